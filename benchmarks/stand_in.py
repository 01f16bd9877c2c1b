"""Memory of our train step on TPUs compared with that of a plain decoder, both compiled here.

    python -m benchmarks.stand_in --records=stand_in.jsonl       needs libtpu (pip install '.[tpu]') but no TPU

The stand-in has the same sizes and uses only JAX: AdamW, float32 parameters and moments, bfloat16 products, every
weight and row split over all chips, one loop over the layers with full remat, softmax attention, all logits at once.
Same batch, vocabulary 40,000, rows of 1,024. Each program takes a minute or two.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402

from benchmarks.memory import config_of, training_of  # noqa: E402
from codellm_jax.model.decoder import DecoderConfig, parameter_count  # noqa: E402
from codellm_jax.pods.programs import compile_train_step  # noqa: E402
from codellm_jax.pods.topologies import compile_only_devices, parse_topology  # noqa: E402
from codellm_jax.training.plan import GIB  # noqa: E402

CASES = (("2_6b", "v4-8", 16), ("2_6b", "v4-128", 256), ("13b", "v4-128", 256), ("13b", "v5e-256", 256))
VOCABULARY = 40_000


def shapes_of(config: DecoderConfig) -> dict[str, tuple[tuple[int, ...], int]]:
    """Maps names to shapes and the index of the split axis."""
    layers, width, inner = config.layers, config.hidden, config.feedforward
    return {
        "tokens": ((config.vocabulary_size, width), 1), "positions": ((config.length, width), 1),
        "qkv": ((layers, width, 3 * width), 1), "qkv_bias": ((layers, 3 * width), 1),
        "out": ((layers, width, width), 2), "out_bias": ((layers, width), 1),
        "up": ((layers, width, inner), 1), "up_bias": ((layers, inner), 1),
        "down": ((layers, inner, width), 2), "down_bias": ((layers, width), 1),
        "norm1": ((layers, 2, width), 2), "norm2": ((layers, 2, width), 2), "norm": ((2, width), 1)}


def layer_norm(x: jax.Array, parameters: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x * parameters[0] + parameters[1]).astype(jnp.bfloat16)


def loss_fn(params: Any, inputs: jax.Array, targets: jax.Array, config: DecoderConfig, rows: NamedSharding) -> Any:
    heads, half = config.heads, jnp.bfloat16
    batch, length = inputs.shape
    causal = jnp.tril(jnp.ones((length, length), bool))
    x = (params["tokens"][inputs] + params["positions"][None]).astype(half)

    @jax.checkpoint
    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        x = jax.lax.with_sharding_constraint(x, rows)
        products = layer_norm(x, layer["norm1"]) @ layer["qkv"].astype(half) + layer["qkv_bias"].astype(half)
        query, key, value = jnp.split(products.reshape(batch, length, 3 * heads, -1), 3, axis=2)
        scores = jnp.einsum("blhk,bmhk->bhlm", query, key, preferred_element_type=jnp.float32)
        scores = jnp.where(causal, scores * query.shape[-1] ** -0.5, -1e30)
        attended = jnp.einsum("bhlm,bmhk->blhk", jax.nn.softmax(scores).astype(half), value)
        x = x + attended.reshape(x.shape) @ layer["out"].astype(half) + layer["out_bias"].astype(half)
        inner = jax.nn.gelu(layer_norm(x, layer["norm2"]) @ layer["up"].astype(half) + layer["up_bias"].astype(half))
        return x + inner @ layer["down"].astype(half) + layer["down_bias"].astype(half), None

    stacked = {name: params[name] for name in params if name not in ("tokens", "positions", "norm")}
    x, _ = jax.lax.scan(block, x, stacked)
    logits = (layer_norm(x, params["norm"]) @ params["tokens"].T.astype(half)).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def memory_of_stand_in(config: DecoderConfig, batch: int, devices: list[Any]) -> tuple[float, float, float]:
    """GiB per device: arguments, temporaries, peak."""
    mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, b2=0.95, weight_decay=0.1))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))

    def split(shape: tuple[int, ...], axis: int) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(*(None,) * axis, "fsdp")
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    params = {name: split(*shape) for name, shape in shapes_of(config).items()}
    whole = NamedSharding(mesh, PartitionSpec())
    state = optax.tree.map_params(
        optimizer, lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
        jax.eval_shape(optimizer.init, params), params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole))
    tokens = jax.ShapeDtypeStruct((batch, config.length), jnp.int32, sharding=rows)

    def step(params: Any, state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_fn)(params, inputs, targets, config, rows)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, None)).lower(
        params, state, tokens, tokens).compile()
    found: Any = compiled.memory_analysis()
    return tuple(size / GIB for size in (  # type: ignore[return-value]
        found.argument_size_in_bytes, found.temp_size_in_bytes, found.peak_memory_in_bytes))


def least(config: DecoderConfig, batch: int, devices: int) -> float:
    """A lower bound in GiB per device for programs that keep float32 parameters, moments and gradients, the bfloat16
    input of each scanned block, and one block's gathered weights (bfloat16) and gradients (float32).
    """
    block = 4 * config.hidden**2 + 2 * config.hidden * config.feedforward
    inputs = 2 * config.scanned_layers * batch * config.length * config.hidden
    return (16 * parameter_count(config) / devices + inputs / devices + 6 * block) / GIB


def measure(size: str, name: str, batch: int) -> dict[str, Any]:
    training = dataclasses.replace(training_of(size, VOCABULARY, "full"), batch_size=batch, microbatches=1)
    topology = parse_topology(name)
    memory = compile_train_step(training, topology).memory
    assert memory is not None
    devices = compile_only_devices(topology)
    plain = memory_of_stand_in(config_of(training), batch, devices)
    return {"size": size, "topology": name, "batch": batch, "stand_in": plain,
            "least": least(config_of(training), batch, len(devices)),
            "ours": [found / GIB for found in (memory.arguments, memory.temporaries, memory.peak)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", default="stand_in.jsonl", help="a line for each case (default: %(default)s)")
    path = Path(parser.parse_args().records)
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices cannot be read back
    for size, name, batch in CASES:
        if [size, name, batch] not in [[one["size"], one["topology"], one["batch"]] for one in records]:
            records.append(measure(size, name, batch))
            with path.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
            print(json.dumps(records[-1]), flush=True)
    print("\n| peak (arguments + temporaries) | stand-in | ours | ours / stand-in, peaks | totals | any such program |")
    print("|---|---|---|---|---|---|")
    for one in records:
        plain, ours = one["stand_in"], one["ours"]
        told = [f"{peak:.2f} ({arguments:.2f} + {temporaries:.2f})" for arguments, temporaries, peak in (plain, ours)]
        print(f"| {one['size']}, {one['topology']}, batch {one['batch']} | {' | '.join(told)} | "
              f"{ours[2] / plain[2]:.2f} | {sum(ours[:2]) / sum(plain[:2]):.2f} | {one['least']:.2f} |")


if __name__ == "__main__":
    main()
