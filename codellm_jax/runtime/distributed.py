"""Several processes as one: how they join, what they agree on, and what is said when one of them is gone.

Each process holds the devices of its host, reads its own rows, and computes its part of every step; the first one
alone writes records and results. What they agree on goes through small collectives, so all must ask at the same place.
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

HEARTBEAT_TIMEOUT = 30  # seconds without a sign of life after which a process counts as gone
JOIN_TIMEOUT = 300  # seconds for all processes to come
PATIENCE = 86_400  # seconds to wait for what one process does for all, such as the cache of rows


def join(
    address: str | None = None, count: int | None = None, index: int | None = None, heartbeat: int | None = None
) -> None:
    """Makes this process one of several; before JAX is used.

    Without arguments the surroundings tell: a Cloud TPU slice, Slurm, or Open MPI, as `jax.distributed` finds them.

    Args:
      address: host:port of the first process.
      count: of the processes.
      index: of this one, from 0.
      heartbeat: seconds without a sign of life after which a process counts as gone; None for HEARTBEAT_TIMEOUT.

    Raises:
      ValueError: some arguments are given and others not, or do not fit; in one line.
      OSError: the others did not come.
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
            return  # chips, but of no slice that JAX knows: this host is alone
        raise
    except RuntimeError as error:
        raise OSError(f"The {count or 'other'} processes did not find each other at {address or 'their coordinator'} "
                      f"within {JOIN_TIMEOUT} s ({_first_line(error)}).") from None


def leave(status: int) -> None:
    """Before the process ends. One that failed ends here: a good end waits for the others, which may never come."""
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
    """What each process gives, float32 [n], as [processes, n] on every process."""
    if jax.process_count() == 1:
        return values[None]
    return np.asarray(multihost_utils.process_allgather(np.asarray(values, np.float32)))


def require_agreement(what: str, text: str) -> None:
    """Raises ValueError where a process's text differs from that of the first."""
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:3], "big")
    others = gathered(np.array([digest], np.float32))[:, 0]
    if (others != others[0]).any():
        differing = int(np.argmax(others != others[0]))
        raise ValueError(f"Process {differing} has another {what} than process 0: give all the same command, files and "
                         "software.")


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The first process goes through alone, then the others: what it writes for all is there when they come."""
    if jax.process_index() != 0:
        wait_for_all("first process")
    yield
    if jax.process_index() == 0:
        wait_for_all("first process")


def wait_for_all(what: str) -> None:
    """Returns when every process has come here, however long that takes: no collective, which would time out."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"{what} {next(_barriers)}", 1000 * PATIENCE)


_barriers = itertools.count()  # a barrier's name serves once


def _client() -> Any:
    # JAX has no public way to the service that its processes meet at; Orbax takes this one too.
    from jax._src.distributed import global_state

    return global_state.client


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
