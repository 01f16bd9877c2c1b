"""How answers are taken and told, of models that are made up: ties, cuts, draws, failures, odd characters."""

import json
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codellm_jax.evaluation.cuts import fitted
from codellm_jax.evaluation.decoding import Generation
from codellm_jax.evaluation.evaluate import RESULTS_VERSION, Evaluation, ask
from codellm_jax.evaluation.scoring import Request, Scores
from codellm_jax.results.statistics import wilson_interval
from codellm_jax.results.tables import short_score
from codellm_jax.training import train
from codellm_jax.vocabulary import load_vocabulary
from tasks.benchmarks.judging import Benchmarks
from tasks.benchmarks.questions import Candidate, Loaded, Prompt, Question

WORDS = load_vocabulary("python_8k")
LONG = "甲公司与乙公司签订合同，后来双方发生争议。" * 20


class Model:
    """Scores by a function of (prompt, continuation), a number for each token; writes by one of (number, prompt)."""

    def __init__(self, length: int = 64, value: Callable[[str, str], float] = lambda prompt, continuation: -1.0,
                 written: Callable[[int, str], str] = lambda number, prompt: "") -> None:
        self.vocabulary: Any = WORDS
        self.config = types.SimpleNamespace(length=length, dtype="float32", activation="gelu")
        self._value, self._written = value, written

    def score(self, requests: Sequence[Request], batch_tokens: int) -> list[Scores]:
        assert all(len(request.prompt) + len(request.continuation) <= self.config.length + 1 for request in requests)
        return [Scores(np.full(len(request.continuation), self._value(
            WORDS.decode(request.prompt), WORDS.decode([t for t in request.continuation if t != WORDS.pad_id]))),
            np.zeros(len(request.continuation), bool)) for request in requests]

    def write(self, prompts: Sequence[Sequence[int]], stops: Any, sampling: Any, seed: int,
              numbers: Sequence[int]) -> list[Generation]:
        return [Generation(WORDS.encode(self._written(number, WORDS.decode(prompt))), "end", 0)
                for number, prompt in zip(numbers, prompts, strict=True)]


def loaded(name: str, questions: Sequence[Any]) -> Loaded:
    return Loaded(name, tuple(questions), "0" * 64, len(questions), {}, False, ("file",))


def choices(number: int, question: str, answers: str = "ABCD", right: int = 0) -> Question:
    """As the released templates have it: the choice in the prompt, and the question is scored."""
    return Question(f"q{number}", tuple(Candidate(f"该答案：{answer}，可以回答：", question) for answer in answers),
                    (right,))


def asked(folder: Path, tasks: Sequence[Loaded], model: Any, benchmarks: Any = None, **options: Any) -> Any:
    """(results, failures), the lines of each task by name, and what was reported."""
    evaluation = Evaluation([one.name for one in tasks], benchmarks or Benchmarks(), **options)
    told: list[str] = []
    found = ask(evaluation, tasks, model, {"run": "r", "step": 1}, str(folder), told.append, progress=False)
    lines = {path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line][1:]
             for path in folder.glob("*.jsonl")}
    return found, lines, "\n".join(told)


def test_questions_longer_than_the_model_are_told_apart_by_their_choices(tmp_path):
    """A model that likes C best, whatever stands before and after."""
    model = Model(value=lambda prompt, continuation: -1.0 + ("C" in prompt))
    questions = [choices(number, LONG, right=2) for number in range(12)]
    ([result], failures), lines, told = asked(tmp_path, [loaded("logic", questions)], model)
    assert result["value"] == 1.0 and result["ties"] == 0 and result["measured"] and not failures
    assert result["prompts_cut"] == result["continuations_cut"] == 48
    assert "48 prompts and 48 continuations of candidates were too long for the model and were truncated" in told
    candidates = [(WORDS.encode(prompt), WORDS.encode(text)) for prompt, text in questions[0].candidates]
    for line in lines["logic"]:
        for candidate, (prompt, continuation), kept in zip(
                line["candidates"], candidates, fitted(candidates, 64), strict=True):
            assert candidate["prompt_tokens_cut"] == len(prompt) - len(kept.prompt) > 0
            assert candidate["continuation_tokens_cut"] == len(continuation) - len(kept.continuation) > 0
            assert candidate["tokens"] == len(kept.continuation) == 64  # a token of the choice stands before them


def test_a_tie_is_no_hit(tmp_path):
    """Candidates that are the same to the model: 12 of 12 right by taking the first, 1 in 4 by lot."""
    same = [Question(f"q{number}", (Candidate("问：", LONG),) * 4, (0,)) for number in range(12)]
    ([result], _), lines, told = asked(tmp_path, [loaded("jecqa", same)], Model())
    assert (result["value"], result["ties"], result["ties_of_all"], result["measured"]) == (0.25, 12, 12, False)
    assert result["interval"] == list(wilson_interval(3, 12)) and result["chance_p_value"] == 1
    assert result["accuracy_by_scoring"] == dict.fromkeys(("per_token", "sum", "per_byte", "released"), 0.25)
    assert [(line["prediction"], line["tied"], line["correct"]) for line in lines["jecqa"]] == [
        (None, [0, 1, 2, 3], 0.25)] * 12
    row = told.splitlines()[0]
    assert "not measured: most questions are ties" in row and "25.00" not in row and "100.00" not in row
    assert "in 12 of 12 questions several candidates tie: a tie of k counts 1 / k, and in 12 all candidates tie" in told
    assert short_score(result) == "not measured (12 ties, n 12)"
    assert result["settings"]["version"] == RESULTS_VERSION == 3


def test_some_ties_count_in_part_and_leave_a_measurement(tmp_path):
    """Of 5 questions 2 tie: one between A and B, of which A is right, one between A and B while C is right."""
    def value(prompt: str, continuation: str) -> float:
        if "tie" in continuation:
            return -1.0 if "A" in prompt or "B" in prompt else -2.0
        return -1.0 if "B" in prompt else -2.0

    questions = [choices(0, "tie"), choices(1, "tie", right=2), choices(2, "a", right=1), choices(3, "b", right=1),
                 choices(4, "c", right=3)]
    ([result], _), lines, told = asked(tmp_path, [loaded("logic", questions)], Model(value=value))
    assert [line["correct"] for line in lines["logic"]] == [0.5, 0, 1, 1, 0]
    assert [line["prediction"] for line in lines["logic"]] == [None, None, 1, 1, 1]
    assert (result["value"], result["ties"], result["ties_of_all"], result["measured"]) == (0.5, 2, 0, True)
    assert "in 2 of 5 questions several candidates tie: a tie of k counts 1 / k\n" in told and "50.00" in told
    assert "0 and 1 tie by per_token, 0: '该答案：A，可以回答：' + 'tie' = " in told


def test_the_same_tokens_tie_whatever_their_rounding_and_their_bytes(tmp_path):
    """A model whose every answer differs in the last bits, and a text that the vocabulary takes for another."""
    drawn = iter(np.linspace(-1, -1.001, 1000))

    class Lossy:
        def __getattr__(self, name: str) -> Any:
            return getattr(WORDS, name)

        def encode_after(self, context: Any, text: str) -> list[int]:
            return WORDS.encode_after(context, text.replace("\u3000", " "))

    model = Model(value=lambda prompt, continuation: next(drawn))
    model.vocabulary = Lossy()
    questions = [Question(f"q{number}", (Candidate("a", " b c"), Candidate("a", "\u3000b\u3000c")), (0,))
                 for number in range(3)]
    ([result], _), lines, _ = asked(tmp_path, [loaded("cosqa", questions)], model)
    assert result["ties"] == 3 and set(result["accuracy_by_scoring"].values()) == {0.5}
    assert all(line["candidates"][0] == line["candidates"][1] for line in lines["cosqa"])


def test_what_was_scored_is_what_is_shown(tmp_path):
    questions = [choices(number, LONG, answers=("甲", "乙")) for number in range(3)]
    ([result], _), _, told = asked(tmp_path, [loaded("cosqa", questions)], Model(
        value=lambda prompt, continuation: -1.0 - ("甲" in prompt)), scoring="released")
    kept = fitted([(WORDS.encode(prompt), WORDS.encode(text)) for prompt, text in questions[0].candidates], 64)
    assert result["value"] == 0 and len(result["raw_outputs"]) == 3
    for number in (0, 1):
        prompt, continuation = (WORDS.decode(tokens) for tokens in kept[number][:2])
        assert f"{number}: {prompt!r} + {continuation[:60]!r} = " in result["raw_outputs"][0]
    assert "该答案" not in result["raw_outputs"][0]  # which was cut


def test_prompts_begin_where_the_vocabulary_says_so(tmp_path, beginning_tokenizer, monkeypatch):
    """Those that are scored and those that are answered; what stands behind them does not."""
    model, seen = Model(), []
    model.vocabulary = load_vocabulary(beginning_tokenizer)
    monkeypatch.setattr(model, "score", lambda requests, batch_tokens: seen.extend(requests) or Model.score(
        model, requests, batch_tokens))
    asked(tmp_path, [loaded("cosqa", [choices(0, "a row")])], model, scoring="sum")
    assert [list(request.prompt) for request in seen] == [
        [0, *WORDS.encode(f"该答案：{answer}，可以回答：")] for answer in "ABCD"]
    assert all(list(request.continuation)[: len(WORDS.encode("a row"))] == WORDS.encode("a row") for request in seen)
    begun = []
    monkeypatch.setattr(model, "write", lambda prompts, *rest, **options: begun.extend(prompts) or Model.write(
        model, prompts, *rest, **options))
    _, lines, _ = asked(tmp_path, [loaded("dureader", prompts("a"))], model)
    assert begun == [[0, *WORDS.encode("question a")]]


def test_a_single_token_does_not_win_by_having_nothing_to_score(tmp_path):
    """"released" leaves the first token out, and has no padding token after a question that fills the model."""
    prompt = "x = 1\n" * 40
    questions = [Question("q", (Candidate(prompt, "A"), Candidate(prompt, " and something else")), (1,))]
    ([result], _), lines, _ = asked(tmp_path, [loaded("cosqa", questions)], Model(
        value=lambda prompt, continuation: -2.0 if continuation == "A" else -1.0), scoring="released")
    assert lines["cosqa"][0]["candidates"][0]["tokens"] == 1 and result["value"] == 1.0
    assert lines["cosqa"][0]["candidates"][0]["released"] == -2.0


def prompts(*ids: str) -> list[Prompt]:
    return [Prompt(id_, f"question {id_}", ("answer",), {}) for id_ in ids]


def test_an_answer_depends_on_the_question_and_not_on_its_place(tmp_path):
    model = Model(written=lambda number, prompt: f"{number} to {prompt}")
    everything = prompts(*"abcdefghij")
    texts = {}
    for folder, questions in (("all", everything), ("reversed", everything[::-1]), ("some", everything[3:5])):
        _, lines, _ = asked(tmp_path / folder, [loaded("dureader", questions)], model, samples=3)
        texts[folder] = {line["id"]: line["texts"] for line in lines["dureader"]}
    assert texts["all"] == texts["reversed"] and texts["some"] == {id_: texts["all"][id_] for id_ in "de"}
    numbers = [int(text.split()[0]) for each in texts["all"].values() for text in each]
    assert len(set(numbers)) == 30 and 0 <= min(numbers) and max(numbers) < 2**32
    # After an interruption the rest is the same too; and another task's question of the same id is another one.
    path = tmp_path / "all" / "dureader.jsonl"
    path.write_text("\n".join(path.read_text().split("\n")[:4]) + "\n")
    _, lines, _ = asked(tmp_path / "all", [loaded("dureader", everything)], model, samples=3)
    assert {line["id"]: line["texts"] for line in lines["dureader"]} == texts["all"]


class Failing(Benchmarks):
    def judge(self, loaded: Loaded, texts: Any, tokenize: Any) -> Any:
        raise KeyError("a test that is no Python\nand a traceback")


def test_a_task_that_fails_leaves_the_others(tmp_path):
    """Its judge raises; the answers are kept, so that the next time they are judged alone."""
    tasks = [loaded("dureader", prompts("a", "b")), loaded("logic", [choices(0, "q")]),
             loaded("cosqa", [choices(1, "q", answers="AB"), Question("empty", (Candidate("p", ""),) * 2, (0,))]),
             loaded("ekar", [choices(2, "q")])]
    model = Model(written=lambda number, prompt: "answer")
    (results, failures), lines, told = asked(tmp_path, tasks, model, Failing())
    assert [result["task"] for result in results] == ["logic", "ekar"]
    first, second = map(str, failures)
    assert second == "cosqa: Question empty, candidate 0: its continuation is empty: there is no token to score."
    assert first.startswith("dureader: the answers are written to") and "\n" not in first
    assert "KeyError" in first and "a test that is no Python" in first
    assert told.count(" failed: ") == 2 and not (tmp_path / "dureader.json").exists()
    assert [line["texts"] for line in lines["dureader"]] == [["answer"], ["answer"]]

    silent = Model(written=lambda number, prompt: pytest.fail("written again"))
    ([result], failures), _, _ = asked(tmp_path, tasks[:1], silent)
    assert result["value"] == 1.0 and not failures


def test_what_no_encoding_holds_is_written_and_read_again(tmp_path):
    """Lone surrogates, in an answer, a question's extra and a judge's note."""
    odd = "a\udc80 世 \ud800"

    class Odd:
        def __getattr__(self, name: str) -> Any:
            return getattr(WORDS, name)

        def decode_after(self, context: Any, ids: Any) -> str:
            return odd

    class Noting(Benchmarks):
        def judge(self, loaded: Loaded, texts: Any, tokenize: Any) -> Any:
            return super().judge(loaded, texts, tokenize)._replace(notes=[[odd] for _ in texts])

    model = Model()
    model.vocabulary = Odd()
    tasks = [loaded("dureader", [one._replace(extra={"test": odd}) for one in prompts("a", "b")]),
             loaded("logic", [choices(0, "q")])]
    (results, failures), lines, _ = asked(tmp_path, tasks, model, Noting())
    assert not failures and len(results) == 2
    assert [(line["texts"], line["notes"]) for line in lines["dureader"]] == [([odd], [odd])] * 2
    assert "世" in (tmp_path / "dureader.jsonl").read_text(encoding="utf-8")
    result = json.loads((tmp_path / "dureader.json").read_bytes())
    assert result["value"] == 0 and "\\udc80" in (tmp_path / "dureader.json").read_text(encoding="utf-8")


def test_training_records_no_score_of_ties(monkeypatch):
    """And goes on where a benchmark fails, with a warning."""
    results = {"score/logic": {"metric": "accuracy", "value": 0.25, "interval": [0.1, 0.5], "n": 12, "ties": 12,
                               "measured": False},
               "score/cosqa": {"metric": "accuracy", "value": 0.5, "interval": [0.2, 0.8], "n": 4, "ties": 2,
                               "measured": True}}
    monkeypatch.setattr(train, "held_out", lambda run, eval_fn: {})
    monkeypatch.setattr(train, "held_out_rows", lambda run: {})
    monkeypatch.setattr(train, "ask_benchmarks", lambda run: (results, ["mbpp: no judge"]))
    written: list[Any] = []
    told: list[str] = []
    run: Any = types.SimpleNamespace(step=4, held_out=None)
    records: Any = types.SimpleNamespace(write=lambda *values: written.append(values))
    train.evaluate(run, lambda: None, records, types.SimpleNamespace(say=told.append))  # type: ignore[arg-type]
    assert written == [(4, "eval", {"score/cosqa": 0.5})]
    assert told == ["benchmarks after step 4, in per cent: logic not measured (12 ties, n 12), "
                    "cosqa 50.0 (20.0-80.0, n 4)", "WARNING: a benchmark failed after step 4: mbpp: no judge"]
