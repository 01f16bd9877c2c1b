"""Process-wide state: graceful stopping, locks of run directories, the compilation cache."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from codellm_jax.runtime.files import is_still_at
from codellm_jax.runtime.terminal import ending_signals

ONE_CTRL_C = 1.0  # seconds within which SIGINTs count as one, since both terminal and parent may send it


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event set by SIGTERM (a preemption), SIGHUP (a closed terminal) or a first SIGINT; another SIGINT, more than a
    second later, interrupts at once.
    """
    stop = threading.Event()

    first = 0.0

    def handle(number: int, _: Any) -> None:
        nonlocal first
        if number == signal.SIGINT and stop.is_set() and time.monotonic() - first > ONE_CTRL_C:
            raise KeyboardInterrupt
        if not stop.is_set():
            first = time.monotonic()
        stop.set()

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handle) for number in ending_signals()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of file systems without locks


def require_plain_name(setting: str, directory: str) -> None:
    """Raises ValueError for a directory in which Orbax could save but not restore, because it globs names."""
    absolute = directory if "://" in directory else os.path.abspath(os.path.expanduser(directory))
    if found := sorted(set(absolute) & set("*?[]\\")):
        raise ValueError(f"{setting} {absolute} holds {' '.join(found)}, which the checkpoints' library reads as a "
                         "pattern, and could not read again: use another name, such as "
                         f"{re.sub(r'[^A-Za-z0-9._/:~-]+', '_', directory)}.")


@contextlib.contextmanager
def alone_in(
    directory: str, setting: str = "MODEL_DIR", doing: str = "training", part: str = ""
) -> Iterator[Callable[[], None]]:
    """Locks a directory against other processes; the lock ends with its process.

    Yields a function that raises OSError if the directory was moved or removed meanwhile: another process may then be
    using a directory of the same name.

    The lock is the file system's, and so holds across containers and, over NFS, across machines; on gs:// it is a
    lease, see `leases`. On a file system without locks nothing is locked.

    Args:
      setting: the setting that names the directory.
      doing: the activity of a process there, for messages.
      part: locks only the part of this name, such as a task; on gs:// the whole directory is locked nevertheless.

    Raises:
      ValueError: another process holds it.
    """
    if directory.startswith("gs://"):
        from codellm_jax.runtime.leases import leased  # imports TensorStore

        with leased(directory, setting, doing, lambda line: print(line, flush=True)) as lease:
            yield lease.require
        return
    if "://" in directory:
        yield lambda: None
        return
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{setting} {directory} cannot be created: {error.strerror}. Choose another.") from error
    path = os.path.abspath(os.path.join(directory, f".{part}.lock" if part else ".lock"))
    with _locked(path, f"Another process is {doing} in {directory}: wait for it, or use another {setting}.") as lock:

        def require_held() -> None:
            if not is_still_at(lock, path):
                raise OSError(f"{setting} {directory} was moved, removed or replaced during {doing}: this process "
                              "stops, because its output would be lost.")

        require_held()
        try:
            yield require_held
        finally:
            if part and is_still_at(lock, path):
                os.unlink(path)


def _locked(path: str, refusal: str) -> IO[str]:
    """Opens and locks a file. Raises ValueError with `refusal` if another process has locked it."""
    while True:
        lock = open(path, "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(refusal) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                lock.close()
                raise
        if is_still_at(lock, path) or not os.path.isdir(os.path.dirname(path)):
            return lock
        lock.close()  # its holder removed it after it was opened here


ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of malloc.h


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory, up to 2 GiB, if steps run on the CPU. Call before threads start.

    There XLA allocates a step's temporaries anew at each step. With fresh pages, each of which the kernel clears at its
    first touch (40,000 in a step of the default run), a step takes 6% longer. Other C libraries are left unchanged.
    """
    on_processor = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(glob.glob(name) for name in ACCELERATORS)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if on_processor and mallopt is not None:
        for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(option, value)


def use_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache, in the user's folder if one is set."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/codellm_jax/compiled"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        # JAX's default of one second would exclude a small model's evaluation.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
