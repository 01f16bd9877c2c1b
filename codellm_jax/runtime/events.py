"""TensorBoard events of a run: they show what metrics.jsonl holds, and so must never hold up or end the run.

Events are written by the thread that records, without a queue: tensorboardX's own writer hands them to a thread that
waits by the wall clock, which dies where that clock is set back, and then blocks whoever records.
"""

import math
import os
import time
from collections.abc import Callable, Mapping

from etils import epath

from codellm_jax.mixture.transient import asked_again, is_transient

SECONDS_BETWEEN_UPLOADS = 60.0  # of all events so far, where nothing can be appended to


class Events:
    """The events of one session, in a file of its own.

    Args:
      folder: local or gs://.
      first_step: events of earlier sessions from this step on are no longer shown; None shows all.
      warn: told once, where events cannot be written; from then on there are none.
      name: begins the name of the file.
    """

    def __init__(
        self, folder: str, first_step: int | None, warn: Callable[[str], None], name: str = "events"
    ) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import register_writer_factory

        # Its own way to gs:// wants another client of the storage service than the one that all else here uses.
        register_writer_factory("gs", _RemoteFile)
        self._folder, self._warn, self._event = folder, warn, Event
        self._writer: EventsWriter | None = None
        try:
            epath.Path(folder).mkdir(parents=True, exist_ok=True)
            # By the second and the process, lest two sessions share a file when the clock was set back.
            self._writer = EventsWriter(f"{folder}/{name}", f".{os.getpid()}")
            if first_step is not None:
                self._writer.write_event(Event(wall_time=time.time(), step=first_step,
                                               session_log=SessionLog(status=SessionLog.START)))
        except Exception as error:  # of a library or a disk: it is told, and the run goes on
            self._give_up(error)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a scalar for each value, under its name."""
        from tensorboardX.summary import scalar

        if self._writer is None:
            return
        try:
            for name, value in values.items():
                self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=scalar(name, value)))
            self._writer.flush()
        except Exception as error:
            self._give_up(error)

    def write_text(self, name: str, text: str) -> None:
        """Adds a text in Markdown."""
        from tensorboardX import summary

        if self._writer is None:
            return
        try:
            self._writer.write_event(self._event(wall_time=time.time(), summary=summary.text(name, text)))
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        self._warn(f"WARNING: no more TensorBoard events are written to {self._folder}: "
                   f"{' '.join(str(error).split())[:200]}. metrics.jsonl has all values.")


class _RemoteFile:
    """A file of events in gs://: all of it is written again, once in a while and at the end."""

    def __init__(self, path: str) -> None:
        self._path, self._written, self._uploaded = epath.Path(path), bytearray(), -math.inf

    @classmethod
    def open(cls, path: str) -> "_RemoteFile":
        return cls(path)

    @staticmethod
    def directory_check(path: str) -> None:
        """There are no directories to make."""

    def write(self, data: bytes) -> None:
        self._written += data

    def flush(self) -> None:
        if time.monotonic() - self._uploaded >= SECONDS_BETWEEN_UPLOADS:
            self._uploaded = time.monotonic()
            try:
                self._upload()
            except Exception as error:
                if not is_transient(error):  # else the next one has all that this one had
                    raise

    def close(self) -> None:
        asked_again(self._upload)

    def _upload(self) -> None:
        self._path.write_bytes(bytes(self._written))
