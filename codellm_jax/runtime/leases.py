"""Leases on the parts of a study, so that several workers share it without doing the same work twice, and on a run
directory on gs://, which nothing else protects against a second run.

    STUDY_DIR/state/NAME.lease   the worker of NAME: a run, or "plan", "contamination" or "report"
    MODEL_DIR/.lease/run.lease   the trainer

A lease is taken, renewed and released by writes that succeed only if the file is still the one that was read before
(compare-and-swap): TensorStore does that on a disk, also over NFS, under a lock of the file system, and in gs:// by
the object's generation. If several workers take a lease at the same time, exactly one gets it. An NFS mount with local
locks (`nolock`, `local_lock`) gives no such guarantee to several machines.

The holder rewrites it at every beat. A waiting worker judges only by that: a lease has expired if it did not change
for the time that it states, by the waiting worker's clock. Clock differences between machines do not matter. If
the holder ran on the same machine and in the same container, its end is detected at once.

A holder that finds another's lease instead of its own, or cannot renew it in time, has lost it.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorstore

from codellm_jax.results.files import Damaged, Members, require_members

LEASE_SECONDS = 120.0  # seconds without a beat after which a lease expires
BEATS = 6  # beats in that time
LEASE, RECORD = ".lease", ".json"


_NUMBER = (int, float)
OF_HOLDER: Members = {
    "worker": str, "token": str, "place": (str, type(None)), "process": int, "started": (str, type(None)),
    "since": _NUMBER, "beat_at": _NUMBER, "beats": int, "expires": _NUMBER, "step": int}
# How a run of a study ended: "done", or "failed" and why.
OF_RECORD: Members = {"state": str, "why": str, "worker": str, "when": _NUMBER, "train_seconds": (*_NUMBER, type(None)),
                      "eval_seconds": (*_NUMBER, type(None))}


@dataclasses.dataclass(frozen=True)
class Holder:
    """The content of a lease.

    Attributes:
      worker: host name and process number.
      token: unique to this worker.
      place: the scope of process numbers, see `_place`; None if unknown.
      process, started: its number and start time, see `_started`.
      since, beat_at: seconds of the holder's wall clock, for display only.
      beats: number of renewals.
      expires: seconds without a beat after which it expires.
      step: of the run's newest checkpoint when it was taken.
    """

    worker: str
    token: str
    place: str | None
    process: int
    started: str | None
    since: float
    beat_at: float
    beats: int
    expires: float
    step: int

    @property
    def is_gone(self) -> bool:
        """Whether its process is known to have ended; False also if this cannot be determined here."""
        return self.place is not None and self.place == _place() and _started(self.process) != self.started


@functools.cache
def _place() -> str | None:
    """The boot of this machine and the container: the scope of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(process: int) -> str | None:
    """The start of a process, in ticks since boot; None if it has ended."""
    try:
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else after_name[19]


class State:
    """The files of STUDY_DIR/state: leases, and workers' records about runs; or those of another folder."""

    def __init__(self, directory: str, setting: str = "STUDY_DIR", folder: str = "state") -> None:
        """
        Args:
          directory: local or gs://.
          setting: the setting that names it.
          folder: its sub-folder with the files.

        Raises:
          ValueError: it is on another kind of storage.
          OSError: it cannot be opened.
        """
        if "://" in directory and not directory.startswith("gs://"):
            raise ValueError(f"{setting} is {directory}; workers need a folder on a shared disk, or one in gs://.")
        self.directory, self._setting = directory, setting
        self._timeout = 60.0  # seconds for one file
        place = f"{directory.rstrip('/')}/{folder}/"
        if place.startswith("gs://"):
            bucket, _, path = place.removeprefix("gs://").partition("/")
            spec = {"driver": "gcs", "bucket": bucket, "path": path}
        else:
            spec = {"driver": "file", "path": os.path.abspath(os.path.expanduser(place)) + "/"}
        self._store = self._done(tensorstore.KvStore.open(spec))

    def _done(self, future: Any) -> Any:
        """The result of an operation. Raises OSError, in one line, if the directory cannot be read or written."""
        try:
            return future.result(timeout=self._timeout)
        except TimeoutError:
            raise OSError(f"{self._setting} {self.directory} did not answer for {self._timeout:.0f} s.") from None
        except ValueError as error:
            reason = " ".join(str(error).replace("\\x00", "/").split())  # from joining the parts of a path
            raise OSError(f"{self._setting} {self.directory} cannot be read or written: {reason}") from None

    def within(self, seconds: float) -> "State":
        """The same state, with a timeout of this many seconds for each file."""
        other = copy.copy(self)
        other._timeout = seconds
        return other

    def names(self, ending: str) -> list[str]:
        """The names of existing leases, or of records."""
        return sorted(key.decode().removesuffix(ending) for key in self._done(self._store.list())
                      if key.decode().endswith(ending))

    def read(self, name: str, ending: str = LEASE) -> tuple[dict[str, Any] | None, bytes]:
        """The content of a file, None if missing or invalid, and its generation."""
        return self.read_all([name], ending)[name]

    def read_all(self, names: list[str], ending: str) -> dict[str, tuple[dict[str, Any] | None, bytes]]:
        """The same for several files, which are read concurrently."""
        futures = {name: self._store.read(name + ending) for name in names}
        found = {name: self._done(future) for name, future in futures.items()}
        return {name: (_parsed(result.value), result.stamp.generation) for name, result in found.items()}

    def write(self, name: str, value: dict[str, Any] | None, ending: str = LEASE,
              where: bytes | None = None) -> bytes:
        """Writes a file, or removes it if the value is None; with `where` only if it has that generation.

        Returns:
          Its new generation; b"" if it had another one. A file that has the value already counts as written.
        """
        text = None if value is None else json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")
        written = self._done(self._store.write(name + ending, text, if_equal=where))
        if where is None or written.generation or text is None:
            return written.generation
        # If the answer to a request is lost, TensorStore repeats it, and finds that the generation has changed.
        found = self._done(self._store.read(name + ending))
        return found.stamp.generation if found.value == text else b""


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def as_holder(value: dict[str, Any] | None) -> Holder | None:
    """A lease's holder; None for an invalid lease."""
    try:
        require_members(value, OF_HOLDER, OF_HOLDER, "a lease")
        return Holder(**(value or {}))
    except (Damaged, TypeError):
        return None


def as_record(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """How a run ended; None for an invalid record, which is treated as missing."""
    try:
        require_members(value, OF_RECORD, ("state",), "a record")
        if value is not None and value["state"] == "failed":
            require_members(value, OF_RECORD, ("why", "worker", "when"), "a record")
    except Damaged:
        return None
    return value


class Leases:
    """The leases of one worker, and its observations of others' leases."""

    def __init__(self, state: State, lease_seconds: float = LEASE_SECONDS) -> None:
        self.state = state
        self.poll_seconds = lease_seconds / BEATS / 4  # seconds between two checks of others' leases
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        self._lease_seconds = lease_seconds
        self._token = uuid.uuid4().hex
        self._seen: dict[str, tuple[bytes, float]] = {}  # the generation of each lease, and when it was first seen

    def holder(self, name: str) -> str | None:
        """The holder of a lease; None if it may be taken."""
        return self._judged(name, *self.state.read(name))

    def _judged(self, name: str, value: dict[str, Any] | None, generation: bytes) -> str | None:
        seen, now = self._seen.get(name), time.monotonic()
        if seen is None or seen[0] != generation:
            seen = self._seen[name] = (generation, now)
        held = as_holder(value)
        if held is None:  # no lease, or an invalid one, which nobody renews
            return None
        return None if held.is_gone or now - seen[1] >= held.expires else held.worker

    @contextlib.contextmanager
    def held(self, name: str, lost: Callable[[], None], step: int = 0) -> Iterator["Lease | None"]:
        """A lease, renewed until the context ends and then released; None if another worker holds it.

        Args:
          name: of the part of the study.
          lost: is called repeatedly from another thread once the lease is lost: the work under it must
            stop.
          step: of the run's newest checkpoint.

        Raises:
          OSError: STUDY_DIR cannot be read or written.
        """
        value, generation = self.state.read(name)
        if self._judged(name, value, generation) is not None:
            yield None
            return
        now = time.time()
        holder = Holder(self.worker, self._token, _place(), os.getpid(), _started(os.getpid()), now, now, 0,
                        self._lease_seconds, step)
        if not self.state.write(name, dataclasses.asdict(holder), where=generation):
            yield None
            return
        lease = Lease(self.state, name, holder, lost)
        try:
            yield lease
        finally:
            lease.give_back()


class Lease:
    """A lease that this process took. `lost` is its new holder, or why it counts as lost."""

    def __init__(self, state: State, name: str, holder: Holder, lost: Callable[[], None]) -> None:
        self.name = name
        self.lost = ""
        # A beat reads and writes within the time between two beats.
        self._state = state.within(max(1.0, holder.expires / BEATS / 2))
        self._holder, self._on_lost = holder, lost
        self._renewed, self._beating = time.monotonic(), threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease of {name}", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._ended.wait(self._holder.expires / BEATS):
            self._renew_once()
            if self.lost:
                break
        while not self._ended.wait(0.2):
            self._on_lost()

    def _renew_once(self) -> None:
        with self._beating:
            problem, began = "", time.monotonic()
            try:
                self.lost = self.lost or self._beat()
                self._renewed = began
            except OSError as error:
                problem = str(error)
            if time.monotonic() - self._renewed > self._holder.expires / 2:  # before others may take it
                self.lost = self.lost or f"it could not be renewed ({problem})"

    def require(self) -> None:
        """Raises OSError if the lease is lost; checks first if it was not renewed for long, as after a stopped
        process.
        """
        if time.monotonic() - self._renewed > self._holder.expires / 2:
            self._renew_once()
        if self.lost:
            raise OSError(f"The lease on {self._state.directory} is lost: {self.lost}. This process stops, because "
                          "another may be at work there.")

    def _beat(self) -> str:
        """Renews the lease; returns the other holder if it was taken."""
        value, generation = self._state.read(self.name)
        held = as_holder(value)
        if held is not None and held.token == self._holder.token:
            self._holder = dataclasses.replace(held, beats=held.beats + 1, beat_at=time.time())
            if self._state.write(self.name, dataclasses.asdict(self._holder), where=generation):
                return ""
            held = as_holder(self._state.read(self.name)[0])
        return f"{held.worker} took it over" if held else "it was removed"

    def give_back(self) -> None:
        """Ends the lease at once; another's lease is left unchanged. If the directory cannot be reached, the lease
        expires by itself, and the work under it ends as it would have: with its own error, or none.
        """
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            value, generation = self._state.read(self.name)
            held = as_holder(value)
            if held is not None and held.token == self._holder.token:
                self._state.write(self.name, None, where=generation)


@contextlib.contextmanager
def leased(
    directory: str, setting: str, doing: str, report: Callable[[str], None], lease_seconds: float = LEASE_SECONDS
) -> Iterator[Lease]:
    """Holds a directory in gs:// by a lease. Waits until the lease of a killed process expires.

    Args:
      directory: the held one; setting: the setting that names it; doing: what its holder does there.
      report: called with the holder that is waited for.
      lease_seconds: seconds without a beat after which a lease expires.

    Raises:
      ValueError: another process holds it, and renews its lease.
      OSError: the directory cannot be read or written.
    """
    leases = Leases(State(directory, setting, ".lease"), lease_seconds)
    first: Holder | None = None
    while True:
        with leases.held("run", lost=lambda: None) as lease:
            if lease is not None:
                yield lease
                return
        holder = as_holder(leases.state.read("run")[0])
        if holder is not None and first is not None and (holder.token, holder.beats) != (first.token, first.beats):
            raise ValueError(f"Another process ({holder.worker}) is {doing} in {directory}: wait for it, or use "
                             f"another {setting}.")
        if holder is not None and first is None:
            report(f"{holder.worker} holds {directory}; waiting {holder.expires:.0f} s for a heartbeat.")
            first = holder
        time.sleep(leases.poll_seconds)
