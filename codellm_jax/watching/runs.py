"""The state of a run from the files in its directory, during training and after. Nothing is written, and no device is
used.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from codellm_jax.results.files import Damaged, files_of, read_provenance, read_result
from codellm_jax.runtime.files import is_step
from codellm_jax.runtime.progress import read_records

OF_A_RUN = ("provenance.json", "metrics.jsonl", "config.gin", "checkpoints")  # each run directory has one of these
SPEED_RECORDS = 6  # the current speed is the median of this many records


@dataclasses.dataclass(frozen=True)
class OfRun:
    """A run directory.

    Attributes:
      path: the directory.
      provenance: the content of provenance.json; empty if there is none, or it is damaged.
      records: the lines of metrics.jsonl.
      results: by task that was evaluated after training, the content of TASK.json.
      checkpoints, exports, damaged: the steps of those in the directory.
      is_held: whether a process of this machine is training it; None if the system does not say.
      changed_at: when metrics.jsonl was last written, in seconds of its file system's clock; None if there is none.
    """

    path: epath.Path
    provenance: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    results: Mapping[str, Mapping[str, Any]]
    checkpoints: Sequence[int]
    exports: Sequence[int]
    damaged: Sequence[int]
    is_held: bool | None
    changed_at: float | None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def step(self) -> int:
        """The step of the last record, or of a later checkpoint."""
        return max([int(self.provenance.get("step") or 0), *(int(line["step"]) for line in self.records),
                    *self.checkpoints])

    @property
    def last_step(self) -> int | None:
        """The step at which it ends; None for a run that has not begun."""
        return self.provenance.get("last_step")

    @property
    def state(self) -> str:
        """The state in one or two words: "trained", "training", "stopped", "not ended" or "to do"."""
        if self.provenance.get("finished"):
            return "trained"
        if self.is_held:
            return "training"
        if not self.provenance:
            return "not ended" if self.records or self.checkpoints else "to do"
        sessions = self.provenance.get("sessions") or [{}]
        return "not ended" if sessions[-1].get("to_step") is None else "stopped"

    def last(self, split: str) -> Mapping[str, Any]:
        """The last record of "train" or "eval"; empty if there is none."""
        return next((line for line in reversed(self.records) if line["split"] == split), {})

    @property
    def tokens_per_second(self) -> float | None:
        """The median over the last records; None if none contains it."""
        rates = sorted(line["tokens_per_second"] for line in self.records[-2 * SPEED_RECORDS:]
                       if line["split"] == "train" and line.get("tokens_per_second") is not None)
        return rates[len(rates) // 2] if rates else None

    @property
    def seconds_left(self) -> float | None:
        """The remaining time of training at the speed of the last records; None if unknown, or if nothing is left."""
        counted = [(line["step"], line["tokens"]) for line in self.records
                   if line["split"] == "train" and line.get("tokens") is not None]
        rate = self.tokens_per_second
        if self.last_step is None or len(counted) < 2 or not rate or self.step >= self.last_step:
            return None
        (first, before), (last, after) = counted[max(0, len(counted) - SPEED_RECORDS)], counted[-1]
        return (after - before) / (last - first) * (self.last_step - self.step) / rate if last > first else None


def is_run(path: epath.Path) -> bool:
    """Whether a directory is a run directory."""
    return any((path / name).exists() for name in OF_A_RUN)


def read_run(path: epath.Path) -> OfRun:
    """Reads a run directory; any of its files may be missing or damaged."""
    metrics, results = path / "metrics.jsonl", dict[str, Mapping[str, Any]]()
    for file in files_of(path / "results", ".json"):
        try:
            result = read_result(file, ("task", "n", "value"))
        except Damaged:  # `t5x report` names it
            continue
        results[result["task"] + "_sample" * result.get("sample", False)] = result
    try:
        provenance = read_provenance(path)
    except Damaged:
        provenance = None
    return OfRun(path, provenance or {}, read_records(str(path)), results,
                 _steps(path / "checkpoints"), _steps(path / "exports"), _steps(path / "damaged_checkpoints"),
                 is_held(path), float(metrics.stat().mtime) if metrics.exists() else None)


def _steps(folder: epath.Path) -> list[int]:
    return sorted(int(path.name) for path in (folder.iterdir() if folder.exists() else ()) if is_step(path.name))


def is_held(path: epath.Path) -> bool | None:
    """Whether a process of this machine holds the lock of a run directory (`runtime.process.alone_in`); None if the
    system does not say. The lock is not tried, since a run that starts at that moment would find it taken.
    """
    try:
        found = os.stat(os.fspath(path / ".lock"))
        locks = Path("/proc/locks").read_text()
    except OSError:
        return None
    # Compare inode numbers only: some file systems report the device in two ways.
    return any("FLOCK" in fields and any(field.rpartition(":")[2] == str(found.st_ino) for field in fields[5:6])
               for line in locks.splitlines() if (fields := line.split()))
