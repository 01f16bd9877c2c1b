"""Writes and reads checkpoints part by part, so that they are never in memory as a whole.

Orbax writes arrays of one chunk each, TensorStore resizes them to their full shapes and writes the parts, and the
record comes last. `checkpoints` and upstream T5X restore such a checkpoint like any other.
"""

import collections
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import traverse_util

from codellm_jax.results.files import digest
from codellm_jax.runtime.checkpoints import first_line, named_leaves, undamaged_records

CHUNK = 2**24  # maximum bytes of an array's chunk
IN_FLIGHT = 2**25  # maximum bytes waiting to be written; TensorStore holds as much again, compressed


class Part(NamedTuple):
    """Rows of an array: of a leaf such as "params/lm_head", or of one layer of a leaf in "blocks"; or a scalar."""

    leaf: str
    layer: int | None
    first: int  # row at which `rows` begin
    rows: np.ndarray


def rows_of_chunk(shape: tuple[int, ...], itemsize: int = 4) -> int:
    """Rows per chunk of a leaf, or of a layer of it: parts of this many rows are written fastest."""
    return min(shape[0], max(1, CHUNK // (itemsize * math.prod(shape[1:]))))


def save_in_parts(
    folder: epath.Path, shapes: Mapping[str, tuple[int, ...]], parts: Iterable[Part], record: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes a checkpoint of float32 parameters.

    Args:
      folder: RUN/checkpoints/STEP, which does not exist yet.
      shapes: of each leaf, with layers stacked in "blocks".
      parts: every number of each leaf once; at most `IN_FLIGHT` bytes of them are held at a time.
      record: saved beside the state, read after the last part; checksums and digest are added.

    Returns:
      The record as saved.

    Raises:
      ValueError: the parts do not cover the leaves.
      OSError: writing failed.
    """
    tree = traverse_util.unflatten_dict(
        {f"params/{leaf}": jax.ShapeDtypeStruct(shape, np.float32) for leaf, shape in shapes.items()}, sep="/")
    found = write_arrays(folder, tree, (part._replace(leaf=f"params/{part.leaf}") for part in parts))
    return write_record(folder, record, found)


def write_arrays(folder: epath.Path, tree: Any, parts: Iterable[Part]) -> dict[str, list[Any]]:
    """Writes FOLDER/state, as Orbax would write `tree`.

    Args:
      folder: of the step, which does not exist yet.
      tree: of jax.ShapeDtypeStructs or arrays; only shapes and dtypes are used.
      parts: every number of each leaf once, under the names of `named_leaves`; as in `save_in_parts`.

    Returns:
      The checksums, as from `checkpoints.checksums`.

    Raises:
      ValueError: the parts do not cover the leaves.
      OSError: writing failed.
    """
    leaves = named_leaves(tree)
    begun = [np.zeros(_chunk(name, leaf), leaf.dtype) for name, leaf in leaves.items()]
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(
        folder / "state", ocp.args.PyTreeSave(jax.tree.unflatten(jax.tree.structure(tree), begun)))
    context = ocp.type_handlers.get_ts_context(use_ocdbt=True)  # one cache for all
    stores = {name: _opened(folder / "state", name, context).resize(exclusive_max=leaf.shape, expand_only=True).result()
              for name, leaf in leaves.items()}
    sums, written = dict.fromkeys(leaves, 0), dict.fromkeys(leaves, 0)
    waiting: collections.deque[tuple[Any, int]] = collections.deque()
    try:
        for part in parts:
            store, values = stores[part.leaf], part.rows
            if values.ndim:
                rows = slice(part.first, part.first + len(values))
                store = store[rows] if part.layer is None else store[part.layer, rows]
            waiting.append((store.write(values, can_reference_source_data_indefinitely=True), values.nbytes))
            sums[part.leaf] += int(values.reshape(-1).view(f"uint{8 * values.itemsize}").sum(dtype=np.uint64))
            written[part.leaf] += values.size
            while sum(size for _, size in waiting) > IN_FLIGHT:
                _finish(waiting.popleft()[0], folder)
        while waiting:
            _finish(waiting.popleft()[0], folder)
    finally:  # after an error, wait for pending writes, because the folder is removed
        for future, _ in waiting:
            future.exception()
    for name, leaf in leaves.items():
        if written[name] != math.prod(leaf.shape):
            raise ValueError(f"{name} has {math.prod(leaf.shape)} numbers, and {written[name]} were given.")
    return {name: [list(leaf.shape), str(leaf.dtype), sums[name] % 2**32] for name, leaf in leaves.items()}


def write_record(folder: epath.Path, record: Mapping[str, Any], sums: Mapping[str, Any]) -> dict[str, Any]:
    """Writes FOLDER/record with checksums, step and digest, which completes the checkpoint; returns the record."""
    whole = dict(record) | {"checksums": dict(sums), "step": int(folder.name)}
    whole["digest"] = digest(whole)
    ocp.Checkpointer(ocp.JsonCheckpointHandler()).save(folder / "record", ocp.args.JsonSave(whole))
    mark_whole(folder)
    return whole


def mark_whole(folder: epath.Path) -> None:
    """Marks a step's folder as complete, as Orbax does; on gs:// Orbax requires the mark."""
    (folder / "commit_success.txt").write_text(f"Checkpoint commit was successful to {folder}")


def copied(state: epath.Path, names: Mapping[str, str], wanted: Mapping[str, Any]) -> Iterator[Part]:
    """Arrays of a checkpoint as the parts of another; holds one chunk at a time, which is at most an array.

    Args:
      state: the folder that Orbax wrote.
      names: name of a part -> name of the array in `state`.
      wanted: name of a part -> an object with its shape and dtype.

    Raises:
      Damaged: an array cannot be read.
    """
    context = ocp.type_handlers.get_ts_context(use_ocdbt=True)
    for name, leaf in wanted.items():
        chunk = _chunk(name, leaf)
        store = _tried(name, _opened, state, names[name], context)
        if not chunk:
            yield Part(name, None, 0, np.asarray(_tried(name, store.read().result), leaf.dtype))
            continue
        size = chunk[0] * math.ceil(store.chunk_layout.read_chunk.shape[0] / chunk[0])  # whole chunks on both sides
        for first in range(0, leaf.shape[0], size):
            slab = _tried(name, store[first: min(first + size, leaf.shape[0])].read().result)
            stacked = _is_stacked(name, leaf)
            rows = chunk[1] if stacked else chunk[0]
            layers: list[tuple[int | None, int, np.ndarray]] = [
                (first + number, 0, values) for number, values in enumerate(slab)] if stacked else [(None, first, slab)]
            for layer, row, values in layers:
                for at in range(0, len(values), rows):
                    # A copy, so that the slab can be freed before all of it is written.
                    yield Part(name, layer, row + at, values[at: at + rows].astype(leaf.dtype, order="C"))
            del slab, layers, values


class Damaged(ValueError):
    """A checkpoint is not what was saved."""


class SavedParameters:
    """The parameters of a checkpoint, read an array or one layer of it at a time, and checked against its checksums.

    Attributes:
      step: after which it was saved.
      record: the JSON saved with it.
      shapes: of each parameter, by names such as "blocks/attention/query_kernel".
    """

    def __init__(self, path: epath.Path, record: dict[str, Any]) -> None:
        self.step, self.record = int(path.name), record
        self._saved = {name.removeprefix("params/"): facts for name, facts in record["checksums"].items()
                       if name.startswith("params/")}
        self.shapes = {name: tuple(facts[0]) for name, facts in self._saved.items()}
        self._state = path / "state"
        self._context = ocp.type_handlers.get_ts_context(use_ocdbt=True)
        self._stores: dict[str, tensorstore.TensorStore] = {}
        self._sums: dict[str, dict[int | None, int]] = {name: {} for name in self._saved}

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """A whole parameter, or one layer of a stacked one. Raises Damaged if it cannot be read."""
        if name not in self._stores:
            self._stores[name] = _tried(name, _opened, self._state, f"params/{name}", self._context)
        store = self._stores[name] if layer is None else self._stores[name][layer]
        found = np.ascontiguousarray(_tried(name, store.read().result))
        bits = found.view(f"uint{8 * found.dtype.itemsize}")
        self._sums[name][layer] = int(bits.sum(dtype=np.uint32))
        return found

    def require_undamaged(self) -> None:
        """Raises Damaged if a parameter was not read whole or differs from what was saved."""
        for name, (shape, _, saved) in self._saved.items():
            sums = self._sums[name]
            whole = sums[None] if None in sums else sum(sums.values()) % 2**32
            if None not in sums and len(sums) != shape[0]:
                raise Damaged(f"{name} was not read whole")
            if whole != saved:
                raise Damaged(f"{name} differs from what was saved")


def saved_parameters(
    model_dir: str, step: int | None = None, report: Callable[[str], None] = print
) -> Iterator[SavedParameters]:
    """The parameters of a run directory's checkpoints with undamaged records, newest first, or only those of `step`.

    Raises:
      FileNotFoundError: the directory holds no checkpoint, or none of that step.
    """
    for path, record in undamaged_records(model_dir, report, step):
        yield SavedParameters(path, record)


def _finish(write: Any, folder: epath.Path) -> None:
    """Waits for a write. Raises OSError if it failed."""
    try:
        write.result()
    except Exception as error:  # TensorStore has no class of its own for a full disk
        full = "No space left on device" in str(error)
        raise OSError(f"Writing to {folder} failed: "
                      f"{'No space left on device' if full else ' '.join(str(error).split())[:200]}.") from error


def _tried(name: str, read: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a read. Raises Damaged if it fails."""
    try:
        return read(*arguments)
    except Exception as error:  # TensorStore has no class of its own for damage
        raise Damaged(f"{name} cannot be read: {first_line(error)}") from error


def _is_stacked(name: str, leaf: Any) -> bool:
    return "blocks" in name.split("/") and len(leaf.shape) > 1


def _chunk(name: str, leaf: Any) -> tuple[int, ...]:
    shape, itemsize = tuple(leaf.shape), np.dtype(leaf.dtype).itemsize
    if _is_stacked(name, leaf):
        return (1, rows_of_chunk(shape[1:], itemsize), *shape[2:])
    return (rows_of_chunk(shape, itemsize), *shape[1:]) if shape else ()


def _opened(state: epath.Path, name: str, context: tensorstore.Context) -> tensorstore.TensorStore:
    handlers = ocp.type_handlers
    in_one = (state / "manifest.ocdbt").exists()  # else a folder for each array, as in older Orbax
    info = handlers.ParamInfo(name=name.replace("/", "."), path=state / name.replace("/", "."), parent_dir=state,
                              is_ocdbt_checkpoint=in_one, use_zarr3=False, ts_context=context)
    return tensorstore.open(tensorstore.Spec(handlers.get_json_tspec_read(info, use_ocdbt=in_one)), open=True,
                            context=context).result()
