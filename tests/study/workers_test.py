"""Several workers on one study: killed, stopped, suspended, failing, and side by side; nothing is trained twice.

Runs are stood in for by `stand_in`, but in the last test.
"""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from codellm_jax.study import worker as worker_module
from codellm_jax.study.pace import Pace, ToDo, seconds_left
from codellm_jax.study.planned import Standing
from codellm_jax.study.status import status

ROOT = Path(__file__).resolve().parents[2]
ARMS: dict[str, Any] = {"A": {"CODE_RATE": 0.0}, "B": {"CODE_RATE": 0.5}, "C": {"CODE_RATE": 0.25},
                        "AT": {"from": "A", "CODE_RATE": 0.0}, "BT": {"from": "B", "CODE_RATE": 0.0},
                        "ATT": {"from": "AT", "CODE_RATE": 0.5}}
STEPS = 20
LEASE_SECONDS = 3.0

Start = Callable[..., "subprocess.Popen[str]"]


def flags(directory: Path, *more: str) -> list[str]:
    return ["study", "--gin_file=gin/study.gin", f"--gin.STUDY_DIR={directory}", f"--gin.ARMS={ARMS}",
            "--gin.SEEDS=[0]", "--gin.evaluation/TASKS=[]", f"--gin.pretraining/TRAIN_STEPS={STEPS}",
            f"--gin.tuning/TRAIN_STEPS={STEPS}", f"--lease_seconds={LEASE_SECONDS}", *more]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a worker; its output is in tmp_path/NUMBER.txt."""
    processes: list[subprocess.Popen[str]] = []

    def start_one(*more: str, directory: Path | None = None, **environment: str) -> "subprocess.Popen[str]":
        with (tmp_path / f"{len(processes)}.txt").open("w") as output:
            processes.append(subprocess.Popen(
                [sys.executable, str(ROOT / "tests/study/stand_in.py"), *flags(directory or tmp_path / "s", *more)],
                cwd=ROOT, text=True, stdout=output, stderr=output,
                env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/study", "JAX_PLATFORMS": "cpu"} | environment))
        return processes[-1]

    yield start_one
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def said(tmp_path: Path, number: int) -> str:
    return (tmp_path / f"{number}.txt").read_text()


def trained(directory: Path) -> dict[str, list[tuple[int, int]]]:
    """Of each run the (step, process) that were done, in order."""
    steps: dict[str, list[tuple[int, int]]] = {}
    for line in (directory / "log").read_text().splitlines() if (directory / "log").exists() else []:
        run, step, process = line.split()
        assert step != "locked", line
        if step != "fails":
            steps.setdefault(run, []).append((int(step), int(process)))
    return steps


def wait_until(holds: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def results(directory: Path) -> dict[str, tuple[str, list[float]]]:
    """The digest of each run's last checkpoint, and its losses."""
    return {run.name: (json.loads((run / "provenance.json").read_text())["checkpoint"],
                       [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
            for run in sorted((directory / "runs").iterdir())}


def require_trained_once(directory: Path) -> None:
    """Each run by one process after the other, each from no later than where the one before ended, and not before its
    last checkpoint.
    """
    for run, steps in trained(directory).items():
        sessions = [[step for step, _ in group] for _, group in itertools.groupby(steps, key=lambda item: item[1])]
        assert len({process for _, process in steps}) == len(sessions), f"{run} was trained by two at a time: {steps}"
        assert all(session == list(range(session[0], session[0] + len(session))) for session in sessions)
        for one, after in itertools.pairwise(sessions):
            assert one[-1] // 5 * 5 <= after[0] - 1 <= one[-1], (run, sessions)
        assert sessions[0][0] == 1 and sessions[-1][-1] == STEPS


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[float]]]:
    """What one worker makes of the study that nothing disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    done = subprocess.run([sys.executable, str(ROOT / "tests/study/stand_in.py"), *flags(folder / "s")], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {
                              "PYTHONPATH": f"{ROOT}:{ROOT}/tests/study", "STEP_SECONDS": "0.001"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert all([step for step, _ in steps] == list(range(1, STEPS + 1)) for steps in trained(folder / "s").values())
    assert "[6/6] ATT.seed0: done, train " in done.stdout and "All 6 runs are trained" in done.stdout
    assert not list((folder / "s" / "state").glob("*.lease"))
    return results(folder / "s")


def test_four_workers_of_whom_two_are_killed_make_what_one_makes(start, tmp_path, alone):
    directory, dice = tmp_path / "s", random.Random(5)
    workers = [start("--worker", STEP_SECONDS="0.05") for _ in range(4)]
    for count in (10, 40):
        wait_until(lambda count=count: sum(map(len, trained(directory).values())) >= count)
        holding = {json.loads(path.read_text())["process"] for path in (directory / "state").glob("*.lease")}
        victims = [one for one in workers if one.pid in holding] or workers
        victim = dice.choice(victims)
        victim.kill()
        victim.wait()
        workers.remove(victim)
    assert [worker.wait(120) for worker in workers] == [0, 0]
    assert results(directory) == alone
    require_trained_once(directory)
    assert not list((directory / "state").glob("*.lease"))
    assert any("Waiting for " in said(tmp_path, number) for number in range(4))


def test_a_killed_worker_takes_its_command_with_it(start, tmp_path):
    worker = start("--worker", STEP_SECONDS="0.3")
    wait_until(lambda: trained(tmp_path / "s"))
    [(_, [(_, training), *_])] = trained(tmp_path / "s").items()
    worker.kill()
    worker.wait()

    def is_gone() -> bool:
        try:
            return Path(f"/proc/{training}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except FileNotFoundError:
            return True

    wait_until(is_gone, 5.0)


def test_a_command_that_is_killed_goes_on_from_its_checkpoint(start, tmp_path, alone):
    worker, killed = start("--worker", STEP_SECONDS="0.05"), set()
    for _ in range(2):
        wait_until(lambda: len({process for _, process in trained(tmp_path / "s").get("A.seed0", [])}) > len(killed)
                   and trained(tmp_path / "s")["A.seed0"][-1][0] >= 6)
        process = trained(tmp_path / "s")["A.seed0"][-1][1]
        killed.add(process)
        os.kill(process, signal.SIGKILL)
    assert worker.wait(60) == 0 and results(tmp_path / "s") == alone
    require_trained_once(tmp_path / "s")
    assert said(tmp_path, 0).count("A.seed0: train was ended by SIGKILL. It is started again.") == 2


def test_a_stopped_worker_gives_its_run_back_at_once(start, tmp_path, alone):
    directory = tmp_path / "s"
    first = start("--worker", STEP_SECONDS="0.1")
    wait_until(lambda: len(trained(directory).get("A.seed0", [])) >= 3)
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == 128 + signal.SIGTERM
    assert not list((directory / "state").glob("*.lease"))
    assert not (directory / "state" / "A.seed0.json").exists()  # it did not fail
    assert start(STEP_SECONDS="0.001").wait(60) == 0
    assert results(directory) == alone
    require_trained_once(directory)


def test_a_study_stopped_while_it_writes_its_report_says_so(start, tmp_path):
    study = start(STEP_SECONDS="0.001", REPORT_SECONDS="60")
    wait_until((tmp_path / "s" / "reporting").exists)
    study.send_signal(signal.SIGTERM)
    assert study.wait(20) == 128 + signal.SIGTERM
    assert said(tmp_path, 0).splitlines()[-1] == "Interrupted; the same command continues from here."


@pytest.mark.slow
def test_a_suspended_worker_loses_its_run_and_leaves_it_to_the_other(start, tmp_path, alone):
    """Its command goes on meanwhile, and holds the run's directory; the other waits for that, too."""
    directory = tmp_path / "s"
    first = start("--worker", "--lease_seconds=1", STEP_SECONDS="3")
    wait_until(lambda: trained(directory))
    first.send_signal(signal.SIGSTOP)
    second = start("--worker", "--lease_seconds=1", STEP_SECONDS="0.01")
    wait_until(lambda: "in whose directory a process without a lease is training" in said(tmp_path, 1))
    first.send_signal(signal.SIGCONT)
    wait_until(lambda: "A.seed0: the run stops here, because its lease is lost: " in said(tmp_path, 0))
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM and second.wait(60) == 0
    assert results(directory) == alone
    require_trained_once(directory)


def test_leases_that_nobody_holds_any_more(start, tmp_path, alone):
    """Of another machine, which nobody can ask: over after its time, and no sooner."""
    state = tmp_path / "s" / "state"
    state.mkdir(parents=True)
    for name in ("plan", "A.seed0"):
        (state / f"{name}.lease").write_text(json.dumps({
            "worker": "gone:1", "token": "x", "place": "elsewhere", "process": 1, "started": "1", "since": 4e9,
            "beat_at": 4e9, "beats": 3, "expires": 2.0, "step": 0}))
    began = time.monotonic()
    assert start("--worker", STEP_SECONDS="0.001").wait(60) == 0
    assert time.monotonic() - began > 2.0 and results(tmp_path / "s") == alone


def test_a_lease_that_a_worker_left_on_a_run_that_is_done(start, tmp_path):
    assert start(STEP_SECONDS="0.001").wait(60) == 0
    lease = tmp_path / "s" / "state" / "A.seed0.lease"
    lease.write_text(json.dumps({
        "worker": "gone:1", "token": "x", "place": None, "process": 1, "started": None, "since": 0.0, "beat_at": 0.0,
        "beats": 3, "expires": 0.0, "step": 0}))
    assert "6 of 6 runs are done" in status(str(tmp_path / "s"))
    assert start("--worker").wait(60) == 0 and not lease.exists()


def test_a_run_that_fails_is_told_and_left_alone_until_it_is_asked_for(start, tmp_path, alone):
    directory = tmp_path / "s"
    workers = [start("--worker", STEP_SECONDS="0.01", FAIL="A.seed0") for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [1, 1, 1]
    log = (directory / "log").read_text()
    assert len(re.findall("^A.seed0 fails", log, re.MULTILINE)) == 1
    assert set(trained(directory)) == {"B.seed0", "C.seed0", "BT.seed0"}
    for number in range(3):
        text = said(tmp_path, number)
        assert "t5x study: error: A.seed0: train failed: it was told to fail" in text
        assert "t5x study: error: ATT.seed0 is skipped, because it starts from AT.seed0." in text
        assert "3 of 6 runs are done" in text
    record = json.loads((directory / "state" / "A.seed0.json").read_text())
    assert (record["state"], record["why"]) == ("failed", "train failed: it was told to fail")
    # Nor does a worker that comes later try it; the study itself does.
    assert start("--worker").wait(60) == 1 and (directory / "log").read_text() == log
    table = status(str(directory))
    assert re.search(r"^A.seed0 +failed .* train failed: it was told to fail \(\S+:\d+, ", table, re.MULTILINE)
    assert re.search(r"^ATT.seed0 +skipped .* because of AT.seed0, from which it starts$", table, re.MULTILINE)
    assert table.endswith(f"{directory}: 3 of 6 runs are done, 3 failed or depend on one that did.")
    assert start(STEP_SECONDS="0.001").wait(60) == 0
    assert results(directory) == alone
    require_trained_once(directory)


def test_a_run_that_another_made_under_other_settings_is_not_taken_for_ones_own(monkeypatch):
    """Both planned before anything was there to differ."""
    changed = Standing(20, True, True, "digest", {}, ("LEARNING_RATE was 1, is 2",), (), 1.0)
    monkeypatch.setattr(worker_module, "standing", lambda *_: changed)
    told: list[str] = []
    none = types.SimpleNamespace(names=lambda ending: [], read_all=lambda names, ending: {})
    run = types.SimpleNamespace(run=types.SimpleNamespace(name="A.seed0", parent=None))
    one = worker_module.Worker(
        [run], {"A.seed0": {}}, {"A.seed0": changed._replace(evaluated=False)}, types.SimpleNamespace(state=none),
        types.SimpleNamespace(report=told.append, stopped=None), ())
    one.work()
    assert one.failures == {"A.seed0": told[0].removeprefix("[1/1] A.seed0: ")} and told == [
        "[1/1] A.seed0: A.seed0: another worker ran it with another configuration: LEARNING_RATE was 1, is 2"]


@pytest.mark.slow
def test_redo_by_four_at_once_makes_a_run_again_once(start, tmp_path):
    directory = tmp_path / "s"
    assert start(STEP_SECONDS="0.001").wait(60) == 0
    path = directory / "runs" / "B.seed0" / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"order": "another"}))
    assert start("--worker").wait(60) == 1
    assert "1 run(s) in" in said(tmp_path, 1) and "--redo" in said(tmp_path, 1)
    (directory / "log").unlink()
    assert [one.wait(60) for one in [start("--worker", "--redo") for _ in range(4)]] == [0] * 4
    assert {run: len(steps) for run, steps in trained(directory).items()} == {"B.seed0": STEPS, "BT.seed0": STEPS}
    assert sorted(path.name for path in (directory / "replaced").iterdir()) == ["B.seed0-1", "BT.seed0-1"]


def test_a_directory_that_cannot_be_written(start, tmp_path):
    (tmp_path / "s").write_text("a file")
    assert start().wait(60) == 1
    assert len(said(tmp_path, 0).splitlines()) == 1 and "cannot be" in said(tmp_path, 0)


def test_workers_side_by_side_have_devices_of_their_own(start, tmp_path, alone):
    directory = tmp_path / "s"
    assert start("--devices_per_run=2", STEP_SECONDS="0.05", DEVICES="7").wait(60) == 0
    text = said(tmp_path, 0)
    assert "3 workers with 2 of the 7 cpu devices each" in text and results(directory) == alone
    require_trained_once(directory)
    for number, run in enumerate(ARMS, 1):
        assert text.count(f"[{number}/6] {run}.seed0: done, train ") == 1
    assert text.count("All 6 runs are trained") == 1
    began = {run: steps[0] for run, steps in trained(directory).items()}
    assert len({process for _, process in began.values()}) == 6


@pytest.mark.slow
def test_a_signal_reaches_all_that_work_side_by_side(start, tmp_path):
    one = start("--devices_per_run=1", STEP_SECONDS="0.2", DEVICES="3")
    wait_until(lambda: len(trained(tmp_path / "s")) == 3)
    one.send_signal(signal.SIGTERM)
    assert one.wait(20) == 128 + signal.SIGTERM
    assert not list((tmp_path / "s" / "state").glob("*.lease"))


def test_status_tells_who_trains_what_and_how_long_it_takes(tmp_path):
    """Two workers; ten seconds into a run of 20 steps one has done 5 of them; runs that are done took 2 s a step."""
    (tmp_path / "state").mkdir()
    runs = {"A.seed0": None, "B.seed0": None, "AT.seed0": "A.seed0@5", "BT.seed0": "B.seed0", "C.seed0": None}
    (tmp_path / "study.json").write_text(json.dumps({"runs": [
        {"run": name, "from": start, "steps": 20} for name, start in runs.items()]}))
    write = {"plan.json": {name: {"flops": 20.0} for name in runs},
             "C.seed0.json": {"state": "done", "worker": "h:1", "when": 0.0, "train_seconds": 40.0}}
    for name, worker, beat in (("A.seed0", "h:1", 1009.0), ("B.seed0", "g:2", 400.0)):
        write[f"{name}.lease"] = {
            "worker": worker, "token": worker, "place": "elsewhere", "process": 1, "started": "1", "since": 1000.0,
            "beat_at": beat, "beats": 1, "expires": 120.0, "step": 0}
    for name, value in write.items():
        (tmp_path / "state" / name).write_text(json.dumps(value))
    (tmp_path / "runs" / "A.seed0").mkdir(parents=True)
    (tmp_path / "runs" / "C.seed0").mkdir()
    (tmp_path / "runs" / "C.seed0" / "provenance.json").write_text('{"finished": true}')
    (tmp_path / "runs" / "A.seed0" / "metrics.jsonl").write_text('{"step": 5, "split": "train"}\n{"step": 6, "spl')
    lines = [re.split(r"  +", line) for line in status(str(tmp_path), now=1010.0).splitlines()]
    assert lines[1] == ["A.seed0", "training", "5/20", "10 s", "30 s", "h:1"]
    assert lines[2] == ["B.seed0", "no heartbeat", "20", "10 s", "40 s", "g:2 for 10:10"]
    assert lines[3] == ["AT.seed0", "to do", "20", "40 s"] and lines[5] == ["C.seed0", "done", "20/20"]
    # By the one worker that is alive: 30 + 40 + 40 + 40 s.
    assert lines[-1] == [f"{tmp_path}: 1 of 5 runs are done, 4 are left; 1 worker at work, about 2:30 left with 1."]


def test_status_reads_without_jax(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"runs": [{"run": "A.seed0", "from": None, "steps": 20}]}))
    script = ("import sys; from codellm_jax import cli\n"
              f"assert cli.main({flags(tmp_path, '--status')}) == 0\n"
              "print({'jax', 'tensorflow', 'flax', 'orbax'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.json"]


@pytest.mark.parametrize("workers, seconds", [(1, 100), (2, 70), (3, 70), (9, 70)])
def test_the_time_that_is_left_keeps_children_behind_their_parents(workers, seconds):
    runs = [ToDo("a", None, 40), ToDo("b", None, 10), ToDo("c", "a", 30), ToDo("d", "b", 20)]
    assert seconds_left(runs, workers) == seconds
    assert seconds_left([*runs, ToDo("e", None, None)], workers) is None and seconds_left([], workers) == 0.0


def test_pace():
    pace = Pace()
    assert pace.seconds(0.0, 0) == 0.0 and pace.seconds(1.0, 0) is None and pace.seconds(0.0, 1) is None
    pace.trained(10.0, 20.0)
    pace.trained(10.0, 40.0)
    pace.evaluated(5.0)
    assert pace.seconds(2.0, 2) == 2.0 * 3.0 + 2 * 5.0
