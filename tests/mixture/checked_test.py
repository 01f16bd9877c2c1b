"""Cached rows that are not those that were written: files in other places, facts of another cache, damage."""

import dataclasses
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codellm_jax.mixture import checked
from codellm_jax.mixture import rows as rows_module
from codellm_jax.mixture.checked import DamagedRows, recorded_splits, row_digests
from codellm_jax.mixture.rows import Rows, RowsHash
from codellm_jax.mixture.stores import ROWS_A_SHARD, create_digests, create_store, open_store

WIDTH, COUNT, SALT = 5, 2 * ROWS_A_SHARD + 100, "0a1b train "
KEY = {"version": 2, "task": "text.a"}
FACTS = {"count": 3, "tokens": 99, "documents": 2, "content_hash": "ab", "notes": ["one"], "digests": "ab train "}


def write(path: Path, rows: np.ndarray) -> Any:
    store = create_store(str(path), WIDTH, np.dtype(np.uint16)).resize(exclusive_max=list(rows.shape)).result()
    store[:].write(rows.astype(np.uint16)).result()
    return open_store(str(path))


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


def opened(path: Path, salt: str = SALT) -> Rows:
    """The rows of an array, as a process that has not read it yet."""
    for name in (str(path), f"{path}.digests"):
        rows_module._stores.pop(name, None)
    return Rows("text.a", "train", str(path), COUNT, WIDTH - 1, COUNT * WIDTH, 1, "", digests=salt)


@pytest.fixture
def with_digests(array: tuple[Path, np.ndarray]) -> tuple[Path, np.ndarray]:
    path, rows = array
    create_digests(str(path), COUNT).write(row_digests(SALT, range(COUNT), rows.astype(np.uint16))).result()
    return array


def test_a_digest_is_the_checksum_of_the_salt_the_number_and_the_row() -> None:
    rows = np.array([[1, 2], [3, 4]], np.uint16)
    assert row_digests("a", [7, 8], rows).tolist() == [
        zlib.crc32(b"a7 \1\0\2\0"), zlib.crc32(b"a8 \3\0\4\0")]
    assert row_digests("a", [7, 8], rows.astype(">u2")).tolist() == row_digests("a", [7, 8], rows).tolist()


@pytest.mark.parametrize("place", [0, 3000, 4095, 4096, 8191, COUNT - 1])
def test_an_edit_of_any_row_is_noticed_when_that_row_is_read(
    with_digests: tuple[Path, np.ndarray], place: int,
) -> None:
    """Written by TensorStore itself, so that its checksums agree."""
    path, rows = with_digests
    open_store(str(path), write=True)[place, 3].write(np.uint16(rows[place, 3] ^ 1)).result()
    others, found = np.setdiff1d(np.arange(COUNT), [place]), opened(path)
    np.testing.assert_array_equal(found.read(others), rows[others])
    for numbers in ([place], [COUNT // 2, place, 5]):
        with pytest.raises(ValueError, match=f"damaged .row {place} is another than was written.: delete"):
            found.read(np.array(numbers))


def test_rows_and_files_that_change_places_are_noticed(with_digests: tuple[Path, np.ndarray]) -> None:
    path, rows = with_digests
    first, second, _ = files(path)
    shutil.move(first, path / "kept")
    shutil.move(second, first)
    shutil.move(path / "kept", second)
    np.testing.assert_array_equal(opened(path).read(np.array([COUNT - 1])), rows[-1:])
    with pytest.raises(ValueError, match="row 5000 is another than was written"):
        opened(path).read(np.array([5000, COUNT - 1]))


def test_rows_of_another_array_with_its_digests_are_noticed(with_digests: tuple[Path, np.ndarray]) -> None:
    path, _ = with_digests
    with pytest.raises(ValueError, match="row 17 is another than was written"):
        opened(path, "other train ").read(np.array([17]))
    shutil.rmtree(f"{path}.digests")
    with pytest.raises(ValueError, match="are damaged"):
        opened(path).read(np.array([17]))


def test_a_small_array_is_compared_whole(array: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows = array
    store, written = open_store(str(path)), hash_of([rows])
    assert checked.require_written(store, COUNT, WIDTH, written, hash_of)
    for count, width in ((COUNT - 1, WIDTH), (COUNT + 1, WIDTH), (COUNT, WIDTH + 1)):
        with pytest.raises(DamagedRows, match="the array has the shape"):
            checked.require_written(store, count, width, written, hash_of)
    changed = rows.copy()
    changed[3000, 2] += 1
    store = write(path, changed)
    with pytest.raises(DamagedRows, match="differ from those written"):
        checked.require_written(store, COUNT, WIDTH, written, hash_of)
    monkeypatch.setattr(checked, "BYTES_READ_WHOLE", 1000)
    assert not checked.require_written(store, COUNT, WIDTH, written, hash_of)


@pytest.mark.parametrize("change", [
    b"", b"{", b"null", b"[]", b"[" * 100_000, b"\xff\xfe", {"key": KEY}, {"splits": None}, {"splits": {}}, {"key": {}},
    {"splits": {"validation": FACTS}}, {"splits": {"train": None}}, {"splits": {"train": FACTS, "other": FACTS}},
    {"suffix": "/../../other"}, {"suffix": None}, *({"splits": {"train": FACTS | wrong}} for wrong in (
        {"count": "many"}, {"count": -1}, {"count": True}, {"count": None}, {"notes": "x"}, {"notes": [1]},
        {"digests": 1}, {"content_hash": 7}, {"path": "/etc"}))], ids=str)
def test_facts_that_are_none_are_refused(change: Any) -> None:
    whole = {"key": KEY, "splits": {"train": FACTS}, "suffix": ""}
    content = change if isinstance(change, bytes) else json.dumps(
        change if change == {"key": KEY} else whole | change).encode()
    with pytest.raises(DamagedRows) as raised:
        recorded_splits(content, KEY)
    assert "\n" not in str(raised.value)


def test_facts_of_an_earlier_version_are_taken() -> None:
    facts = {name: value for name, value in FACTS.items() if name != "digests"} | {"heads": ["0f"]}
    suffix, splits = recorded_splits(json.dumps({"key": KEY, "splits": {"train": facts}}).encode(), KEY)
    assert suffix == "" and splits["train"]["count"] == 3 and splits["train"]["digests"] == ""


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


def test_a_large_cache_of_an_earlier_version_opens_and_says_what_it_lacks(
    tiny_corpora: Any, tiny_cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tasks
    from codellm_jax.mixture.rows import cached_rows
    from codellm_jax.vocabulary import load_vocabulary

    monkeypatch.setattr(checked, "BYTES_READ_WHOLE", 0)
    definitions = tasks.Definitions(modules=("tasks.pretraining",), corpora=tiny_corpora)
    arguments = ("code.tiny", definitions, load_vocabulary("python_8k"), 32)
    whole, told = cached_rows(*arguments, tiny_cache, told_nothing), list[str]()
    cache = tmp_path / "cache"
    shutil.copytree(tiny_cache, cache)
    for path in (cache / "rows" / "code.tiny").rglob("*.digests"):
        shutil.rmtree(path)
    for file in (cache / "rows" / "code.tiny").rglob("cache.json"):  # of other lengths too, if other tests came before
        recorded = json.loads(file.read_text())
        for facts in recorded["splits"].values():
            del facts["digests"]
        file.write_text(json.dumps(recorded))
    for _ in range(2):  # said once
        found = cached_rows(*arguments, str(cache), told.append)
    assert len(told) == 1 and "no digests" in told[0] and str(Path(found["train"].path).parent) in told[0]
    every = np.arange(whole["train"].count)
    np.testing.assert_array_equal(found["train"].read(every), whole["train"].read(every))


def told_nothing(line: str) -> None:
    raise AssertionError(line)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [
    swapped, of_code(Path.unlink), of_code(lambda file: file.write_text('{"splits": null}')), with_facts(count="many"),
    with_facts(count=7), of_code(lambda file: shutil.rmtree(file.parent / "train")),
    of_code(lambda file: (file.unlink(), file.mkdir())),
    of_code(lambda file: next(file.parent.glob("*.digests/c/0")).write_bytes(b"x"))],
    ids=["swapped", "no cache.json", "splits: null", "count: many", "count lowered", "no array", "a folder",
         "damaged digests"])
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
