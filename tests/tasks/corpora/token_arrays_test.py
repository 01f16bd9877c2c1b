"""Tokens already made: the rows that they give are those of the text that they were made of."""

import json
import pathlib
import random
import struct
from typing import Any

import numpy as np
import pytest

import tasks
from codellm_jax.mixture import shards
from codellm_jax.mixture.places import cache_place
from codellm_jax.mixture.rows import cached_rows
from codellm_jax.vocabulary import Vocabulary, load_vocabulary
from tasks.corpora import sources, specs, token_arrays

NAME, LENGTH = "text.mine", 16
WORDS = "the a row of tokens is read by its number héllo 世界 order\n position  share".split(" ")


def _texts(count: int = 400) -> list[str]:
    dice = random.Random(5)
    return [" ".join(dice.choice(WORDS) for _ in range(dice.randrange(1, 40))) + f" {number}"
            for number in range(count)]


def _megatron(file: pathlib.Path, documents: list[list[list[int]]], code: int = 8) -> str:
    """Writes documents of sequences as Megatron's IndexedDatasetBuilder does."""
    dtype = {8: "<u2", 4: "<i4"}[code]
    sequences = [sequence for document in documents for sequence in document]
    sizes = [len(sequence) for sequence in sequences]
    width = np.dtype(dtype).itemsize
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]) * width
    bounds = np.cumsum([0, *map(len, documents)])
    file.write_bytes(b"".join(np.array(sequence, dtype).tobytes() for sequence in sequences))
    file.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds)) +
        np.array(sizes, "<i4").tobytes() + offsets.astype("<i8").tobytes() + bounds.astype("<i8").tobytes())
    return str(file)


def _flat(file: pathlib.Path, documents: list[list[int]], end: int, dtype: str = "<u2") -> str:
    file.write_bytes(np.array([token for document in documents for token in (*document, end)], dtype).tobytes())
    return str(file)


def _rows(spec: dict[str, Any], vocabulary: Vocabulary, cache: pathlib.Path) -> dict[str, Any]:
    definitions = tasks.Definitions(corpora={NAME: spec})
    found = cached_rows(NAME, definitions, vocabulary, LENGTH, str(cache), report=lambda line: None)
    return {split: (rows.count, rows.tokens, rows.documents, rows.content_hash) for split, rows in found.items()}


@pytest.fixture(scope="module")
def ours() -> Vocabulary:
    return load_vocabulary("python_8k")


@pytest.mark.parametrize("kind", ["megatron", "megatron, ended, of sentences", "tokens", "tokens, uint32", "npy"])
@pytest.mark.parametrize("options", [{}, {"holdout": 0}, {"sample": 0.5, "holdout": 0.1}])
def test_rows_are_those_of_the_text(
    tmp_path: pathlib.Path, ours: Vocabulary, kind: str, options: dict[str, Any]
) -> None:
    texts = _texts()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents, spec = [ours.encode(text) for text in texts], {"vocabulary": "python_8k", **options}
    if kind == "megatron":
        spec["megatron"] = _megatron(tmp_path / "a_text_document.bin", [[document] for document in documents])
    elif kind.startswith("megatron"):
        spec["megatron"] = _megatron(tmp_path / "a.bin", [
            [document[:5], document[5:], [ours.end_of_document_id]] for document in documents], code=4)
    elif kind == "npy":
        flat = [token for document in documents for token in (*document, ours.end_of_document_id)]
        np.save(tmp_path / "a.npy", np.array(flat, np.uint16))
        spec["tokens"] = str(tmp_path / "a.npy")
    else:
        dtype = "uint32" if kind.endswith("32") else "uint16"
        spec |= {"tokens": _flat(tmp_path / "a.bin", documents, ours.end_of_document_id, dtype), "dtype": dtype}
    of_text = _rows({"json_lines": str(tmp_path / "a.jsonl"), **options}, ours, tmp_path / "cache")
    assert _rows(spec, ours, tmp_path / "cache") == of_text
    assert of_text["train"][2] > 100


@pytest.mark.parametrize("name", ["llama", "beginning"])
def test_vocabularies_of_others(
    tmp_path: pathlib.Path, name: str, other_vocabularies: dict[str, str], beginning_tokenizer: str
) -> None:
    """One puts a blank before each text; with the other each document begins with a token, in the files or not."""
    path = other_vocabularies["llama"] if name == "llama" else beginning_tokenizer
    vocabulary, texts = load_vocabulary(path), _texts()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected = _rows({"json_lines": str(tmp_path / "a.jsonl")}, vocabulary, tmp_path / "cache")
    for begin in {(), vocabulary.begin_ids}:
        file = _flat(tmp_path / f"{len(begin)}.bin", [[*begin, *vocabulary.encode(text)] for text in texts],
                     vocabulary.end_of_document_id)
        assert _rows({"tokens": file, "vocabulary": path}, vocabulary, tmp_path / "cache") == expected


def test_another_end(tmp_path: pathlib.Path, ours: Vocabulary) -> None:
    texts = _texts(100)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    file = _flat(tmp_path / "a.bin", [ours.encode(text) for text in texts], 60_000)
    assert _rows({"tokens": file, "vocabulary": "python_8k", "end": 60_000}, ours, tmp_path) == _rows(
        {"json_lines": str(tmp_path / "a.jsonl")}, ours, tmp_path)


def test_another_vocabulary_than_the_runs_is_refused(
    tmp_path: pathlib.Path, ours: Vocabulary, other_vocabularies: dict[str, str]
) -> None:
    other = load_vocabulary(other_vocabularies["llama"])
    documents = [other.encode(text) for text in _texts(50)]
    file = _flat(tmp_path / "a.bin", documents, other.end_of_document_id)
    with pytest.raises(ValueError, match="text.mine: its tokens were made with .*llama.model.* set VOCABULARY to"):
        _rows({"tokens": file, "vocabulary": other.path}, ours, tmp_path / "cache")
    # Stated as what they are not: their ids are there, but stand for other texts.
    with pytest.raises(ValueError, match="text.mine: .*a.bin: none of its first 8 documents has the tokens that"):
        _rows({"tokens": file, "vocabulary": "python_8k", "end": other.end_of_document_id}, ours, tmp_path / "cache")


def _known(ours: Vocabulary) -> token_arrays.Known:
    table = ours.bytes_of_ids()
    return token_arrays.Known("python_8k", ours.pieces, ours.end_of_document_id, (),
                              lambda ids: b"".join(table[each] for each in ids), ours.encode)


def _read(spec: dict[str, Any], ours: Vocabulary) -> list[str]:
    found = token_arrays.documents({"vocabulary": "python_8k", "holdout": 0, **spec}, "train", NAME, _known(ours))
    return [document.text for document in found]


def test_what_is_wrong_with_flat_arrays(
    tmp_path: pathlib.Path, ours: Vocabulary, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = _texts(60)
    documents, file = [ours.encode(text) for text in texts], tmp_path / "a.bin"
    _flat(file, documents, ours.end_of_document_id, "<u4")
    with pytest.raises(ValueError, match="every second number of .*a.bin is 0, .* give 'dtype': 'uint32'"):
        _read({"tokens": str(file)}, ours)
    _flat(file, documents, ours.end_of_document_id)
    with pytest.raises(ValueError, match=r"a.bin, token \d+ holds the id \d+, but python_8k has the ids 0 to \d+: .* "
                                          "'dtype'"):
        _read({"tokens": str(file), "dtype": "uint32"}, ours)
    file.write_bytes(file.read_bytes() + b"\0")
    assert _read({"tokens": str(file)}, ours) == texts
    assert "1 broken rest of a.bin" in caplog.text
    monkeypatch.setattr(token_arrays, "ENDLESS", 100)
    with pytest.raises(ValueError, match="hold no id 8888, which should end documents: give the right id"):
        _read({"tokens": str(file), "end": 8888}, ours)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="no document is left .*1 empty file"):
        _read({"tokens": str(file)}, ours)


def test_documents_with_other_tokens_are_told_and_taken(
    tmp_path: pathlib.Path, ours: Vocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    """As some tokenizers leave out merges at random."""
    texts = _texts(20)
    documents = [ours.encode(text) for text in texts]
    documents[2] = [token for letter in texts[2] for token in ours.encode(letter)]
    file = _flat(tmp_path / "a.bin", documents, ours.end_of_document_id)
    assert _read({"tokens": file}, ours) == texts
    assert ("among the first documents of each file, 1 have tokens other than those that python_8k gives their text"
            in caplog.text)


def test_by_shards_the_cache_is_the_same(tmp_path: pathlib.Path, ours: Vocabulary, monkeypatch: Any) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    texts = _texts()
    documents = [[ours.encode(text)] for text in texts]
    documents[101] = [[token for letter in texts[101] for token in ours.encode(letter)]]  # the second of its file
    for number in range(4):
        _megatron(tmp_path / f"{number}.bin", documents[number * 100 : (number + 1) * 100])
    spec = {"megatron": str(tmp_path / "*.bin"), "vocabulary": "python_8k", "sample": 0.9}
    definitions = tasks.Definitions(corpora={NAME: spec})
    alone = cached_rows(NAME, definitions, ours, LENGTH, str(tmp_path / "alone"), report=lambda line: None)
    place = cache_place(NAME, definitions, ours, LENGTH, str(tmp_path / "parts"), "pretraining")
    build = shards.Build(NAME, definitions, ours, LENGTH, "pretraining", place)
    planned = shards.plan(build)
    assert len(planned) == 4 * 3
    for shard in reversed(planned):
        shards.tokenize(build, shard)
    pieces = shards.pieces(build, planned)
    for piece in pieces:
        shards.cut(build, piece)
    shards.finish(build, planned, pieces)
    parts = cached_rows(NAME, definitions, ours, LENGTH, str(tmp_path / "parts"), report=lambda line: None)
    for split, rows in alone.items():
        assert rows.content_hash == parts[split].content_hash and rows.notes == parts[split].notes
    assert any("1 have tokens other" in note for note in alone["train"].notes)


def test_documents_across_blocks(tmp_path: pathlib.Path, ours: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _texts(60)
    file = _flat(tmp_path / "a.bin", [ours.encode(text) for text in texts], ours.end_of_document_id)
    for size in (2, 7, 64):
        monkeypatch.setattr(token_arrays, "BYTES_AT_ONCE", size)
        assert _read({"tokens": file}, ours) == texts
    monkeypatch.setattr(token_arrays, "LONGEST", 20)
    assert _read({"tokens": file}, ours) == [text for text in texts if len(ours.encode(text)) <= 20]


def test_what_is_wrong_with_megatrons_files(
    tmp_path: pathlib.Path, ours: Vocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    texts = _texts(60)
    file = pathlib.Path(_megatron(tmp_path / "a.bin", [[ours.encode(text)] for text in texts]))
    index, whole = file.with_suffix(".idx"), file.read_bytes()
    assert _read({"megatron": str(file)}, ours) == texts
    file.write_bytes(whole[: len(whole) // 2])
    found = _read({"megatron": str(file)}, ours)
    assert 20 < len(found) < 40 and found == texts[: len(found)]
    assert f"{60 - len(found)} beyond the end of the .bin file" in caplog.text
    file.write_bytes(whole)
    facts = index.read_bytes()
    for content, message in (
        (facts[:-8], "a.idx is truncated: it has"), (b"TNTIDX\0\0" + facts, "a.idx is not a Megatron index"),
        (facts[:9] + b"\x02" + facts[10:], "a.idx has version 2"), (b"", "a.idx is not a Megatron index"),
        (facts[:-8] + b"\xff" * 8, "a.idx is damaged: documents from sequence"),
    ):
        index.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            _read({"megatron": str(file)}, ours)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="a.bin has no .*a.idx beside it"):
        _read({"megatron": str(file)}, ours)
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(ValueError, match="b.txt is not a .bin file"):
        _read({"megatron": str(tmp_path / "b.txt")}, ours)


def test_specs_of_tokens(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="'tokens' needs 'vocabulary'"):
        specs.validate({"tokens": "*"}, NAME)
    with pytest.raises(ValueError, match="'dtype' must be 'uint16' or 'uint32'"):
        specs.validate({"tokens": "*", "vocabulary": "python_8k", "dtype": "int8"}, NAME)
    spec = {"tokens": _flat(tmp_path / "a.bin", [[1, 2, 3]], 0), "vocabulary": "python_8k"}
    before = sources.describe(spec)
    _flat(tmp_path / "a.bin", [[1, 2, 4]], 0)  # of the same size
    assert before != sources.describe(spec)
    assert specs.is_divisible(spec, "train")
