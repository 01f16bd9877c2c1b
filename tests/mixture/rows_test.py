"""The cache of rows against documents that are tokenized, joined and cut in plain Python."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tasks
from codellm_jax.mixture import half_made, stores
from codellm_jax.mixture import rows as rows_module
from codellm_jax.mixture.rows import Rows, cached_rows
from codellm_jax.vocabulary import Vocabulary, load_vocabulary, train_vocabulary

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 32


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary("python_8k")


@pytest.fixture(scope="module")
def definitions(tiny_corpora) -> tasks.Definitions:
    return tasks.Definitions(modules=("tasks.pretraining",), corpora=tiny_corpora)


def silent(line: str) -> None:
    del line


def corpus(folder: Path, documents: list[str], name: str = "text.other", **options) -> tasks.Definitions:
    folder.mkdir(exist_ok=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    spec = {"json_lines": str(folder / "corpus.jsonl"), "holdout": 0} | options
    return tasks.Definitions(modules=("tasks.pretraining",), corpora={name: spec})


def joined(vocabulary: Vocabulary, documents: list[str]) -> list[int]:
    tokens = []
    for document in documents:
        tokens += [*vocabulary.encode(document), vocabulary.end_of_document_id]
    return tokens


def cut(tokens: list[int], length: int) -> list[list[int]]:
    width = length + 1
    return [tokens[start : start + width] for start in range(0, len(tokens) - width + 1, width)]


def forbid_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the rows are cached already")

    monkeypatch.setattr(rows_module, "_write_cache", fail)


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["text.tiny", "code.tiny"])
def test_rows_are_the_documents_joined_and_cut(
    name, vocabulary, definitions, tiny_cache, tiny_documents, monkeypatch
):
    forbid_writing(monkeypatch)
    splits = cached_rows(name, definitions, vocabulary, LENGTH, tiny_cache)
    assert set(splits) == {"train", "validation"}
    for split, found in splits.items():
        tokens = joined(vocabulary, tiny_documents[name, split])
        expected = cut(tokens, LENGTH)
        assert (found.name, found.split, found.length) == (name, split, LENGTH)
        assert found.count == len(expected) > 3
        assert found.tokens == len(tokens)
        assert found.documents == len(tiny_documents[name, split])
        assert found.tokens - found.count * (LENGTH + 1) == len(tokens) - len(expected) * (LENGTH + 1) > 0
        read = found.read(np.arange(found.count))
        assert read.dtype == np.int32
        assert read.tolist() == expected
    assert splits["train"].content_hash != splits["validation"].content_hash


def test_any_order_and_repeats(vocabulary, definitions, tiny_cache, tiny_documents):
    found = cached_rows("text.tiny", definitions, vocabulary, LENGTH, tiny_cache)["train"]
    expected = np.array(cut(joined(vocabulary, tiny_documents["text.tiny", "train"]), LENGTH))
    numbers = np.random.default_rng(0).integers(0, found.count, 200)
    np.testing.assert_array_equal(found.read(numbers), expected[numbers])
    np.testing.assert_array_equal(found.read(np.array([7, 3, 7])), expected[[7, 3, 7]])
    assert found.read(np.array([], np.int64)).shape == (0, LENGTH + 1)
    with pytest.raises(ValueError):
        found.read(np.array([found.count]))


def test_many_shards(tmp_path, vocabulary, tiny_documents, monkeypatch):
    for module in (rows_module, stores):
        monkeypatch.setattr(module, "ROWS_A_SHARD", 32)
    documents = tiny_documents["text.tiny", "train"] * 3
    found = cached_rows("text.other", corpus(tmp_path / "c", documents), vocabulary, 16, str(tmp_path), silent)["train"]
    expected = cut(joined(vocabulary, documents), 16)
    assert found.count == len(expected) > 5 * 32
    assert found.read(np.arange(found.count)).tolist() == expected
    for module in (rows_module, stores):
        monkeypatch.setattr(module, "ROWS_A_SHARD", 4096)
    again = cached_rows("text.other", corpus(tmp_path / "c", documents), vocabulary, 16, str(tmp_path / "b"), silent)
    assert again["train"].content_hash == found.content_hash  # of the rows, not of how they were written


def test_the_hash_is_of_the_rows_whatever_their_blocks(monkeypatch):
    import hashlib

    dice = np.random.default_rng(3)
    rows = dice.integers(0, 9000, (10_000, 5))
    edges = [0, *sorted(dice.integers(0, 10_000, 30).tolist()), 4096, 8192, 10_000]
    content = rows.astype("<u4")
    parts = [content[:4096], content[4096:8192], content[8192:]]
    in_parts = hashlib.sha256(b"".join(hashlib.sha256(part.tobytes()).digest() for part in parts)).hexdigest()
    for most, expected in ((10_000, hashlib.sha256(content.tobytes()).hexdigest()), (9999, in_parts), (5, in_parts)):
        monkeypatch.setattr(rows_module, "ROWS_HASHED_WHOLE", most)
        found = rows_module.RowsHash()
        for first, last in zip(sorted(edges), sorted(edges)[1:], strict=False):
            found.update(rows[first:last].astype(np.uint16))
        assert found.of_all() == expected
    assert rows_module.hash_of_digests(map(rows_module.digest, parts)) == in_parts


def test_the_second_opening_imports_neither_seqio_nor_tensorflow(tiny_corpora, tiny_cache):
    program = f"""
import sys
import numpy as np
import tasks
from codellm_jax.mixture.mixture import Mixture, open_mixture
from codellm_jax.vocabulary import load_vocabulary
definitions = tasks.Definitions(modules=("tasks.pretraining",), corpora={tiny_corpora!r})
mixture = Mixture(["text.tiny", "code.tiny"], definitions, {{"targets": {LENGTH}}}, 0.5, cache_dir={tiny_cache!r})
opened = open_mixture(mixture, load_vocabulary("python_8k"), 0, 100)
assert opened.training[0].read(np.arange(3)).shape == (3, {LENGTH + 1})
print(sorted({{"seqio", "tensorflow", "jax"}} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr


def test_each_vocabulary_length_and_content_has_a_cache_of_its_own(
    tmp_path, vocabulary, definitions, tiny_documents, tiny_cache
):
    documents = tiny_documents["text.tiny", "train"]
    first = corpus(tmp_path / "c", documents)
    other_vocabulary = train_vocabulary(documents * 30, 500, str(tmp_path / "other.model"))
    other_end = dataclasses.replace(vocabulary, end_of_document_id=5)
    opened = [
        cached_rows("text.other", first, vocabulary, LENGTH, str(tmp_path), silent),
        cached_rows("text.other", first, vocabulary, LENGTH + 1, str(tmp_path), silent),
        cached_rows("text.other", first, other_vocabulary, LENGTH, str(tmp_path), silent),
        cached_rows("text.other", first, other_end, LENGTH, str(tmp_path), silent),
        cached_rows("text.other", corpus(tmp_path / "c", documents[:-1]), vocabulary, LENGTH, str(tmp_path), silent),
    ]
    assert len({splits["train"].path for splits in opened}) == len(opened)
    assert len({splits["train"].content_hash for splits in opened}) == len(opened)
    for splits, words, length, texts in zip(
            opened, [vocabulary, vocabulary, other_vocabulary, other_end, vocabulary],
            [LENGTH, LENGTH + 1, LENGTH, LENGTH, LENGTH], [documents] * 4 + [documents[:-1]], strict=True):
        found = splits["train"]
        assert found.read(np.arange(found.count)).tolist() == cut(joined(words, texts), length)


def test_the_same_file_elsewhere_is_the_same_vocabulary(tmp_path, vocabulary, definitions, tiny_cache, monkeypatch):
    copy = tmp_path / "copied.model"
    copy.write_bytes(Path(vocabulary.path).read_bytes())
    forbid_writing(monkeypatch)
    moved = cached_rows("text.tiny", definitions, load_vocabulary(str(copy)), LENGTH, tiny_cache)
    assert moved == cached_rows("text.tiny", definitions, vocabulary, LENGTH, tiny_cache)


def test_a_corpus_smaller_than_a_row(tmp_path, vocabulary):
    small = corpus(tmp_path / "c", ["Only a few words."])
    tokens = len(vocabulary.encode("Only a few words.")) + 1
    with pytest.raises(ValueError, match=f"text.other: its training split has {tokens} tokens, fewer than the 33") as e:
        cached_rows("text.other", small, vocabulary, LENGTH, str(tmp_path / "cache"), silent)
    assert "\n" not in str(e.value)
    assert files_below(tmp_path / "cache") == []
    fits = cached_rows("text.other", small, vocabulary, tokens - 1, str(tmp_path / "cache"), silent)["train"]
    assert (fits.count, fits.tokens) == (1, fits.length + 1)


def test_an_unknown_task_names_the_nearest(tmp_path, vocabulary, definitions):
    with pytest.raises(ValueError, match=r"No SeqIO task or mixture is named 'text.tny'; nearest: text.tiny") as raised:
        cached_rows("text.tny", definitions, vocabulary, LENGTH, str(tmp_path), silent)
    assert "\n" not in str(raised.value)


def test_a_crash_while_writing_leaves_no_half_cache(tmp_path, vocabulary, tiny_documents, monkeypatch):
    monkeypatch.setattr(rows_module, "ROWS_A_SHARD", 16)
    defined = corpus(tmp_path / "c", tiny_documents["text.tiny", "train"])
    real, cache = rows_module._write_split, tmp_path / "cache"

    def dies(task, split, documents, *rest):
        def some():
            for number, document in enumerate(documents):
                if number == 15:
                    raise OSError("No space left on device")
                yield document

        return real(task, split, some(), *rest)

    monkeypatch.setattr(rows_module, "_write_split", dies)
    with pytest.raises(OSError, match="No space left on device"):
        cached_rows("text.other", defined, vocabulary, LENGTH, str(cache), silent)
    assert files_below(cache) == []
    monkeypatch.setattr(rows_module, "_write_split", real)
    found = cached_rows("text.other", defined, vocabulary, LENGTH, str(cache), silent)["train"]
    assert found.read(np.arange(found.count)).tolist() == cut(
        joined(vocabulary, tiny_documents["text.tiny", "train"]), LENGTH)


def test_what_a_killed_builder_left_is_no_cache(tmp_path, vocabulary, tiny_documents, monkeypatch):
    """SIGKILL: nothing is cleaned up, not even in the folder that was being written."""
    defined = corpus(tmp_path / "c", tiny_documents["text.tiny", "train"])
    with monkeypatch.context() as patch:
        patch.setattr(half_made, "_remove", lambda folder: None)
        patch.setattr(rows_module.os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cached_rows("text.other", defined, vocabulary, LENGTH, str(tmp_path), silent)
    assert len([name for name in files_below(tmp_path) if name.endswith("cache.json")]) == 1
    [left] = (tmp_path / "rows" / "text.other").iterdir()
    found = cached_rows("text.other", defined, vocabulary, LENGTH, str(tmp_path), silent)["train"]
    assert found.read(np.arange(found.count)).tolist() == cut(
        joined(vocabulary, tiny_documents["text.tiny", "train"]), LENGTH)
    assert not left.exists()


@pytest.mark.parametrize("name, told", [("t5", True), ("llama", False)])
def test_text_that_does_not_come_back_is_noted_with_the_rows(
    tmp_path, tiny_documents, tiny_instructions, other_vocabularies, name, told
):
    own = load_vocabulary(other_vocabularies[name])
    documents = tiny_documents["code.tiny", "train"]
    defined = corpus(tmp_path / "c", documents, "code.other")
    for _ in range(2):  # the second time from the cache
        notes = cached_rows("code.other", defined, own, LENGTH, str(tmp_path), silent)["train"].notes
        assert len(notes) == told
        for note in notes:
            assert note.startswith(f"WARNING: code.other, train: {len(documents)} of {len(documents)} documents ")
            assert r":\n" in note
    asked = tasks.Definitions(("tasks.pretraining", "tasks.tuning"), tiny_instructions)
    notes = cached_rows("code.asked", asked, own, 64, str(tmp_path), silent, "tuning")["train"].notes
    assert [" examples checked are changed by encoding" in note for note in notes] == [True] * told


def test_tasks_of_other_making_are_looked_at_too(tmp_path, other_vocabularies):
    own = load_vocabulary(other_vocabularies["t5"])
    [note] = cached_rows("text.python_rows", tasks.Definitions(), own, LENGTH, str(tmp_path), silent)["train"].notes
    assert note.startswith("WARNING: text.python_rows, train: 64 of 64 documents checked are changed by encoding")


def in_validation(holdout: float) -> str:
    return next(text for number in range(999) if int(hashlib.sha256(
        (text := f"a document {number}").encode()).hexdigest()[:8], 16) < holdout * 2**32)


def test_where_all_is_held_out_it_is_said_so(tmp_path, vocabulary):
    """More copies of one text than are looked at to see that it is one."""
    defined = corpus(tmp_path / "c", [in_validation(0.4)] * 600, holdout=0.4)
    with pytest.raises(ValueError, match=r"text.other: all of its documents are held out \(600 in validation\), and "
                                         r"none is left to train on; in its CORPORA line set 'holdout': 0"):
        cached_rows("text.other", defined, vocabulary, LENGTH, str(tmp_path), silent)


def test_one_document_is_trained_on_whatever_its_hash(tmp_path, vocabulary):
    defined = corpus(tmp_path / "c", [in_validation(0.01)], holdout=0.01)
    found = cached_rows("text.other", defined, vocabulary, 2, str(tmp_path), silent)
    assert {split: rows.documents for split, rows in found.items()} == {"train": 1, "validation": 0, "test": 0}
    with pytest.raises(ValueError, match="fewer than the 99 of one row.* Held out are 1 in validation, 1 in test, "):
        cached_rows("text.other", corpus(tmp_path / "d", ["a", "b", "c"], holdout=0.01), vocabulary, 98, str(tmp_path),
                    silent)


def test_builders_at_the_same_time_both_succeed(tmp_path, vocabulary, tiny_documents, monkeypatch):
    defined = corpus(tmp_path / "c", tiny_documents["code.tiny", "train"], "code.other")
    real, others = rows_module._write_split, []

    def overtaken(*arguments):
        facts = real(*arguments)
        if not others:  # another process begins after us and is done before us; it may even have our number
            others.append(None)
            others[0] = cached_rows("code.other", defined, vocabulary, LENGTH, str(tmp_path), silent)
        return facts

    monkeypatch.setattr(rows_module, "_write_split", overtaken)
    found = cached_rows("code.other", defined, vocabulary, LENGTH, str(tmp_path), silent)
    assert found == others[0]
    assert found["train"].read(np.arange(found["train"].count)).tolist() == cut(
        joined(vocabulary, tiny_documents["code.tiny", "train"]), LENGTH)
    assert [path.name for path in (tmp_path / "rows" / "code.other").iterdir()] == [
        Path(found["train"].path).parent.name]


def test_every_flipped_byte_is_noticed(tmp_path, vocabulary, tiny_documents):
    defined = corpus(tmp_path / "c", tiny_documents["text.tiny", "train"])
    found = cached_rows("text.other", defined, vocabulary, LENGTH, str(tmp_path), silent)["train"]
    expected = cut(joined(vocabulary, tiny_documents["text.tiny", "train"]), LENGTH)
    shards = [path for path in Path(found.path).rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert len(shards) == 1
    whole = shards[0].read_bytes()
    dice = np.random.default_rng(1)
    noticed = 0
    for offset in [0, len(whole) - 1, *dice.integers(0, len(whole), 40).tolist()]:
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << int(dice.integers(8))
        shards[0].write_bytes(bytes(damaged))
        rows_module._stores.pop(found.path, None)  # as a process that has not read it yet
        try:
            # Padding between chunks may be damaged unseen, tokens not.
            assert found.read(np.arange(found.count)).tolist() == expected
        except ValueError:
            noticed += 1
    rows_module._stores.pop(found.path, None)
    assert noticed >= 40


def test_a_shard_that_is_gone_is_noticed(tmp_path, vocabulary, tiny_documents):
    defined = corpus(tmp_path / "c", tiny_documents["text.tiny", "train"])
    found = cached_rows("text.other", defined, vocabulary, LENGTH, str(tmp_path), silent)["train"]
    shard, = [path for path in Path(found.path).rglob("*") if path.is_file() and path.name != "zarr.json"]
    shard.unlink()
    with pytest.raises((ValueError, OSError)):
        found.read(np.arange(2))


def test_rows_of_zeros_are_rows(tmp_path):
    store = rows_module.create_store(str(tmp_path / "rows"), LENGTH + 1, np.dtype(np.uint16)).resize(
        exclusive_max=[40, LENGTH + 1]).result()
    store[0:40].write(np.zeros((40, LENGTH + 1), np.uint16)).result()
    found = Rows("text.other", "train", str(tmp_path / "rows"), 40, LENGTH, 40 * (LENGTH + 1), 1, "")
    assert found.read(np.arange(40)).tolist() == np.zeros((40, LENGTH + 1)).tolist()


def test_large_vocabularies_are_stored_in_32_bits(tmp_path, vocabulary, tiny_documents):
    large = dataclasses.replace(vocabulary, size=130_048, end_of_document_id=130_004)
    defined = corpus(tmp_path / "c", tiny_documents["text.tiny", "train"])
    found = cached_rows("text.other", defined, large, LENGTH, str(tmp_path), silent)["train"]
    assert found.read(np.arange(found.count)).tolist() == cut(
        joined(large, tiny_documents["text.tiny", "train"]), LENGTH)
    assert json.loads((Path(found.path) / "zarr.json").read_text())["data_type"] == "uint32"


def test_small_vocabularies_are_stored_in_16_bits(vocabulary, definitions, tiny_cache):
    found = cached_rows("text.tiny", definitions, vocabulary, LENGTH, tiny_cache)["train"]
    assert json.loads((Path(found.path) / "zarr.json").read_text())["data_type"] == "uint16"


def test_reports_tell_what_was_tokenized(tmp_path, vocabulary, tiny_documents):
    lines = []
    documents = tiny_documents["code.tiny", "train"]
    cached_rows("code.other", corpus(tmp_path / "c", documents, "code.other"), vocabulary, LENGTH, str(tmp_path),
                lines.append)
    tokens = joined(vocabulary, documents)
    assert lines == [f"tokenized code.other train: {len(documents)} documents, {len(tokens):,} tokens, "
                     f"{len(cut(tokens, LENGTH))} rows of {LENGTH}; {len(tokens) % (LENGTH + 1)} tokens after the last "
                     "full row are left out"]


def test_rows_say_where_they_are(tiny_cache, vocabulary, definitions):
    found = cached_rows("text.tiny", definitions, vocabulary, LENGTH, tiny_cache)["train"]
    assert isinstance(found, Rows) and found.path.startswith(os.path.join(tiny_cache, "rows", "text.tiny"))


def test_only_an_error_of_the_cache_is_told_as_one(tmp_path):
    directory = tmp_path / "cache" / "rows" / "text.a" / "0123"
    for file in (f"{directory}/x", f"{directory.parent}/.0123.host.1/train", str(tmp_path), None):
        told = rows_module.storage_error(PermissionError(13, "Permission denied", file), directory)
        assert str(told).startswith(f"Rows cannot be cached in {directory.parent}: Permission denied.")
    for error in (PermissionError(13, "Permission denied", "/data/a.jsonl"), FileNotFoundError("text.a: no file")):
        assert rows_module.storage_error(error, directory) is None
