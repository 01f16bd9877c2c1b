"""A command's output, which must survive a closed pipe, a closed terminal or a full disk; and its errors in one line,
without the output of libraries.
"""

import contextlib
import errno
import io
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator

from codellm_jax.mixture.transient import is_of_storage

LONGEST_LINE = 4000  # characters of an error
NOBODY_READS = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)


class LastingStream(io.TextIOWrapper):
    """A text file that drops what cannot be written instead of raising, for work that must not end because of its log.

    Characters that its encoding lacks are escaped. After its reader is gone, nothing more is written; after a full
    disk, later output is tried again.
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
    """A line-buffered `LastingStream` for an open file."""
    return LastingStream(binary, encoding=encoding, errors="backslashreplace", line_buffering=True)


def outlive_the_terminal() -> None:
    """Makes stdout and stderr drop what cannot be written, instead of raising an error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            encoding, binary = stream.encoding, stream.detach()
            made = lasting(binary, encoding)  # type: ignore[arg-type]
            setattr(sys, name, made)
            setattr(sys, f"__{name}__", made)


def escape_what_cannot_be_encoded() -> None:
    """Makes stdout and stderr escape characters that the terminal's encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def to_nowhere(descriptor: int) -> None:
    """Redirects a file descriptor to /dev/null, including output still buffered."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def ending_signals() -> list[signal.Signals]:
    """The signals that request an orderly end: a preemption, Ctrl-C, and a closed terminal (unless the process ignores
    SIGHUP, as under nohup).
    """
    gone = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    return [signal.SIGTERM, signal.SIGINT, *gone]


def quiet_libraries() -> None:
    """Silences tracebacks of failed saves and restores, which are raised and reported in one line. Orbax also logs a
    traceback, and prints others that no `except` can catch: of each further write that finds the event loop closed, and
    of each further read that Python closes unfinished (GeneratorExit) after another read of the checkpoint failed. At
    the end Python warns of each write that a failed save never began, after the error, which must be the last line.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    told, told_unraisable = sys.excepthook, sys.unraisablehook
    late = "Event loop is closed"

    def unraisable(found: "sys.UnraisableHookArgs") -> None:
        error = found.exc_value
        if str(error) != late and not isinstance(getattr(error, "__context__", None), GeneratorExit):
            told_unraisable(found)

    sys.excepthook = lambda kind, error, trace: None if str(error) == late else told(kind, error, trace)
    sys.unraisablehook = unraisable


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C end the process at once, even inside a library that would swallow Python's KeyboardInterrupt; for use
    before the first step, when there is nothing to save.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def is_of_peers(error: BaseException) -> bool:
    """Whether an error shows that another process of the run is gone: it comes from a collective with a closed peer,
    or from the coordination service.
    """
    return any(word in str(error) for word in ("Gloo", "another task", "coordination service", "CoordinationService"))


def one_line(error: Exception) -> str:
    """An error as one line, for the end of a command. It may quote a file: what would control the terminal is escaped,
    and an endless name is cut.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r" In call to configurable '.*$", "", text)  # gin's suffix, with addresses of functions
    text = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text[:LONGEST_LINE + 1])
    text = text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + "..."
    if isinstance(error, MemoryError):
        return f"there is too little memory: {text}"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return text
    if is_of_peers(error):
        return ("another process of this run failed or is lost. Start the same command again on all: it continues from "
                f"the newest checkpoint. ({text[:200]})")
    if is_of_storage(error):
        return (f"the storage fails, or cannot be reached: {text[:300]}. Start the same command again once it answers: "
                "it continues from what is there.")
    return f"{type(error).__name__}: {text} (--debug shows where)"
