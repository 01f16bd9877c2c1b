"""A small published model as a hub has it, of Llama's form: config.json, model.safetensors and tokenizer.json.

Written here by hand, from the families' documented names and shapes, and not by what the package writes with.
"""

import json
from pathlib import Path

import numpy as np

LAYERS, HIDDEN, HEADS, KEY_HEADS, HEAD, FEEDFORWARD, POSITIONS = 2, 24, 4, 2, 6, 40, 64
TEXTS = ["The quick brown fox jumps over the lazy dog.\n", "def add(first, second):\n    return first + second\n",
         "import os\n\nprint(os.getcwd())\n", "At which stage does code help?\n"] * 4


def write_tokenizer(folder: Path) -> int:
    """Writes a byte-level BPE tokenizer that ends documents with <|endoftext|>; returns how many ids it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}))
    return tokenizer.get_vocab_size()


def write_safetensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """The format: the header's length in 8 bytes, the header as JSON, and the numbers one behind the other."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(map(np.ndarray.tobytes, tensors.values())))


def write_published_model(folder: Path, seed: int = 0) -> Path:
    """Writes a Llama with grouped queries and a head of its own size; returns its folder."""
    folder.mkdir(parents=True)
    rows = write_tokenizer(folder) + 5  # as many have, more than the tokenizer has ids
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
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows, "hidden_size": HIDDEN,
        "intermediate_size": FEEDFORWARD, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS, "head_dim": HEAD, "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
        "torch_dtype": "float32"}))
    return folder
