"""A study of micro models: planned, killed, gone on with, changed, failing in part, and made by hand."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from codellm_jax import cli
from codellm_jax.configuration import build, read_configuration
from codellm_jax.runtime.provenance import package_versions
from codellm_jax.study.planned import _results as planned_results
from codellm_jax.study.planned import planned_runs

ROOT = Path(__file__).resolve().parents[2]
NL = {"CODE_RATE": 0.0}
NN = {"from": "NL", "CODE_RATE": 0.0}


@pytest.fixture(scope="module")
def study_flags(tiny_flags: list[str], tiny_tuning_flags: list[str]) -> list[str]:
    """Flags of `t5x study` for micro models and one task; STUDY_DIR, ARMS and SEEDS are the test's."""
    def of_stage(stage: str, flags: list[str]) -> list[str]:
        return [flag.replace("--gin.", f"--gin.{stage}/", 1) for flag in flags if flag.startswith("--gin.")]

    return ["--gin_file=gin/study.gin", "--gin.PRETRAINING_FILES=['gin/pretrain.gin']",
            *of_stage("pretraining", tiny_flags), *of_stage("tuning", tiny_tuning_flags),
            "--gin.pretraining/TRAIN_STEPS=4", "--gin.tuning/TRAIN_STEPS=4", "--gin.tuning/BATCH_SIZE=8",
            "--gin.evaluation/TASKS=['logic']"]


# The processes of a study have one device each: eight on two cores take their time.
XLA_FLAGS = "--xla_llvm_disable_expensive_passes=true"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.chdir(ROOT)  # where the processes of a study find the package
    monkeypatch.setenv("XLA_FLAGS", XLA_FLAGS)


def command(directory: Path, flags: list[str], arms: dict[str, Any], *more: str) -> list[str]:
    return ["study", *flags, f"--gin.STUDY_DIR={directory}", f"--gin.ARMS={arms}", "--gin.SEEDS=[0]", *more]


def sessions(directory: Path, run: str) -> list[tuple[int, int | None]]:
    return [(session["from_step"], session["to_step"])
            for session in read(directory / "runs" / run / "provenance.json")["sessions"]]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def fingerprint(directory: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in directory.rglob("*.json") if "checkpoints" in path.parts
            or path.name in ("provenance.json", "logic_sample.json")}


@pytest.fixture(scope="module")
def finished(
    study_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[str]]:
    """A study of NL and NN that was interrupted three times; its directory, its arms, what its last command said."""
    directory, arms = tmp_path_factory.mktemp("study") / "s", {"NN": NN, "NL": NL}
    line = [sys.executable, "-W", "ignore", "-m", "codellm_jax.cli", *command(
        directory, study_flags, arms, "--gin.pretraining/CHECKPOINT_PERIOD=40", "--gin.pretraining/TRAIN_STEPS=600",
        "--gin.tuning/TRAIN_STEPS=600", "--gin.tuning/EVAL_PERIOD=600", "--gin.pretraining/EVAL_PERIOD=600",
        "--gin.tuning/CHECKPOINT_PERIOD=40")]
    log, environment = directory.parent / "log.txt", os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": XLA_FLAGS}

    def stop_at(run: str, steps: int, number: int) -> int:
        with log.open("a") as output:
            process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=output, stderr=output)
            metrics, end = directory / "runs" / run / "metrics.jsonl", time.monotonic() + 120
            saved = directory / "runs" / run / "checkpoints"
            while (not metrics.exists() or f'"step": {steps},' not in metrics.read_text()
                   or not any(path.name.isdigit() for path in saved.glob("*")) and number == signal.SIGKILL):
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.02)
            process.send_signal(number)
            return process.wait(60)

    assert stop_at("NL.seed0", 20, signal.SIGTERM) == 128 + signal.SIGTERM
    assert stop_at("NL.seed0", 60, signal.SIGKILL) == -signal.SIGKILL
    assert stop_at("NN.seed0", 60, signal.SIGKILL) == -signal.SIGKILL
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, arms, [done.stdout, *line[line.index("study"):]]


def test_a_study_killed_three_times_is_finished_and_its_shared_run_trained_once(finished):
    directory, _, (said, *_) = finished
    # Stopped by a signal that lets it save, killed after the checkpoint of step 40 or later, finished.
    steps = sessions(directory, "NL.seed0")
    assert len(steps) == 3 and steps[0][0] == 0 and 20 <= steps[0][1] == steps[1][0] and steps[1][1] is None
    assert steps[2][0] % 40 == 0 or steps[2][0] == steps[0][1]
    assert steps[2][1] == 600
    assert [end for _, end in sessions(directory, "NN.seed0")] == [None, 600]
    assert "[1/2] NL.seed0: done before" in said and "[2/2] NN.seed0: done, train " in said
    assert f"All 2 runs are trained and evaluated: {directory}" in said
    for run in ("NL.seed0", "NN.seed0"):
        result = read(directory / "runs" / run / "results" / "logic_sample.json")
        provenance = read(directory / "runs" / run / "provenance.json")
        assert result["checkpoint"]["digest"] == provenance["checkpoint"] and result["checkpoint"]["step"] == 600


def test_provenance_names_what_a_run_and_its_results_came_of(finished):
    directory, _, _ = finished
    nl, nn = (read(directory / "runs" / f"{arm}.seed0" / "provenance.json") for arm in ("NL", "NN"))
    assert nl["arm"] == "NL" and nn["arm"] == "NN" and nl["finished"] and nl["step"] == nl["last_step"] == 600
    assert nl["versions"] == package_versions() and nl["versions"]["jax"] and nl["versions"]["tensorflow"]
    assert nl["config_hash"] != nn["config_hash"] and len(nl["config_hash"]) == 64 and nl["seed"] == 0
    assert set(nl["data"]) == {"text.tiny", "code.tiny"} and nl["order"] == nl["ledger"]["order_fingerprint"]
    assert nl["ledger"]["rows"] == {"text.tiny": 4800, "code.tiny": 0}
    # What it was tuned from is known by the digest of that checkpoint.
    assert nn["ledger"]["before"][0]["digest"] == nl["checkpoint"]
    of_result = read(directory / "runs" / "NN.seed0" / "results" / "logic_sample.json")["provenance"]
    assert of_result["training_config_hash"] == nn["config_hash"] and of_result["versions"] == nl["versions"]
    assert of_result["asked"]["TASKS"] == "['logic']"
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert nl["code"]["commit"] == head.strip() and isinstance(nl["code"]["dirty"], bool)


def test_contamination_was_measured_of_all_that_the_runs_train_on(finished):
    found = read(finished[0] / "contamination.json")
    assert set(found["tasks"]["logic_sample"]["sources"]) == {"text.tiny", "code.tiny", "text.asked", "code.asked"}


def test_the_plan_is_written_down(finished):
    directory, _, _ = finished
    plan = read(directory / "study.json")
    assert plan["comparison"] == "compute-matched" and plan["common"]["tuning"]["settings"]["TRAIN_STEPS"] == "600"
    assert [(run["run"], run["arm"], run["stage"], run["seed"], run["from"], run["mix"], run["settings"])
            for run in plan["runs"]] == [
        ("NL.seed0", "NL", "pretraining", 0, None, "constant", {"CODE_RATE": 0.0}),
        ("NN.seed0", "NN", "tuning", 0, "NL.seed0", "constant", {"CODE_RATE": 0.0})]


@pytest.mark.slow
def test_a_changed_configuration_is_refused_and_redone_only_when_asked(finished, capsys):
    directory, _, (_, *arguments) = finished
    before = fingerprint(directory)
    longer = [*arguments, "--gin.tuning/LEARNING_RATE=0.5"]
    assert cli.main(longer) == 1
    said = capsys.readouterr()
    assert "NN.seed0 was trained under another configuration: LEARNING_RATE was 0.001, is 0.5" in said.out
    assert "1 run(s)" in said.err and "--redo" in said.err and "NL.seed0 was" not in said.out
    assert len(said.err.strip().splitlines()) == 1
    assert cli.main([*arguments, "--gin.evaluation/SCORING=sum"]) == 1
    said = capsys.readouterr()
    assert "NN.seed0 was evaluated under another configuration: SCORING was 'per_token', is 'sum'" in said.out
    assert fingerprint(directory) == before
    # With --redo the run is made again, the old one kept, and that which it starts from left as it is.
    assert cli.main([*longer, "--gin.tuning/TRAIN_STEPS=4", "--gin.tuning/EVAL_PERIOD=4", "--redo"]) == 0, \
        capsys.readouterr()
    assert "NN.seed0 is run again; its old files are in" in capsys.readouterr().out
    replaced = directory / "replaced" / "NN.seed0-1"
    assert read(replaced / "provenance.json")["last_step"] == 600 and (replaced / "results").is_dir()
    assert read(directory / "runs" / "NN.seed0" / "provenance.json")["last_step"] == 4
    assert {path: time for path, time in fingerprint(directory / "runs").items() if "NL.seed0" in path} == {
        path: time for path, time in before.items() if "NL.seed0" in path}


@pytest.mark.slow
def test_a_failing_arm_does_not_stop_the_others(study_flags, tmp_path, capsys):
    arms = {"BAD": NL | {"MIXTURE_OR_TASK_NAME": ["text.nowhere"]}, "NB": NN | {"from": "BAD"},
            "FAST": NL | {"LEARNING_RATE": 1e30, "WARMUP_STEPS": 0}, "NL": NL}
    assert cli.main(command(tmp_path, study_flags, arms)) == 1
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert len(lines) == 3, said.err
    assert lines[0].startswith("t5x study: error: BAD.seed0: No SeqIO task or mixture is named 'text.nowhere'")
    assert lines[1] == "t5x study: error: NB.seed0 is skipped, because it starts from BAD.seed0."
    assert lines[2].startswith("t5x study: error: FAST.seed0: train failed: ") and "The loss became nan" in lines[2]
    assert "[4/4] NL.seed0: done, train " in said.out and "1 of 4 runs are done" in said.out
    assert (tmp_path / "runs" / "NL.seed0" / "results" / "logic_sample.json").exists()
    assert "loss" in (tmp_path / "runs" / "FAST.seed0" / "train.log").read_text()


@pytest.mark.slow
def test_the_printed_commands_make_the_study(study_flags, tmp_path, capsys):
    arms = {"CODE": {"CODE_RATE": 0.5}, "CN": {"from": "CODE", "CODE_RATE": 0.0},
            "CC-increase": {"from": "CODE", "MIX_PHASES": ["7:3", "5:5"]}}
    arguments = command(tmp_path, study_flags, arms)
    assert cli.main([*arguments, "--print_commands"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "study.json").exists()
    groups = [line for line in printed if line.startswith("# Group")]
    assert groups == ["# Group 1", "# Group 2, once the group before is done"]
    made = [line for line in printed if line.startswith("t5x train")]
    assert [line.split("MODEL_DIR=")[1].split("/runs/")[1].split()[0] for line in made] == [
        "CODE.seed0", "CN.seed0", "CC-increase.seed0"]
    for line in made:
        for one in line.split(" && "):
            assert cli.main(shlex.split(one)[1:]) == 0, capsys.readouterr().err
    capsys.readouterr()
    before = fingerprint(tmp_path)
    assert shlex.split(printed[-1]) == ["t5x", *arguments]
    assert cli.main(shlex.split(printed[-1])[1:]) == 0
    said = capsys.readouterr().out
    assert [line.split(": ")[1] for line in said.splitlines() if line.startswith("[")] == ["done before"] * 3
    assert fingerprint(tmp_path) == before
    assert [run["arm"] for run in read(tmp_path / "study.json")["runs"]] == ["CODE", "CN", "CC-increase"]
    # One arm and what it stands on; nothing is left to do, and the plan on disk stays whole.
    assert cli.main([*arguments, "--arm=CC", "--seed=0"]) == 0
    assert "[2/2] CC-increase.seed0: done before" in capsys.readouterr().out
    assert len(read(tmp_path / "study.json")["runs"]) == 3


def test_dry_run_tells_tokens_and_time_and_trains_nothing(study_flags, tmp_path, capsys):
    arms = {"NL": NL, "CODE": {"CODE_RATE": 0.25}, "NN": NN}
    flags = command(tmp_path / "s", study_flags, arms, "--gin.COMPARISON=data-matched",
                    "--gin.pretraining/TRAIN_STEPS=9")
    assert cli.main([*flags, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    nl, code, nn = (next(line for line in printed.splitlines() if line.startswith(f"{arm} ")).split()
                    for arm in ("NL", "CODE", "  NN"))
    # 8 rows of 32; 9 / 0.75 = 12 steps.
    assert nl[1:6] == ["pretraining", "-", "constant", "9", f"{9 * 8 * 32:,}"]
    assert code[4:6] == ["12", f"{12 * 8 * 32:,}"]
    assert nn[:3] == ["NN", "tuning", "NL"] and "code.tiny" in printed and "data-matched, 3 runs" in printed
    assert "equal text     2,304 tokens: NL, CODE" in printed
    assert "measured     CODE.seed0: 3 steps after the first" in printed or "measured     NL.seed0: 3 steps" in printed
    assert "3 evaluations of 1 tasks are not included" in printed
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("comparison, steps", [("compute-matched", [60, 60, 20, 20, 20]),
                                               ("data-matched", [60, 90, 20, 32, 32])])
def test_the_shipped_study_under_both_comparisons(comparison, steps):
    """60 / (1 - 1/3) = 90; 20 / (1 - 3/8) = 32, the mean of both schedules too."""
    configuration = read_configuration(["gin/study.gin"], [("COMPARISON", comparison)])
    planned, told = planned_runs(build(configuration, "study"), configuration, [])
    by_arm = {one.run.arm.name: one for one in planned}
    assert len(planned) == 20 and not told
    assert [by_arm[arm].run.steps for arm in ("NL", "CODE", "NN", "NC-uniform", "CC-decrease")] == steps
    assert [by_arm[arm].training.resolved("train.train_steps") for arm in ("NL", "CODE")] == [
        str(step) for step in steps[:2]]


def test_an_arms_own_file_is_above_the_stage_and_its_rate_above_the_stages_phases():
    configuration = read_configuration(["gin/study.gin"], [
        ("MORE_ARMS", str({"WIDE": {"gin_file": "gin/models/125m.gin", "CODE_RATE": 0.5},
                           "WN": {"from": "WIDE", "CODE_RATE": 0.0}})),
        ("pretraining/MIX_PHASES", "['5:5', '7:3']"), ("pretraining/DROPOUT_RATE", "0.1")])
    planned, _ = planned_runs(build(configuration, "study"), configuration, [])
    wide, tuned = (next(one for one in planned if one.run.arm.name == name) for name in ("WIDE", "WN"))
    assert wide.training.resolved("train.train_steps") == "10000" and wide.training.resolved("model.layers") == "12"
    assert wide.training.resolved("model.dropout_rate") == "0.1"
    assert wide.training.resolved("mixture.mix_phases") == "None" and wide.run.mix == "constant"
    # What is tuned from it is of its size.
    assert tuned.training.resolved("model.hidden") == "768" and "model.hidden" not in tuned.training.asked


@pytest.mark.parametrize("arguments, message", [
    (["--gin.pretraining/BATCHSIZE=8"], "NL: --gin.BATCHSIZE: nothing uses the setting BATCHSIZE"),
    (["--gin.evaluation/TASK=1"], "evaluation: --gin.TASK: nothing uses the setting TASK"),
    (["--gin_file=gin/models/125m.gin"], "gin/models/125m.gin:6: a size is set for pre-training"),
    (["--gin.VOCABULARI=my.model"], "no stage of the study reads the setting VOCABULARI; nearest: VOCABULARY"),
    (["--gin.SEED=3"], "--gin.SEED: the study sets SEED itself: SEEDS lists seeds"),
    (["--gin.modle.layers=3"], "nothing is named 'modle'; nearest: model"),
    (["--arm=XX"], "--arm=XX: the study has no such arm; it has NL, CODE"),
    (["--gin.COMPARISON=fair"], "COMPARISON must be one of"),
    (["--gin.ARMS={'NL': {}}"], "NL: neither CODE_RATE nor MIX_PHASES is set"),
])
def test_slips_get_one_line(arguments, message, capsys):
    assert cli.main(["study", "--gin_file=gin/study.gin", *arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines


def test_a_file_that_is_no_study_is_refused(capsys):
    assert cli.main(["study", "--gin_file=gin/mixed_pretrain.gin"]) == 1
    assert "describe no study: add one such as gin/study.gin" in capsys.readouterr().err


def test_settings_without_a_stage_hold_for_every_stage_that_reads_them():
    corpora = "{'text.a': {'json_lines': 'a.jsonl'}, 'code.b': {'instructions': 'b.json'}}"
    configuration = read_configuration(["gin/study.gin"], [
        ("CORPORA", corpora), ("VOCABULARY", "my.model"), ("DATA_DIR", "/data"), ("model.layers", "2"),
        ("LOG_PERIOD", "5"), ("tuning/LOG_PERIOD", "7"), ("TASKS", "['logic']"), ("adamw.b2", "0.9")])
    planned, _ = planned_runs(build(configuration, "study"), configuration, [])
    pretrained, tuned = (next(one for one in planned if one.run.arm.name == name) for name in ("NL", "NN"))
    for one in (pretrained, tuned):
        assert one.training.resolved("tasks.corpora") == corpora
        assert one.training.resolved("model.layers") == "2"
        assert one.training.resolved("vocabulary.path") == "'my.model'"
        assert one.training.resolved("adamw.b2") == "0.9"
        assert one.tasks == ("logic",) and one.evaluation.resolved("benchmarks.data_dir") == "'/data'"
    assert pretrained.training.resolved("train.log_period") == "5"  # a stage's own is above
    assert tuned.training.resolved("train.log_period") == "7"
    # What a tuned run takes over is not asked of it again, so that an arm of another size can be tuned too.
    assert "model.layers" in pretrained.training.asked and "model.layers" not in tuned.training.asked
    assert "CORPORA" not in pretrained.evaluation.asked and "EVAL_TASKS" not in pretrained.evaluation.asked


@pytest.mark.parametrize("name, lines", [
    ("evaluation/TASKS", ["evaluation/TASKS = ['logic']", "  set by --gin.evaluation/TASKS", "  overriding", "  used"]),
    ("tuning/BATCH_SIZE", ["tuning/BATCH_SIZE = 8", "  set by gin/study.gin:", "  overriding 16 of gin/tune.gin:"]),
    ("model.layers", ["pretraining/model.layers = 2", "  set by --gin.model.layers", "  overriding 4 of gin/models/t"]),
    ("pretraining/CODE_RATE", ["pretraining/CODE_RATE = None", "  set by the study's plan"]),
    ("SEEDS", ["SEEDS = [0, 1]", "  set by gin/study.gin:"]),
])
def test_explain_answers_of_a_studys_stages(capsys, name, lines):
    assert cli.main(["explain", name, "--gin_file=gin/study.gin", "--gin.evaluation/TASKS=['logic']",
                     "--gin.model.layers=2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for line, start in zip(printed, lines, strict=False):
        assert line.startswith(start), printed


@pytest.mark.slow
def test_without_benchmarks_a_study_gives_losses(study_flags, tmp_path, capsys):
    flags = command(tmp_path, study_flags, {"NL": NL}, "--gin.evaluation/TASKS=[]")
    assert cli.main(flags) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "All 1 runs are trained: " in said and " eval" not in said
    [row] = [line for line in said.splitlines() if line.startswith("NL.seed0  ")]
    records = [json.loads(line) for line in (tmp_path / "runs/NL.seed0/metrics.jsonl").read_text().splitlines()]
    last = [line for line in records if line["split"] == "eval"][-1]
    assert row.split()[1:] == ["4", f"{last['loss/text']:.4f}", f"{last['loss/code']:.4f}",
                               f"{last['bits_per_byte/text']:.4f}", f"{last['bits_per_byte/code']:.4f}"]
    assert not (tmp_path / "runs" / "NL.seed0" / "results").exists()
    assert "perplexity" in (tmp_path / "report" / "report.md").read_text()
    assert cli.main([*flags, "--print_commands"]) == 0
    assert "t5x eval" not in capsys.readouterr().out
    assert cli.main(flags) == 0 and "[1/1] NL.seed0: done before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_branches_from_steps_of_a_trunk(study_flags, tmp_path, capsys):
    """The trunk is trained once and keeps the steps; a branch of its own settings ends as the trunk does."""
    arms = {"TRUNK": {"CODE_RATE": 0.5}, "SAME": {"from": "TRUNK@0.5"},
            "GRID": {"from": "TRUNK", "sweep": {"at": [0.25, 3], "CODE_RATE": [0.1]}, "TRAIN_STEPS": 6},
            "TUNED": {"from": "GRID", "CODE_RATE": 0.0}}
    losses = ["--gin.evaluation/TASKS=[]"]
    planned = command(tmp_path, study_flags, arms, *losses)
    assert cli.main([*planned, "--dry_run"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    assert "SAME pretraining TRUNK@2 " in words and "GRID-0.25-0.1 pretraining TRUNK@1 " in words
    assert "TUNED-0.25-0.1 tuning GRID-0.25-0.1 " in words and "error" not in printed
    assert cli.main(planned) == 0, capsys.readouterr().err
    runs = tmp_path / "runs"
    ends = {name: [line for line in map(json.loads, (runs / f"{name}.seed0" / "metrics.jsonl").read_text().splitlines())
                   if line["split"] == "eval"][-1] for name in ("TRUNK", "SAME", "GRID-3-0.1")}
    assert ends["SAME"]["loss"] == ends["TRUNK"]["loss"] and ends["GRID-3-0.1"]["step"] == 6
    assert {path.name for path in (runs / "TRUNK.seed0" / "checkpoints").iterdir()} >= {"1", "2", "3", "4"}
    assert [stage["stage"] for stage in read(runs / "TUNED-3-0.1.seed0" / "provenance.json")["ledger"]["before"]] == [
        "pretraining", "pretraining"]
    capsys.readouterr()
    assert cli.main(planned) == 0  # nothing is to do
    assert sessions(tmp_path, "SAME.seed0") == [(2, 4)] and "done before" in capsys.readouterr().out


@pytest.mark.slow
def test_four_workers_of_whom_two_are_killed_train_what_one_trains(study_flags, tmp_path):
    """Bit for bit, and no step twice but those after the last checkpoint of a run whose worker was killed."""
    arms = {"NL": NL, "CODE": {"CODE_RATE": 0.5}, "NN": NN, "CN": {"from": "CODE", "CODE_RATE": 0.0}}
    common = ["--gin.evaluation/TASKS=[]", "--gin.pretraining/model.layers=1"]
    common += [f"--gin.{stage}/{name}" for stage in ("pretraining", "tuning")
               for name in ("CHECKPOINT_PERIOD=20", "TRAIN_STEPS=160", "EVAL_PERIOD=160")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": XLA_FLAGS}

    def start(directory: Path, *more: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "log.txt").open("a") as output:
            return subprocess.Popen([sys.executable, "-W", "ignore", "-m", "codellm_jax.cli", *command(
                directory, study_flags, arms, *common, *more)], cwd=ROOT, env=environment, stdout=output, stderr=output)

    def saved() -> int:
        return len([path for path in shared.glob("runs/*/checkpoints/*") if path.name.isdigit()])

    def at_work() -> list[subprocess.Popen[bytes]]:
        holding = [read(path)["process"] for path in (shared / "state").glob("*seed0.lease")]
        return [worker for worker in workers if worker.pid in holding]

    shared, alone = tmp_path / "shared", tmp_path / "alone"
    workers = [start(shared, "--worker", "--lease_seconds=12") for _ in range(4)]
    try:
        for count in (2, 5):
            end = time.monotonic() + 300
            while saved() < count or not at_work():
                assert time.monotonic() < end, (tmp_path / "log.txt").read_text()
                time.sleep(0.05)
            victim = at_work()[0]
            workers.remove(victim)
            victim.kill()
            victim.wait()
        assert [worker.wait(400) for worker in workers] == [0, 0], (tmp_path / "log.txt").read_text()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert start(alone).wait(400) == 0, (tmp_path / "log.txt").read_text()
    killed = 0
    for run in ("NL.seed0", "CODE.seed0", "NN.seed0", "CN.seed0"):
        # The digest of a checkpoint covers the paths that its settings name, the checksums its arrays alone.
        one, other = (read(directory / "runs" / run / "checkpoints" / "160" / "record" / "metadata")
                      for directory in (alone, shared))
        assert one["checksums"] == other["checksums"] and one["place"] == other["place"]
        losses = [[{key: value for key, value in json.loads(line).items() if "loss" in key or key == "step"}
                   for line in (directory / "runs" / run / "metrics.jsonl").read_text().splitlines()]
                  for directory in (alone, shared)]
        assert losses[0] == losses[1] and losses[0]
        ends = sessions(shared, run)
        assert sessions(alone, run) == [(0, 160)] and ends[-1][1] == 160 and ends[0][0] == 0
        assert all(end is None and after[0] % 20 == 0 for (_, end), after in zip(ends, ends[1:], strict=False))
        killed += len(ends) - 1
    assert killed <= 2


def test_results_of_a_file_of_questions(tmp_path, monkeypatch):
    """They are those of the file that TASKS names, or of the options in BENCHMARKS; what others say is free."""
    monkeypatch.chdir(tmp_path)

    def planned(task: str, specs: dict) -> Any:
        configuration = read_configuration(["gin/study.gin"], [
            ("STUDY_DIR", str(tmp_path)), ("evaluation/TASKS", str([task])), ("BENCHMARKS", str(specs))])
        return next(iter(planned_runs(build(configuration, "study"), configuration, [])[0]))

    def write(name: str, file: str, specs: dict) -> None:
        one = planned(name, specs)
        results = Path(one.folder) / "results"
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{name}.json").write_text(json.dumps({
            "checkpoint": {"digest": "d"}, "files": [file], "provenance": {"asked": dict(one.evaluation.asked)}}))

    mine, other = ({"mine": {"file": file}} for file in ("a.jsonl", "b.jsonl"))
    write("my_questions", str(tmp_path / "my-questions.jsonl"), {})
    assert planned_results(planned("my-questions.jsonl", mine), "d") == ([], True)
    write("my_questions", str(tmp_path / "other" / "my-questions.jsonl"), {})
    assert planned_results(planned("my-questions.jsonl", {}), "d") == ([], False)
    write("mine", str(tmp_path / "a.jsonl"), mine)
    assert planned_results(planned("mine", mine), "d") == ([], True)
    assert planned_results(planned("mine", other), "d") == ([], False)


@pytest.mark.slow
def test_a_study_on_files_of_questions(study_flags, tmp_path, capfd):
    """Searched for, asked and reported like the others, by a name of BENCHMARKS and by the path itself."""
    record = {"stem": "Which?", "choices": ["one", "two"], "answer": 1}
    (tmp_path / "own.jsonl").write_text(f"{json.dumps(record)}\n" * 5)
    (tmp_path / "sums.jsonl").write_text('{"question": "3 + 4?", "answer": "#### 7"}\n')
    specs = {"mine": {"file": f"{tmp_path}/own.jsonl", "fields": {"question": "stem"}}}
    flags = [*study_flags[:-1], f"--gin.evaluation/TASKS=['mine', '{tmp_path}/sums.jsonl']",
             "--gin.evaluation/sampling.max_new_tokens=4", f"--gin.BENCHMARKS={specs}"]
    assert cli.main(command(tmp_path / "study", flags, {"NL": NL})) == 0
    results = tmp_path / "study" / "runs" / "NL.seed0" / "results"
    assert {path.name for path in results.glob("*.json")} == {"mine.json", "sums.json"}
    assert read(tmp_path / "study" / "contamination.json")["tasks"].keys() == {"mine", "sums"}
    report = "".join(path.read_text() for path in (tmp_path / "study" / "report").glob("*.md"))
    assert "mine" in report and "sums" in report
    capfd.readouterr()
    assert cli.main(command(tmp_path / "study", flags, {"NL": NL})) == 0
    assert "evaluat" not in capfd.readouterr().out.replace("trained and evaluated", "")
