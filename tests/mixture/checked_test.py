"""Cached rows that are not those that were written: files in other places, facts of another cache, damage."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codellm_jax.mixture import checked
from codellm_jax.mixture import rows as rows_module
from codellm_jax.mixture.checked import DamagedRows, Heads, heads_of, recorded_splits
from codellm_jax.mixture.rows import RowsHash, create_store

WIDTH, COUNT = 5, 2 * checked.ROWS_A_FILE + 100
KEY = {"version": 2, "task": "text.a"}
FACTS = {"count": 3, "tokens": 99, "documents": 2, "content_hash": "ab", "notes": ["one"], "heads": ["0f"]}


def write(path: Path, rows: np.ndarray) -> Any:
    store = create_store(str(path), WIDTH, np.dtype(np.uint16)).resize(exclusive_max=list(rows.shape)).result()
    store[:].write(rows.astype(np.uint16)).result()
    return rows_module.open_store(str(path))


def hash_of(blocks: Any) -> str:
    content = RowsHash()
    for block in blocks:
        content.update(block)
    return content.of_all()


@pytest.fixture
def array(tmp_path: Path) -> tuple[Path, np.ndarray]:
    rows = np.random.default_rng(0).integers(0, 60_000, (COUNT, WIDTH))
    write(tmp_path / "rows", rows)
    return tmp_path / "rows", rows


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json")


def test_files_that_change_places_are_noticed_at_their_first_read(array: tuple[Path, np.ndarray]) -> None:
    path, _ = array
    heads = Heads(heads_of(rows_module.open_store(str(path)), COUNT))
    assert len(heads._expected) == 3 and len(set(heads._expected)) == 3
    first, second, _ = files(path)
    shutil.move(first, path / "kept")
    shutil.move(second, first)
    shutil.move(path / "kept", second)
    store = rows_module.open_store(str(path))
    heads.begin(store, COUNT, np.array([COUNT - 1]))()  # of the third file, which is in its place
    with pytest.raises(DamagedRows, match="rows 4096 to 8191 are others than were written"):
        heads.begin(store, COUNT, np.array([5000, COUNT - 1]))()


def test_a_small_array_is_compared_whole(array: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows = array
    store, written = rows_module.open_store(str(path)), hash_of([rows])
    assert checked.require_written(store, COUNT, WIDTH, written, hash_of)
    for count, width in ((COUNT - 1, WIDTH), (COUNT + 1, WIDTH), (COUNT, WIDTH + 1)):
        with pytest.raises(DamagedRows, match="the array has the shape"):
            checked.require_written(store, count, width, written, hash_of)
    changed = rows.copy()
    changed[3000, 2] += 1
    store = write(path, changed)
    with pytest.raises(DamagedRows, match="others than were written"):
        checked.require_written(store, COUNT, WIDTH, written, hash_of)
    monkeypatch.setattr(checked, "BYTES_READ_WHOLE", 1000)
    assert not checked.require_written(store, COUNT, WIDTH, written, hash_of)


@pytest.mark.parametrize("change", [
    b"", b"{", b"null", b"[]", b"[" * 100_000, b"\xff\xfe", {"key": KEY}, {"splits": None}, {"splits": {}}, {"key": {}},
    {"splits": {"validation": FACTS}}, {"splits": {"train": None}}, {"splits": {"train": FACTS, "other": FACTS}},
    {"suffix": "/../../other"}, {"suffix": None}, *({"splits": {"train": FACTS | wrong}} for wrong in (
        {"count": "many"}, {"count": -1}, {"count": True}, {"count": None}, {"notes": "x"}, {"notes": [1]},
        {"heads": {}}, {"content_hash": 7}, {"path": "/etc"}))], ids=str)
def test_facts_that_are_none_are_refused(change: Any) -> None:
    whole = {"key": KEY, "splits": {"train": FACTS}, "suffix": ""}
    content = change if isinstance(change, bytes) else json.dumps(
        change if change == {"key": KEY} else whole | change).encode()
    with pytest.raises(DamagedRows) as raised:
        recorded_splits(content, KEY)
    assert "\n" not in str(raised.value)


def test_facts_of_an_earlier_version_are_taken() -> None:
    facts = {name: value for name, value in FACTS.items() if name != "heads"}
    suffix, splits = recorded_splits(json.dumps({"key": KEY, "splits": {"train": facts}}).encode(), KEY)
    assert suffix == "" and splits["train"]["count"] == 3 and splits["train"]["heads"] == ()


def swapped(cache: Path) -> None:
    """The rows of text in the place of those of code."""
    text, code = (next(path.parent for path in (cache / "rows" / name).rglob("cache.json"))
                  for name in ("text.tiny", "code.tiny"))
    shutil.rmtree(code / "train")
    shutil.copytree(text / "train", code / "train")


def of_code(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda cache: change(next((cache / "rows" / "code.tiny").rglob("cache.json")))


def with_facts(**facts: Any) -> Callable[[Path], Any]:
    def change(file: Path) -> None:
        recorded = json.loads(file.read_text())
        recorded["splits"]["train"] |= facts
        file.write_text(json.dumps(recorded))

    return of_code(change)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [
    swapped, of_code(Path.unlink), of_code(lambda file: file.write_text('{"splits": null}')), with_facts(count="many"),
    with_facts(count=7), of_code(lambda file: shutil.rmtree(file.parent / "train")),
    of_code(lambda file: (file.unlink(), file.mkdir()))],
    ids=["swapped", "no cache.json", "splits: null", "count: many", "count lowered", "no array", "a folder"])
def test_a_damaged_cache_is_set_aside_and_written_anew(
    damage: Callable[[Path], Any], tiny_corpora: Any, tiny_cache: str, tmp_path: Path,
) -> None:
    import tasks
    from codellm_jax.mixture.rows import cached_rows
    from codellm_jax.vocabulary import load_vocabulary

    definitions = tasks.Definitions(modules=("tasks.pretraining",), corpora=tiny_corpora)
    cache, told = tmp_path / "cache", list[str]()
    shutil.copytree(tiny_cache, cache)
    wanted = cached_rows("code.tiny", definitions, load_vocabulary("python_8k"), 32, tiny_cache)
    damage(cache)
    found = cached_rows("code.tiny", definitions, load_vocabulary("python_8k"), 32, str(cache), told.append)
    for split, rows in wanted.items():
        assert found[split] == dataclasses.replace(rows, path=found[split].path)
        every = np.arange(rows.count)
        np.testing.assert_array_equal(found[split].read(every), rows.read(every))
    kept = [path.name for path in (cache / "rows" / "code.tiny").iterdir() if ".set_aside." in path.name]
    assert len(kept) == 1
    assert any("damaged and are written again" in line for line in told) or damage.__closure__ and not [
        path for path in (cache / "rows" / "code.tiny" / kept[0]).glob("cache.json")]
