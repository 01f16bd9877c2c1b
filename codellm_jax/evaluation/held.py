"""The files of an evaluation, and locks so that one process at a time writes them."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from codellm_jax.runtime.process import alone_in


def name_of_files(loaded: Any) -> str:
    """The name of a loaded task's files, without a suffix; a sample's differs from that of the whole benchmark."""
    return f"{loaded.name}_sample" if loaded.is_sample else str(loaded.name)


@contextlib.contextmanager
def alone_at(loaded: Sequence[Any], folder: str) -> Iterator[None]:
    """Locks the files of some tasks, so that no two evaluations write the same file; other tasks stay free.

    On gs:// it locks the whole folder.

    Raises:
      ValueError: another process is evaluating one of them there.
    """
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            names = sorted(map(name_of_files, loaded))
            for name in names if "://" not in folder else names[:1]:
                held.enter_context(alone_in(os.path.expanduser(folder), "evaluate.results_dir",
                                            f"evaluating {name}" if "://" not in folder else "evaluating", name))
        yield
