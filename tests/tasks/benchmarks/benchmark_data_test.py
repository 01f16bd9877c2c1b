"""Our own sample items, and the real files of the benchmarks against independent counts."""

import collections
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tasks.benchmarks import locating
from tasks.benchmarks.loading import BENCHMARKS, GENERATED, load
from tasks.benchmarks.questions import Loaded, Prompt, Question
from tasks.programs import sandbox
from tasks.programs.programs import problem_tests

ROOT = pathlib.Path(__file__).resolve().parents[3]
DATA = ROOT.parent / "shared" / "data" / "benchmarks"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"the benchmarks' real files are not at {DATA}")


# ---- Samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", BENCHMARKS)
def test_samples(task: str) -> None:
    loaded = load(task, None)
    assert loaded.is_sample and loaded.name == task and 4 <= len(loaded.questions) <= 8
    assert not set(loaded.skipped) - {"of another split", "with several right answers", "with an image",
                                      "without a lecture"}
    assert loaded.read == len(loaded.questions) + sum(loaded.skipped.values())
    assert {type(question) for question in loaded.questions} == {Prompt if task in GENERATED else Question}
    answers = [question.answer for question in loaded.questions if isinstance(question, Question)]
    # No answer that is always right.
    assert not answers or collections.Counter(answers).most_common(1)[0][1] <= len(answers) * 0.6


@pytest.mark.parametrize("task", [task for task in BENCHMARKS if task not in ("mbpp_three_shot", "humaneval")])
def test_samples_have_worked_examples(task: str) -> None:
    loaded = load(task, None, few_shot=2)
    assert loaded.worked_examples >= 2 and loaded.is_sample


def test_samples_are_small_and_found_nowhere_else() -> None:
    files = [file for file in pathlib.Path(locating.SAMPLES).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 60_000
    assert {file.suffix for file in files} == {".json", ".jsonl", ".csv"}
    with pytest.raises(FileNotFoundError, match="holds no file logic_val.csv"):
        load("logic", str(ROOT / "tasks"))


def test_a_copy_of_the_samples_is_still_a_sample(tmp_path: pathlib.Path) -> None:
    shutil.copytree(locating.SAMPLES, tmp_path / "copy")
    copied, own = load("ekar_cot", str(tmp_path)), load("ekar_cot", None)
    assert copied.is_sample and copied.questions == own.questions and copied.sha256 == own.sha256


@pytest.mark.parametrize("file", ["mbpp.jsonl", "sanitized-mbpp.json"])
def test_sample_programs_pass_their_tests(file: str) -> None:
    text = (pathlib.Path(locating.SAMPLES) / file).read_text()
    for problem in json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines()):
        scope: dict = {}
        for line in [*problem.get("test_imports", []), problem.get("test_setup_code", ""), problem["code"],
                     *problem["test_list"]]:
            exec(line, scope)  # Our own programs.


def test_sample_functions_pass_their_checks() -> None:
    """As HumanEval's own harness runs them: prompt, function and check, one behind the other."""
    for line in (pathlib.Path(locating.SAMPLES) / "HumanEval.jsonl").read_text().splitlines():
        problem, scope = json.loads(line), {}
        exec(problem["prompt"] + problem["canonical_solution"] + problem["test"], scope)
        scope["check"](scope[problem["entry_point"]])  # Our own programs.


def test_sample_answers_are_in_their_texts() -> None:
    for question in load("dureader", None).questions:
        assert isinstance(question, Prompt)
        assert all(reference in question.prompt for reference in question.references)


def test_loading_imports_neither_seqio_nor_tensorflow() -> None:
    script = ("import sys; from tasks.benchmarks.loading import load; load('logic', None); "
              "print(sorted({'tensorflow', 'seqio', 'jax', 'numpy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# ---- Real files --------------------------------------------------------------------------------


def levels(loaded: Loaded) -> tuple[float, float]:
    """Percent right by choosing blindly, and by always giving the commonest answer."""
    questions = [question for question in loaded.questions if isinstance(question, Question)]
    answers = collections.Counter(question.answer for question in questions)
    return (100 * sum(1 / len(question.candidates) for question in questions) / len(questions),
            100 * max(answers.values()) / len(questions))


# One record has no label, another's labels hold a full stop.
MISLABELLED = {"without an answer": 1, "whose right answer is not a choice": 1}
# As the data's README and the study's page give them: questions, skipped, chance, majority.
REAL = {
    "logic": (22, {}, 25.0, 36.36),
    "jecqa": (479 + 533, {"with several right answers": 986, **MISLABELLED}, 25.0, 28.95),
    "jecqa_exact_set": (1998, MISLABELLED, 6.67, 14.66),
    "scienceqa_text_only": (2224, {"of another split": 6508 + 2144}, 44.08, 44.38),
    "ekar": (335, {}, 25.0, 27.16),
    "cosqa": (604, {}, 50.0, 51.82),
    "c3": (1825, {}, 26.43, 30.41),
    "ocnli": (2950, {"labelled '-'": 50}, 33.33, 37.39),
    "cmnli": (6117 + 6118, {}, 33.33, 34.92),
}


@real
@pytest.mark.parametrize("task", REAL)
def test_real_questions(task: str) -> None:
    loaded = load(task, str(DATA.parent))
    n, skipped, chance, majority = REAL[task]
    assert len(loaded.questions) == n and dict(loaded.skipped) == skipped and not loaded.is_sample
    assert loaded.read == n + sum(skipped.values())
    assert [round(level, 2) for level in levels(loaded)] == [chance, majority]
    assert len({question.id for question in loaded.questions}) == n
    content = b"".join(pathlib.Path(file).read_bytes() for file in loaded.files)
    assert loaded.sha256 == hashlib.sha256(content).hexdigest()


@real
def test_real_prompts() -> None:
    mbpp, three_shot, dureader = (load(task, str(DATA.parent)) for task in ("mbpp", "mbpp_three_shot", "dureader"))
    assert [len(loaded.questions) for loaded in (mbpp, three_shot, dureader)] == [427, 500, 708 + 709]
    splits = collections.Counter(prompt.extra["split"] for prompt in mbpp.questions if isinstance(prompt, Prompt))
    assert splits["train"] == 120 and splits["test"] == 257
    assert [question.id for question in three_shot.questions] == [str(number) for number in range(11, 511)]
    assert all(isinstance(prompt, Prompt) and prompt.prompt.count("[BEGIN]") == 4 and prompt.prompt.count("[DONE]") == 3
               and len(prompt.extra["test_list"]) == 3 and prompt.extra["stop"] == ("[DONE]",)
               for prompt in three_shot.questions)
    assert not any("\r" in prompt.prompt for prompt in three_shot.questions if isinstance(prompt, Prompt))


@pytest.mark.slow
@real
@pytest.mark.skipif(not all(sandbox.guarantees().values()), reason="this host lacks namespaces")
def test_real_functions() -> None:
    """The solution of each of HumanEval's problems passes, and a function that returns nothing passes none."""
    questions = load("humaneval", str(DATA.parent)).questions
    assert [question.id for question in questions] == [f"HumanEval/{number}" for number in range(164)]
    solutions = [question.references[0] for question in questions if isinstance(question, Prompt)]
    tests = [problem_tests({**question.extra, "code": code})
             for question, code in zip(questions, solutions, strict=True) if isinstance(question, Prompt)]
    outcomes = sandbox.run_programs([test.of(code) for test, code in zip(tests, solutions, strict=True)]
                                    + [test.of("    return None\n") for test in tests])
    assert [outcome.passed for outcome in outcomes] == [True] * 164 + [False] * 164


@real
@pytest.mark.parametrize("task,pool", [("logic", 5), ("scienceqa_text_only", 6508), ("ekar", 1155), ("c3", 5856),
                                       ("mbpp", 254)])
def test_real_worked_examples(task: str, pool: int) -> None:
    zero, three = load(task, str(DATA.parent)), load(task, str(DATA.parent), few_shot=3, seed=5)
    assert three.worked_examples == pool
    contexts = set()
    for plain, question in zip(zero.questions, three.questions, strict=True):
        if isinstance(plain, Prompt) and isinstance(question, Prompt):
            contexts.add(question.prompt.removesuffix(plain.prompt))
            assert question.prompt != plain.prompt
        elif isinstance(plain, Question) and isinstance(question, Question):
            assert plain.answer == question.answer
            for own, candidate in zip(plain.candidates, question.candidates, strict=True):
                assert candidate.prompt.endswith(own.prompt) and candidate.continuation == own.continuation
            contexts.add(question.candidates[0].prompt.removesuffix(plain.candidates[0].prompt))
    # Of five examples there are sixty ordered draws; questions draw apart from each other.
    assert len(contexts) > 0.6 * len(zero.questions)


@real
def test_what_the_real_repackaged_files_lack() -> None:
    for task in ("scienceqa", "scienceqa_cot", "scienceqa_all", "ekar_cot"):
        with pytest.raises(ValueError, match=f"^{task}: {re.escape(str(DATA))}.* or evaluate "):
            load(task, str(DATA.parent))
