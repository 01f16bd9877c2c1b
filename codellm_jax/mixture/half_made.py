"""A folder that is being made beside its place: held by who makes it, and cleared away once nobody does.

What holds it is a lock of the file system on a file in it (flock). It ends with its process, however that ends, and all
see it that see the disk: other containers too, whose host names and process numbers may be the same, and by NFS other
machines, unless it is mounted with local locks (`nolock`, `local_lock`), where no machine must share a cache that
another is writing. Where a file system knows no locks nothing is held, and nothing is cleared away.
"""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LOCK, CONTENT = ".lock", "content"


@contextlib.contextmanager
def half_made(place: str | os.PathLike[str]) -> Iterator[Path]:
    """A new and empty folder on the disk of `place`, to be moved there once it is whole; else it is removed.

    Folders that others began for the same place, and were killed over, are removed first.
    """
    folder, prefix = Path(place).parent, f".{Path(place).name}."
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{prefix}*"):
        _remove_unless_held(left)
    own, lock = _held(folder, prefix)
    with lock:
        try:
            (own / CONTENT).mkdir()
            yield own / CONTENT
        finally:
            _remove(own)


def _held(folder: Path, prefix: str) -> tuple[Path, IO[str]]:
    """A new folder that this process holds, and what holds it."""
    while True:
        own = folder / f"{prefix}{uuid.uuid4().hex[:8]}"
        own.mkdir()
        # Until it is held another process may take it for one that was left, and remove it: then the next.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock = (own / LOCK).open("x")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise
            except OSError:  # there are no locks here, for the others neither
                pass
            if (own / LOCK).exists():
                return own, lock
            lock.close()


def _remove_unless_held(left: Path) -> None:
    try:
        lock = (left / LOCK).open("r+")  # to be written, as NFS wants it of what is locked
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            left.rmdir()  # its maker was killed before it held it; one with files in it stays
        return
    except OSError:
        return
    with lock, contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(left)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder / CONTENT, ignore_errors=True)  # before its lock, lest a rest stay that none can hold
    shutil.rmtree(folder, ignore_errors=True)
