"""A checkpoint whose parameters are never in memory as a whole: it is written and read part by part.

It is one as `checkpoints` has them, but for the rest of a state: Orbax writes arrays of one chunk each, TensorStore
makes them as long as they are to be and writes the parts, and the record comes last.
"""

import collections
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from codellm_jax.runtime.checkpoints import digest, first_line, undamaged_records

CHUNK = 2**24  # bytes at most, of an array's numbers that are stored as one
IN_FLIGHT = 2**26  # bytes that may wait to be written


class Part(NamedTuple):
    """Rows of a parameter, float32: of a leaf such as "lm_head", or of one layer of a leaf in "blocks"."""

    leaf: str
    layer: int | None
    first: int  # row that `rows` begin at
    rows: np.ndarray


def rows_of_chunk(shape: tuple[int, ...]) -> int:
    """Rows of a leaf, or of a layer of it, that are stored as one: parts of so many are written fastest."""
    return min(shape[0], max(1, CHUNK // (4 * math.prod(shape[1:]))))


def save_in_parts(
    folder: epath.Path, shapes: Mapping[str, tuple[int, ...]], parts: Iterable[Part], record: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes a checkpoint of parameters.

    Args:
      folder: RUN/checkpoints/STEP, which is not there yet.
      shapes: of each leaf, with layers stacked in "blocks".
      parts: every number of each leaf once; at most `IN_FLIGHT` bytes of them are held at a time.
      record: what is saved beside, as it is after the last part; checksums and digest are added.

    Returns:
      The record as it is saved.

    Raises:
      ValueError: the parts are not all of the leaves.
      OSError: the disk cannot take them.
    """
    chunks = {leaf: _chunk(leaf, shape) for leaf, shape in shapes.items()}
    tree: dict[str, Any] = {}
    for leaf, chunk in chunks.items():
        *branches, name = ["params", *leaf.split("/")]
        at = tree
        for branch in branches:
            at = at.setdefault(branch, {})
        at[name] = np.zeros(chunk, np.float32)
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(folder / "state", ocp.args.PyTreeSave(tree))
    context = ocp.type_handlers.get_ts_context(use_ocdbt=True)  # one cache for all
    stores = {leaf: _opened(folder / "state", leaf, context).resize(exclusive_max=shape, expand_only=True).result()
              for leaf, shape in shapes.items()}
    sums, written = dict.fromkeys(shapes, 0), dict.fromkeys(shapes, 0)
    waiting: collections.deque[tuple[Any, int]] = collections.deque()
    for part in parts:
        rows = slice(part.first, part.first + len(part.rows))
        store = stores[part.leaf][rows] if part.layer is None else stores[part.leaf][part.layer, rows]
        waiting.append((store.write(part.rows, can_reference_source_data_indefinitely=True), part.rows.nbytes))
        sums[part.leaf] += int(part.rows.view(np.uint32).sum(dtype=np.uint64))
        written[part.leaf] += part.rows.size
        while sum(size for _, size in waiting) > IN_FLIGHT:
            _finish(waiting.popleft()[0], folder)
    for future, _ in waiting:
        _finish(future, folder)
    for leaf, shape in shapes.items():
        if written[leaf] != math.prod(shape):
            raise ValueError(f"{leaf} has {math.prod(shape)} numbers, but {written[leaf]} were given.")
    whole = dict(record) | {"checksums": {
        f"params/{leaf}": [list(shape), "float32", sums[leaf] % 2**32] for leaf, shape in shapes.items()},
        "step": int(folder.name)}
    whole["digest"] = digest(whole)
    ocp.Checkpointer(ocp.JsonCheckpointHandler()).save(folder / "record", ocp.args.JsonSave(whole))
    return whole


class Damaged(ValueError):
    """A checkpoint is not what was saved."""


class SavedParameters:
    """The parameters of a checkpoint, read an array or one layer of it at a time, and checked against its checksums.

    Attributes:
      step: that it was saved after.
      record: what was saved with it.
      shapes: of each parameter, such as "blocks/attention/query_kernel".
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
        """A whole parameter, or one layer of a stacked one. Raises Damaged where it cannot be read."""
        try:
            if name not in self._stores:
                self._stores[name] = _opened(self._state, name, self._context)
            store = self._stores[name]
            found = np.ascontiguousarray(store.read().result() if layer is None else store[layer].read().result())
        except Exception as error:  # TensorStore has no class of its own for what is damaged
            raise Damaged(f"{name} cannot be read: {first_line(error)}") from error
        bits = found.view(f"uint{8 * found.dtype.itemsize}")
        self._sums[name][layer] = int(bits.sum(dtype=np.uint32))
        return found

    def require_undamaged(self) -> None:
        """Raises Damaged where what was read is not all that was saved."""
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
    """The parameters of a run directory's checkpoints with whole records, newest first; with `step` of that one alone.

    Raises:
      FileNotFoundError: the directory holds no checkpoint, or none of that step.
    """
    for path, record in undamaged_records(model_dir, report, step):
        yield SavedParameters(path, record)


def _finish(write: Any, folder: epath.Path) -> None:
    """Waits for a write. Raises OSError where it failed."""
    try:
        write.result()
    except Exception as error:  # TensorStore has no class of its own for a disk that is full
        full = "No space left on device" in str(error)
        raise OSError(f"Writing to {folder} failed: "
                      f"{'No space left on device' if full else ' '.join(str(error).split())[:200]}.") from error


def _chunk(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if leaf.startswith("blocks/"):
        return (1, rows_of_chunk(shape[1:]), *shape[2:])
    return (rows_of_chunk(shape), *shape[1:])


def _opened(state: epath.Path, leaf: str, context: tensorstore.Context) -> tensorstore.TensorStore:
    handlers = ocp.type_handlers
    info = handlers.ParamInfo(name=f"params/{leaf}".replace("/", "."), parent_dir=state, is_ocdbt_checkpoint=True,
                              use_zarr3=False, ts_context=context)
    return tensorstore.open(tensorstore.Spec(handlers.get_json_tspec_read(info, use_ocdbt=True)), open=True,
                            context=context).result()
