"""The trackers that follow a run, each in its own process.

Each tracker is fed by its own process, `follow`, which reads the files that the run writes anyway. A tracker that
fails, hangs or is slow therefore neither stops nor slows the run; a warning is printed, and the next `t5x train` or
`t5x eval` of the run sends the missing data.
"""

import contextlib
import difflib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from etils import epath

from codellm_jax.runtime.terminal import one_line

KNOWN = ("tensorboard", "wandb", "mlflow")
FOLDER = "trackers"  # in a run directory: a record of the data sent to each tracker, and its log
END_SECONDS = 30.0  # at the end of a command, for the remaining data

Told = Callable[[str], None]


def require_known(names: Sequence[str]) -> None:
    """Raises ValueError for an unknown tracker."""
    for name in names:
        if name not in KNOWN:
            near = difflib.get_close_matches(str(name), KNOWN, n=1, cutoff=0.3)
            raise ValueError(f"TRACKERS must list some of {', '.join(KNOWN)}, found {name!r}"
                             + (f"; nearest: {near[0]}." if near else "."))


class Trackers:
    """The trackers that follow a run directory until `close`."""

    def __init__(self, directory: str, names: Sequence[str], report: Told) -> None:
        """
        Args:
          directory: a run directory, or a study's, whose report is sent.
          names: of trackers.
          report: called when a tracker fails, possibly from another thread.
        """
        self._directory, self._report = directory, report
        self._late: set[str] = set()
        # The run itself writes TensorBoard's events; only the final data is left.
        self._has_events = "tensorboard" in names
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._threads: list[threading.Thread] = []
        for name in dict.fromkeys(names):
            if name != "tensorboard":
                try:
                    self._processes[name] = _follow(directory, name)
                except OSError as error:
                    self._failed(name, one_line(error))
        for one in self._processes.items():
            self._threads.append(threading.Thread(target=self._watch, args=one, daemon=True))
            self._threads[-1].start()

    def _watch(self, name: str, process: "subprocess.Popen[str]") -> None:
        """Reports why a tracker's process ended, if it failed."""
        assert process.stdout is not None
        why = process.stdout.read().strip()
        if (status := process.wait()) and name not in self._late:
            self._failed(name, why or f"its process ended with status {status}")

    def _failed(self, name: str, why: str) -> None:
        self._report(f"WARNING: the tracker {name} stopped: {why.rstrip('.')}. The run continues without it.")

    def close(self) -> None:
        """Sends the remaining data to all trackers, and waits for them at most END_SECONDS."""
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        if self._has_events:
            from codellm_jax.tracking.follow import Follower

            try:
                Follower(self._directory, "tensorboard").rest()
            except Exception as error:  # whatever it is, the run itself has succeeded
                self._failed("tensorboard", one_line(error))
        end = time.monotonic() + END_SECONDS
        for name, process in self._processes.items():
            try:
                process.wait(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._late.add(name)
                process.kill()
                self._report(f"WARNING: the tracker {name} did not accept everything within {END_SECONDS:g} s; the "
                             "next t5x train or t5x eval of this run sends the rest.")
        for thread in self._threads:
            thread.join()


def _follow(directory: str, name: str) -> "subprocess.Popen[str]":
    # In its own session: Ctrl-C is meant for the run; when it ends, the tracker sends the rest.
    return subprocess.Popen([sys.executable, "-m", "codellm_jax.tracking.follow", directory, name], text=True,
                            encoding="utf-8", errors="replace", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            start_new_session=True)


def catch_up(directory: str, report: Told = print) -> None:
    """Sends the new data of a run, or the report of a study, to the trackers that already follow it."""
    if "://" in directory and not directory.startswith("gs://"):
        return
    try:
        names = _following(epath.Path(directory).expanduser())
    except OSError as error:  # the command itself has succeeded
        report(f"WARNING: the files for trackers in {directory} cannot be read: {one_line(error)}")
        return
    if names:
        Trackers(directory, names, report).close()


def _following(folder: epath.Path) -> list[str]:
    """The trackers of a run, or of any run of a study."""
    if (folder / "study.json").exists():
        folders = list((folder / "runs").iterdir()) if (folder / "runs").is_dir() else []
    else:
        folders = [folder]
    return [name for name in KNOWN if any((one / FOLDER / f"{name}.json").exists() for one in folders)]
