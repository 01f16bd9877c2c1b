"""Which trackers follow a run, and the process of each.

A tracker is fed by a process of its own, `follow`, which reads the files that the run writes anyhow. So one that
fails, hangs or is slow neither stops the run nor slows it; a line says so, and what it did not take is sent by the
next `t5x train` or `t5x eval` of the run.
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
FOLDER = "trackers"  # of a run directory: what each tracker was sent, and its log
END_SECONDS = 30.0  # at the end of a command, for what is not sent yet

Told = Callable[[str], None]


def require_known(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that there is not."""
    for name in names:
        if name not in KNOWN:
            near = difflib.get_close_matches(str(name), KNOWN, n=1, cutoff=0.3)
            raise ValueError(f"TRACKERS must list some of {', '.join(KNOWN)}, found {name!r}"
                             + (f"; nearest: {near[0]}." if near else "."))


class Trackers:
    """What follows a run directory until `close`."""

    def __init__(self, directory: str, names: Sequence[str], report: Told) -> None:
        """
        Args:
          directory: a run directory, or a study's, of which the report is sent.
          names: of trackers.
          report: is told of a tracker that failed, also from another thread.
        """
        self._directory, self._report = directory, report
        self._late: set[str] = set()
        # TensorBoard's events are files of the run, which it writes itself; only what comes last is left.
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
        """Reports why a tracker's process ended, where it failed."""
        assert process.stdout is not None
        why = process.stdout.read().strip()
        if (status := process.wait()) and name not in self._late:
            self._failed(name, why or f"its process ended with status {status}")

    def _failed(self, name: str, why: str) -> None:
        self._report(f"WARNING: the tracker {name} stopped: {why.rstrip('.')}. The run continues without it.")

    def close(self) -> None:
        """Has all trackers take the rest, and waits for them no longer than END_SECONDS."""
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        if self._has_events:
            from codellm_jax.tracking.follow import Follower

            try:
                Follower(self._directory, "tensorboard").rest()
            except Exception as error:  # whatever it is, the run has ended well
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
    # In a session of its own: Ctrl-C is for the run, at whose end the tracker takes the rest.
    return subprocess.Popen([sys.executable, "-m", "codellm_jax.tracking.follow", directory, name], text=True,
                            encoding="utf-8", errors="replace", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            start_new_session=True)


def catch_up(directory: str, report: Told = print) -> None:
    """Sends what is new of a run, or the report of a study, to the trackers that follow it already."""
    if "://" in directory and not directory.startswith("gs://"):
        return
    try:
        names = _following(epath.Path(directory).expanduser())
    except OSError as error:  # what was asked for is done
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
