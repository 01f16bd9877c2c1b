"""Runs killed at any moment go on as if nothing had happened: the command itself, in processes really killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# What depends on the clock; everything else must be bit-identical.
CLOCK = {"tokens_per_second", "data_wait_fraction"}


@pytest.fixture(scope="module")
def command(tiny_flags):
    def make(model_dir: Path, *more: str) -> list[str]:
        return [sys.executable, "-m", "codellm_jax.cli", "train", *tiny_flags, f"--gin.MODEL_DIR={model_dir}",
                "--gin.TRAIN_STEPS=60", "--gin.EVAL_PERIOD=20", "--gin.CHECKPOINT_PERIOD=7", "--gin.LOG_PERIOD=1",
                *more]

    return make


def environment(devices: int = 1) -> dict[str, str]:
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def records(model_dir: Path) -> list[dict[str, object]]:
    path = model_dir / "metrics.jsonl"
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK}
            for line in path.read_text().splitlines()] if path.exists() else []


def steps_recorded(model_dir: Path) -> int:
    path = model_dir / "metrics.jsonl"
    return path.read_text().count('"split": "train"') if path.exists() else 0


def run_until(command: list[str], model_dir: Path, lines: int, number: signal.Signals, delay: float = 0.0) -> int:
    """Starts the command and sends a signal once the run has recorded that many more steps; returns its status."""
    before = steps_recorded(model_dir)
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            now = steps_recorded(model_dir)
            before = min(before, now)  # a resume drops the lines after its checkpoint
            if now - before >= lines:
                time.sleep(delay)
                process.send_signal(number)
                break
            time.sleep(0.01)
        return process.wait(60)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = subprocess.run(command(model_dir), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return model_dir, done.stdout


def test_killed_three_times_the_losses_are_bit_identical(command, uninterrupted, tmp_path):
    model_dir = tmp_path / "run"
    dice = random.Random(0)
    for _ in range(3):
        # Some of these land while a save is in flight: there is one every seven steps.
        status = run_until(command(model_dir), model_dir, dice.randint(8, 16), signal.SIGKILL, dice.random() * 0.05)
        assert status == -signal.SIGKILL
    done = subprocess.run(command(model_dir), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Resuming" in done.stdout
    assert records(model_dir) == records(uninterrupted[0])


def test_sigterm_saves_and_exits_cleanly(command, uninterrupted, tmp_path):
    model_dir = tmp_path / "run"
    assert run_until(command(model_dir), model_dir, 10, signal.SIGTERM) == 0
    saved = max(int(path.name) for path in (model_dir / "checkpoints").iterdir())
    assert saved == steps_recorded(model_dir) and saved % 7
    assert subprocess.run(command(model_dir), env=environment(), capture_output=True).returncode == 0
    assert records(model_dir) == records(uninterrupted[0])


def test_a_second_run_in_the_same_directory_is_kept_out(command, tmp_path):
    model_dir = tmp_path / "run"
    long = command(model_dir, "--gin.TRAIN_STEPS=100000")
    first = subprocess.Popen(long, env=environment(), stdout=subprocess.DEVNULL)
    try:
        while not steps_recorded(model_dir) and first.poll() is None:
            time.sleep(0.05)
        second = subprocess.run(long, env=environment(), capture_output=True, text=True)
        assert first.poll() is None, "the first run was over too soon to tell"
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 1
    assert second.stderr.strip() == (
        f"t5x train: error: Another process is training in {model_dir}: wait for it, or use another MODEL_DIR.")


def test_a_run_that_is_done_trains_no_further(command, uninterrupted):
    model_dir, _ = uninterrupted
    before = (model_dir / "metrics.jsonl").read_text()
    done = subprocess.run(command(model_dir), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "60 of 60 steps are done" in done.stdout
    assert (model_dir / "metrics.jsonl").read_text() == before


def test_the_summary_tells_what_was_trained_on(uninterrupted):
    model_dir, printed = uninterrupted
    for words in ("held-out loss, nats/token", "step 0", "step 60", "share asked", "realised", str(model_dir),
                  "tensorboard --logdir", "Next:", "tokens/s", " left"):
        assert words in printed


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(command, uninterrupted, tmp_path):
    model_dir = tmp_path / "run"
    assert run_until(command(model_dir), model_dir, 20, signal.SIGTERM) == 0
    done = subprocess.run(command(model_dir, "--gin.mesh.data=2", "--gin.mesh.fsdp=2", "--gin.mesh.model=2"),
                          env=environment(devices=8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for found, wanted in zip(records(model_dir), records(uninterrupted[0]), strict=True):
        assert found["step"] == wanted["step"]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-3)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(command, uninterrupted, tmp_path):
    model_dir = tmp_path / "run"
    assert run_until(command(model_dir), model_dir, 30, signal.SIGKILL) == -signal.SIGKILL
    newest, before = sorted((int(path.name) for path in (model_dir / "checkpoints").iterdir()
                             if path.name.isdigit()), reverse=True)[:2]
    victim = max((path for path in (model_dir / "checkpoints" / str(newest) / "state").rglob("*") if path.is_file()),
                 key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    for position in range(len(content) // 2, len(content) // 2 + 64):
        content[position] ^= 0xFF
    victim.write_bytes(content)
    done = subprocess.run(command(model_dir), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"WARNING: the checkpoint of step {newest} is damaged" in done.stdout
    assert f"after step {before}." in done.stdout
    assert (model_dir / "damaged_checkpoints" / str(newest)).is_dir()
    assert records(model_dir) == records(uninterrupted[0])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretraining", "tuning"])
def test_killed_at_and_inside_a_change_of_the_mix(stage, tiny_flags, tiny_tuning_flags, uninterrupted, tmp_path):
    arm = tiny_flags if stage == "pretraining" else [
        "--gin_file=gin/tune_text.gin", f"--gin.INITIAL_CHECKPOINT_PATH={uninterrupted[0]}", *tiny_tuning_flags]

    def command(model_dir: Path) -> list[str]:
        return [sys.executable, "-m", "codellm_jax.cli", "train", *arm, f"--gin.MODEL_DIR={model_dir}",
                "--gin.MIX_PHASES=['5:5', '6:4 to 7:3', '7:3', '1:9']", "--gin.TRAIN_STEPS=40", "--gin.EVAL_PERIOD=20",
                "--gin.CHECKPOINT_PERIOD=10", "--gin.LOG_PERIOD=1"]

    def finish(model_dir: Path) -> None:
        done = subprocess.run(command(model_dir), env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    finish(tmp_path / "whole")
    killed = tmp_path / "killed"
    # A change comes every ten steps, with a checkpoint. The first stop falls on the first change or just after it, the
    # kill sends the run back to the second.
    assert run_until(command(killed), killed, 10, signal.SIGTERM) == 0
    assert run_until(command(killed), killed, 14, signal.SIGKILL) == -signal.SIGKILL
    finish(killed)
    assert records(killed) == records(tmp_path / "whole")
    assert len(records(killed)) == 43
