"""TensorBoard events of a run: they only show metrics.jsonl, so they must never delay or end the run.

The recording thread writes events itself, without a queue: tensorboardX's own writer uses a thread that waits on the
wall clock, dies if that clock is set back, and then blocks the recording thread.
"""

import concurrent.futures
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from etils import epath

from codellm_jax.mixture.transient import asked_again, is_transient

# On gs:// files cannot be appended to and are uploaded whole, so their size and frequency are limited.
SECONDS_BETWEEN_UPLOADS = 60.0
BYTES_OF_FILE = 4 << 20


@contextlib.contextmanager
def _not_imported(*names: str) -> Iterator[None]:
    """Makes imports of these modules fail.

    tensorboardX imports those that are installed, and needs none for scalars and texts. PyTorch takes longer than all
    other imports of a run.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: the import fails
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


class Events:
    """The events of one session, in its own file.

    Args:
      folder: local or gs://.
      first_step: events of earlier sessions from this step on are no longer shown; None shows all.
      warn: called once if events cannot be written; then none are written.
      name: prefix of the file name.
    """

    def __init__(
        self, folder: str, first_step: int | None, warn: Callable[[str], None], name: str = "events"
    ) -> None:
        with _not_imported("torch", "google.cloud.storage"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.record_writer import register_writer_factory

        # tensorboardX's own access to gs:// needs another client of the storage service.
        register_writer_factory("gs", _RemoteFile)
        self._folder, self._warn, self._event = folder, warn, Event
        self._writer: EventsWriter | None = None
        try:
            epath.Path(folder).mkdir(parents=True, exist_ok=True)
            # Named by second and process, so that two sessions never share a file, even if the clock was set back.
            self._writer = EventsWriter(f"{folder}/{name}", f".{os.getpid()}")
            if first_step is not None:
                self._writer.write_event(Event(wall_time=time.time(), step=first_step,
                                               session_log=SessionLog(status=SessionLog.START)))
        except Exception as error:  # of a library or a disk: it is reported, and the run continues
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
    """A file of events on gs://, rewritten whole by a thread from time to time and at the end. Once it is long, further
    events go to another file, whose name ends in its number; TensorBoard reads them in order.
    """

    def __init__(self, path: str) -> None:
        self._path, self._uploaded = path, -math.inf
        self._files = {0: bytearray()}  # by number: those not completely uploaded, and the last
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "events")
        self._uploading: concurrent.futures.Future[list[int]] | None = None

    @classmethod
    def open(cls, path: str) -> "_RemoteFile":
        return cls(path)

    @staticmethod
    def directory_check(path: str) -> None:
        """Does nothing: gs:// has no directories to create."""

    def write(self, data: bytes) -> None:
        self._files[max(self._files)] += data

    def flush(self) -> None:
        """Called between two events."""
        if self._uploading is not None:
            if not self._uploading.done():
                return
            uploading, self._uploading = self._uploading, None
            error = uploading.exception()
            if error is None:
                self._drop(uploading.result())
            elif not isinstance(error, Exception) or not is_transient(error):
                raise error  # otherwise the next upload includes this content
        if time.monotonic() - self._uploaded >= SECONDS_BETWEEN_UPLOADS:
            self._uploaded = time.monotonic()
            self._uploading = self._thread.submit(self._upload, self._contents())
            if len(self._files[last := max(self._files)]) >= BYTES_OF_FILE:
                self._files[last + 1] = bytearray()

    def close(self) -> None:
        self._thread.shutdown()
        asked_again(lambda: self._upload(self._contents()))

    def _contents(self) -> dict[int, bytes]:
        return {number: bytes(content) for number, content in self._files.items()}

    def _upload(self, contents: Mapping[int, bytes]) -> list[int]:
        for number, content in contents.items():
            if content:
                epath.Path(f"{self._path}.{number:05}" if number else self._path).write_bytes(content)
        return list(contents)

    def _drop(self, uploaded: Sequence[int]) -> None:
        """Drops uploaded files to which nothing more is added."""
        for number in uploaded:
            if number != max(self._files):
                del self._files[number]
