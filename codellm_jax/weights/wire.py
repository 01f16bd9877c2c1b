"""MindSpore's checkpoint and strategy files in protobuf's wire format: finds the offsets of each tensor's numbers.

Checkpoints exceed the size that protobuf parses at once (2 GiB), so a file is walked by the lengths of its fields, and
numbers are read at their offsets. Every length is checked against the size of the file before memory is allocated.

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

A tensor larger than 512 MiB is stored as several values with the same tag, each with the full dims, and their contents
follow one another; a scalar has the dims [0] (`_exec_save` of mindspore/train/serialization.py).
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

MOST_VALUES = 200_000  # of a checkpoint, which bounds the memory for their offsets
MOST_STRATEGY = 1 << 24  # bytes of a strategy file
MOST_AXES = 8  # of a tensor
MOST_DEVICE_AXES = 32
MOST_DEVICES = 1 << 20
MOST_FIELDS = 100  # of a message without repeated messages
CHECKSUM = b"crc_num"  # followed by ten bytes, at the end of some checkpoints


class Malformed(ValueError):
    """An invalid file; the message continues a sentence that begins with the file's name."""


@dataclass(frozen=True)
class Stored:
    """A tensor, or a part of one, in a file.

    Attributes:
      file: the file that contains it.
      shape: of the stored part.
      dtype: None if the type is unknown.
      pieces: offset and size of each piece in bytes; concatenated, they are the numbers in C order.
    """

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    pieces: tuple[tuple[int, int], ...]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows from start to stop along the first axis; raises OSError if the file has become shorter."""
        assert self.dtype is not None
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        wanted = np.empty((stop - start) * row if self.shape else row, np.uint8)
        begin, at = start * row, 0
        with epath.Path(self.file).open("rb") as stream:
            for offset, size in self.pieces:  # the wanted bytes may begin in one and end in another
                skipped = min(max(begin - at, 0), size)
                into = wanted.data[max(at - begin, 0):max(at + size - begin, 0)]
                stream.seek(offset + skipped)
                if into and stream.readinto(into) != len(into):
                    raise OSError(f"{self.file} ends within a tensor; copy it again.")
                at += size
        return wanted.view(self.dtype).reshape((stop - start, *self.shape[1:]) if self.shape else ())


@dataclass(frozen=True)
class Layout:
    """The slicing of a parameter over devices.

    Attributes:
      devices: the device matrix; ranks count its positions with the last axis fastest.
      axes: for each axis of the parameter, the axis of the device matrix that slices it, counted from the last; -1 for
        none.
      shard_step, shard_size: the optimizer's sharding: each slice is cut further along its first axis into shard_size
        shards (-1: as many as there are copies), and ranks shard_step apart hold successive shards; 0 without sharding.
    """

    devices: tuple[int, ...]
    axes: tuple[int, ...]
    shard_step: int
    shard_size: int


# ---- Fields ------------------------------------------------------------------------------------

Span = tuple[int, int]  # begin and end of an item in the file


def _varint(stream: IO[bytes], at: int, end: int) -> tuple[int, int]:
    """A number, and the offset after it."""
    stream.seek(at)
    value = 0
    for index, byte in enumerate(stream.read(min(10, end - at))):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, at + index + 1
    raise Malformed(f"is damaged or truncated: no number at byte {at:,}")


def _fields(stream: IO[bytes], span: Span, most: int = MOST_FIELDS) -> Iterator[tuple[int, int | Span]]:
    """The number and the value of each field: a number, or the span of its bytes. More than `most` are refused, which
    bounds the time.
    """
    at, end = span
    count = 0
    while at < end:
        begin = at
        if (count := count + 1) > most:
            raise Malformed(f"has more than {most:,} values before byte {begin:,}; it is damaged, or too large")
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
            raise Malformed(f"is truncated or damaged: the field at byte {begin:,} has {size:,} bytes, but "
                            f"{end - at:,} are left")
        yield number, (at, at + size)
        at += size


def _span(value: int | Span, what: str) -> Span:
    if isinstance(value, int):
        raise Malformed(f"is damaged: a number instead of {what}")
    return value


def _text(stream: IO[bytes], value: int | Span, what: str) -> str:
    begin, end = _span(value, what)
    if end - begin > 1024:
        raise Malformed(f"is damaged: {what} of {end - begin:,} bytes")
    stream.seek(begin)
    try:
        return stream.read(end - begin).decode()
    except UnicodeDecodeError:
        raise Malformed(f"is damaged: {what} at byte {begin:,} is not text") from None


def _numbers(stream: IO[bytes], value: int | Span, most: int) -> list[int]:
    """One signed number of a repeated field, or several packed ones."""
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
    """Tag -> tensor of a checkpoint file; the numbers are not read.

    Raises:
      ValueError: it is not a checkpoint, is truncated or damaged; the one-line message names it.
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
            for number, value in _fields(stream, (0, end), MOST_VALUES):
                if number != 1:
                    raise Malformed("is damaged: it holds an invalid value")
                tag, shape, kind, content = _value(stream, _span(value, "a value"))
                if dims.setdefault(tag, shape) != shape or kinds.setdefault(tag, kind) != kind:
                    raise Malformed(f"is damaged: the pieces of {tag} do not belong to one tensor")
                pieces.setdefault(tag, []).append((content[0], content[1] - content[0]))
            if not dims:
                raise Malformed("holds no tensor")
    except Malformed as error:
        raise ValueError(f"{file} {error}{'' if dims else '; or it is not a MindSpore checkpoint'}.") from None
    found = {tag: Stored(file, shape, DTYPES.get(kinds[tag].lower().removeprefix("mindspore.")), tuple(pieces[tag]))
             for tag, shape in dims.items()}
    for tag, stored in found.items():
        there = sum(length for _, length in stored.pieces)
        if stored.dtype is not None and there != math.prod(stored.shape) * stored.dtype.itemsize:
            raise ValueError(f"{file} is damaged: {tag} {list(stored.shape)} of {kinds[tag]} has {there:,} bytes.")
    return found


def _value(stream: IO[bytes], span: Span) -> tuple[str, tuple[int, ...], str, Span]:
    """A value's tag, and its tensor's shape, type and the span of its content."""
    tag, tensor = None, None
    for number, value in _fields(stream, span):
        if number == 1 and tag is None:
            tag = _text(stream, value, "a tag")
        elif number == 2 and tensor is None:
            tensor = _tensor(stream, _span(value, "a tensor"))
        else:
            raise Malformed("holds an entry that is not a tensor (a map of parameters?), or is damaged")
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
    """Parameter -> its slicing, from a strategy file; raises ValueError and OSError as `stored_tensors` does."""
    path = epath.Path(file)
    size = path.stat().length
    found = {}
    try:
        if size > MOST_STRATEGY:
            raise Malformed(f"has {size:,} bytes, too large for a strategy file")
        with path.open("rb") as stream:
            for number, value in _fields(stream, (0, size), MOST_VALUES):
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
            raise Malformed("is not a strategy file, or slices no parameter")
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
        raise Malformed("slices a parameter unevenly (param_split_shape, field), which is not supported")
    if (not 0 < len(devices) <= MOST_DEVICE_AXES or any(count < 1 for count in devices)
            or math.prod(devices) > MOST_DEVICES or any(not -1 <= axis < len(devices) for axis in axes)):
        raise Malformed(f"is damaged: a device matrix {devices[:MOST_AXES]} and a tensor map {axes[:MOST_AXES]}")
    return Layout(tuple(devices), tuple(axes), single.get(6, 0), single.get(7, 0))
