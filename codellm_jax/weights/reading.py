"""Reads the tensors of a folder one at a time, or some rows of one: from safetensors, or PyTorch's .bin files.

The header of a safetensors file is read and checked as its library does. Numbers are read at their offsets, not through
a memory mapping, whose pages would count as memory of the process. Unpickling is limited to what PyTorch's
`weights_only` allows.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from codellm_jax import contents
from codellm_jax.tokenizing import foreign

LONGEST_HEADER = foreign.LARGEST_SETTINGS  # bytes
LONGEST_NAME = 200  # characters of a tensor's name
MOST_AXES = 32  # of a tensor

# Name in the header -> the NumPy dtype. The types that the numbers of a model may have:
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
          "F64": np.dtype(np.float64)}
# Other types that a file may contain, for example of masks:
OTHERS = {name: np.dtype(kind) for name, kind in {
    "BOOL": "?", "I8": "i1", "U8": "u1", "I16": "i2", "U16": "u2", "I32": "i4", "U32": "u4", "I64": "i8", "U64": "u8",
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}.items()}
DTYPES = FLOATS | OTHERS


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a folder, in the order of its files.

    Attributes:
      shapes: the shape of each by name.
      dtypes: their NumPy dtype names, such as "bfloat16".
      files: the names of the files that contain them.
      load: the function behind `read`: returns a tensor, or the rows of a slice, as a NumPy array of its own dtype.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    files: tuple[str, ...]
    load: Callable[[str, slice], np.ndarray]

    def read(self, name: str, index: slice = slice(None)) -> np.ndarray:
        """A tensor, or the rows that a slice without steps selects; raises OSError if it cannot be read."""
        return self.load(name, index)


@dataclasses.dataclass(frozen=True)
class Stored:
    """The location of a tensor in a safetensors file."""

    file: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


def open_tensors(folder: str) -> Tensors:
    """Opens the tensors of a folder, local or gs://: safetensors in one file or in several with an index, else .bin
    files.

    Raises:
      FileNotFoundError: the folder, or a file that its index names, does not exist; or it holds no such files.
      ValueError: with a one-line message: a file is incomplete, invalid, or does not match the index.
    """
    place = epath.Path(folder).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"{folder} is {'a file, not a' if place.exists() else 'not a'} folder of weights.")
    names = sorted(path.name for path in place.iterdir())
    for whole, ending, open_files in (("model.safetensors", ".safetensors", _open_safetensors),
                                      ("pytorch_model.bin", ".bin", _open_pickled)):
        index = f"{whole}.index.json"
        shards = [name for name in names if name.endswith(ending) and not name.startswith("adapter_")]
        if whole in names:
            return open_files(place, [whole])
        if index in names:
            wanted = _shards_of_index(place / index)
            missing = sorted(set(wanted.values()) - set(names))
            if missing:
                raise FileNotFoundError(f"{place / index} names {_few(missing)}, but {place} does not hold "
                                        f"{'it' if len(missing) == 1 else 'them'}.")
            tensors = open_files(place, sorted(set(wanted.values())))
            _require_index(place / index, wanted, tensors)
            return tensors
        if len(shards) == 1 and ending == ".safetensors":
            return open_files(place, shards)
        if shards and ending == ".safetensors":
            raise ValueError(f"{place} holds {_few(shards)} but no {index}, so it is unknown whether they are "
                             "complete.")
    adapters = [name for name in names if name.startswith("adapter_")]
    raise FileNotFoundError(f"{place} holds neither model.safetensors nor pytorch_model.bin, nor shards of one with an "
                            f"index{f', but an adapter, {adapters[0]}' if adapters else ''}: only these formats are "
                            "supported.")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shards_of_index(index: epath.Path) -> dict[str, str]:
    """Tensor -> the file in the same folder that an index names for it."""
    named = foreign.json_object(str(index)).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files.")
    outside = [name for name in named.values() if os.path.basename(name) != name or name in ("", ".", "..")]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is not a file of its folder.")
    return named


def _require_index(index: epath.Path, wanted: Mapping[str, str], tensors: Tensors) -> None:
    absent, unnamed = sorted(set(wanted) - set(tensors.shapes)), sorted(set(tensors.shapes) - set(wanted))
    if absent:
        raise ValueError(f"{index} names {_few(absent)} in {wanted[absent[0]]}, which does not hold "
                         f"{'it' if len(absent) == 1 else 'them'}.")
    if unnamed:
        raise ValueError(f"The shards of {index} contain {_few(unnamed)}, which it does not name.")


def _open_safetensors(folder: epath.Path, names: list[str]) -> Tensors:
    stored: dict[str, Stored] = {}
    for name in names:
        for tensor, found in _header(folder / name).items():
            if tensor in stored:
                raise ValueError(f"{tensor} occurs in both {stored[tensor].file.name} and {name} of {folder}.")
            stored[tensor] = found

    def load(name: str, index: slice) -> np.ndarray:
        return _loaded(stored[name], name, index)

    return Tensors({name: found.shape for name, found in stored.items()},
                   {name: found.dtype.name for name, found in stored.items()}, tuple(names), load)


def _loaded(stored: Stored, name: str, index: slice) -> np.ndarray:
    row = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    first, last, _ = index.indices(stored.shape[0]) if stored.shape else (0, 1, 1)
    with stored.file.open("rb") as file:
        file.seek(stored.offset + first * row)
        content = file.read((last - first) * row)
    if len(content) != (last - first) * row:
        raise OSError(f"{stored.file} ends within {name}: it has become shorter since its header was read.")
    return np.frombuffer(content, stored.dtype).reshape((last - first, *stored.shape[1:]) if stored.shape else ())


def _header(file: epath.Path) -> dict[str, Stored]:
    """The location of each tensor, by offset. Raises ValueError with a one-line message that names the file if it is
    incomplete.
    """
    foreign.require_own(str(file))
    size = contents.size(str(file))
    with file.open("rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        beginning = opened.read(64)
        if what := contents.kind(start + beginning):
            if what != "a safetensors file":
                raise ValueError(f"{file} is {what}, not a safetensors file.")
        if len(start) < 8 or beginning[:1] != b"{" or not length:
            raise ValueError(f"{file} is not a safetensors file: it does not begin with a header.")
        if 8 + length > size:
            raise ValueError(f"{file} is incomplete: its header has {length} bytes, but the file has {size}.")
        if length > LONGEST_HEADER:
            raise ValueError(f"{file} has a header of {length:,} bytes; at most {LONGEST_HEADER:,} are read.")
        text = beginning + opened.read(max(0, length - len(beginning)))
    try:
        header = foreign.parsed(text[:length].decode())
    except ValueError as error:
        raise ValueError(f"{file} has a damaged header: {' '.join(str(error).split())[:200]}.") from None
    header.pop("__metadata__", None)
    stored, spans = {}, []
    for name, facts in header.items():
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise ValueError(f"{file} has a damaged header: a tensor is named {name[:LONGEST_NAME]!r}.")
        try:
            dtype, shape = DTYPES[facts["dtype"]], tuple(facts["shape"])
            begin, end = facts["data_offsets"]
            sound = len(shape) <= MOST_AXES and all(
                type(number) is int and 0 <= number <= size for number in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{file} has a damaged header: {name} is {json.dumps(facts)[:foreign.LONGEST_QUOTE]}.")
        stored[name] = Stored(file, dtype, shape, 8 + length + begin)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise ValueError(f"{file} has a damaged header: {name} begins at byte {begin}, where {at} was expected.")
        at = end
    if 8 + length + at != size:
        raise ValueError(f"{file} is incomplete: according to its header it has {8 + length + at} bytes, but it has "
                         f"{size}.")
    return dict(sorted(stored.items(), key=lambda item: item[1].offset))


def _open_pickled(folder: epath.Path, names: list[str]) -> Tensors:
    """The tensors of files pickled by PyTorch. Each file is opened anew for each tensor, so its pages do not stay in
    memory.
    """
    try:
        import torch
    except ImportError:
        raise ValueError(f"{folder / names[0]} needs PyTorch, which is not installed: pip install torch, or "
                         "convert it to safetensors.") from None
    if "://" in str(folder):
        raise ValueError(f"{folder} holds .bin files, which can only be read from a local disk: copy the folder.")

    def opened(name: str) -> dict[str, Any]:
        file = folder / name
        foreign.require_own(str(file))
        if what := contents.kind(contents.head(str(file))):
            if what not in ("a zip archive", "a pickled file"):
                raise ValueError(f"{file} is {what}, not a PyTorch file.")
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # from zip, pickle or the restricted unpickler
            old = "_use_new_zipfile_serialization" in str(error)
            line = " ".join(str(error).split("\n")[0].split())[:160]
            raise ValueError(
                f"{file} has the format of PyTorch before 1.6, which is not supported: convert it to safetensors."
                if old else f"{file} cannot be read by PyTorch as weights alone: {line}") from None
        if not isinstance(found, dict) or not all(
                isinstance(tensor, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
                and value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()  # not repeated
                for tensor, value in found.items()):
            raise ValueError(f"{file} contains other objects than named tensors.")
        return found

    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    files: dict[str, str] = {}
    for name in names:
        for tensor, value in opened(name).items():
            if tensor in files:
                raise ValueError(f"{tensor} occurs in both {files[tensor]} and {name} of {folder}.")
            files[tensor], shapes[tensor] = name, tuple(value.shape)
            dtypes[tensor] = str(value.dtype).removeprefix("torch.")

    def load(name: str, index: slice) -> np.ndarray:
        value = opened(files[name])[name]
        rows = (value[index] if value.ndim else value).contiguous()
        if rows.dtype == torch.bfloat16:  # which NumPy itself lacks
            return rows.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
        return rows.numpy().copy()

    return Tensors(shapes, dtypes, tuple(names), load)
