"""Runs the commands of a study one after the other, each in its own process."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from etils import epath

from codellm_jax.runtime.progress import StatusLine
from codellm_jax.runtime.supervision import without_others
from codellm_jax.runtime.terminal import ending_signals, lasting

PROGRESS = re.compile(r"(step|question) \d+/\d+ ")  # relayed now and then
ALWAYS_TOLD = re.compile(r"WARNING|held-out loss after|Resuming|Stopped by|t5x \w+: error:")


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    how: str  # in words, if it failed


class Commands:
    """Runs commands, forwards signals to the running one, and relays its output.

    A context manager: within it SIGTERM, SIGHUP and SIGINT are stored in `stopped` and forwarded to the running
    command, which saves and ends. The command always ends with this process.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
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

    def wait(self, seconds: float) -> None:
        """Sleeps, at most until a signal arrives."""
        end = time.monotonic() + seconds
        while self.stopped is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def kill(self) -> None:
        """Kills the running command, if any, and everything that it started. May be called from another thread."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def run(
        self, arguments: Sequence[str], heading: str = "", log: str = "", more: Callable[[], str] = str,
    ) -> Ended:
        """Runs `python -m ARGUMENTS`.

        Args:
          arguments: a module and its arguments.
          heading: precedes relayed progress, warnings and errors; without one all output is relayed
            unchanged.
          log: a file, local or in gs://, to which all output is appended.
          more: text appended to a line of progress.
        """
        self._process = _bound_process(arguments, os.environ)
        if self.stopped:  # before there was a process to forward it to
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
                    self.report(lines[-1])
                elif is_progress or ALWAYS_TOLD.match(line):
                    self.report(f"{heading}: {lines[-1]}{more() if is_progress else ''}")
        status = self._process.wait()
        if remote:
            epath.Path(log).write_text("\n".join([*lines, ""]))
        return Ended(status, _how(status, lines))


def _how(status: int, lines: Sequence[str]) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}."
    if not status:
        return "was stopped by a signal before its end; the same command continues from there."
    errors = [line for line in lines if "error: " in line] or [line for line in lines if line.strip()]
    return f"failed: {errors[-1].split('error: ', 1)[-1]}" if errors else f"failed with status {status}."


def side_by_side(
    arguments: Sequence[str], environments: Sequence[Mapping[str, str]], report: Callable[[str], None]
) -> int:
    """Runs `python -m ARGUMENTS` in each of these environments at the same time; returns the highest exit status.

    Relays all output of the first; of the others, lines about runs, errors, and lines that only they print. A signal
    is forwarded to all, and all end with this process.
    """
    processes: list[subprocess.Popen[str]] = []
    stopped: list[int] = []
    said: set[str] = set()
    speaking = threading.Lock()

    def stop(number: int, _: FrameType | None) -> None:
        stopped.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    def relay(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with speaking:
                if line.startswith("[") or line not in said:
                    report(line.rstrip("\n"))
                said.add(line)

    before = {number: signal.signal(number, stop) for number in ending_signals()}
    try:
        for environment in environments:
            processes.append(_bound_process(arguments, environment))
        threads = [threading.Thread(target=relay, args=(process,)) for process in processes]
        for thread in threads:
            thread.start()
        for number in stopped:  # a signal that arrived while they were started
            stop(number, None)
        statuses = [process.wait() for process in processes]
        for thread in threads:
            thread.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return max(128 - status if status < 0 else status for status in statuses)


def _bound_process(arguments: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    """Starts `python -m ARGUMENTS`, which always ends with this process.

    In its own process group: Ctrl-C reaches only this process, which forwards it once. The child binds itself to this
    process, because between fork and exec no Python code is safe beside other threads, such as those that renew leases.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "codellm_jax.runtime.supervision", str(os.getpid()), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, errors="replace",
        process_group=0, env=without_others(environment))
