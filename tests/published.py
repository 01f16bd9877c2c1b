"""Published models for tests: folders with config.json, safetensors and a tokenizer, from golden files or random."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).resolve().parent / "model" / "golden"
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "bool": "BOOL", "int64": "I64"}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# The sizes of the random Llama.
LAYERS, HIDDEN, HEADS, KEY_HEADS, HEAD, FEEDFORWARD, POSITIONS = 2, 24, 4, 2, 6, 40, 64
TEXTS = ["The quick brown fox jumps over the lazy dog.\n", "def add(first, second):\n    return first + second\n",
         "import os\n\nprint(os.getcwd())\n", "At which stage does code help?\n"] * 4


def golden(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The configuration, tensors, tokens and logits of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    facts = json.loads(str(arrays.pop("config")))
    return facts, arrays, arrays.pop("tokens"), arrays.pop("logits")


def safetensors(tensors: Mapping[str, np.ndarray], metadata: bool = True) -> bytes:
    """The bytes of a safetensors file, by the format's documentation."""
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
    """Writes a model's folder as published; with several shards, also an index."""
    folder.mkdir(parents=True, exist_ok=True)
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
    """Writes a tokenizer of fifteen pieces, fewer than the rows of the golden files' embeddings."""
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


def write_byte_tokenizer(folder: Path) -> int:
    """Writes a byte-level BPE tokenizer that ends documents with <|endoftext|>; returns its number of ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}))
    return tokenizer.get_vocab_size()


def write_llama(folder: Path, seed: int = 0) -> Path:
    """Writes a Llama with grouped queries and a separate head size; returns its folder."""
    rows = write_byte_tokenizer(folder) + 5  # as in many models, more rows than ids
    dice = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (rows, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in {
            "self_attn.q_proj": (HEADS * HEAD, HIDDEN), "self_attn.k_proj": (KEY_HEADS * HEAD, HIDDEN),
            "self_attn.v_proj": (KEY_HEADS * HEAD, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
            "mlp.gate_proj": (FEEDFORWARD, HIDDEN), "mlp.up_proj": (FEEDFORWARD, HIDDEN),
            "mlp.down_proj": (HIDDEN, FEEDFORWARD), "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,)}.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (rows, HIDDEN)}
    tensors = {name: (0.1 * dice.normal(size=shape) + (len(shape) == 1)).astype(np.float32)
               for name, shape in shapes.items()}
    facts = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows, "hidden_size": HIDDEN,
        "intermediate_size": FEEDFORWARD, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS, "head_dim": HEAD, "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
        "torch_dtype": "float32"}
    return write_model(folder, facts, tensors, tokenizer=False)
