"""A folder under construction beside its final place: locked by its writer, and removed once nothing holds the lock.

The lock is an flock on a file in the folder. It ends with its process, however that ends, and is visible to everything
that shares the disk: other containers, whose host names and process ids may coincide, and over NFS other machines. With
NFS mounted with local locks (`nolock`, `local_lock`), machines must not share a cache that one of them is writing.
On a file system without locks nothing is locked, and nothing is removed.
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
    """A new, empty folder on the disk of `place`. The caller moves it there when complete; otherwise it is removed.

    Folders left for the same place by processes that were killed are removed first.
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
    """A new folder that this process has locked, and the lock file."""
    while True:
        own = folder / f"{prefix}{uuid.uuid4().hex[:8]}"
        own.mkdir()
        # Before it is locked, another process may remove it as abandoned: then try another.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock = (own / LOCK).open("x")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise
            except OSError:  # no process can lock here
                pass
            if (own / LOCK).exists():
                return own, lock
            lock.close()


def _remove_unless_held(left: Path) -> None:
    try:
        lock = (left / LOCK).open("r+")  # NFS requires write access for an exclusive lock
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            left.rmdir()  # its writer was killed before locking it; a folder with files stays
        return
    except OSError:
        return
    with lock, contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(left)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder / CONTENT, ignore_errors=True)  # before its lock file, so that no unlockable rest remains
    shutil.rmtree(folder, ignore_errors=True)
