"""`t5x contamination`: planted questions in both stages, what the file holds, and slips."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tasks
from codellm_jax import cli
from codellm_jax.configuration import build, read_configuration
from codellm_jax.evaluation import contamination
from codellm_jax.evaluation.contamination import Contamination, measure, measure_into, table
from codellm_jax.mixture import overlap
from codellm_jax.mixture.mixture import Mixture
from codellm_jax.prepare.steps import steps_of
from codellm_jax.vocabulary import load_vocabulary
from tasks.benchmarks.judging import Benchmarks
from tasks.benchmarks.loading import load
from tasks.benchmarks.texts import read_texts

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
FILLING = "a row of tokens is read by its number and never lost while one model learns " * 9
TASKS = ["logic", "scienceqa", "mbpp", "dureader"]


@pytest.fixture(scope="module")
def questions() -> dict[str, dict[str, tuple[str, ...]]]:
    return {task: read_texts(task, None).parts for task in TASKS}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, questions):
    """Two corpora of documents and one of instructions: of logic the first question, and too little of the fourth one;
    of mbpp the second, of scienceqa the first as an instruction; of dureader the first, held out.
    """
    folder = tmp_path_factory.mktemp("planted")
    logic, science, mbpp, dureader = ([*questions[task].values()] for task in TASKS)
    files = {
        "text": [f"{FILLING} {logic[3][0][:22]} {FILLING}", f"{FILLING} {logic[0][0]} {FILLING}", FILLING],
        "held_out": [f"{FILLING} {dureader[0][0]}"],
        "code": [FILLING, "\n".join(mbpp[1]) + "\n" + FILLING]}
    for name, documents in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    asked = [{"input": "Say something.", "target": "Something."}, {"input": science[0][0], "target": science[0][1]}]
    (folder / "asked.json").write_text(json.dumps(asked))
    return {
        "text.planted": {"json_lines": str(folder / "text.jsonl"), "validation": str(folder / "held_out.jsonl")},
        "code.planted": {"json_lines": str(folder / "code.jsonl"), "holdout": 0},
        "text.asked": {"instructions": str(folder / "asked.json"), "holdout": 0}}


@pytest.fixture(scope="module")
def flags(corpora, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return [f"--gin.CORPORA={corpora}", f"--gin.CACHE_DIR={cache}", f"--gin.TASKS={TASKS}"]


def pretraining(flags: list[str], *more: str) -> list[str]:
    return ["contamination", "--gin_file=gin/mixed_pretrain.gin", *flags,
            "--gin.MIXTURE_OR_TASK_NAME=['text.planted', 'code.planted']", "--gin.TASK_FEATURE_LENGTHS={'targets': 32}",
            *more]


def overlapping(file: Path) -> dict[str, dict[str, list[str]]]:
    """For each task the ids by source, where there are any."""
    found = json.loads(file.read_text())["tasks"]
    return {task: {source: here["ids"] for source, here in of["sources"].items() if here["ids"]}
            for task, of in found.items()}


def test_questions_of_the_samples_planted_in_pretraining(flags, questions, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert cli.main(pretraining(flags, f"--output={file}")) == 0
    printed = capsys.readouterr().out
    logic, mbpp = [*questions["logic"]][0], [*questions["mbpp"]][1]
    assert overlapping(file) == {
        "logic_sample": {"text.planted": [logic]}, "mbpp_sample": {"code.planted": [mbpp]}, "scienceqa_sample": {},
        "dureader_sample": {}}
    found = json.loads(file.read_text())
    assert [found[name] for name in ("n", "minimum", "characters", "minimum_characters")] == [13, 8, 26, 16]
    assert found["sources"].keys() == {"text.planted", "code.planted"}
    one = found["tasks"]["logic_sample"]
    assert (one["questions"], one["data"]) == (len(load("logic", None).questions), load("logic", None).sha256)
    assert one["sources"]["text.planted"]["overlapping"] == 1
    assert len(one["sources"]["text.planted"]["ngrams"][logic].split()) == 25  # the whole of it
    assert one["sources"]["code.planted"] == {"overlapping": 0, "ids": [], "ngrams": {}}
    [row] = [line.split() for line in printed.splitlines() if line.startswith("logic_sample  ")]
    assert row == ["logic_sample", str(one["questions"]), str(one["not_measurable"]), "1", "text.planted", "1"]
    assert f"mbpp_sample {mbpp} in code.planted: " in printed and "searched" in printed
    # The same again is read, not searched for; with another n it is.
    before = file.read_bytes()
    assert cli.main(pretraining(flags, f"--output={file}")) == 0
    assert "searched" not in (again := capsys.readouterr().out) and again.splitlines()[0] in printed
    assert file.read_bytes() == before
    assert cli.main(pretraining(flags, f"--output={file}", "--gin.NGRAM=10")) == 0
    assert "searched" in capsys.readouterr().out and json.loads(file.read_text())["n"] == 10
    # Of Chinese 13 characters, which any text may share, were enough to mark the fourth question, too.
    assert cli.main(pretraining(flags, f"--output={file}", "--gin.contamination.characters=13")) == 0
    assert overlapping(file)["logic_sample"] == {"text.planted": [logic, [*questions["logic"]][3]]}


def test_a_source_is_searched_whatever_share_falls_to_it(flags, tmp_path):
    assert cli.main(pretraining(flags, f"--output={tmp_path}/found.json", "--gin.CODE_RATE=0.0")) == 0
    assert json.loads((tmp_path / "found.json").read_text())["sources"].keys() == {"text.planted", "code.planted"}


def test_questions_of_the_samples_planted_in_tuning(flags, pretrained, questions, tmp_path, capsys):
    arm = ["contamination", "--gin_file=gin/tune_text.gin", f"--gin.INITIAL_CHECKPOINT_PATH={pretrained / 'NL'}",
           *flags, "--gin.MIXTURE_OR_TASK_NAME=['text.asked']", f"--output={tmp_path}/found.json"]
    assert cli.main(arm) == 0
    # Of the two examples, rows of 32 tokens, the question's begins with it.
    assert overlapping(tmp_path / "found.json")["scienceqa_sample"] == {"text.asked": [[*questions["scienceqa"]][0]]}
    sources = json.loads((tmp_path / "found.json").read_text())["sources"]
    assert sources["text.asked"]["stage"] == "tuning"
    # What it was pre-trained on is searched, too.
    assert sources.keys() == {"text.asked", "text.tiny", "code.tiny"} and sources["text.tiny"]["stage"] == "pretraining"


def test_the_stages_before_a_run_are_searched(monkeypatch):
    """A branch of a run that went on from published weights, by way of one whose directory is gone."""
    def record(stage: str, name: str, before: list[str]) -> dict:
        return {"ledger": {"stage": stage, "before": [{"model_dir": path} for path in before]}, "settings": {
            "mixture.name": "%NAME", "NAME": f"['{name}']", "mixture.lengths": "{'targets': 32}",
            "mixture.code_rate": "0.0", "mixture.stage": f"'{stage}'", "mixture.definitions": "@evil()",
            "tasks.modules": "['tasks.pretraining']", "tasks.corpora": f"{{'{name}': {{'python': 'text'}}}}",
            "vocabulary.path": "'python_8k'", "train.batch_size": "8"}}

    records = {"hf://ORG/NAME": record("imported", "text.x", []), "runs/first": record(
        "pretraining", "text.first", ["hf://ORG/NAME"]), "runs/trunk": record(
            "pretraining", "text.trunk", ["hf://ORG/NAME", "runs/first", "runs/gone"])}

    def newest_record(path: str) -> tuple[int, dict]:
        if path not in records:
            raise FileNotFoundError(f"there is no checkpoint in {path}")
        return 4, records[path]

    monkeypatch.setattr(contamination, "newest_record", newest_record)
    settings = [("train.branch_from", "'runs/trunk@4'"), ("train.initial_checkpoint_path", "None")]
    told: list[str] = []
    found = contamination.mixtures_behind(read_configuration([], settings), told.append)
    assert [(mixture.name, mixture.length, vocabulary.pieces) for mixture, vocabulary in found] == [
        (["text.first"], 32, load_vocabulary().pieces), (["text.trunk"], 32, load_vocabulary().pieces)]
    assert told[0] == "Not searched: the training data of hf://ORG/NAME is not known." and len(told) == 2
    assert "there is no checkpoint in runs/gone" in told[1]
    none = [("train.branch_from", "None"), ("train.initial_checkpoint_path", "None")]
    assert contamination.mixtures_behind(read_configuration([], none)) == []


def test_a_run_by_its_own_configuration(flags, pretrained, tmp_path):
    assert cli.main(["contamination", f"--gin_file={pretrained / 'CODE' / 'config.gin'}", "--gin.TASKS=['logic']",
                     f"--output={tmp_path}/found.json"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["sources"].keys() == {"text.tiny", "code.tiny"} and overlapping(tmp_path / "found.json") == {
        "logic_sample": {}}


def test_several_mixtures_at_once(corpora, tmp_path, questions, monkeypatch):
    """Each source once; one that is cut in two lengths in both forms, and its questions counted once."""
    definitions = tasks.Definitions(("tasks.pretraining",), corpora)
    vocabulary = load_vocabulary()

    def mixture(names: list[str], length: int, stage: str = "pretraining") -> tuple[Mixture, object]:
        return Mixture(names, definitions, {"targets": length}, 0.5, cache_dir=str(tmp_path), stage=stage), vocabulary

    mixtures = [mixture(["text.planted", "code.planted"], 32), mixture(["text.planted"], 64),
                mixture(["text.planted", "code.planted"], 32), mixture(["text.asked"], 64, "tuning")]
    asked = Contamination(TASKS, Benchmarks(), processes=1)
    found = measure_into(f"{tmp_path}/found.json", asked, mixtures, report=lambda line: None)
    assert len(found["sources"]["text.planted"]["rows"]) == 2 and len(found["sources"]["code.planted"]["rows"]) == 1
    assert found["tasks"]["logic_sample"]["sources"]["text.planted"]["ids"] == [[*questions["logic"]][0]]
    assert found["tasks"]["scienceqa_sample"]["sources"]["text.asked"]["overlapping"] == 1
    assert json.loads((tmp_path / "found.json").read_text()) == found
    monkeypatch.setattr(overlap, "TOKENS_A_RANGE", 64)
    assert measure(asked, mixtures[::-1], report=lambda line: None)["tasks"] == found["tasks"]
    assert "text.planted 1" in table(found)


def test_tokens_are_those_that_are_trained_on(corpora, questions, tmp_path):
    mixture = Mixture(["text.asked"], tasks.Definitions(("tasks.tuning",), corpora), {"targets": 32}, 0.0,
                      cache_dir=str(tmp_path), stage="tuning")
    vocabulary = load_vocabulary()
    found = measure(Contamination(["logic"], Benchmarks()), [(mixture, vocabulary)], report=lambda line: None)
    texts = [("Say something.", "Something."), [*questions["scienceqa"].values()][0][:2]]
    sizes = [sum(len(vocabulary.encode(text)) for text in pair) + 1 for pair in texts]
    assert found["sources"]["text.asked"]["tokens"] == sum(min(size, 33) for size in sizes)


@pytest.mark.parametrize("more, message", [
    (["--gin.TASKS=['logik']"], "There is no benchmark 'logik'"),
    (["--gin.TASKS=[]"], "TASKS must be a list of benchmarks"),
    (["--gin.NGRAM=0"], "NGRAM must be at least 1, found 0"),
    (["--gin.DATA_DIR=/nowhere"], "/nowhere"),
    (["--output=/nowhere/found.json"], "/nowhere/found.json cannot be written: its directory"),
    (["--gin.MIXTURE_OR_TASK_NAME=['text.nothing']"], "No SeqIO task or mixture is named 'text.nothing'"),
])
def test_slips_get_one_line(flags, capsys, more, message):
    assert cli.main(pretraining(flags, *more)) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line and line.startswith("t5x contamination: error: ")


def test_slips_of_files(flags, capsys, tmp_path, pretrained):
    assert cli.main(["contamination"]) == 1
    assert "no --gin_file is given" in capsys.readouterr().err
    assert cli.main(["contamination", "--gin_file=gin/eval.gin", f"--gin.CHECKPOINT_PATH={pretrained / 'NL'}"]) == 1
    assert "no --gin_file names a mixture: add the gin file of an arm" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text('{"a": 1}')
    assert cli.main(pretraining(flags, f"--output={tmp_path}/metrics.json")) == 1
    assert "exists and is not a contamination file" in capsys.readouterr().err
    assert (tmp_path / "metrics.json").read_text() == '{"a": 1}'


def test_the_tasks_are_those_of_an_evaluation():
    of = [next(ast.literal_eval(setting.value) for setting in read_configuration(
        [file], [("CHECKPOINT_PATH", "None"), ("VOCABULARY", "python_8k"), ("TASK_FEATURE_LENGTHS", "{'targets': 8}")]
        if "eval" in file else []).settings if setting.name == "TASKS")
          for file in ("gin/eval.gin", "gin/contamination.gin")]
    assert of[0] == of[1]


def test_the_lengths_are_those_of_a_preparation():
    asked = build(read_configuration(["gin/contamination.gin"], []), "contamination")
    [step] = steps_of(["decontaminate"], ["text.a"])
    assert {name: getattr(asked, name) for name in step.options} == step.options


def test_the_embedded_corpora_hold_no_sample_item():
    found = []
    cache = str(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).parent)  # kept between runs of the tests, as that one is
    for name, module, stage in (("python_text_code", "tasks.pretraining", "pretraining"),
                                ("python_instructions", "tasks.tuning", "tuning")):
        mixture = Mixture(name, tasks.Definitions((module,)), {"targets": 256}, 0.5, cache_dir=cache, stage=stage)
        found.append((mixture, load_vocabulary()))
    every = build(read_configuration(["gin/contamination.gin"], []), "contamination")
    measured = measure(every, found, report=lambda line: None)
    assert len(measured["sources"]) == 4 and len(measured["tasks"]) == 12
    assert {task: [source for source, one in of["sources"].items() if one["ids"]]
            for task, of in measured["tasks"].items()} == {task: [] for task in measured["tasks"]}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real files are not at {DATA}")
def test_mbpp_on_the_problems_it_is_evaluated_on(tmp_path):
    """Of the training problems 120 are in the sanitized set too, most of them with the same program."""
    corpora = {name: {"mbpp": str(DATA / "benchmarks" / "mbpp" / "mbpp.jsonl"), "keep_sanitized": kept}
               for name, kept in (("code.kept", True), ("code.left_out", False))}
    mixture = Mixture([*corpora], tasks.Definitions(("tasks.tuning",), corpora), {"targets": 1024}, 1.0,
                      cache_dir=str(tmp_path), stage="tuning")
    asked = Contamination(["mbpp"], Benchmarks(str(DATA)), most=1000)
    found = measure(asked, [(mixture, load_vocabulary())], report=lambda line: None)["tasks"]["mbpp"]["sources"]

    def joined(text: str) -> str:
        return f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "

    def overlap_with(texts: list[str]) -> set[str]:
        ids = set()
        for one in sanitized:
            for part in (joined(one["prompt"]).split(), joined(one["code"]).split()):
                size = min(13, len(part))
                grams = [" ".join(["", *part[at : at + size], ""]) for at in range(len(part) - size + 1)]
                if size >= 8 and any(gram in text for gram in grams for text in texts):
                    ids.add(str(one["task_id"]))
        return ids

    folder = DATA / "benchmarks" / "mbpp"
    sanitized = json.loads((folder / "sanitized-mbpp.json").read_text())
    problems = [one for one in map(json.loads, (folder / "mbpp.jsonl").open()) if 601 <= one["task_id"] <= 974]
    trained_on = {one["task_id"] for one in problems} & {one["task_id"] for one in sanitized}
    assert len(trained_on) == 120 and len(problems) == 374
    for name, kept in (("code.kept", problems),
                       ("code.left_out", [one for one in problems if one["task_id"] not in trained_on])):
        expected = overlap_with([joined(one[key]) for one in kept for key in ("text", "code")])
        assert set(found[name]["ids"]) == expected, name
    assert len(trained_on & {*map(int, found["code.kept"]["ids"])}) > 110


@pytest.fixture
def searching(tmp_path):
    """Starts a search by two processes that goes on for hours, or whose processes die; returns it once they read."""
    script = tmp_path / "script.py"
    script.write_text("""\
import os, sys, time
import numpy as np
from codellm_jax.mixture import overlap
from codellm_jax.mixture.ngrams import Question, index
from codellm_jax.vocabulary import load_vocabulary

class Rows:
    count, length = 1 << 20, 1024
    def read(self, numbers):
        os.write(1, b"reading\\n")  # at once: two processes write
        if sys.argv[1] == "die":
            os._exit(9)
        time.sleep(0.2)
        return np.ones((len(numbers), 1025), np.int32)

if __name__ == "__main__":
    overlap.TOKENS_A_RANGE = 1 << 20
    question = Question("t", "a", ("a b c d e f g h i",))
    overlap.search([overlap.Trained(Rows(), load_vocabulary(), "pretraining")], index([question]), 2)
""")

    def start(how: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, str(script), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            start_new_session=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert process.stdout.readline() == "reading\n"
        return process

    return start


@pytest.mark.parametrize("number, whole_group", [
    (signal.SIGINT, True), pytest.param(signal.SIGKILL, False, marks=pytest.mark.slow)])
def test_stopped_it_ends_with_its_processes(searching, number, whole_group):
    """Ctrl-C at a terminal reaches the whole group; that the first process alone is killed is noticed by the others."""
    process = searching("go on")
    (os.killpg if whole_group else os.kill)(process.pid, number)
    process.communicate(timeout=60)  # until the last process that could write has ended


def test_a_process_that_dies_is_told(searching):
    process = searching("die")
    assert "ChildProcessError: A search process was killed" in process.communicate(timeout=60)[1]
