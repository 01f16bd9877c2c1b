"""metrics.jsonl after kills, lines of progress, and durations."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codellm_jax.mixture import transient
from codellm_jax.runtime import events, progress
from codellm_jax.runtime.progress import Records, StatusLine, duration, peak_flops, read_records


def write_steps(model_dir: Path, begin: int, steps: range, value: float = 1.0) -> None:
    records = Records(str(model_dir), begin, active=True)
    for step in steps:
        records.write(step, "train", {"loss": value * step})
    records.close()


def test_lines_are_what_was_written(tmp_path):
    records = Records(str(tmp_path), 0, active=True)
    records.write(1, "train", {"loss": 2.5, "loss/text": 3, "model_flops_utilization": None})
    records.write(1, "eval", {"loss": 0.125})
    # Readable while the run goes on.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records.close()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "split": "train", "loss": 2.5, "loss/text": 3.0}, {"step": 1, "split": "eval", "loss": 0.125}]
    assert read_records(str(tmp_path)) == [json.loads(line) for line in lines]


def test_what_is_not_finite_becomes_null(tmp_path):
    records = Records(str(tmp_path), 0, active=True)
    records.write(3, "train", {"loss": math.nan, "grad_norm": math.inf, "rate": -math.inf, "tokens": 5})
    records.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"step": 3, "split": "train", "loss": None, "grad_norm": None, "rate": None, "tokens": 5}


def test_lines_after_the_checkpoint_are_dropped_and_written_again(tmp_path):
    write_steps(tmp_path, 0, range(1, 8), value=1.0)
    write_steps(tmp_path, 4, range(5, 10), value=2.0)
    assert [(line["step"], line["loss"]) for line in read_records(str(tmp_path))] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (5, 10), (6, 12), (7, 14), (8, 16), (9, 18)]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.jsonl"]


def test_a_run_that_begins_anew_keeps_no_line(tmp_path):
    # Killed before its first checkpoint, with its evaluation before the first step on record.
    records = Records(str(tmp_path), 0, active=True)
    records.write(0, "eval", {"loss": 9.0})
    records.write(1, "train", {"loss": 9.0})
    records.close()
    records = Records(str(tmp_path), 0, active=True)
    records.write(0, "eval", {"loss": 9.0})
    records.close()
    assert [(line["step"], line["split"]) for line in read_records(str(tmp_path))] == [(0, "eval")]


@pytest.mark.parametrize("kept", [1, 10, 25, 36])
def test_a_last_line_that_was_cut_short_is_dropped(tmp_path, kept):
    write_steps(tmp_path, 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:kept])
    assert [line["step"] for line in read_records(str(tmp_path))] == [1, 2]
    write_steps(tmp_path, 3, range(4, 5))
    assert [line["step"] for line in read_records(str(tmp_path))] == [1, 2, 4]


def test_a_kill_while_reopening_loses_no_line(tmp_path, monkeypatch):
    write_steps(tmp_path, 0, range(1, 8))

    class Killed(BaseException):
        pass

    def die_halfway(path: Path, text: str) -> None:
        path.write_bytes(text[:30].encode())
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(type(progress.epath.Path(tmp_path)), "write_text", die_halfway)
        with pytest.raises(Killed):
            Records(str(tmp_path), 6, active=True)
    assert [line["step"] for line in read_records(str(tmp_path))] == list(range(1, 8))
    write_steps(tmp_path, 6, range(7, 9))
    assert [line["step"] for line in read_records(str(tmp_path))] == list(range(1, 9))


def test_a_link_in_a_run_directory_is_not_written_through(tmp_path):
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.write_text("mine")
    run.mkdir()
    write_steps(run, 0, range(1, 4))
    for name in (".metrics.jsonl", "metrics.jsonl"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside)
        write_steps(run, 0, range(1, 3))
        assert outside.read_text() == "mine" and not (run / "metrics.jsonl").is_symlink()
    assert [line["step"] for line in read_records(str(run))] == [1, 2]


def test_no_records_yet(tmp_path):
    assert read_records(str(tmp_path / "nothing")) == []


def test_other_processes_write_nothing(tmp_path):
    records = Records(str(tmp_path / "run"), 0, active=False)
    records.write(1, "train", {"loss": 1.0})
    records.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_the_same_values(tmp_path):
    write_steps(tmp_path, 0, range(1, 8), value=1.0)
    # Files are named by the second in which they are opened; a resume is never in the same one.
    first, = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.1000000000.host"))
    write_steps(tmp_path, 4, range(5, 7), value=2.0)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (5, 10), (6, 12)]


def test_tensorboard_events_do_not_import_an_installed_torch(tmp_path):
    (tmp_path / "torch.py").write_text("print('torch was imported')\n")
    program = """if True:
        import sys
        from codellm_jax.runtime.progress import Records
        records = Records(sys.argv[1], 0, active=True)
        records.write(1, "train", {"loss": 1.0})
        records.close()
        print("written")
        import torch  # still possible
        """
    (tmp_path / "run").mkdir()
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["written", "torch was imported"]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_plain_status_lines_come_now_and_then(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    status = StatusLine(3, 50, active=True)
    for step, clock in ((4, 100), (5, 105), (6, 109.9), (7, 110.1), (8, 111), (50, 112)):
        now[0] = clock
        status.show(step, f"loss {step}")
    status.say("a line of its own")
    status.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 4/50 loss 4", "step 7/50 loss 7", "step 50/50 loss 50", "a line of its own"]


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    status = StatusLine(10, 20, active=True)
    status.show(15, "loss 1.5")
    status.say("held-out loss")
    status.show(20, "loss 1.0")
    status.close()
    captured = capsys.readouterr()
    assert captured.out == "" and "held-out loss\n" in captured.err
    assert "20/20 loss 1.0" in captured.err and "100%" in captured.err


def test_a_silent_status_line(capsys):
    status = StatusLine(0, 5, active=False)
    status.show(5, "loss")
    status.say("text")
    status.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0 s"), (-3, "0 s"), (45.2, "45 s"), (59.4, "59 s"), (59.6, "1:00"), (185, "3:05"), (3599.7, "1:00:00"),
    (7800, "2:10:00"), (86_400 * 2, "48:00:00")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_device_that_is_not_in_the_table_has_no_peak():
    assert peak_flops() is None  # CPU


def test_a_clock_that_is_set_back_holds_nothing_up(tmp_path, monkeypatch):
    """A thread that waits by the wall clock dies of a time-out too large, and a queue behind it fills."""
    real, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    records = Records(str(tmp_path), 0, active=True)
    for step in range(1, 40):
        shift[0] = -366 * 86_400.0 * (step > 5)
        records.write(step, "train", {f"value/{number}": 1.0 for number in range(20)})
    records.close()
    assert len(read_records(str(tmp_path))) == 39


def test_events_that_cannot_be_written_are_told_once_and_end_nothing(tmp_path):
    told: list[str] = []
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    records = Records(str(tmp_path), 0, active=True, warn=told.append)
    for step in (1, 2):
        records.write(step, "train", {"loss": 1.0})
    records.close()
    [line] = told
    assert line.startswith("WARNING: no more TensorBoard events are written to ")
    assert len(read_records(str(tmp_path))) == 2


def test_lines_that_are_no_records_are_set_aside_and_the_others_kept(tmp_path):
    write_steps(tmp_path, 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    broken = whole + '{"step": null, "split": "train"}\n{"step": 4}\nnone\n'
    path.write_text(broken)
    told: list[str] = []
    records = Records(str(tmp_path), 3, active=True, warn=told.append)
    records.close()
    assert path.read_text() == whole and (tmp_path / "set_aside" / "1" / "metrics.jsonl").read_text() == broken
    assert len(told) == 1 and told[0].startswith(f"WARNING: 3 lines of {path} are not records of a run")


def test_a_file_that_is_replaced_is_written_again_with_all_its_lines(tmp_path):
    told: list[str] = []
    records = Records(str(tmp_path), 0, active=True, warn=told.append)
    records.write(1, "train", {"loss": 1.0})
    (tmp_path / "metrics.jsonl").rename(tmp_path / "moved")
    (tmp_path / "metrics.jsonl").write_text("another's\n")
    for step in (2, 3):
        records.write(step, "train", {"loss": 1.0})
    records.close()
    assert [line["step"] for line in read_records(str(tmp_path))] == [1, 2, 3] and len(told) == 1
    assert (tmp_path / "set_aside" / "1" / "metrics.jsonl").read_text() == "another's\n"


class Slow:
    """A file in gs:// that counts what is written."""

    def __init__(self) -> None:
        self.name, self.writes = "metrics.jsonl", list[str]()

    def write_text(self, text: str) -> None:
        self.writes.append(text)


def test_remote_lines_are_written_at_a_rate_of_their_own_and_before_a_checkpoint(monkeypatch):
    now, path = [0.0], Slow()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = progress._RemoteLines(path, "kept\n")
    assert path.writes == ["kept\n"]
    for step in range(100):  # a line a second
        now[0] = float(step)
        lines.add(f"{step}\n")
    assert len(path.writes) < 15
    lines.settle()
    assert path.writes[-1] == "kept\n" + "".join(f"{step}\n" for step in range(100))
    count = len(path.writes)
    lines.settle()
    assert len(path.writes) == count
    lines.close()


def test_remote_lines_that_cannot_be_written_are_written_later_or_end_the_save(monkeypatch):
    now, path = [0.0], Slow()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = progress._RemoteLines(path, "kept\n")
    whole, path.write_text = path.write_text, lambda text: 1 / 0
    for step in range(50):
        now[0] += 5
        lines.add(f"{step}\n")
    with pytest.raises(OSError, match="cannot be written: division by zero. Run the same command again"):
        lines.settle()
    path.write_text = whole
    lines.settle()
    assert path.writes[-1] == "kept\n" + "".join(f"{step}\n" for step in range(50))
    lines.close()


def test_remote_events_are_uploaded_in_files_of_a_bounded_length_and_outlast_failures(tmp_path, monkeypatch):
    """Two days of them: what is held, and what is uploaded at once, does not grow."""
    class Client:
        def __init__(self, path: str) -> None:
            self.path = tmp_path / Path(path).name

        def write_bytes(self, content: bytes) -> None:
            uploads.append(len(content))
            if len(uploads) % 5 == 2:
                raise ConnectionError("the service is busy")
            self.path.write_bytes(content)

    now, uploads, held, written = [0.0], list[int](), list[int](), b""
    monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(events.epath, "Path", Client)
    monkeypatch.setattr(events, "BYTES_OF_FILE", 10_000)
    monkeypatch.setattr(transient, "SECONDS_BETWEEN_TRIES", (0, 0, 0))
    file = events._RemoteFile("gs://bucket/events.out.tfevents.1")
    for minute in range(2 * 24 * 60):
        now[0] += 60
        written += (event := f"{minute:04}".encode() * 25)
        file.write(event)
        if file._uploading is not None:
            file._uploading.exception()  # waits for it
        file.flush()
        held.append(sum(map(len, file._files.values())))
    file.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:2] == ["events.out.tfevents.1", "events.out.tfevents.1.00001"] and len(names) > 20
    assert b"".join((tmp_path / name).read_bytes() for name in names) == written
    assert max(uploads) <= 10_300 and max(held) <= 2 * 10_300


@pytest.mark.slow
def test_a_long_run_does_not_grow_in_memory(tmp_path):
    """A run of days is as one of 240 lines, but for the length of its files."""
    import tracemalloc

    records = Records(str(tmp_path), 0, active=True)
    tracemalloc.start()
    sizes, files = [], []
    for step in range(1, 241):
        records.write(step, "train", {f"loss/source_{number}": step / 7 for number in range(40)})
        if step in (80, 160, 240):
            sizes.append(tracemalloc.get_traced_memory()[0])
            files.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))
    tracemalloc.stop()
    records.close()
    assert sizes[2] - sizes[1] < 100_000
    assert files[2] - files[1] == pytest.approx(files[1] - files[0], rel=0.02)
