"""Commands that are run one after the other, each in a process of its own: what a study is made of."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from etils import epath

from codellm_jax.runtime.progress import StatusLine
from codellm_jax.runtime.supervision import die_with_parent
from codellm_jax.runtime.terminal import ending_signals, lasting

PROGRESS = re.compile(r"(step|question) \d+/\d+ ")  # told every now and then
ALWAYS_TOLD = re.compile(r"WARNING|held-out loss after|Resuming|Stopped by|t5x \w+: error:")


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    how: str  # in words, of one that failed


class Commands:
    """Runs commands, passes signals on to the one that runs, and relays what it says.

    A context manager: within it SIGTERM, SIGHUP and SIGINT are kept in `stopped`, and the command that runs gets them,
    to save and end. It ends with this process, however that ends.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._process: subprocess.Popen[str] | None = None
        self._before: dict[int, Any] = {}
        self.stopped: int | None = None  # the signal

    def __enter__(self) -> "Commands":
        self._before = {number: signal.signal(number, self._stop) for number in ending_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.stopped = number
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def run(
        self, arguments: Sequence[str], heading: str = "", log: str = "", more: Callable[[], str] = str,
    ) -> Ended:
        """Runs `python -m ARGUMENTS`.

        Args:
          arguments: a module and its arguments.
          heading: stands before what is relayed of its progress, its warnings and its error; without one all that it
            says is relayed as it is.
          log: a file, local or in gs://, that everything it says is added to.
          more: what is added to a line of progress.
        """
        # In a group of its own: Ctrl-C reaches this process alone, which passes it on, once.
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, text=True, errors="replace", process_group=0, preexec_fn=die_with_parent)
        if self.stopped:  # before there was a process to pass it on to
            self._process.send_signal(self.stopped)
        lines: list[str] = []
        next_line, remote = 0.0, "://" in log
        if log and not remote:
            Path(log).expanduser().parent.mkdir(parents=True, exist_ok=True)
        with lasting(open(Path(log).expanduser() if log and not remote else os.devnull, "ab")) as file:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                lines.append(line.rstrip("\n"))
                file.write(line)
                file.flush()
                is_progress = PROGRESS.match(line) and time.monotonic() >= next_line
                if is_progress:
                    next_line = time.monotonic() + StatusLine.SECONDS_BETWEEN_LINES
                if not heading:
                    self._report(lines[-1])
                elif is_progress or ALWAYS_TOLD.match(line):
                    self._report(f"{heading}: {lines[-1]}{more() if is_progress else ''}")
        status = self._process.wait()
        if remote:
            epath.Path(log).write_text("\n".join([*lines, ""]))
        return Ended(status, _how(status, lines))


def _how(status: int, lines: Sequence[str]) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}."
    if not status:
        return "stopped before its end, by a signal of its own; the same command goes on from there."
    errors = [line for line in lines if "error: " in line] or [line for line in lines if line.strip()]
    return f"failed: {errors[-1].split('error: ', 1)[-1]}" if errors else f"failed with status {status}."


class Pace:
    """How fast runs went, and so how long others will take."""

    def __init__(self) -> None:
        self._flops = self._seconds = 0.0
        self._evaluations: list[float] = []

    def trained(self, flops: float, seconds: float) -> None:
        self._flops, self._seconds = self._flops + flops, self._seconds + seconds

    def evaluated(self, seconds: float) -> None:
        self._evaluations.append(seconds)

    def left(self, flops: Sequence[float], evaluations: int) -> float | None:
        """Seconds for runs of these FLOPs and as many evaluations; None while it cannot be known."""
        if (flops and not self._flops) or (evaluations and not self._evaluations):
            return None
        return sum(flops) * self._seconds / (self._flops or 1.0) + evaluations * sum(self._evaluations) / max(
            1, len(self._evaluations))
