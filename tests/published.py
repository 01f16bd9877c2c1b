"""Published models for tests: folders with config.json, safetensors and a tokenizer, of the golden files or random."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).resolve().parent / "model" / "golden"
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "bool": "BOOL", "int64": "I64"}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def golden(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The configuration, the tensors, tokens and logits of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    facts = json.loads(str(arrays.pop("config")))
    return facts, arrays, arrays.pop("tokens"), arrays.pop("logits")


def safetensors(tensors: Mapping[str, np.ndarray], metadata: bool = True) -> bytes:
    """A file's bytes, as the format's documentation has them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
    at = 0
    for name, array in tensors.items():
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape),
                        "data_offsets": [at, at := at + array.nbytes]}
    return with_header(json.dumps(header), b"".join(array.tobytes() for array in tensors.values()))


def with_header(header: str, content: bytes) -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + content


def write_model(
    folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1, tokenizer: bool = True
) -> Path:
    """Writes a folder as models are published; with several shards, an index too."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(facts))
    if tokenizer:
        write_tokenizer(folder)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(tensors))
        return folder
    places = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        (folder / name).write_bytes(safetensors(part))
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def write_tokenizer(folder: Path) -> None:
    """Fifteen pieces: fewer than the embeddings of the golden files have rows."""
    letters = [[letter, -3.0] for letter in "▁etaoinshrdlu"]
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end = {"id": 1, "content": "</s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
        "pre_tokenizer": spaces, "post_processor": None, "decoder": spaces,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["</s>", 0.0], *letters],
                  "byte_fallback": False}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "</s>"}))
