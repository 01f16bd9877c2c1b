"""Several processes are one run: the same losses and scores, through the death of one, on other numbers of them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import codellm_jax.training.train as train_module
from codellm_jax import cli
from codellm_jax.runtime.progress import read_records

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("=8", "=4")}
STEPS = 12
# Process 1 is slow to read its part of the last batch, as from a far store: reading ahead does not hide it.
SLOW_READER = """
import sys, time
import codellm_jax.training.train as train
from codellm_jax import cli
from codellm_jax.runtime.progress import read_records

read = train.batch_of_step

def slow_read(training, plan, step):
    if "--process_index=1" in sys.argv and step == 11:
        while max((line["step"] for line in read_records(training.model_dir)), default=0) < 10:
            time.sleep(0.1)
        time.sleep(3)
    return read(training, plan, step)

train.batch_of_step = slow_read
sys.exit(cli.main(sys.argv[1:]))
"""


def command(flags: list[str], run: Path, *more: str) -> list[str]:
    return ["train", *flags, f"--gin.MODEL_DIR={run}", f"--gin.TRAIN_STEPS={STEPS}", "--gin.EVAL_PERIOD=6",
            "--gin.CHECKPOINT_PERIOD=4", "--gin.LOG_PERIOD=1", "--gin.EVAL_TASKS=['cosqa']",
            "--gin.EXPORT_PERIOD=6", *more]


def workers(marks: list[str]) -> list[int]:
    """Processes whose command line holds all of some texts; of a process and its child the child comes last."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if all(mark in line for mark in marks):
            found.append(int(folder.name))
    return sorted(found)


def by_hand(program: list[str], arguments: list[list[str]]) -> list[subprocess.CompletedProcess]:
    """A process for each list of arguments, which find each other at a port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = [subprocess.Popen(
        [sys.executable, *program, *each, f"--coordinator_address={address}", f"--process_count={len(arguments)}",
         f"--process_index={index}"], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for index, each in enumerate(arguments)]
    return [subprocess.CompletedProcess(one.args, one.returncode, *texts)
            for one, texts in [(one, one.communicate(timeout=240)) for one in running]]


def without_gloo(text: str) -> str:
    """What is left when the pieces of Gloo's lines are taken out, which its threads write into each other."""
    pieces = r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d|\s"
    return re.sub(pieces, "", text)


def lines_of(run: Path) -> dict[tuple[int, str], dict]:
    return {(line["step"], line["split"]): line for line in read_records(str(run))}


@pytest.fixture(scope="module")
def alone(tiny_flags, tmp_path_factory) -> Path:
    """The run of one process with eight devices."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main(command(tiny_flags, run)) == 0
    return run


@pytest.fixture(scope="module")
def together(tiny_flags, tmp_path_factory, alone) -> Path:
    """The same run: begun by two processes, of which one is killed; taken over by one; ended by two again."""
    run = tmp_path_factory.mktemp("together") / "run"
    two = subprocess.Popen(
        [sys.executable, "-m", "codellm_jax.cli", *command(tiny_flags, run), "--local_processes=2"], env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while max((line["step"] for line in read_records(str(run))), default=0) < 6:
        assert two.poll() is None, two.communicate()[1]
        time.sleep(0.1)
    os.kill(workers(["--process_index=1", str(run)])[-1], signal.SIGKILL)
    began = time.monotonic()
    _, errors = two.communicate(timeout=120)
    assert two.returncode == 1 and time.monotonic() - began < 60
    assert "ended by SIGKILL" in errors.strip().splitlines()[-1] and "continues from the newest checkpoint" in errors
    assert not workers([str(run)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "stops", lambda stop, step, period: step == 6)
        assert cli.main(command(tiny_flags, run)) == 0
    ended = by_hand(["-c", SLOW_READER], [command(tiny_flags, run, "--profile_steps=8:9")] * 2)
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert "Resuming" in ended[0].stdout and not without_gloo(ended[1].stdout)
    return run


@pytest.mark.slow
def test_losses_and_scores_are_those_of_one_process(alone, together):
    wanted, found = lines_of(alone), lines_of(together)
    assert list(found) == list(wanted)
    for key, line in wanted.items():
        for name, value in line.items():
            if name.startswith(("loss", "token", "score", "grad_norm", "learning_rate")) and "per_second" not in name:
                assert found[key][name] == pytest.approx(value, rel=5e-6, abs=1e-7), (key, name)
    for step in ("6", "12"):
        one, other = ([json.loads(line) for line in (
            run / "results" / "in_training" / step / "cosqa_sample.jsonl").read_text().splitlines()[1:]]
            for run in (alone, together))
        assert [line["id"] for line in one] == [line["id"] for line in other]
        for a, b in zip(one, other, strict=True):
            assert [c["log_likelihood"] for c in a["candidates"]] == pytest.approx(
                [c["log_likelihood"] for c in b["candidates"]], rel=1e-5)


@pytest.mark.slow
def test_two_processes_export_what_they_save(together, tmp_path):
    assert sorted(path.name for path in (together / "exports").iterdir()) == ["12", "6"]
    assert cli.main(["export", f"{together}@12", f"--output={tmp_path / 'out'}"]) == 0
    saved, exported = (folder / "model.safetensors" for folder in (tmp_path / "out", together / "exports" / "12"))
    assert saved.read_bytes() == exported.read_bytes()


@pytest.mark.slow
def test_each_process_writes_its_own_profile(together):
    folder = together / "tensorboard" / "plugins" / "profile" / "steps_8-9"
    for index in range(2):
        trace = jax.profiler.ProfileData.from_file(str(folder / f"process_{index}.xplane.pb"))
        steps = [dict(event.stats)["step_num"] for plane in trace.planes for line in plane.lines
                 for event in line.events if event.name == "train"]
        assert list(map(int, steps)) == [8, 9]
        assert (folder / f"process_{index}.perfetto.json.gz").exists()
    files = [(folder / f"process_{index}.xplane.pb").read_bytes() for index in range(2)]
    assert len(list(folder.iterdir())) == 4 and files[0] != files[1]


@pytest.mark.slow
def test_a_process_that_keeps_the_others_waiting_is_seen(together):
    lines = lines_of(together)
    line = lines[12, "train"]
    assert line["busiest_process"] == 1 and line["busiest_process_fraction"] > 0.5, line
    assert line["busiest_process_fraction"] > line["busy_fraction_median"] > 0
    assert all("busiest_process" in lines[step, "train"] for step in range(7, 12))
    assert "busiest_process" not in lines[6, "train"]  # by one


@pytest.mark.slow
def test_evaluation_by_two(alone, tmp_path):
    """Of which one writes; begun by one process, and what it has written is gone on from."""
    arguments = ["eval", "--gin_file=gin/eval.gin", f"--gin.CHECKPOINT_PATH={alone}",
                 "--gin.TASKS=['logic', 'dureader']", "--gin.sampling.max_new_tokens=4"]
    assert cli.main([*arguments, f"--gin.evaluate.results_dir={tmp_path}/one"]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    path = tmp_path / "two" / "logic_sample.jsonl"
    kept = path.read_text().splitlines()[:3]
    path.write_text("\n".join(kept) + "\n")
    (tmp_path / "two" / "dureader_sample.jsonl").unlink()
    done = subprocess.run([sys.executable, "-m", "codellm_jax.cli", *arguments, "--local_processes=2",
                           f"--gin.evaluate.results_dir={tmp_path}/two"],
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("logic (sample)") == 1  # told once
    for task in ("logic_sample", "dureader_sample"):
        one, two = (json.loads((tmp_path / run / f"{task}.json").read_text()) for run in ("one", "two"))
        assert one["value"] == two["value"] and one["n"] == two["n"] and one["settings"] == two["settings"]
        lines = [[json.loads(line) for line in (tmp_path / run / f"{task}.jsonl").read_text().splitlines()[1:]]
                 for run in ("one", "two")]
        assert [line["id"] for line in lines[0]] == [line["id"] for line in lines[1]]
        for a, b in zip(*lines, strict=True):
            if "texts" in a:
                assert a["texts"] == b["texts"]
            else:
                assert [c["log_likelihood"] for c in a["candidates"]] == pytest.approx(
                    [c["log_likelihood"] for c in b["candidates"]], rel=1e-5)


def test_processes_that_are_told_different_things_are_refused(tiny_flags, tmp_path):
    run = tmp_path / "run"
    done = by_hand(["-m", "codellm_jax.cli"], [command(tiny_flags, run), command(tiny_flags, run, "--gin.SEED=1")])
    assert [one.returncode for one in done] == [1, 1]
    for one in done:
        assert "Process 1 has a different order of its data than process 0" in one.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_evaluations_that_are_told_different_things_are_refused(alone, tmp_path):
    """Else the results of one would hold the other's numbers."""
    arguments = ["eval", "--gin_file=gin/eval.gin", f"--gin.CHECKPOINT_PATH={alone}", "--gin.TASKS=['logic']",
                 f"--gin.evaluate.results_dir={tmp_path}"]
    done = by_hand(["-m", "codellm_jax.cli"],
                   [[*arguments, f"--gin.TEMPLATE={name}"] for name in ("paper", "released")])
    assert [one.returncode for one in done] == [1, 1]
    for one in done:
        assert "Process 1 has a different logic_sample to ask" in one.stderr.strip().splitlines()[-1], one.stderr
    assert not list(tmp_path.glob("*.json*"))


@pytest.mark.parametrize("flags, message", [
    (["--local_processes=1"], "--local_processes must be at least 2, found 1"),
    (["--process_index=1"], "--coordinator_address=HOST:PORT, --process_count=N and --process_index=0 ... N - 1 go"),
    (["--coordinator_address=here", "--process_count=2", "--process_index=0"], "go together; found here, 2, 0")])
def test_slips_get_one_line(flags, message):
    done = subprocess.run([sys.executable, "-m", "codellm_jax.cli", "train", "--gin_file=gin/mixed_pretrain.gin",
                           *flags], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and message in done.stderr
