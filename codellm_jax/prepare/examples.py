"""Documents as ArrayRecord or TFRecord files, which `tfds.builder_from_directory(OUTPUT)` opens as a dataset.

TensorFlow Datasets reads ArrayRecord as a data source, and TFRecord also as a tf.data.Dataset. A record is a
tf.train.Example in protobuf's wire format, encoded here so that workers need no TensorFlow and the bytes are
deterministic (protobuf's order of a map's entries is not). A missing text is empty.
"""

import contextlib
import importlib
import json
import os
import shutil
import struct
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

NAME, VERSION = "documents", "1.0.0"  # of the dataset
TEXTS = ("text", "source", "file", "sha256", "license", "language")
NUMBERS = ("row", "bytes_read", "tokens")
_OPTIONS = "group_size:1,zstd"  # each record can be read alone


class _TFRecords:
    """Writes a TFRecord file: each record with its length and checksums (CRC-32C, masked as in TensorFlow)."""

    def __init__(self, path: str) -> None:
        self._checksum = importlib.import_module("google_crc32c").value
        self._file = open(path, "wb")

    def write(self, record: bytes) -> None:
        length = struct.pack("<Q", len(record))
        self._file.write(length + self._masked(length) + record + self._masked(record))

    def _masked(self, content: bytes) -> bytes:
        found = self._checksum(content)
        return struct.pack("<I", ((found >> 15 | found << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    def close(self) -> None:
        self._file.close()


class Records:
    """A file of documents, written under a temporary name until it is complete.

    Args:
      path: of the file; its suffix gives the format, .array_record or .tfrecord.
    """

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._building = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        self._held = contextlib.ExitStack()
        self._local = os.fspath(self._building)
        if "://" in self._local:  # the library writes only to a local disk
            self._local = self._held.enter_context(tempfile.NamedTemporaryFile(suffix=path.suffix)).name
        self._writer: Any = _TFRecords(self._local) if path.suffix == ".tfrecord" else importlib.import_module(
            "array_record.python.array_record_module").ArrayRecordWriter(self._local, _OPTIONS)
        self.count = self.bytes = 0

    def add(self, row: Mapping[str, Any], size: int) -> None:
        """Adds a document; `size` is the size of its text in bytes."""
        del size
        record = example(row)
        self._writer.write(record)
        self.count += 1
        self.bytes += len(record)

    def close(self) -> None:
        """Completes the file and moves it into place."""
        self._writer.close()
        if self._local != os.fspath(self._building):
            with open(self._local, "rb") as written, self._building.open("wb") as file:
                shutil.copyfileobj(written, file, 1 << 20)
        self._held.close()
        self._building.replace(self._path)

    def discard(self) -> None:
        """Removes the incomplete file."""
        with contextlib.suppress(RuntimeError):  # the file is discarded anyway
            self._writer.close()
        self._held.close()
        self._building.unlink(missing_ok=True)


def example(row: Mapping[str, Any]) -> bytes:
    """A document as a serialized tf.train.Example."""
    features = {name: _message(1, _texts([row[name] or ""])) for name in TEXTS}
    features |= {name: _message(3, _message(1, _varint(row[name])))
                 for name in NUMBERS if row[name] is not None}
    features["changed_by"] = _message(1, _texts(row["changed_by"]))
    entries = (_message(1, name.encode()) + _message(2, feature) for name, feature in sorted(features.items()))
    return _message(1, b"".join(_message(1, entry) for entry in entries))


def _texts(texts: Sequence[str]) -> bytes:
    return b"".join(_message(1, text.encode()) for text in texts)


def _message(field: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return bytes([field << 3 | 2]) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


# ---- The dataset ---------------------------------------------------------------------------------


def shard(form: str, number: int, count: int) -> str:
    """The name of a file of the dataset."""
    return f"{NAME}-train.{form}-{number:05d}-of-{count:05d}"


def descriptions(form: str, documents: Sequence[int], size: int, tokens: bool) -> Iterator[tuple[str, str]]:
    """The names and contents of the files that turn a folder of records into a TFDS dataset.

    Args:
      form: "array_record" or "tfrecord".
      documents: number of documents in each file.
      size: bytes of all records.
      tokens: whether documents have a number of tokens.
    """
    text = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
    number = {"pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
              "tensor": {"dtype": "int64", "encoding": "none", "shape": {}}}
    several = {"pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
               "sequence": {"feature": text, "length": "-1"}}
    features = dict.fromkeys(TEXTS, text) | {name: number for name in NUMBERS if tokens or name != "tokens"}
    yield "features.json", _json({
        "featuresDict": {"features": features | {"changed_by": several}},
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict"})
    yield "dataset_info.json", _json({
        "description": "Documents prepared by t5x prepare; README.md is their data card.", "disableShuffling": True,
        "fileFormat": form, "name": NAME, "version": VERSION, "splits": [{
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "name": "train",
            "numBytes": str(size), "shardLengths": [str(count) for count in documents]}] if documents else []})


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
