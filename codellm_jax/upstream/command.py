"""`t5x adopt` with its flags."""

import argparse
import os
from collections.abc import Sequence

from codellm_jax.runtime.terminal import quiet_libraries


def adopt(flags: argparse.Namespace, search_paths: Sequence[str]) -> str:
    """Converts a checkpoint of upstream T5X to a run, or a run to one; returns the text to print.

    Raises:
      FileNotFoundError, ValueError: with a one-line message.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: no accelerator is needed
    from codellm_jax.upstream import adopt

    if not flags.debug:
        quiet_libraries()
    if flags.to == "run":
        return adopt.adopt(flags.source, flags.output, flags.gin_file, flags.overrides, search_paths)
    if flags.gin_file or flags.overrides:
        raise ValueError("--to=t5x takes no gin files and no settings: a checkpoint of T5X has none.")
    return adopt.give(flags.source, flags.output)
