"""Writes safetensors files, whole or in shards of limited size, tensor by tensor.

A file consists of eight bytes, the length of its header; the header, JSON with the dtype, shape and offset of each
tensor; and the numbers of the tensors one after the other.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import ml_dtypes
import numpy as np

from codellm_jax.weights.layouts import PublishedTensor

# The writable dtypes -> numpy's dtype, and its name in the files.
DTYPES: dict[str, tuple[np.dtype, str]] = {
    "float32": (np.dtype(np.float32), "F32"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
    "float16": (np.dtype(np.float16), "F16"),
}
Dtypes = Mapping[str, str]  # name of a tensor -> a key of DTYPES
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
         "TIB": 2**40}
INDEX = "model.safetensors.index.json"
COPIED = 2**24  # bytes of a tensor that are converted and written at a time


def parse_size(text: str) -> int:
    """The bytes of a size such as 5GB, 500 MB or 1GiB. Raises ValueError for an invalid size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = math.floor(float(found[1]) * UNITS[found[2].upper()]) if found and found[2].upper() in UNITS else 0
    if size < 1:
        raise ValueError(f"--max_shard_size must be a size such as 5GB, 500MB or 1GiB, found {text!r}.")
    return size


def files_of(tensors: Sequence[PublishedTensor], dtypes: Dtypes, most: int) -> dict[str, list[PublishedTensor]]:
    """File name -> its tensors, in order: one file, or shards of at most `most` bytes each. A larger tensor gets its
    own shard.
    """
    shards: list[list[PublishedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        # Its part of the header is counted as if it were at the end of a file.
        own = size_of(tensor, dtypes) + len(json.dumps({tensor.name: _entry(tensor, dtypes, 10**12)}))
        if shards[-1] and size + own + 100 > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += own
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}


def index_of(files: Mapping[str, Sequence[PublishedTensor]], dtypes: Dtypes) -> dict[str, Any]:
    """The index of shards: the bytes of all tensors, and the file of each tensor."""
    total = sum(size_of(tensor, dtypes) for tensors in files.values() for tensor in tensors)
    return {"metadata": {"total_size": total},
            "weight_map": {tensor.name: file for file, tensors in files.items() for tensor in tensors}}


def size_of(tensor: PublishedTensor, dtypes: Dtypes) -> int:
    """The size in bytes of a tensor's numbers."""
    return math.prod(tensor.shape) * DTYPES[dtypes[tensor.name]][0].itemsize


def write_tensors(
    file: IO[bytes], tensors: Sequence[PublishedTensor], arrays: Iterator[np.ndarray], dtypes: Dtypes
) -> None:
    """Writes a file of tensors, whose numbers arrive in order, as published and in any dtype.

    Raises:
      ValueError: a number exceeds the range of its dtype.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        header[tensor.name] = _entry(tensor, dtypes, start)
        start += size_of(tensor, dtypes)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:  # `zip` would hold each array until the next one arrives
        _write_numbers(file, tensor, next(arrays), dtypes[tensor.name])


def _entry(tensor: PublishedTensor, dtypes: Dtypes, start: int) -> dict[str, Any]:
    return {"dtype": DTYPES[dtypes[tensor.name]][1], "shape": list(tensor.shape),
            "data_offsets": [start, start + size_of(tensor, dtypes)]}


def _write_numbers(file: IO[bytes], tensor: PublishedTensor, array: np.ndarray, dtype: str) -> None:
    """Writes parts along the first axis, so no second copy of the whole tensor is made."""
    assert array.shape == tensor.shape, tensor.name
    rows = max(1, COPIED * len(array) // max(1, array.nbytes))
    for first in range(0, len(array), rows):
        part = array[first : first + rows]
        with np.errstate(over="ignore"):
            written = part.astype(DTYPES[dtype][0], copy=False)
        if dtype != "float32" and (np.isinf(written) & np.isfinite(part)).any():
            raise ValueError(
                f"{tensor.name} has numbers beyond the range of {dtype}: use --dtype=float32 or bfloat16.")
        file.write(written.tobytes())
