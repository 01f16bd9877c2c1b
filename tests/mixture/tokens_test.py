"""Tokens of tasks against those that SeqIO's own readers and preprocessors give."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import seqio

import tasks
from codellm_jax.mixture.tokens import Note, added, examples, is_divisible, open_task, task_tokens, warnings_of
from codellm_jax.vocabulary import load_vocabulary, train_vocabulary

ODD = ["\x00null", "tab\tand\r\nbreaks\n\n", "  spaces   and\u00a0others\u2003\u3000 ", "\u2581escaped\u2581",
       "世界 héllo 🙂🏽", "e\u0301 \ufb01 ① ½ Å", "</s><pad><|endofdocument|>", "\ufffd\ufeff",
       "a" * 3000, "x = {\n" + " " * 130 + "1}\n"]


def written(folder, records) -> str:
    (folder / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / "corpus.jsonl")


@pytest.mark.parametrize("own_vocabulary", [False, True])
def test_texts_are_encoded_as_seqio_encodes_them(tmp_path, tiny_documents, own_vocabulary):
    texts = [*ODD, *(text for documents in tiny_documents.values() for text in documents)]
    vocabulary = load_vocabulary()
    if own_vocabulary:
        files = sorted((Path(__file__).resolve().parents[2] / "codellm_jax").glob("*.py"))
        vocabulary = train_vocabulary([file.read_text() for file in files], 700, str(tmp_path / "own.model"))
    defined = tasks.Definitions(corpora={
        "text.odd": {"json_lines": written(tmp_path, [{"text": text} for text in texts]), "holdout": 0}})
    task = open_task("text.odd", defined, "pretraining")
    by_seqio = list(task_tokens(task, "train", seqio.SentencePieceVocabulary(vocabulary.path, extra_ids=0)))
    found = list(examples(task, "train", dataclasses.replace(vocabulary, end_of_document_id=499), threads=2))
    assert len(found) == len(by_seqio) == len(texts)
    for example, expected, text in zip(found, by_seqio, texts, strict=True):
        assert example.targets.tolist() == [*expected["targets"][:-1].tolist(), 499]
        assert example.text_bytes == len(text.encode()) and not len(example.inputs)


def test_instructions_are_encoded_as_seqio_encodes_them(tmp_path):
    pairs = list(zip(ODD, ODD[::-1], strict=True))
    defined = tasks.Definitions(corpora={"text.odd_pairs": {
        "instructions": written(tmp_path, [{"input": first, "target": second} for first, second in pairs]),
        "holdout": 0}})
    task = open_task("text.odd_pairs", defined, "tuning")
    vocabulary = load_vocabulary()
    by_seqio = list(task_tokens(task, "train", seqio.SentencePieceVocabulary(vocabulary.path, extra_ids=0)))
    found = list(examples(task, "train", vocabulary))
    assert [(example.inputs.tolist(), example.targets.tolist()) for example in found] == [
        (expected["inputs"].tolist(), expected["targets"].tolist()) for expected in by_seqio]
    assert [example.text_bytes for example in found] == [len((a + b).encode()) for a, b in pairs]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_answers_are_encoded_as_they_stand_behind_their_prompts(tmp_path, other_vocabularies, name):
    """So that evaluation, which encodes a candidate behind its prompt, asks for the tokens that were trained on."""
    pairs = [("value\n", "    return value"), ("the row", " of tokens"), ("the row:", "value")]
    defined = tasks.Definitions(corpora={"text.behind": {
        "instructions": written(tmp_path, [{"input": first, "target": second} for first, second in pairs]),
        "holdout": 0}})
    vocabulary = load_vocabulary(other_vocabularies[name])
    found = list(examples(open_task("text.behind", defined, "tuning"), "train", vocabulary))
    assert [example.inputs.tolist() for example in found] == [vocabulary.encode(first) for first, _ in pairs]
    assert [example.targets.tolist() for example in found] == [
        [*vocabulary.encode_after(vocabulary.encode(first), second), vocabulary.end_of_document_id]
        for first, second in pairs]
    if name == "llama":
        assert [vocabulary.decode([*example.inputs, *example.targets]) for example in found] == [
            first + second for first, second in pairs]


def test_documents_and_prompts_begin_where_the_vocabulary_says_so(tmp_path, beginning_tokenizer):
    plain, own = load_vocabulary(), load_vocabulary(beginning_tokenizer)
    assert (own.begin_ids, own.end_of_document_id) == ((0,), 1)
    documents = tasks.Definitions(corpora={
        "text.begun": {"json_lines": written(tmp_path, [{"text": text} for text in ODD]), "holdout": 0}})
    found = list(examples(open_task("text.begun", documents, "pretraining"), "train", own, threads=2))
    assert [example.targets.tolist() for example in found] == [[0, *plain.encode(text), 1] for text in ODD]
    pairs = list(zip(ODD, ODD[::-1], strict=True))
    (tmp_path / "asked").mkdir()
    asked = tasks.Definitions(corpora={"text.begun_pairs": {
        "instructions": written(tmp_path / "asked", [{"input": first, "target": second} for first, second in pairs]),
        "holdout": 0}})
    found = list(examples(open_task("text.begun_pairs", asked, "tuning"), "train", own))
    assert [(example.inputs.tolist(), example.targets.tolist()) for example in found] == [
        ([0, *plain.encode(first)], [*plain.encode(second), 1]) for first, second in pairs]


def test_preprocessors_of_other_tasks_see_the_same_tokens_of_a_tokenizer_json(beginning_tokenizer):
    """What joins documents and cuts them does so alike, and puts the begin token before what it gives."""
    task = open_task("text.python_rows", tasks.Definitions(), "pretraining")
    plain, own = (
        [example.targets.tolist() for example, _ in zip(examples(task, "train", vocabulary), range(5), strict=False)]
        for vocabulary in (load_vocabulary(), load_vocabulary(beginning_tokenizer)))
    assert own == [[0, *tokens] for tokens in plain]


def test_any_other_task_goes_through_its_own_preprocessors(tmp_path):
    """text.python_rows joins documents and cuts them, which no single document shows."""
    task = open_task("text.python_rows", tasks.Definitions(), "pretraining")
    found = [example.targets for example, _ in zip(examples(task, "train", load_vocabulary()), range(5), strict=False)]
    assert {len(tokens) for tokens in found} <= {256, 257}
    assert not is_divisible(task, "train")


@pytest.mark.parametrize("spec, stage, divisible", [
    ({"json_lines": "*"}, "pretraining", True), ({"text_files": "*"}, "pretraining", True),
    ({"tfrecords": "*"}, "pretraining", True), ({"python": "text"}, "pretraining", False),
    ({"tfds": "some:1.0.0"}, "pretraining", False), ({"instructions": "*"}, "tuning", True),
    ({"instructions": "*", "sample": 3}, "tuning", False),
    ({"official": "code.cosqa", "data_dir": "/d"}, "tuning", True),
    ({"official": "text.pclue", "data_dir": "/d"}, "tuning", False), ({"mbpp": "*"}, "tuning", True)])
def test_what_can_be_divided(spec, stage, divisible):
    task = open_task("text.any", tasks.Definitions(corpora={"text.any": spec}), stage)
    assert is_divisible(task, "train") is divisible
    assert is_divisible(task, "validation") is (divisible or "sample" in spec or spec.get("official") == "text.pclue")


def test_notes_of_parts_are_those_of_the_whole(tmp_path):
    """Each file read by itself, and all at once."""
    for name, lines in (("a", ['{"text": "one"}', "{", '{"text": 3}', "{"]), ("b", ['{"text": "two"}', "[", ""]),
                        ("c", ['{"text": "three"}'])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    defined = tasks.Definitions(corpora={"text.noted": {"json_lines": str(tmp_path / "*.jsonl"), "holdout": 0}})
    task = open_task("text.noted", defined, "pretraining")

    def notes(files=None) -> list[Note]:
        with warnings_of("text.noted") as found:
            list(examples(task, "train", load_vocabulary(), files))
        return found

    parts = [json.loads(json.dumps(note)) for file in sorted(tmp_path.glob("*.jsonl")) for note in notes([str(file)])]
    assert len(parts) == 3
    assert list(map(str, notes())) == list(map(str, added(Note(said, tuple(values)) for said, values in parts))) == [
        f"text.noted, read for train: 3 records are documents, skipped: 3 broken JSON (first: {tmp_path}/a.jsonl, "
        f"line 2), 1 without text in field 'text' (first: {tmp_path}/a.jsonl, line 3, whose fields are 'text')."]
    assert added([Note(said, tuple(values)) for said, values in parts[2:]]) == []


def test_a_warning_without_values_is_told_as_it_is():
    with warnings_of("text.a") as found:
        logging.warning("text.a: 100% of it")
        logging.warning("text.ab: of another")
    assert list(map(str, found)) == ["text.a: 100% of it"]
    assert list(map(str, added(found * 2))) == ["text.a: 100% of it"]


def test_reading_a_cache_needs_neither_seqio_nor_tensorflow():
    done = subprocess.run([sys.executable, "-c", "import sys, codellm_jax.mixture.tokens; "
                           "print({'seqio', 'tensorflow'} & set(sys.modules))"], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
