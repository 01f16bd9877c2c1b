"""SeqIO reads the pre-training tasks: whole documents, other vocabularies, users' corpora."""

import collections
import json
import pathlib
import uuid

import pytest

import tasks
from codellm_jax import vocabulary

seqio = pytest.importorskip("seqio")

from tasks import pretraining  # noqa: E402
from tasks.corpora import standard_library  # noqa: E402


def _tokens(name: str, split: str = "train", length: int | None = None) -> list[list[int]]:
    dataset = seqio.get_mixture_or_task(name).get_dataset(
        length and {"targets": length}, split=split, shuffle=False
    )
    return [example["targets"].tolist() for example in dataset.as_numpy_iterator()]


def _fresh(pool: str = "text") -> str:
    return f"{pool}.t{uuid.uuid4().hex[:8]}"


def _corpus(folder: pathlib.Path, *texts: str) -> dict[str, object]:
    for index, text in enumerate(texts):
        (folder / f"{index}.txt").write_text(text)
    return {"text_files": str(folder / "*.txt"), "holdout": 0}


@pytest.mark.parametrize("kind", ["text", "code"])
def test_documents_are_whole_and_end(kind: str) -> None:
    words = vocabulary.load_vocabulary("python_8k")
    expected = list(standard_library.python_documents(kind, "validation"))
    found = _tokens(f"{kind}.python", "validation")
    assert [words.decode(ids[:-1]) for ids in found] == expected
    assert {ids[-1] for ids in found} == {words.end_of_document_id}
    assert max(map(len, found)) > 4096


def test_seqio_trims_to_a_length() -> None:
    trimmed = _tokens("text.python", "test", 256)
    assert max(map(len, trimmed)) == 256
    assert trimmed == [ids[:256] for ids in _tokens("text.python", "test")]


def test_mixture() -> None:
    mixture = seqio.get_mixture_or_task("python_text_code")
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == {
        "text.python": 2,
        "code.python": 1,
    }
    dataset = mixture.get_dataset({"targets": 64}, "train", shuffle=False, num_epochs=None)
    starts = {
        kind: {tuple(words[:64]) for words in _first_tokens(f"{kind}.python", 120)}
        for kind in ("text", "code")
    }
    drawn = collections.Counter(
        kind
        for example in dataset.take(90).as_numpy_iterator()
        for kind in starts
        if tuple(example["targets"].tolist()) in starts[kind]
    )
    assert drawn["text"] > 1.3 * drawn["code"] > 0


def _first_tokens(name: str, count: int) -> list[list[int]]:
    dataset = seqio.get_mixture_or_task(name).get_dataset(
        {"targets": 64}, split="train", shuffle=False
    )
    return [example["targets"].tolist() for example in dataset.take(count).as_numpy_iterator()]


def test_another_vocabulary(tmp_path: pathlib.Path) -> None:
    documents = standard_library.python_documents("text", "test")
    other = vocabulary.train_vocabulary(documents, 600, str(tmp_path / "other.model"))
    task = seqio.TaskRegistry.get("code.python").replace(
        output_features=pretraining.output_features(other.path)
    )
    first = next(task.get_dataset(None, split="test", shuffle=False).as_numpy_iterator())[
        "targets"
    ].tolist()
    text = next(standard_library.python_documents("code", "test"))
    assert first == [*other.encode(text), other.end_of_document_id]


def test_users_corpora(tmp_path: pathlib.Path) -> None:
    name = _fresh()
    definitions = tasks.Definitions(corpora={name: _corpus(tmp_path, "one \u2581", "two\n")})
    definitions.register()
    definitions.register()
    words = vocabulary.load_vocabulary()
    assert _tokens(name) == [[*words.encode(text), 1] for text in ("one \u2581", "two\n")]
    assert tuple(seqio.get_mixture_or_task(name).splits) == ("train",)


def test_another_spec_replaces(tmp_path: pathlib.Path) -> None:
    name = _fresh("code")
    pretraining.add_corpus(name, _corpus(tmp_path, "one", "two"))
    first = seqio.TaskRegistry.get(name)
    pretraining.add_corpus(name, _corpus(tmp_path, "one", "two"))
    assert seqio.TaskRegistry.get(name) is first
    pretraining.add_corpus(name, {"text_files": str(tmp_path / "0.txt"), "holdout": 0})
    assert len(_tokens(name)) == 1


def test_aliases(tmp_path: pathlib.Path) -> None:
    target, alias, second = _fresh(), _fresh(), _fresh()
    corpora = {second: {"task": alias}, alias: {"task": target}, target: _corpus(tmp_path, "one")}
    tasks.Definitions(corpora=corpora).register()
    assert _tokens(second) == _tokens(alias) == _tokens(target)
    assert seqio.TaskRegistry.get(second).name == second


def test_bad_aliases() -> None:
    with pytest.raises(ValueError, match="no SeqIO task is named 'text.pythn'; did you mean"):
        pretraining.add_corpus(_fresh(), {"task": "text.pythn"})
    inputs_only = f"inputs_{uuid.uuid4().hex}"
    seqio.TaskRegistry.add(
        inputs_only,
        source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"]),
        output_features={"inputs": pretraining.output_features()["targets"]},
        preprocessors=[],
    )
    with pytest.raises(ValueError, match="has no feature 'targets', only inputs"):
        pretraining.add_corpus(_fresh(), {"task": inputs_only})


@pytest.mark.parametrize("name", ["text.python", "python_text_code"])
def test_names_of_modules_are_kept(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is already another task"):
        pretraining.add_corpus(name, {"python": "text"})


def test_errors_keep_their_type(tmp_path: pathlib.Path) -> None:
    name = _fresh()
    pretraining.add_corpus(name, {"json_lines": str(tmp_path / "*.jsonl")})
    with pytest.raises(FileNotFoundError, match=f"{name}: no file matches"):
        _tokens(name)


def test_holdout_of_a_corpus(tmp_path: pathlib.Path) -> None:
    lines = [json.dumps({"text": f"document {i}"}) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    name = _fresh()
    pretraining.add_corpus(name, {"json_lines": str(tmp_path / "a.jsonl"), "holdout": 0.2})
    counts = {split: len(_tokens(name, split)) for split in ("train", "validation", "test")}
    assert sum(counts.values()) == 200 and min(counts.values()) > 20
