"""Import and export of a model with 1.3 billion parameters: seconds, and peak memory.

    python -m benchmarks.weights                      --layers=24 --hidden=2048 are the defaults

The model is generated: random bfloat16 numbers in the shapes of a Llama, in one file of safetensors.

  memory  the process's peak resident memory (VmHWM), compared with the bound: three times the largest tensor plus 1 GiB
  copy    the time of `cp` of the same file, on the same disk in the same minutes
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

GIB = 2**30
PEAK = ("import sys; from codellm_jax import cli; status = cli.main(sys.argv[1:]); "
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))); sys.exit(status)")


def llama(layers: int, hidden: int, rows: int) -> dict[str, Any]:
    """The config.json of a Llama of these sizes."""
    return {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": rows,
            "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "rms_norm_eps": 1e-5,
            "intermediate_size": hidden * 8 // 3 // 128 * 128, "max_position_embeddings": 2048}


def shapes_of(facts: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from codellm_jax.model.config import DecoderConfig
    from codellm_jax.weights.layouts import decoder_values, published_tensors

    return {tensor.name: tensor.shape for tensor in published_tensors(facts, DecoderConfig(**decoder_values(facts)))}


def write_model(folder: Path, facts: dict[str, Any]) -> int:
    """Writes a model of random bfloat16 numbers; returns the bytes of its largest tensor."""
    shapes = shapes_of(facts)
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at := at + 2 * math.prod(shape)]}
    text = json.dumps(header).encode()
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(facts))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for row in range(0, shape[0], 1024):
                part = generator.standard_normal((min(1024, shape[0] - row), *shape[1:]), np.float32)
                file.write((0.02 * part).astype(ml_dtypes.bfloat16).tobytes())
    return 2 * max(math.prod(shape) for shape in shapes.values())


def timed(command: list[str]) -> tuple[float, str]:
    began = time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.monotonic() - began, done.stdout


def measured(what: str, copy: float, size: int, bound: int, *arguments: str) -> str:
    """A line on a t5x command that processes `size` bytes; `copy` is the time of cp for the same amount."""
    seconds, text = timed([sys.executable, "-c", PEAK, what, *arguments])
    peak = 1024 * int(text.split("VmHWM:")[1].split()[0])
    return (f"{what} {seconds:6.1f} s  {size / seconds / 1e6:5.0f} MB/s  {seconds / copy:5.1f} times cp   "
            f"memory {peak / GIB:.2f} GiB, {peak / bound:.2f} of the bound")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=32_000, help="of the embedding")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest = write_model(folder / "model", llama(flags.layers, flags.hidden, flags.rows))
        file = folder / "model" / "model.safetensors"
        size = file.stat().st_size
        copy, _ = timed(["cp", str(file), str(folder / "copy")])
        (folder / "copy").unlink()
        bound = 3 * largest + GIB
        print(f"{size / 1e9:.3f} GB of bfloat16, the largest tensor {largest / 1e6:.0f} MB; cp takes {copy:.1f} s")
        print(measured("import", copy, size, bound, str(file.parent), f"--output={folder / 'run'}",
                       "--vocabulary=python_8k"))
        print(measured("export", copy, size, bound, str(folder / "run"), f"--output={folder / 'out'}"))


if __name__ == "__main__":
    main()
