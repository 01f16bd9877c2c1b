"""TensorBoard, Weights & Biases and MLflow behind the same few functions."""

import dataclasses
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from codellm_jax.runtime.events import Events

PROJECT = "codellm_jax"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set
LONGEST = 6000  # characters of a parameter in MLflow


@dataclasses.dataclass(frozen=True)
class Tracked:
    """The description of a run for a tracker.

    Attributes:
      name: of the run.
      group: the study that it belongs to, or None.
      id: the tracker's id of the run, from an earlier session; None the first time.
      place: a local folder for the tracker's own files; None for the tracker's default.
      directory: the run directory.
      configuration: name -> value.
    """

    name: str
    group: str | None
    id: str | None
    place: str | None
    directory: str
    configuration: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Tracker:
    """An open run of a tracker.

    Attributes:
      id: the tracker's id of the run.
      record: takes a step and its values.
      summary: takes values of the run as a whole, and its step.
      file: takes a file and its kind: "results", "report" or "".
      close: takes whether the run has ended; sends the remaining data.
    """

    id: str
    record: Callable[[int, Mapping[str, float]], None]
    summary: Callable[[Mapping[str, float], int], None]
    file: Callable[[Path, str], None]
    close: Callable[[bool], None]


def open_tensorboard(run: Tracked) -> Tracker:
    """Configuration, ledger and scores, in an events file beside the one that the run itself writes."""
    def fail(why: str) -> None:
        raise OSError(why)

    events = Events(f"{run.directory}/tensorboard", None, fail, "summary")
    if run.configuration and run.id is None:
        rows = "\n".join(f"| {name} | `{value}` |" for name, value in sorted(run.configuration.items()))
        events.write_text("configuration", f"| setting | value |\n|---|---|\n{rows}")

    def file(path: Path, kind: str) -> None:
        if path.name == "report.md":
            events.write_text("report", path.read_text(encoding="utf-8"))

    return Tracker("tensorboard", lambda step, values: None, lambda values, step: events.write(step, values), file,
                   lambda finished: events.close())


def open_wandb(run: Tracked) -> Tracker:
    """A run of Weights & Biases; with WANDB_MODE=offline it stays in the run directory, for `wandb sync`."""
    import wandb

    made = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT, name=run.name, group=run.group, dir=run.place,
        id=run.id or uuid.uuid4().hex[:12], resume="allow", config=dict(run.configuration),
        settings=wandb.Settings(silent=True, console="off"))

    files: dict[str, list[Path]] = {}

    def close(finished: bool) -> None:
        for kind, paths in files.items():
            artifact = wandb.Artifact(f"{kind or 'run'}-{made.id}", type=kind or "run")
            for path in paths:
                artifact.add_file(str(path))
            made.log_artifact(artifact)
        made.finish(exit_code=0 if finished else 1)

    return Tracker(
        made.id, lambda step, values: made.log(dict(values), step=step),
        lambda values, step: made.summary.update(dict(values)),
        lambda path, kind: files.setdefault(kind, []).append(path), close)


def open_mlflow(run: Tracked) -> Tracker:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in ./mlruns."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or Path("mlruns").absolute().as_uri()
    if "://" not in uri or uri.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow requires this for its file store
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    if run.id is None:
        experiment = client.get_experiment_by_name(name)
        try:
            number = experiment.experiment_id if experiment else client.create_experiment(name)
        except MlflowException:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
            number = experiment.experiment_id  # another run has just made it
        made = client.create_run(number, run_name=run.name, tags={"study": run.group} if run.group else {})
        known = made.info.run_id
        client.log_batch(known, params=[Param(name, str(value)[:LONGEST]) for name, value in run.configuration.items()])
    else:
        known = run.id
        client.update_run(known, status="RUNNING")

    def values_of(step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        client.log_batch(known, metrics=[Metric(_as_file(name), value, now, step) for name, value in values.items()])

    return Tracker(
        known, values_of, lambda values, step: values_of(step, values),
        lambda path, kind: client.log_artifact(known, str(path), kind or None),
        lambda finished: client.set_terminated(known, "FINISHED" if finished else "KILLED"))


def _as_file(name: str) -> str:
    """The file name of a metric: in a file store, "train/loss" and "train/loss/text" would be a file and its folder."""
    split, _, rest = name.partition("/")
    return f"{split}/{rest.replace('/', '.')}"


OPEN: Mapping[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": open_tensorboard, "wandb": open_wandb, "mlflow": open_mlflow}
