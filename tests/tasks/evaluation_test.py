"""SeqIO reads the benchmarks: an example for each candidate, tokenized, its text beside it."""

import pathlib
from typing import Any

import pytest

from codellm_jax import vocabulary
from tasks.benchmarks.loading import BENCHMARKS, GENERATED, load
from tasks.benchmarks.questions import Prompt, Question
from tasks.programs.sandbox import guarantees

seqio = pytest.importorskip("seqio")

from tasks import evaluation  # noqa: E402

WORDS = vocabulary.load_vocabulary("python_8k")


def _examples(name: str) -> list[dict]:
    dataset = seqio.get_mixture_or_task(name).get_dataset(None, split="test", shuffle=False)
    return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_samples_through_seqio(benchmark: str) -> None:
    loaded = load(benchmark, None)
    found = _examples(f"sample.{benchmark}")
    texts = [(one["inputs_pretokenized"].decode(), one["targets_pretokenized"].decode()) for one in found]
    assert [(WORDS.decode(one["inputs"].tolist()), WORDS.decode(one["targets"].tolist())) for one in found] == texts
    assert not any(WORDS.end_of_document_id in one["targets"] for one in found)
    if benchmark in GENERATED:
        prompts = [question for question in loaded.questions if isinstance(question, Prompt)]
        assert texts == [(prompt.prompt, prompt.references[0]) for prompt in prompts]
        assert [[reference.decode() for reference in one["references"]] for one in found] == [
            list(prompt.references) for prompt in prompts]
        return
    questions = [question for question in loaded.questions if isinstance(question, Question)]
    assert texts == [tuple(candidate) for question in questions for candidate in question.candidates]
    assert [(one["question"], one["candidate"], one["answer"], one["id"].decode()) for one in found] == [
        (number, place, question.answer[0], question.id)
        for number, question in enumerate(questions) for place in range(len(question.candidates))]


class Asked(seqio.Evaluator):
    """SeqIO's own evaluator on one of our sample tasks."""

    def __init__(self, name: str) -> None:
        super().__init__(f"sample.{name}", seqio.EncDecFeatureConverter(pack=False), eval_split="test",
                         sequence_length={"inputs": 1024, "targets": 1024})

    def scores(self, **functions: Any) -> dict[str, float]:
        metrics, _ = self.evaluate(compute_metrics=True, step=0, **functions)
        [found] = metrics.result().values()
        return found


@pytest.mark.parametrize("benchmark", ["logic", "scienceqa", "ekar"])
def test_seqio_evaluates_choices(benchmark: str) -> None:
    """By the mean over tokens: a score of -1 a token for the wanted candidate, and of -1.01 for each other one."""
    questions = [question for question in load(benchmark, None).questions if isinstance(question, Question)]

    def score_fn(wrong_first: bool) -> Any:
        def score(dataset: Any) -> list[tuple[int, float]]:
            found = []
            examples = _examples(f"sample.{benchmark}")
            for number, _ in dataset.as_numpy_iterator():
                example = examples[number]
                wanted = int(example["answer"])
                if wrong_first and int(example["question"]) == 0:
                    wanted = (wanted + 1) % len(questions[0].candidates)
                found.append((number, -len(example["targets"]) * (1.0 if example["candidate"] == wanted else 1.01)))
            return found
        return score

    for wrong in (False, True):
        found = Asked(benchmark).scores(score_fn=score_fn(wrong), predict_fn=None)
        assert found == {"accuracy": pytest.approx(1 - wrong / len(questions)), "questions": len(questions), "ties": 0}


def test_a_tie_counts_in_part() -> None:
    """The same score a token for all candidates is blind choice. The same tokens tie however they are rounded."""
    questions = [question for question in load("logic", None).questions if isinstance(question, Question)]
    lengths = [len(example["targets"]) for example in _examples("sample.logic")]
    found = Asked("logic").scores(predict_fn=None, score_fn=lambda dataset: [
        (number, -lengths[number]) for number, _ in dataset.as_numpy_iterator()])
    assert found == {"accuracy": 0.25, "questions": len(questions), "ties": len(questions)}
    same = [{"question": number // 2, "candidate": number % 2, "answer": 1, "tokens": ((1, 2), (3, 4, number // 2))}
            for number in range(4)]
    assert evaluation.accuracy(same, [-3.0, -3.0000001, -3.0, -2.9999999]) == {
        "accuracy": 0.5, "questions": 2, "ties": 2}


def test_seqio_evaluates_what_is_written() -> None:
    def predict_fn(wrong: int) -> Any:
        ended = [*WORDS.encode("x"), *[WORDS.end_of_document_id] * 1023]
        return lambda dataset: [(number, example["decoder_target_tokens"].tolist() if number >= wrong else ended)
                                for number, example in dataset.as_numpy_iterator()]

    n = len(load("dureader", None).questions)
    found = Asked("dureader").scores(predict_fn=predict_fn(1), score_fn=None)
    assert found == {"f1": pytest.approx(1 - 1 / n), "exact_match": pytest.approx(1 - 1 / n)}
    if all(guarantees().values()):
        n = len(load("mbpp", None).questions)
        found = Asked("mbpp").scores(predict_fn=predict_fn(2), score_fn=None)
        assert found["pass@1"] == pytest.approx(1 - 2 / n) and 0 < found["bleu"] < 100
        assert Asked("mbpp").scores(predict_fn=predict_fn(0), score_fn=None)["bleu"] == pytest.approx(100)


def test_registered_again_for_other_data() -> None:
    names = evaluation.register(None, prefix="again.")
    assert names == [f"again.{benchmark}" for benchmark in BENCHMARKS]
    plain = _examples("again.cosqa")
    evaluation.register(None, template="multiple_choice", few_shot=1, seed=3, prefix="again.")
    assert len(_examples("again.cosqa")) == len(plain) and _examples("again.cosqa")[0]["targets"].tolist() != plain[0][
        "targets"].tolist()
    evaluation.register("/nowhere", prefix="again.")
    with pytest.raises(FileNotFoundError, match="^cosqa: there is no folder '/nowhere'"):
        _examples("again.cosqa")


def test_files_of_ones_own(tmp_path: pathlib.Path) -> None:
    (tmp_path / "sky.jsonl").write_text('{"question": "Blue?", "choices": ["sky", "grass"], "answer": "sky"}')
    (tmp_path / "sums.jsonl").write_text('{"question": "3 + 4?", "answer": "#### 7"}\n{"question": "1?", "answer": 1}')
    names = evaluation.register(None, prefix="own.", specs={
        name: {"file": f"{tmp_path}/{name}.jsonl"} for name in ("sky", "sums")})
    assert names == [f"own.{benchmark}" for benchmark in (*BENCHMARKS, "sky", "sums")]
    [first, second] = _examples("own.sky")
    assert [one["targets_pretokenized"].decode() for one in (first, second)] == [" sky", " grass"]
    assert first["answer"] == second["answer"] == 0
    task = seqio.get_mixture_or_task("own.sums")
    assert task.metric_fns[0]([0, 1], ["so #### 7", "2"]) == {"exact_match": 0.5}


def test_another_vocabulary() -> None:
    task = seqio.get_mixture_or_task("sample.logic")
    features = {name: seqio.Feature(seqio.ByteVocabulary(), add_eos=False) for name in ("inputs", "targets")}
    [first, *_] = task.replace(name="sample.logic_bytes", output_features=features).get_dataset(
        None, split="test", shuffle=False).as_numpy_iterator()
    assert len(first["targets"]) == len(first["targets_pretokenized"])


def test_a_name_of_another_origin(tmp_path: pathlib.Path) -> None:
    seqio.TaskRegistry.add_provider("mine.cosqa", seqio.get_mixture_or_task("sample.cosqa").replace(name="mine.cosqa"))
    with pytest.raises(ValueError, match="^mine.cosqa is already another task; give the benchmarks a prefix.$"):
        evaluation.register(None, prefix="mine.")
    assert "mine.logic" not in seqio.TaskRegistry.names()


def test_all_benchmarks_are_one_mixture():
    names = {task.name for task in seqio.MixtureRegistry.get("sample.benchmarks").tasks}
    assert names == {f"sample.{name}" for name in BENCHMARKS}
    assert evaluation.one_benchmark("logic") == "sample.logic"
    with pytest.raises(ValueError, match="There is no benchmark 'sums'; there are sample.c3"):
        evaluation.one_benchmark("sums")
