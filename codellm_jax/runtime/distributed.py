"""Runs with several processes: how they join, what they agree on, and how a lost process is reported.

Each process holds the devices of its host, reads its own rows, and computes its part of every step; only the first
writes records and results. Agreement uses small collectives, so all processes must call it at the same point.
"""

import contextlib
import hashlib
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a process counts as lost
JOIN_TIMEOUT = 300  # seconds for all processes to join
PATIENCE = 86_400  # seconds to wait for work that one process does for all, such as caching rows


def join(
    address: str | None = None, count: int | None = None, index: int | None = None, heartbeat: int | None = None
) -> None:
    """Makes this process one of several; before JAX is used.

    Without arguments `jax.distributed` finds the others: on a Cloud TPU slice, Slurm, or Open MPI.

    Args:
      address: host:port of the first process.
      count: number of processes.
      index: of this one, from 0.
      heartbeat: seconds without a heartbeat after which a process counts as lost; None for HEARTBEAT_TIMEOUT.

    Raises:
      ValueError: only some arguments are given, or they are inconsistent; in one line.
      OSError: the others did not join.
    """
    given = (address, count, index)
    if any(part is not None for part in given):
        if address is None or count is None or index is None or ":" not in address or not 0 <= index < count:
            raise ValueError("--coordinator_address=HOST:PORT, --process_count=N and --process_index=0 ... N - 1 go "
                             f"together; found {address}, {count}, {index}.")
    heartbeat = HEARTBEAT_TIMEOUT if heartbeat is None else heartbeat
    if heartbeat < 1:
        raise ValueError(f"--heartbeat_seconds must be at least 1, found {heartbeat}.")
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=JOIN_TIMEOUT,
                                   heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=60)
    except ValueError as error:
        if address is None and "coordinator_address" in str(error):
            return  # chips, but not of a slice known to JAX: this host is alone
        raise
    except RuntimeError as error:
        raise OSError(f"The {count or 'other'} processes did not find each other at {address or 'their coordinator'} "
                      f"within {JOIN_TIMEOUT} s ({_first_line(error)}).") from None


def leave(status: int) -> None:
    """Call before the process ends. A failed process exits here: a normal exit waits for the others, which may never
    come."""
    if not jax.distributed.is_initialized():
        return
    if status and jax.process_count() > 1:
        sys.stdout.flush()
        os._exit(status)
    jax.distributed.shutdown()


def agreed(value: int) -> int:
    """The first process's value, below 2^31, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def gathered(values: np.ndarray) -> np.ndarray:
    """The values of all processes, float32 [n] each, as [processes, n] on every process."""
    if jax.process_count() == 1:
        return values[None]
    return np.asarray(multihost_utils.process_allgather(np.asarray(values, np.float32)))


def require_agreement(what: str, text: str) -> None:
    """Raises ValueError if a process's text differs from that of the first."""
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:3], "big")
    others = gathered(np.array([digest], np.float32))[:, 0]
    if (others != others[0]).any():
        differing = int(np.argmax(others != others[0]))
        raise ValueError(f"Process {differing} has a different {what} than process 0: give all processes the same "
                         "command, files and software.")


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block alone, then the others: what it writes for all exists when they enter."""
    if jax.process_index() != 0:
        wait_for_all("first process")
    yield
    if jax.process_index() == 0:
        wait_for_all("first process")


def wait_for_all(what: str) -> None:
    """Returns when every process has arrived, however long that takes; not a collective, which would time out."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"{what} {next(_barriers)}", 1000 * PATIENCE)


_barriers = itertools.count()  # a barrier's name can be used once


def _client() -> Any:
    # JAX has no public access to its coordination service; Orbax also uses this one.
    from jax._src.distributed import global_state

    return global_state.client


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
