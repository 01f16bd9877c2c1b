"""MindSpore's checkpoint and strategy files, by protobuf's wire format: where in a file each tensor's numbers stand.

Checkpoints are larger than protobuf parses as a whole (2 GiB), and so a file is walked by its fields' lengths, and the
numbers are read by their place. Nothing is allocated by what a file merely says: each length is held against the file.

  mindspore/ccsrc/utils/checkpoint.proto     Checkpoint { repeated Value value = 1 }
                                             Value { string tag = 1; TensorProto tensor = 2; MapTensorProto = 3 }
                                             TensorProto { repeated int64 dims = 1; string tensor_type = 2;
                                                           bytes tensor_content = 3 }
  mindspore/ccsrc/utils/node_strategy.proto  ParallelStrategyMap { repeated ParallelLayoutItem = 3 }
                                             ParallelLayoutItem { string param_name = 1; ParallelLayouts = 2 }
                                             ParallelLayouts { repeated DevMatrix dev_matrix = 1; TensorMap
                                                           tensor_map = 2; ParamSplitShape param_split_shape = 3;
                                                           int32 field = 5; int32 opt_weight_shard_step = 6;
                                                           int32 opt_weight_shard_size = 7 }, each of the first three
                                                           with its numbers as field 1

A tensor of more than 512 MiB stands in several values of one tag, each with the whole dims, whose contents follow one
another; a scalar has the dims [0] (`_exec_save` of mindspore/train/serialization.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import ml_dtypes
import numpy as np
from etils import epath

# tensor_type in lower case, without "mindspore.".
DTYPES = {name: np.dtype(name) for name in (
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")}
DTYPES |= {"bfloat16": np.dtype(ml_dtypes.bfloat16), "bool_": np.dtype(bool)}

MOST_VALUES = 200_000  # of a checkpoint; and so much memory at most for its places
MOST_STRATEGY = 1 << 26  # bytes of a strategy file
MOST_AXES = 8  # of a tensor
MOST_DEVICE_AXES = 32
CHECKSUM = b"crc_num"  # followed by ten bytes, at the end of some checkpoints


class Malformed(ValueError):
    """A file is not what it should be; in words that go on after its name."""


@dataclass(frozen=True)
class Stored:
    """A tensor, or a part of one, in a file.

    Attributes:
      file: where it lies.
      shape: of what lies there.
      dtype: None where the type is not known here.
      pieces: offset and bytes of each piece; joined they are the numbers in order of C.
    """

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    pieces: tuple[tuple[int, int], ...]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows from start to stop of the first axis; raises OSError where the file has become shorter."""
        assert self.dtype is not None
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        wanted = np.empty((stop - start) * row if self.shape else row, np.uint8)
        begin, at = start * row, 0
        with epath.Path(self.file).open("rb") as stream:
            for offset, size in self.pieces:  # of which the wanted bytes may begin in one and end in another
                skipped = min(max(begin - at, 0), size)
                into = wanted.data[max(at - begin, 0):max(at + size - begin, 0)]
                stream.seek(offset + skipped)
                if into and stream.readinto(into) != len(into):
                    raise OSError(f"{self.file} ends within a tensor; bring it anew.")
                at += size
        return wanted.view(self.dtype).reshape((stop - start, *self.shape[1:]) if self.shape else ())


@dataclass(frozen=True)
class Layout:
    """How a parameter is sliced over devices.

    Attributes:
      devices: the device matrix; ranks count its positions, the last axis first.
      axes: of each axis of the parameter, which axis of the device matrix slices it, counted from the last; -1 if none.
      shard_step, shard_size: the optimizer's sharding: each such slice is cut once more on its first axis into
        shard_size shards (-1: as many as there are copies), and ranks shard_step apart have successive ones; 0 if not.
    """

    devices: tuple[int, ...]
    axes: tuple[int, ...]
    shard_step: int
    shard_size: int


# ---- Fields ------------------------------------------------------------------------------------

Span = tuple[int, int]  # where something begins and ends in the file


def _varint(stream: IO[bytes], at: int, end: int) -> tuple[int, int]:
    """A number and where it ends."""
    stream.seek(at)
    value = 0
    for index, byte in enumerate(stream.read(min(10, end - at))):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, at + index + 1
    raise Malformed(f"is damaged or breaks off: no number at byte {at:,}")


def _fields(stream: IO[bytes], span: Span) -> Iterator[tuple[int, int | Span]]:
    """Each field's number and its value: a number, or where its bytes stand."""
    at, end = span
    while at < end:
        begin = at
        key, at = _varint(stream, at, end)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(stream, at, end)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(stream, at, end)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise Malformed(f"is damaged: no field at byte {begin:,}")
        if size > end - at:
            raise Malformed(f"breaks off, or is damaged: the field at byte {begin:,} has {size:,} bytes, {end - at:,} "
                            "are there")
        yield number, (at, at + size)
        at += size


def _span(value: int | Span, what: str) -> Span:
    if isinstance(value, int):
        raise Malformed(f"is damaged: a number in the place of {what}")
    return value


def _text(stream: IO[bytes], value: int | Span, what: str) -> str:
    begin, end = _span(value, what)
    if end - begin > 1024:
        raise Malformed(f"is damaged: {what} of {end - begin:,} bytes")
    stream.seek(begin)
    try:
        return stream.read(end - begin).decode()
    except UnicodeDecodeError:
        raise Malformed(f"is damaged: {what} is no text at byte {begin:,}") from None


def _numbers(stream: IO[bytes], value: int | Span, most: int) -> list[int]:
    """One signed number of a repeated field, or several that are packed."""
    found = []
    if isinstance(value, int):
        found.append(value)
    else:
        at, end = value
        while at < end and len(found) <= most:
            number, at = _varint(stream, at, end)
            found.append(number)
    return [number - (1 << 64) if number >= 1 << 63 else number for number in found]


# ---- Checkpoints -------------------------------------------------------------------------------


def stored_tensors(file: str) -> dict[str, Stored]:
    """Tag -> tensor of a checkpoint file, of which the numbers are not read.

    Raises:
      ValueError: it is no checkpoint, is truncated or damaged; in a line that names it.
      OSError: it cannot be read.
    """
    path = epath.Path(file)
    size = path.stat().length
    dims: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, str] = {}
    pieces: dict[str, list[tuple[int, int]]] = {}
    try:
        with path.open("rb") as stream:
            stream.seek(max(size - 17, 0))
            end = size - 17 if size > 17 and stream.read(7) == CHECKSUM else size
            for count, (number, value) in enumerate(_fields(stream, (0, end))):
                if number != 1 or count >= MOST_VALUES:
                    raise Malformed("is damaged: it holds what is no value" if number != 1 else
                                    f"has more than {MOST_VALUES:,} values")
                tag, shape, kind, content = _value(stream, _span(value, "a value"))
                if dims.setdefault(tag, shape) != shape or kinds.setdefault(tag, kind) != kind:
                    raise Malformed(f"is damaged: the pieces of {tag} are not of one tensor")
                pieces.setdefault(tag, []).append((content[0], content[1] - content[0]))
            if not dims:
                raise Malformed("holds no tensor")
    except Malformed as error:
        raise ValueError(f"{file} {error}{'' if dims else '; or it is no checkpoint of MindSpore'}.") from None
    found = {tag: Stored(file, shape, DTYPES.get(kinds[tag].lower().removeprefix("mindspore.")), tuple(pieces[tag]))
             for tag, shape in dims.items()}
    for tag, stored in found.items():
        there = sum(length for _, length in stored.pieces)
        if stored.dtype is not None and there != math.prod(stored.shape) * stored.dtype.itemsize:
            raise ValueError(f"{file} is damaged: {tag} {list(stored.shape)} of {kinds[tag]} has {there:,} bytes.")
    return found


def _value(stream: IO[bytes], span: Span) -> tuple[str, tuple[int, ...], str, Span]:
    """A value's tag, and its tensor's shape, type and where the content stands."""
    tag, tensor = None, None
    for number, value in _fields(stream, span):
        if number == 1 and tag is None:
            tag = _text(stream, value, "a tag")
        elif number == 2 and tensor is None:
            tensor = _tensor(stream, _span(value, "a tensor"))
        else:
            raise Malformed("holds what is no tensor (a map of parameters?), or is damaged")
    if tag is None or tensor is None:
        raise Malformed(f"is damaged: a value at byte {span[0]:,} without its {'tag' if tag is None else 'tensor'}")
    return tag, *tensor


def _tensor(stream: IO[bytes], span: Span) -> tuple[tuple[int, ...], str, Span]:
    dims: list[int] = []
    kind: str | None = None
    content: Span | None = None
    for number, value in _fields(stream, span):
        if number == 1:
            dims += _numbers(stream, value, MOST_AXES)
        elif number == 2 and kind is None:
            kind = _text(stream, value, "a type")
        elif number == 3 and content is None:
            content = _span(value, "a tensor's content")
        else:
            raise Malformed(f"is damaged: a tensor at byte {span[0]:,} has an unknown field")
        if len(dims) > MOST_AXES:
            raise Malformed(f"is damaged: a tensor at byte {span[0]:,} has more than {MOST_AXES} axes")
    if kind is None or content is None:
        raise Malformed(f"is damaged: a tensor at byte {span[0]:,} without its type or content")
    if dims == [0]:
        dims = []
    if any(dim <= 0 for dim in dims):
        raise Malformed(f"is damaged: a tensor at byte {span[0]:,} has the shape {dims}")
    return tuple(dims), kind, content


# ---- Strategy files ----------------------------------------------------------------------------


def layouts(file: str) -> dict[str, Layout]:
    """Parameter -> how it is sliced, of a strategy file; raises ValueError and OSError as `stored_tensors` does."""
    path = epath.Path(file)
    size = path.stat().length
    found = {}
    try:
        if size > MOST_STRATEGY:
            raise Malformed(f"has {size:,} bytes, more than a strategy file")
        with path.open("rb") as stream:
            for number, value in _fields(stream, (0, size)):
                if number != 3:
                    continue
                name, layout = None, None
                for inner, item in _fields(stream, _span(value, "a layout")):
                    if inner == 1:
                        name = _text(stream, item, "a parameter's name")
                    elif inner == 2:
                        layout = _layout(stream, _span(item, "a layout"))
                if name is None or layout is None:
                    raise Malformed("is damaged: a layout without its parameter")
                found[name] = layout
        if not found:
            raise Malformed("is no strategy file, or slices no parameter")
    except Malformed as error:
        raise ValueError(f"{file} {error}.") from None
    return found


def _layout(stream: IO[bytes], span: Span) -> Layout:
    numbers: dict[int, list[int]] = {1: [], 2: [], 3: []}
    single: dict[int, int] = {}
    for number, value in _fields(stream, span):
        if number in numbers:
            for _, inner in _fields(stream, _span(value, "a list")):
                numbers[number] += _numbers(stream, inner, MOST_DEVICE_AXES)
                if len(numbers[number]) > MOST_DEVICE_AXES:
                    break
        elif number in (5, 6, 7) and isinstance(value, int):
            single[number] = _numbers(stream, value, 1)[0]
    devices, axes, uneven = numbers.values()
    if uneven or single.get(5, 0):
        raise Malformed("slices a parameter unevenly (param_split_shape, field), which is not read here")
    if (not 0 < len(devices) <= MOST_DEVICE_AXES or any(not 0 < count <= 1 << 20 for count in devices)
            or any(not -1 <= axis < len(devices) for axis in axes)):
        raise Malformed(f"is damaged: a device matrix {devices[:MOST_AXES]} and a tensor map {axes[:MOST_AXES]}")
    return Layout(tuple(devices), tuple(axes), single.get(6, 0), single.get(7, 0))
