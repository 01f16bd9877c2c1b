"""What a command prints, where nobody may be left to read it: a closed pipe, a terminal that is gone, a full disk. And
its errors in one line, without what libraries print besides.
"""

import contextlib
import errno
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator

NOBODY_READS = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)


class LastingStream(io.TextIOWrapper):
    """A text file that loses what cannot be written and raises nothing, for work that must not end over its log.

    What its encoding lacks is written as an escape. Where nobody reads any more, nothing is written from then on; where
    a disk is full, what is printed later is tried again.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if error.errno in NOBODY_READS:
            to_nowhere(self.fileno())


def lasting(binary: io.BufferedWriter, encoding: str = "utf-8") -> LastingStream:
    """A `LastingStream`, by lines, into an open file."""
    return LastingStream(binary, encoding=encoding, errors="backslashreplace", line_buffering=True)


def outlive_the_terminal() -> None:
    """Has stdout and stderr of this process lose what cannot be written, in the place of raising an error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            encoding, binary = stream.encoding, stream.detach()
            made = lasting(binary, encoding)  # type: ignore[arg-type]
            setattr(sys, name, made)
            setattr(sys, f"__{name}__", made)


def escape_what_cannot_be_encoded() -> None:
    """Has stdout and stderr write an escape for what the terminal's encoding lacks, and raise no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def to_nowhere(descriptor: int) -> None:
    """Has a descriptor lead to /dev/null, also for what is buffered and not written yet."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def ending_signals() -> list[signal.Signals]:
    """The signals by which others end this process in good order: a preemption, Ctrl-C, and a terminal that goes away
    (but for a process that was started to outlive it, as nohup does).
    """
    gone = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    return [signal.SIGTERM, signal.SIGINT, *gone]


def quiet_libraries() -> None:
    """A failed save is raised and told in one line. Orbax logs its traceback besides, and each of its other writes
    that finds the event loop closed prints one of its own, where no `except` can reach it.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    told, told_unraisable = sys.excepthook, sys.unraisablehook
    late = "Event loop is closed"
    sys.excepthook = lambda kind, error, trace: None if str(error) == late else told(kind, error, trace)
    sys.unraisablehook = lambda found: None if str(found.exc_value) == late else told_unraisable(found)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Until steps are taken there is nothing to save: Ctrl-C ends the process at once, even inside a library that would
    swallow Python's KeyboardInterrupt.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def is_of_peers(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone: of a collective that found the other end closed,
    or of the service that the processes meet at.
    """
    return any(word in str(error) for word in ("Gloo", "another task", "coordination service", "CoordinationService"))


def one_line(error: Exception) -> str:
    """An error as one line, for the end of a command."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r" In call to configurable '.*$", "", text)  # gin's postscript, with addresses of functions
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return text
    if is_of_peers(error):
        return ("another process of this run failed or is lost. Start the same command again on all: it continues from "
                f"the newest checkpoint. ({text[:200]})")
    return f"{type(error).__name__}: {text} (--debug shows where)"
