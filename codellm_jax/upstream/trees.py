"""A run's state as upstream T5X's checkpoints hold it: by Orbax too, the same arrays under other names.

    MODEL_DIR/checkpoint_STEP/state    target = params, state/param_states = opt_state, state/step = step

What dropout is drawn from is not there: T5X draws it from RANDOM_SEED and the step alone, as this package does.
"""

import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from codellm_jax.runtime.checkpoints import first_line, named_leaves, require_same_arrays, resolved
from codellm_jax.runtime.state import TrainState

PREFIX = "checkpoint"


def find_checkpoint(path: str) -> tuple[epath.Path, int]:
    """The newest checkpoint of one of T5X's model directories, or the one that is named itself, with its step.

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


def read_state(checkpoint: epath.Path, step: int, abstract: TrainState, rng: jax.Array) -> TrainState:
    """The state of a checkpoint of T5X.

    Args:
      checkpoint, step: as `find_checkpoint` gives them.
      abstract: what is read, with shardings.
      rng: what dropout is drawn from.

    Raises:
      ValueError: in one line; it is of another model or optimizer, or damaged.
    """
    handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    wanted = {_their_name(name): leaf for name, leaf in named_leaves(abstract).items() if name != "rng"}
    item = traverse_util.unflatten_dict(wanted, sep="/")
    try:
        metadata = handler.metadata(checkpoint / "state").item_metadata.tree
    except Exception as error:
        raise ValueError(f"{checkpoint} cannot be read ({first_line(error)}): choose another step.") from None
    found = {name: [list(leaf.shape)] for name, leaf in named_leaves(metadata).items()}
    require_same_arrays(found, item, step)
    try:
        restored = named_leaves(handler.restore(checkpoint / "state", ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))))
    except Exception as error:
        raise ValueError(f"{checkpoint} is damaged ({first_line(error)}): choose another step.") from None
    leaves = [rng if name == "rng" else restored[_their_name(name)] for name in named_leaves(abstract)]
    state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    if int(state.step) != step:
        raise ValueError(f"{checkpoint} holds the state of step {int(state.step)}: it was renamed.")
    return state


def write_state(directory: str, step: int, arrays: dict[str, np.ndarray]) -> None:
    """Writes DIRECTORY/checkpoint_STEP of the arrays of a state by their names."""
    tree = traverse_util.unflatten_dict(
        {_their_name(name): array for name, array in arrays.items() if name != "rng"}, sep="/")
    manager = ocp.CheckpointManager(
        resolved(directory), options=ocp.CheckpointManagerOptions(step_prefix=PREFIX, enable_async_checkpointing=False),
        item_names=("state",))
    try:
        manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
    finally:
        manager.close()


def read_arrays(model_dir: str, step: int) -> dict[str, np.ndarray]:
    """The arrays of a step of a run of this package by their names."""
    path = epath.Path(resolved(model_dir)) / "checkpoints" / str(step) / "state"
    try:
        return {name: np.asarray(leaf) for name, leaf in named_leaves(read_on_host(path)).items()}
    except Exception as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}): choose another step.") from None


def read_on_host(path: epath.Path) -> Any:
    """A tree of arrays that Orbax wrote, in this process's memory, whatever devices it was saved from."""
    handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    tree = handler.metadata(path).item_metadata.tree
    return handler.restore(path, ocp.args.PyTreeRestore(
        restore_args=jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)))


def _their_name(name: str) -> str:
    kind, _, rest = name.partition("/")
    return {"params": f"target/{rest}", "opt_state": f"state/param_states/{rest}", "step": "state/step"}[kind]
