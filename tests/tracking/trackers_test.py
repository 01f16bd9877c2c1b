"""What trackers are sent of a run, once each, and that one which fails or hangs costs a line."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from written_runs import write_run, write_study

from codellm_jax.tracking import follow, trackers
from codellm_jax.tracking.backends import OPEN, Tracked, Tracker
from codellm_jax.tracking.follow import Follower
from codellm_jax.tracking.trackers import Trackers, catch_up, require_known

ROOT = Path(__file__).resolve().parent.parent.parent


class Sent:
    """A tracker that keeps what it is sent."""

    def __init__(self) -> None:
        self.opened: list[Tracked] = []
        self.records: list[tuple[int, Mapping[str, float]]] = []
        self.summary: dict[str, float] = {}
        self.files: list[tuple[str, str]] = []
        self.closed: list[bool] = []

    def open(self, run: Tracked) -> Tracker:
        self.opened.append(run)
        return Tracker("id7", lambda step, values: self.records.append((step, values)),
                       lambda values, step: self.summary.update(values),
                       lambda path, kind: self.files.append((kind, path.name)), self.closed.append)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    one = Sent()
    monkeypatch.setattr(follow, "OPEN", {"wandb": one.open, "tensorboard": one.open})
    return one


def test_all_of_a_run_is_sent_once(tmp_path, sent):
    run = write_run(tmp_path / "run", 4, 10, asked={
        "model.layers": "4", "BATCH_SIZE": "8", "train.batch_size": "%BATCH_SIZE", "train.mixture": "@mixture()"})
    follower = Follower(str(run), "wandb")
    assert sent.opened[0].configuration == {"model.layers": 4, "train.batch_size": 8, "train.mixture": "@mixture()",
                                            "arm": "CODE", "seed": 3, "parameters": 1234567}
    follower.records()
    follower.records()
    assert [(step, sorted(values)[0], values.get("train/loss")) for step, values in sent.records] == [
        (2, "train/loss", 8.8), (4, "train/loss", 8.6), (4, "eval/loss", None)]
    # Killed, gone on with from step 2, and trained to the end: what was sent is not sent again.
    lines = (run / "metrics.jsonl").read_text().splitlines()[:1]
    more = [json.dumps({"step": step, "split": "train", "loss": float(step)}) for step in (4, 6)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, *more]) + "\n")
    again = Follower(str(run), "wandb")
    again.records()
    again.rest()
    assert sent.opened[1].id == "id7"
    assert [step for step, _ in sent.records] == [2, 4, 4, 6]
    assert sent.summary["ledger/rows/text.a"] == 30 and sent.summary["ledger/share/code.a"] == 0.25
    assert sorted(sent.files) == [("", "config.gin"), ("", "provenance.json")]
    assert sent.closed == [False]


def test_scores_of_an_evaluation_are_sent_later(tmp_path, sent):
    run = write_run(tmp_path / "run", 10, 10)
    Follower(str(run), "wandb").rest()
    (run / "results").mkdir()
    (run / "results" / "logic.json").write_text('{"task": "logic", "value": 0.4, "interval": [0.3, 0.5], "n": 9}')
    sent.files.clear()
    Follower(str(run), "wandb").rest()
    assert [sent.summary[name] for name in ("score/logic", "score_low/logic", "score_high/logic")] == [0.4, 0.3, 0.5]
    assert sent.files == [("results", "logic.json")] and sent.closed == [True, True]


def test_a_studys_runs_are_grouped_and_its_report_is_sent(tmp_path, sent):
    write_study(tmp_path / "first")
    Follower(str(tmp_path / "first" / "runs" / "NL.seed0"), "wandb")
    (tmp_path / "first" / "report").mkdir()
    (tmp_path / "first" / "report" / "report.html").write_text("<p>")
    Follower(str(tmp_path / "first"), "wandb").rest()
    assert [(run.name, run.group) for run in sent.opened] == [("NL.seed0", "first"), ("report of first", "first")]
    assert sent.files == [("report", "report.html")]


def test_who_follows_a_run_is_known_from_its_files(tmp_path, monkeypatch):
    asked: list[tuple[str, list[str]]] = []

    class Asked:
        def __init__(self, directory: str, names: list[str], report: Any) -> None:
            asked.append((directory, names))

        def close(self) -> None:
            pass

    monkeypatch.setattr(trackers, "Trackers", Asked)
    write_study(tmp_path)
    run = tmp_path / "runs" / "NL.seed0"
    catch_up(str(run))
    (run / "trackers").mkdir()
    (run / "trackers" / "mlflow.json").write_text("{}")
    catch_up(str(run))
    catch_up(str(tmp_path))
    catch_up("hf://ORG/NAME")  # published weights have none
    assert asked == [(str(run), ["mlflow"]), (str(tmp_path), ["mlflow"])]


def test_an_unknown_tracker_gets_the_nearest():
    require_known(["tensorboard", "wandb", "mlflow"])
    with pytest.raises(ValueError, match="TRACKERS must list some of .*, found 'wandbb'; nearest: wandb"):
        require_known(["wandbb"])


def test_events_that_cannot_be_written_are_a_line(tmp_path, sent, monkeypatch):
    def fail(run: Tracked) -> Tracker:
        raise OSError("no space left")

    monkeypatch.setattr(follow, "OPEN", {"tensorboard": fail})
    told: list[str] = []
    Trackers(str(write_run(tmp_path / "run", 4, 10)), ["tensorboard"], told.append).close()
    assert told == ["WARNING: the tracker tensorboard stopped: no space left. The run continues without it."]


def test_tensorboard_has_scores_and_ledger(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = write_run(tmp_path / "run", 10, 10, asked={"model.layers": "4"})
    Follower(str(run), "tensorboard").rest()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert events.Scalars("ledger/rows/text.a")[0].value == 30
    assert "configuration/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
@pytest.mark.parametrize("wandb, told, at_most", [
    ("raise RuntimeError('no network')", "wandb stopped: RuntimeError: no network. The run continues", 20),
    ("import time; time.sleep(3600)", "wandb did not accept everything within 1 s", 20),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "wandb stopped: its process ended with status -9", 20)])
def test_one_that_fails_hangs_or_dies_is_a_line(tmp_path, monkeypatch, wandb, told, at_most):
    (tmp_path / "wandb.py").write_text(wandb + "\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), *sys.path]))
    monkeypatch.setattr(trackers, "END_SECONDS", 1.0)
    lines: list[str] = []
    began = time.monotonic()
    started = Trackers(str(write_run(tmp_path / "run", 4, 10)), ["wandb"], lines.append)
    if "within" not in told:  # while the run goes on
        while not lines:
            time.sleep(0.05)
            assert time.monotonic() - began < at_most
    started.close()
    assert time.monotonic() - began < at_most
    [line] = lines
    assert told in line


def records_of(file: Path) -> list[Any]:
    """What Weights & Biases keeps offline: a log in LevelDB's format, blocks of 32 KiB, whose records are protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        whole += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole one, or the last part of one
            found.append(Record())
            found[-1].ParseFromString(whole)
            whole = b""
    return found


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trackers, "END_SECONDS", 140.0)  # a busy machine imports the library for long
    run = write_run(tmp_path / "run", 4, 10, asked={"model.layers": "4"})
    lines: list[str] = []
    Trackers(str(run), ["wandb"], lines.append).close()
    assert lines == []
    [folder] = run.glob("trackers/wandb/offline-run-*")
    [file] = folder.glob("run-*.wandb")
    records = records_of(file)
    logged = [{item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
               for item in record.history.item} for record in records if record.HasField("history")]
    assert [(line["_step"], line["train/loss"]) for line in logged] == [(2, 8.8), (4, 8.6)]
    assert logged[-1]["eval/loss/code"] == 7.5
    summed = {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
              for record in records if record.HasField("summary") for item in record.summary.update}
    assert summed["ledger/rows/text.a"] == 30
    configured = {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
                  for record in records if record.HasField("run") for item in record.run.config.update}
    assert configured["model.layers"] == 4 and configured["seed"] == 3


@pytest.mark.slow
def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(trackers, "END_SECONDS", 140.0)
    from mlflow.tracking import MlflowClient

    run = write_run(tmp_path / "run", 4, 10, asked={"model.layers": "4"})
    lines: list[str] = []
    for _ in range(2):  # the second has nothing to add
        Trackers(str(run), ["mlflow"], lines.append).close()
    assert lines == []
    client = MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
    experiment = client.get_experiment_by_name("codellm_jax")
    [found] = client.search_runs([experiment.experiment_id])
    known = found.info.run_id
    assert [(one.step, one.value) for one in client.get_metric_history(known, "train/loss")] == [(2, 8.8), (4, 8.6)]
    assert found.data.params["model.layers"] == "4" and found.data.metrics["ledger/rows.text.a"] == 30
    assert found.info.status == "KILLED" and found.info.run_name == "run"
    assert {one.path for one in client.list_artifacts(known)} == {"config.gin", "provenance.json"}


def test_every_tracker_can_be_opened():
    assert set(OPEN) == set(trackers.KNOWN)
