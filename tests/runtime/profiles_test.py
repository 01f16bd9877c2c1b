"""Traces of the asked steps, read back; and what is said where they cannot be had."""

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import pytest

import codellm_jax.training.train as train_module
from codellm_jax import cli
from codellm_jax.runtime.profiles import ProfileSteps, parse_profile_steps
from codellm_jax.runtime.progress import read_records
from codellm_jax.training.train import train

MIXED = "--gin_file=gin/mixed_pretrain.gin"


def folder_of(model_dir: str, name: str) -> Path:
    return Path(model_dir) / "tensorboard" / "plugins" / "profile" / name


def events(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The events of a trace with their arguments, as JAX's own reader gives them."""
    profile = jax.profiler.ProfileData.from_file(str(file))
    return [(event.name, dict(event.stats)) for plane in profile.planes for line in plane.lines
            for event in line.events]


def steps_on(file: Path) -> list[int]:
    return [int(stats["step_num"]) for name, stats in events(file) if name == "train"]


def losses(model_dir: str) -> dict[tuple[int, str], float]:
    """Of each step that is recorded its own loss, whatever the records before it."""
    return {(line["step"], line["split"]): line.get("last_step/loss", line["loss"]) for line in read_records(model_dir)}


@pytest.mark.slow
def test_a_trace_holds_the_asked_steps_and_changes_nothing(make_training, capsys):
    plain, profiled = make_training(), make_training(log_period=4)
    train(plain)
    capsys.readouterr()
    train(profiled, profile_steps=ProfileSteps(4, 7))
    folder = folder_of(profiled.model_dir, "steps_4-7")
    assert sorted(file.name for file in folder.iterdir()) == ["process_0.perfetto.json.gz", "process_0.xplane.pb"]
    assert steps_on(folder / "process_0.xplane.pb") == [4, 5, 6, 7]
    # The program ran as often as there are steps: none of another step's work is on it, and none is missing.
    found = [name for name, _ in events(folder / "process_0.xplane.pb")]
    assert found.count("PjitFunction(train_step)") in (4, 8)  # JAX tells each call once or twice
    assert {"Meter.settle", "Meter.next_batch", "batch_of_step", "evaluate", "Checkpoints.save"} <= set(found)
    opened = json.loads(gzip.decompress((folder / "process_0.perfetto.json.gz").read_bytes()))["traceEvents"]
    assert [event["args"]["step_num"] for event in opened if event.get("name") == "train"] == ["4", "5", "6", "7"]
    said = [line for line in capsys.readouterr().out.splitlines() if "Profile" in line]
    assert len(said) == 1 and said[0].startswith(f"Profile of steps 4 to 7: {folder}. Drop process_0.perfetto.json.gz")
    whole = losses(plain.model_dir)
    assert all(whole[key] == loss for key, loss in losses(profiled.model_dir).items())


@pytest.mark.slow
def test_a_resumed_run_profiles_what_is_left_and_says_so(make_training, capsys, monkeypatch):
    training = make_training()
    monkeypatch.setattr(train_module, "stops", lambda stop, step, period: step == 6)
    train(training, profile_steps=ProfileSteps(5, 8))  # ends within the steps
    assert steps_on(folder_of(training.model_dir, "steps_5-6") / "process_0.xplane.pb") == [5, 6]
    monkeypatch.setattr(train_module, "stops", lambda stop, step, period: step == 9)
    train(training, profile_steps=ProfileSteps(5, 8))
    assert steps_on(folder_of(training.model_dir, "steps_7-8") / "process_0.xplane.pb") == [7, 8]
    assert ("--profile_steps=5:8 begins with completed steps: steps 7 to 8 will be profiled."
            in capsys.readouterr().out)
    monkeypatch.undo()
    train(training, profile_steps=ProfileSteps(5, 8))
    assert "--profile_steps=5:8 is over, since 9 steps are done: nothing will be profiled." in capsys.readouterr().out
    assert len(list(folder_of(training.model_dir, "").iterdir())) == 2


@pytest.mark.slow
def test_a_profile_that_cannot_be_written_does_not_end_the_run(make_training, capsys):
    training = make_training()
    blocked = folder_of(training.model_dir, "")
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")
    assert train(training, profile_steps=ProfileSteps(2, 3)).step == 12
    assert "WARNING: the profile of steps 2 to 3 is not written: " in capsys.readouterr().out


def test_steps_beyond_the_run_are_refused(make_training):
    training = make_training()
    with pytest.raises(ValueError, match="--profile_steps=12:13 exceeds the run, which has 12 steps."):
        train(training, profile_steps=ProfileSteps(12, 13))
    assert not list(Path(training.model_dir).iterdir())


@pytest.mark.parametrize("given, message", [
    ("15:10", "--profile_steps=15:10 ends before it begins"),
    ("0:3", "--profile_steps=0:3: steps are counted from 1."),
    ("10", "--profile_steps must be FIRST:LAST, two steps such as 10:15, found '10'."),
    ("10-15", "found '10-15'"), ("10:", "found '10:'"), ("-1:4", "found '-1:4'"), ("", "found ''"),
    ("390:401", "--profile_steps=390:401 exceeds the run, which has 400 steps.")])
def test_slips_get_one_line(capsys, given, message):
    assert cli.main(["train", MIXED, "--dry_run", f"--profile_steps={given}"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines


def test_steps_are_counted_from_one_and_both_ends_are_in():
    assert parse_profile_steps("1:1") == ProfileSteps(1, 1)
    assert parse_profile_steps("10:15") == ProfileSteps(10, 15)
