"""SeqIO reads the tasks of tuning: prompts without an end, answers with one, other vocabularies, official names."""

import json
import pathlib
import uuid
from collections.abc import Callable

import pytest

import tasks
from codellm_jax import vocabulary
from codellm_jax.tokenizing.training import END_OF_DOCUMENT_PIECE
from tasks.corpora import official, standard_library
from tasks.instruction_sets import instructions
from tasks.instruction_sets.prompts import conversation_turns

seqio = pytest.importorskip("seqio")

from tasks import pretraining, tuning  # noqa: E402

WORDS = vocabulary.load_vocabulary("python_8k")


def _tokens(name: str, split: str = "train") -> list[tuple[list[int], list[int]]]:
    dataset = seqio.get_mixture_or_task(name).get_dataset(None, split=split, shuffle=False)
    return [(one["inputs"].tolist(), one["targets"].tolist()) for one in dataset.as_numpy_iterator()]


def _fresh(pool: str = "text") -> str:
    return f"{pool}.t{uuid.uuid4().hex[:8]}"


def _spec(write: Callable[..., str], *answers: str) -> dict[str, object]:
    records = [{"instruction": f"Say {answer}.", "input": "", "output": answer} for answer in answers]
    return {"instructions": write(f"{uuid.uuid4().hex}.json", records), "holdout": 0}


@pytest.mark.parametrize("kind", ["text", "code"])
def test_pairs_come_back_from_their_tokens(kind: str) -> None:
    expected = list(instructions.pairs({"python_instructions": kind}, "test"))
    found = _tokens(f"{kind}.python_instructions", "test")
    assert [(WORDS.decode(inputs), WORDS.decode(targets[:-1])) for inputs, targets in found] == expected
    for inputs, targets in found:
        assert WORDS.end_of_document_id not in inputs
        assert targets.count(WORDS.end_of_document_id) == 1 and targets[-1] == WORDS.end_of_document_id


def test_text_that_names_the_end_token(write: Callable[..., str]) -> None:
    name, answer = _fresh(), f"{END_OF_DOCUMENT_PIECE} 世\u2581 \r\n"
    tuning.add_corpus(name, _spec(write, answer))
    [(inputs, targets)] = _tokens(name)
    assert WORDS.decode(targets[:-1]) == answer and targets.count(WORDS.end_of_document_id) == 1
    assert WORDS.end_of_document_id not in inputs


def test_a_conversation_is_its_last_answer_to_seqio(write: Callable[..., str]) -> None:
    messages = [{"role": role, "content": text} for role, text in (
        ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2"))]
    name = _fresh()
    tuning.add_corpus(name, {"instructions": write(f"{uuid.uuid4().hex}.json", [{"messages": messages}]), "holdout": 0})
    [(inputs, targets)] = _tokens(name)
    assert WORDS.decode(inputs) == "".join(conversation_turns(messages)[:3])
    assert targets == [*WORDS.encode("2"), WORDS.end_of_document_id]


def test_tasks_are_plain() -> None:
    for name in ("text.python_instructions", "code.python_instructions"):
        task = seqio.get_mixture_or_task(name)
        assert set(task.splits) == {"train", "validation", "test"} and not task.metric_fns
        assert list(task.output_features) == ["inputs", "targets"]
        assert [task.output_features[key].add_eos for key in ("inputs", "targets")] == [False, True]


def test_mixture() -> None:
    mixture = seqio.get_mixture_or_task("python_instructions")
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == {
        "text.python_instructions": 5, "code.python_instructions": 3}
    lengths = {"inputs": 64, "targets": 32}
    dataset = mixture.get_dataset(lengths, "train", shuffle=False, num_epochs=None)
    assert all(len(one["inputs"]) <= 64 and len(one["targets"]) <= 32 for one in dataset.take(20).as_numpy_iterator())


def test_upstream_feature_converter() -> None:
    """As T5X feeds a decoder: the prompt is not counted in the loss, the answer and its end are."""
    lengths = {"inputs": 1024, "targets": 1024}
    dataset = seqio.get_mixture_or_task("code.python_instructions").get_dataset(lengths, "test", shuffle=False)
    converted = seqio.DecoderFeatureConverter(pack=False)(dataset, lengths)
    inputs, targets = _tokens("code.python_instructions", "test")[0]
    one = next(converted.as_numpy_iterator())
    assert one["decoder_target_tokens"][: len(inputs + targets)].tolist() == inputs + targets
    assert int(one["decoder_loss_weights"].sum()) == len(targets)


def test_another_vocabulary(tmp_path: pathlib.Path) -> None:
    documents = standard_library.python_documents("text", "test")
    other = vocabulary.train_vocabulary(documents, 600, str(tmp_path / "other.model"))
    task = seqio.TaskRegistry.get("code.python_instructions").replace(
        output_features=tuning.output_features(other.path))
    first = next(task.get_dataset(None, split="test", shuffle=False).as_numpy_iterator())
    pair = next(instructions.pairs({"python_instructions": "code"}, "test"))
    assert first["inputs"].tolist() == other.encode(pair.inputs)
    assert first["targets"].tolist() == [*other.encode(pair.targets), other.end_of_document_id]


def test_users_corpora(write: Callable[..., str]) -> None:
    name, alias, python = _fresh(), _fresh(), _fresh("code")
    corpora = {
        alias: {"task": name}, name: _spec(write, "one", "two"), python: {"python_instructions": "code"}}
    definitions = tasks.Definitions(modules=["tasks.tuning"], corpora=corpora)
    definitions.register()
    definitions.register()
    assert [WORDS.decode(targets) for _, targets in _tokens(name)] == ["one", "two"]
    assert _tokens(alias) == _tokens(name)
    assert _tokens(python, "test") == _tokens("code.python_instructions", "test")
    assert tuple(seqio.get_mixture_or_task(name).splits) == ("train",)
    assert definitions.describe(alias)["aliased"] == definitions.describe(name)


def test_another_spec_replaces(write: Callable[..., str], tmp_path: pathlib.Path) -> None:
    name = _fresh()
    spec = _spec(write, "one", "two")
    tuning.add_corpus(name, spec)
    first = seqio.TaskRegistry.get(name)
    tuning.add_corpus(name, dict(spec))
    assert seqio.TaskRegistry.get(name) is first
    tuning.add_corpus(name, _spec(write, "three"))
    assert len(_tokens(name)) == 1
    (tmp_path / "a.txt").write_text("a document")
    pretraining.add_corpus(name, {"text_files": str(tmp_path / "a.txt"), "holdout": 0})
    assert list(seqio.TaskRegistry.get(name).output_features) == ["targets"]


@pytest.mark.parametrize("name", ["text.python_instructions", "text.python", "python_instructions"])
def test_names_of_modules_are_kept(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is already another task"):
        tuning.add_corpus(name, {"python_instructions": "text"})


def test_errors_keep_their_type(tmp_path: pathlib.Path) -> None:
    name = _fresh()
    tuning.add_corpus(name, {"instructions": str(tmp_path / "*.json")})
    with pytest.raises(FileNotFoundError, match=f"{name}: no file matches"):
        _tokens(name)


def test_official_names(write: Callable[..., str], tmp_path: pathlib.Path) -> None:
    """Each is registered, whether its file is there or not; only what is used is looked for."""
    write("data/mbpp.jsonl", json.dumps({"text": "Problem.", "code": "return", "task_id": 974}))
    own = _spec(write, "own")
    definitions = tasks.Definitions(["tasks.tuning"], {"text.pclue": own}, data_dir=str(tmp_path / "data"))
    definitions.register()
    definitions.register()
    assert set(official.MIXTURE_RATES) <= set(seqio.TaskRegistry.names())
    assert [WORDS.decode(targets) for _, targets in _tokens("code.mbpp")] == ["return"]
    assert [WORDS.decode(targets) for _, targets in _tokens("text.pclue")] == ["own"]
    with pytest.raises(FileNotFoundError, match="^code.cosqa: DATA_DIR .* holds no file cosqa-train.json"):
        _tokens("code.cosqa")
    mixture = seqio.get_mixture_or_task("paper_instructions")
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    text = [rates[name] for name in ("text.alpaca_gpt4_en", "text.alpaca_gpt4_zh", "text.pclue")]
    assert text == [52_000, 52_000, 200_000]
    assert abs(sum(rates.values()) - sum(text) - 150_000) <= 1
    assert {task for task in mixture.tasks if task.name == "text.pclue"} == {seqio.TaskRegistry.get("text.pclue")}
    assert definitions.describe("paper_instructions")["instructions"] == instructions.INSTRUCTIONS_VERSION


def test_embedded_tasks_are_described() -> None:
    definitions = tasks.Definitions(modules=["tasks.tuning"])
    description = definitions.describe("code.python_instructions")
    assert description["instructions"] == instructions.INSTRUCTIONS_VERSION
    assert "instructions" not in tasks.Definitions().describe("text.python")
