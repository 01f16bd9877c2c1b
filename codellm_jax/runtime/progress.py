"""What a run tells while it trains: a status line, JSON lines, TensorBoard events, and its use of the hardware."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import tqdm
from etils import epath

# Dense bfloat16 peak, FLOP/s per device, from the vendors' data sheets. A device that is not here has no utilisation.
PEAK_FLOPS = {
    "TPU v2": 45e12 / 2, "TPU v3": 123e12 / 2, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12,
    "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops() -> float | None:
    """The peak of this process's devices, FLOP/s each, where it is known."""
    import jax  # not above: what a study has done is read without it

    return PEAK_FLOPS.get(jax.devices()[0].device_kind)


class Records:
    """metrics.jsonl and TensorBoard events of a run directory, written by one process.

    Lines after `step` are left by a run that was killed after its last checkpoint; they are dropped, and will be
    written again with the same values.
    """

    def __init__(self, model_dir: str, step: int, active: bool, tensorboard: bool = True) -> None:
        self._path = epath.Path(model_dir) / "metrics.jsonl"
        self._open = contextlib.ExitStack()
        self._lines: Any = None
        self._events: Any = None
        if not active:
            return
        # A run without a checkpoint begins anew, its evaluation before the first step included.
        kept = [line for line in read_records(model_dir) if line["step"] <= step] if step else []
        building = self._path.with_name(f".{self._path.name}")
        building.write_text("".join(json.dumps(line) + "\n" for line in kept))
        building.replace(self._path)  # a kill in between loses no line
        # etils gives a context and no file where the path is remote.
        self._lines = self._open.enter_context(self._path.open("a"))
        if tensorboard:
            from tensorboardX import SummaryWriter

            use_remote_events()
            self._events = SummaryWriter(logdir=str(epath.Path(model_dir) / "tensorboard"),
                                         purge_step=step + bool(step))

    def write(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Adds one line; values that are not known are left out, and those not finite become null."""
        if self._lines is None:
            return
        known = {name: float(value) for name, value in values.items() if value is not None}
        line = {"step": step, "split": split} | {
            name: value if math.isfinite(value) else None for name, value in known.items()}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        if self._events is not None:
            for name, value in known.items():
                self._events.add_scalar(f"{split}/{name}", value, step)
            self._events.flush()

    def close(self) -> None:
        if self._lines is not None:
            self._open.close()
        if self._events is not None:
            self._events.close()


def use_remote_events() -> None:
    """Has events be written to gs:// by the client of the storage service that all else here uses."""
    from tensorboardX import record_writer

    record_writer.register_writer_factory("gs", _RemoteEvents)


class _RemoteEvents:
    """A file of events in gs://, where nothing can be appended to: each flush writes all of it again."""

    def __init__(self, path: str) -> None:
        self._path, self._written = epath.Path(path), bytearray()

    @classmethod
    def open(cls, path: str) -> "_RemoteEvents":
        return cls(path)

    @staticmethod
    def directory_check(path: str) -> None:
        """There are no directories to make."""

    def write(self, data: bytes) -> None:
        self._written += data

    def flush(self) -> None:
        self._path.write_bytes(bytes(self._written))

    def close(self) -> None:
        self.flush()


def read_records(model_dir: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without any that a kill cut short or that are no records."""
    path = epath.Path(model_dir).expanduser() / "metrics.jsonl"
    lines = []
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and {"step", "split"} <= record.keys():
            lines.append(record)
    return lines


class StatusLine:
    """One line of progress: a bar on a terminal, a plain line every so often elsewhere; silent if not `active`."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, first: int, total: int, active: bool, unit: str = "step") -> None:
        self._total, self._active, self._unit = total, active, unit
        self._bar = None
        self._printed = self._step = first
        self._next_line = 0.0
        if active and sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total, initial=first, dynamic_ncols=True,
                                  bar_format="{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} {desc}")

    def show(self, step: int, text: str) -> None:
        """Shows what holds after `step` steps."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._step)
        elif time.monotonic() >= self._next_line or self._step < step == self._total:
            self._next_line = time.monotonic() + self.SECONDS_BETWEEN_LINES
            print(f"{self._unit} {step}/{self._total} {text}", flush=True)
        self._step = step

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def say(text: str) -> None:
    """Prints on the first process alone."""
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as one reads them: 45 s, 3:05, 2:10:00."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
