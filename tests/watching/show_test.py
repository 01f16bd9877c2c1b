"""`t5x show` on directories that are written here by hand: what it prints of a run, a study and a folder of runs."""

import fcntl
import json
import re
import subprocess
import sys

import pytest
from etils import epath
from written_runs import write_run, write_study

from codellm_jax.watching.runs import is_held, read_run
from codellm_jax.watching.show import describe_state, show


def test_a_run_that_is_trained(tmp_path):
    text = show(str(write_run(tmp_path / "CODE", 10, 10)))
    assert "trained to the end, step 10 of 10" in text
    assert "arm CODE, seed 3, 1,234,567 parameters, 2 x cpu" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["training", "10", "8.0000", "-", "-"] in rows
    assert ["held", "out", "10", "7.0000", "6.5000", "7.5000"] in rows
    assert ["text.a", "30", "300", "0.7500", "0.50"] in rows and ["code.a", "10", "100", "0.2500", "2.00"] in rows
    assert ["speed", "8", "tokens/s,", "1:30", "in", "1", "session", "that", "ended"] in rows
    assert f"Evaluate it: t5x eval --gin_file=gin/eval.gin --gin.CHECKPOINT_PATH={tmp_path}/CODE" in text


def test_a_run_that_was_stopped_says_how_to_go_on(tmp_path):
    text = show(str(write_run(tmp_path / "a b", 6, 10)))
    assert "stopped normally after step 6 of 10" in text
    assert f"Continue:    t5x train --gin_file='{tmp_path}/a b/config.gin'" in text


def test_a_run_that_was_killed_is_told_from_one_that_trains(tmp_path):
    path = epath.Path(write_run(tmp_path / "killed", 6, 10, ended=False))
    (path / ".lock").touch()
    changed = read_run(path).changed_at
    assert describe_state(read_run(path), changed + 75) == (
        "not ended, step 6 of 10; no process of this machine trains it; the last record is 1:15 old")
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_held(path)
        # Four steps of 40 tokens, at 8 tokens a second.
        assert describe_state(read_run(path), changed) == (
            "training, step 6 of 10, about 20 s left; the last record is 0 s old")
        fcntl.flock(lock, fcntl.LOCK_UN)
    assert is_held(path) is False


@pytest.mark.parametrize("name, content", [
    pytest.param("provenance.json", b"[" * 100_000, id="nested"), ("provenance.json", b'{"step": "many"}'),
    ("checkpoints/\u00b2", b""),
    ("provenance.json", b'{"step": 5, "fin'), ("provenance.json", b"[]"), ("provenance.json", b"\xff\xfe"),
    ("metrics.jsonl", b'{"step": "six", "split": "train"}\n{"step": 2, "split": "train", "loss": "low"}\nno\n[]\n')])
def test_files_that_are_broken_leave_the_rest(tmp_path, name, content):
    path = write_run(tmp_path / "run", 4, 10)
    (path / name).write_bytes(content)
    assert "step 4" in show(str(path))


def test_a_folder_of_runs_is_a_table(tmp_path):
    write_run(tmp_path / "first", 10, 10)
    write_run(tmp_path / "second", 4, 10)
    (tmp_path / "notes").mkdir()
    lines = [line.split() for line in show(str(tmp_path)).splitlines()]
    assert ["first", "trained", "10/10", "8.0000", "6.5000", "7.5000", "8", "-", "-"] in lines
    assert ["second", "stopped", "4/10", "8.6000", "6.5000", "7.5000", "8", "-", "-"] in lines
    assert not [line for line in lines if line[:1] == ["notes"]]


def test_a_study_tells_arms_failures_and_what_to_do(tmp_path):
    write_study(tmp_path)
    text = show(str(tmp_path), "bin/t5x")
    lines = [line.split() for line in text.splitlines()]
    assert "1 of 4 runs are done, 2 failed or depend on one that did, 1 are left; no workers at work." in text
    assert ["NL", "pretraining", "1/2", "10", "6.5000", "7.5000"] in lines
    assert ["NC", "tuning", "0/2", "10", "-", "-"] in lines
    assert "NL.seed1  failed, step 10 of 10: train ended with status 1 (host:7" in text
    assert "Continue:" in text and "Fix:" in text and f"bin/t5x report {tmp_path}" in text


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        show(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="holds neither a run nor a study"):
        show(str(tmp_path))
    (tmp_path / "study.json").write_text('{"runs": 3}')
    with pytest.raises(ValueError, match="study.json is damaged"):
        show(str(tmp_path))


@pytest.mark.parametrize("change", [{"steps": None}, {"steps": "ten"}, {"from": 7}, {"run": "../x"}], ids=str)
def test_a_plan_with_a_damaged_run_is_refused_in_one_line(tmp_path, change):
    write_study(tmp_path)
    plan = json.loads((tmp_path / "study.json").read_text())
    plan["runs"][1] |= change
    (tmp_path / "study.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="study.json is damaged") as raised:
        show(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [
    '{"state": "failed"}', '{"state": 3}', "[]", '{"state": "done", "train_seconds": "1"}'], ids=str)
def test_a_damaged_record_of_a_study_is_as_if_there_were_none(tmp_path, content):
    write_study(tmp_path)
    (tmp_path / "state" / "NL.seed1.json").write_text(content)
    (tmp_path / "state" / "plan.json").write_text('{"NL.seed1": {"flops": "many"}, "NC.seed0": []}')
    assert re.search(r"NL\.seed1 +trained, step 10 of 10", show(str(tmp_path)))


def test_nothing_heavy_is_imported(tmp_path):
    write_run(tmp_path / "run", 10, 10)
    script = (f"import sys; from codellm_jax import cli; assert cli.main(['show', {str(tmp_path / 'run')!r}]) == 0; "
              "print({'jax', 'gin', 'tensorflow', 'matplotlib'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
