"""A run's state in the format of upstream T5X's checkpoints: also Orbax, with the same arrays under other names.

    MODEL_DIR/checkpoint_STEP/state    target = params, state/param_states = opt_state, state/step = step

The dropout key is absent: T5X derives it from RANDOM_SEED and the step alone, as this package does.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from codellm_jax.runtime.checkpoints import first_line, named_leaves, require_same_arrays, resolved
from codellm_jax.runtime.parts import Damaged, Part, copied, mark_whole, write_arrays
from codellm_jax.runtime.state import TrainState

PREFIX = "checkpoint"


def find_checkpoint(path: str) -> tuple[epath.Path, int]:
    """The newest checkpoint of a T5X model directory, or the checkpoint given directly, with its step.

    Raises:
      FileNotFoundError: there is none.
    """
    given = epath.Path(resolved(path))
    if (own := re.fullmatch(rf"{PREFIX}_(\d+)", given.name)) and (given / "state").exists():
        return given, int(own[1])
    steps = [int(found[1]) for place in (given.iterdir() if given.is_dir() else [])
             if (found := re.fullmatch(rf"{PREFIX}_(\d+)", place.name)) and (place / "state").exists()]
    if not steps:
        what = f"{given} is a run of this package already" if (given / "checkpoints").exists() else \
            f"No {PREFIX}_STEP/state in {given}"
        raise FileNotFoundError(f"{what}: name the MODEL_DIR of `python -m t5x.train`, which saves with Orbax "
                                "(use_orbax, its default).")
    return given / f"{PREFIX}_{max(steps)}", max(steps)


def copy_state(checkpoint: epath.Path, step: int, abstract: TrainState, rng: np.ndarray, folder: epath.Path) -> Any:
    """Writes FOLDER/state, a run's state from a T5X checkpoint, one array at a time; returns its checksums.

    Args:
      checkpoint, step: as returned by `find_checkpoint`.
      abstract: the shapes and dtypes to write.
      rng: the dropout key.
      folder: RUN/checkpoints/STEP, which must not exist.

    Raises:
      ValueError: with a one-line message; the checkpoint belongs to another model or optimizer, or is damaged.
      OSError: the disk is full or not writable.
    """
    wanted = {name: leaf for name, leaf in named_leaves(abstract).items() if name != "rng"}
    names = {name: _their_name(name) for name in wanted}
    try:
        tree = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).metadata(checkpoint / "state").item_metadata.tree
    except Exception as error:
        raise ValueError(f"{checkpoint} cannot be read ({first_line(error)}): choose another step.") from None
    found = {name: [list(leaf.shape)] for name, leaf in named_leaves(tree).items()}
    require_same_arrays(found, traverse_util.unflatten_dict(
        {names[name]: leaf for name, leaf in wanted.items()}, sep="/"), step)
    try:
        [saved] = copied(checkpoint / "state", names, {"step": wanted["step"]})
        if int(saved.rows) != step:
            raise ValueError(f"{checkpoint} holds the state of step {int(saved.rows)}: it was renamed.")
        return write_arrays(folder, abstract, itertools.chain(
            copied(checkpoint / "state", names, wanted), [Part("rng", None, 0, rng)]))
    except Damaged as error:
        raise ValueError(f"{checkpoint} is damaged ({error}): choose another step.") from None


def give_state(run: str, step: int, record: Mapping[str, Any], directory: epath.Path) -> None:
    """Writes DIRECTORY/checkpoint_STEP: the arrays of a run's step under T5X's names, one array at a time.

    Raises:
      ValueError: with a one-line message; the arrays differ from what was saved.
      OSError: the disk is full or not writable.
    """
    ours = {_their_name(name): name for name in record["checksums"] if name != "rng"}
    wanted = {theirs: jax.ShapeDtypeStruct(*record["checksums"][name][:2]) for theirs, name in ours.items()}
    state = epath.Path(resolved(run)) / "checkpoints" / str(step) / "state"
    folder = directory / f"{PREFIX}_{step}"
    try:
        sums = write_arrays(folder, traverse_util.unflatten_dict(wanted, sep="/"), copied(state, ours, wanted))
        if wrong := [name for theirs, name in ours.items() if sums[theirs] != record["checksums"][name]]:
            raise Damaged(f"{len(wrong)} arrays differ from what was saved, {wrong[0]} first")
    except Damaged as error:
        raise ValueError(f"The checkpoint of step {step} in {run} is damaged ({error}): choose another step.") from None
    mark_whole(folder)


def _their_name(name: str) -> str:
    kind, _, rest = name.partition("/")
    return {"params": f"target/{rest}", "opt_state": f"state/param_states/{rest}", "step": "state/step"}[kind]
