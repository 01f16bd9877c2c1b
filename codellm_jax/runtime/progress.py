"""The output of a run during training: a status line, JSON lines, TensorBoard events, and hardware utilization."""

import concurrent.futures
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import tqdm
from etils import epath

from codellm_jax.mixture.transient import asked_again
from codellm_jax.results.files import named, write_whole
from codellm_jax.runtime.events import Events
from codellm_jax.runtime.files import is_still_at, set_aside

# Dense bfloat16 peak, FLOP/s per device, from the vendors' data sheets. Other devices have no utilisation.
PEAK_FLOPS = {
    "TPU v2": 45e12 / 2, "TPU v3": 123e12 / 2, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12,
    "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops() -> float | None:
    """The peak of this process's devices, FLOP/s each; None if unknown."""
    import jax  # not at the top: a study's progress is read without it

    return PEAK_FLOPS.get(jax.devices()[0].device_kind)


class Records:
    """metrics.jsonl and TensorBoard events of a run directory, written by one process.

    Lines after `step` are left by a run that was killed after its last checkpoint; they are dropped, and will be
    written again with the same values.

    Args:
      model_dir: local or gs://.
      step: steps done.
      active: whether this process writes.
      require_held: called before each line; raises OSError if the directory is no longer this run's.
      warn: called with a line of text.
      tensorboard: whether TensorBoard events are also written.
    """

    def __init__(
        self, model_dir: str, step: int, active: bool, require_held: Callable[[], None] = lambda: None,
        warn: Callable[[str], None] = print, tensorboard: bool = True,
    ) -> None:
        self._path = epath.Path(model_dir) / "metrics.jsonl"
        self._lines: _Lines | _RemoteLines | None = None
        if not active:
            return
        self._require_held, self._warn = require_held, warn
        content = self._path.read_bytes() if self._path.exists() else b""
        found, broken = parsed_records(content)
        if broken:
            aside = set_aside([self._path], epath.Path(model_dir))
            warn(f"WARNING: {broken} lines of {self._path} are not records of a run; the original file is kept in "
                 f"{aside}, and the other lines are used.")
        # A run without a checkpoint starts over, including its evaluation before the first step.
        kept = "".join(json.dumps(record) + "\n" for record in found if step and record["step"] <= step)
        with named(self._path, len(kept)):
            self._lines = (_RemoteLines if "://" in model_dir else _Lines)(self._path, kept)
        self._events = Events(f"{model_dir.rstrip('/')}/tensorboard", step + 1 if step else None,
                              warn) if tensorboard else None

    def write(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Adds one line; values that are None are left out, and those not finite become null.

        Raises:
          OSError: the line cannot be written, or the directory is no longer this run's.
        """
        if self._lines is None:
            return
        self._require_held()
        known = {name: float(value) for name, value in values.items() if value is not None}
        line = {"step": step, "split": split} | {
            name: value if math.isfinite(value) else None for name, value in known.items()}
        text = json.dumps(line) + "\n"
        with named(self._path, len(text)):
            if self._lines.is_gone():
                self._lines.write_anew()
                self._warn(f"WARNING: {self._path} was removed or replaced; it is written again with all its lines.")
            self._lines.add(text)
        if self._events is not None:
            self._events.write(step, {f"{split}/{name}": value for name, value in known.items()})

    def settle(self) -> None:
        """Returns when all lines are stored; a resume from a checkpoint saved now relies on them."""
        if self._lines is not None:
            self._lines.settle()

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            if self._events is not None:
                self._events.close()


class _Lines:
    """The lines of a local file, which begins with `kept`."""

    def __init__(self, path: epath.Path, kept: str) -> None:
        self._path = path
        building = path.with_name(f".{path.name}")
        building.unlink(missing_ok=True)  # so that a link is not followed
        building.write_text(kept)
        building.replace(path)  # atomic, so that a kill loses no line
        self._file = open(path, "a+")

    def is_gone(self) -> bool:
        """Whether the open file is no longer the one at its path."""
        return not is_still_at(self._file, str(self._path))

    def write_anew(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        self._file.close()
        if self._path.exists():
            set_aside([self._path], self._path.parent)
        write_whole(self._path, content)
        self._file = open(self._path, "a+")

    def add(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def settle(self) -> None:
        """Does nothing: each line is stored when it is added."""

    def close(self) -> None:
        self._file.close()


class _RemoteLines:
    """The lines of a file on gs://, where files cannot be appended to: a thread rewrites all of them, for at most a
    fiftieth of the time, and before every checkpoint.
    """

    SECONDS_BETWEEN_WRITES = 10.0

    def __init__(self, path: epath.Path, kept: str) -> None:
        self._path, self._lines = path, [kept]
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "metrics.jsonl")
        self._writing: concurrent.futures.Future[float] | None = None
        self._stored, self._next = 0, -math.inf
        self.settle()

    def is_gone(self) -> bool:
        """Always False: the next write restores a removed file."""
        return False

    def write_anew(self) -> None:
        """Does nothing: every write is whole."""

    def add(self, line: str) -> None:
        self._lines.append(line)
        if self._writing is not None and self._writing.done():
            try:
                took = self._finish()
            except OSError:  # the next write retries; before a checkpoint the error is raised
                took = 0.0
            self._next = time.monotonic() + max(self.SECONDS_BETWEEN_WRITES, 50 * took)
        if self._writing is None and time.monotonic() >= self._next:
            self._begin()

    def settle(self) -> None:
        if self._writing is not None:
            self._finish()
        if self._stored < len(self._lines):
            self._begin()
            self._finish()

    def close(self) -> None:
        self.settle()
        self._thread.shutdown()

    def _begin(self) -> None:
        self._stored, text = len(self._lines), "".join(self._lines)
        self._writing = self._thread.submit(self._write, text)

    def _write(self, text: str) -> float:
        began = time.monotonic()
        asked_again(lambda: self._path.write_text(text))
        return time.monotonic() - began

    def _finish(self) -> float:
        writing, self._writing = self._writing, None
        assert writing is not None
        try:
            return writing.result()
        except Exception as error:  # the storage client has its own classes
            self._stored = 0
            raise OSError(f"{self._path} cannot be written: {' '.join(str(error).split())[:200]}. Run the same "
                          "command again once it can: it continues from the last complete checkpoint.") from error


def read_records(model_dir: str) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, without a line that a kill cut short or lines that are not records."""
    path = epath.Path(model_dir).expanduser() / "metrics.jsonl"
    return parsed_records(path.read_bytes())[0] if path.exists() else []


def parsed_records(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records in the content of metrics.jsonl, and the number of other lines, not counting an unfinished last one.
    """
    records, broken = [], 0
    *lines, cut = content.decode(errors="replace").split("\n")
    for line in [*lines, cut]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if _is_record(record):
            records.append(record)
        elif line is not cut:
            broken += 1
    return records, broken


def _is_record(record: Any) -> bool:
    """Whether it is an object with a step, a split, and numbers, where null means a value that is not finite."""
    if not isinstance(record, dict) or not isinstance(record.get("split"), str):
        return False
    step = record.get("step")
    return type(step) is int and 0 <= step < 2**53 and all(
        value is None or type(value) in (int, float) for name, value in record.items() if name != "split")


class StatusLine:
    """One line of progress: a bar on a terminal, else a plain line from time to time; silent if not `active`."""

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
        """Shows the state after `step` steps."""
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
        """Prints a separate line, above the bar."""
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
    """Prints only on the first process."""
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)


def duration(seconds: float) -> str:
    """A readable duration: 45 s, 3:05, 2:10:00."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
