"""Parameters to start from: those of a run, or published ones, through the same two functions.

INITIAL_CHECKPOINT_PATH, CHECKPOINT_PATH and a study's 'from' name a run directory or a SOURCE of `t5x import`: a folder
of published weights, or hf://ORG/NAME[@REVISION].
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from codellm_jax.hub import is_hub_name
from codellm_jax.runtime import checkpoints
from codellm_jax.runtime.compatibility import moved_along
from codellm_jax.weights.importing import describe_source, open_source, parameters_on_mesh
from codellm_jax.weights.mindspore import is_mindspore

# The decoder's tables with a row for each position; with shorter rows, the last positions are unused.
POSITION_TABLES = ("position_embedding", "query_embedding")
# Longer rows must be requested explicitly: published models support up to a million tokens.
LONGEST_ROWS = 2048


def is_published(path: str) -> bool:
    """Whether a path names published weights, not a run directory."""
    if is_hub_name(path):
        return True
    folder = epath.Path(path).expanduser()
    if not folder.is_dir() or (folder / "checkpoints").exists():
        return False
    return is_mindspore(str(folder)) or any(
        name == "config.json" or name.endswith(checkpoints.WEIGHTS_OF_OTHERS)
        for name in (found.name for found in folder.iterdir()))


def newest_record(path: str) -> tuple[int, dict[str, Any]]:
    """The step and the record of a run's newest checkpoint; for published weights, step 0 and an equivalent record.

    Raises:
      FileNotFoundError, ValueError: with a one-line message; there is no checkpoint, or it cannot be read.
    """
    return (0, describe_source(path)) if is_published(path) else checkpoints.newest_record(path)


def newest_settings(path: str, training: bool = False) -> tuple[int, dict[str, str]]:
    """The step of `newest_record`, and its settings; for training, rows of an imported model have at most LONGEST_ROWS.

    Raises:
      FileNotFoundError, ValueError: as for `newest_record`.
    """
    step, record = newest_record(path)
    settings = dict(record["settings"]) if is_published(path) else moved_along(record["settings"], path)
    if training and record["ledger"]["stage"] == "imported" and record["ledger"]["length"] > LONGEST_ROWS:
        settings["mixture.lengths"] = repr({"targets": LONGEST_ROWS})
    return step, settings


def restore_parameters(
    path: str, abstract_params: Any, check: Callable[[dict[str, Any]], None] = lambda record: None,
    report: Callable[[str], None] = print,
) -> tuple[Any, dict[str, Any]]:
    """Parameters with the shardings of `abstract_params`, and the record that belongs to them, with its `step`.

    If rows are shorter than those of the model, the tables of positions lose their last rows.

    Args:
      path: a run directory, or published weights.
      abstract_params: shapes, dtypes and shardings.
      check: called with the record before parameters are read; raises if they are unsuitable.
      report: called with a line.

    Raises:
      FileNotFoundError, ValueError: as for `newest_record`; or parameters have other names or shapes.
    """
    if is_published(path):
        source = open_source(path)
        record = describe_source(source)
        check(record)
        params = parameters_on_mesh(source, _with_positions(abstract_params, record["ledger"]["length"]))
        report(f"Parameters of {source.name}.")
    else:
        length = checkpoints.newest_record(path)[1]["ledger"]["length"]
        params, record = checkpoints.restore_parameters(path, _with_positions(abstract_params, length), check, report)
    return _cut(params, abstract_params), record


def _with_positions(params: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Abstract parameters with position tables of this length."""
    return {name: jax.ShapeDtypeStruct((length, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
            if name in POSITION_TABLES else leaf for name, leaf in params.items()}


def _cut(params: Mapping[str, Any], abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with position tables as long as those of `abstract`."""
    def first_rows(name: str) -> Any:
        length = abstract[name].shape[0]
        cut = jax.jit(lambda table: table[:length], out_shardings=abstract[name].sharding)
        return cut(params[name])

    return {name: first_rows(name) if name in POSITION_TABLES and leaf.shape != abstract[name].shape else leaf
            for name, leaf in params.items()}


def results_folder(path: str) -> str:
    """The folder for results of an evaluation: in the run, or runs/NAME beside published weights."""
    if not is_published(path):
        return f"{path}/results"
    name = path.removeprefix("hf://").rstrip("/") if is_hub_name(path) else os.path.basename(checkpoints.resolved(path))
    return f"runs/{name.replace('/', '--')}/results"
