"""Our train step on TPUs compared with that of upstream MaxText's GPT-3 decoder, both compiled here.

    PYTHONPATH=MAXTEXT/src python -m benchmarks.maxtext --records=maxtext.jsonl

MAXTEXT: its source. Needs Python 3.12, libtpu (pip install '.[tpu]'), and the packages that MaxText's compiler imports,
but no TPU and none of Google Cloud's packages.

MaxText's own command compiles its own train step: its decoder, loss, optimizer, layout, attention and options for the
compiler. Only the devices are ours, so that both have the same wrap-around links. The sizes are ours: float32 state,
bfloat16 products, full remat, one loop over the layers, everything split over all chips, vocabulary 40,000 padded to
40,064, rows of 1,024. MaxText has no query layer, so its last layer is one more block. Each program takes one to four
minutes; an interrupted run continues after its last record.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")  # MaxText then does without Google Cloud's packages

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks.memory import config_of, training_of  # noqa: E402
from codellm_jax.model.decoder import DecoderConfig, parameter_count  # noqa: E402
from codellm_jax.pods.collectives import Program, read_program  # noqa: E402
from codellm_jax.pods.programs import Memory, Outcome, compile_train_step  # noqa: E402
from codellm_jax.pods.roofline import estimate  # noqa: E402
from codellm_jax.pods.topologies import Topology, compile_only_devices, parse_topology  # noqa: E402
from codellm_jax.training.plan import GIB, Training  # noqa: E402

CASES = (("2_6b", "v5e-256", 512), ("1_3b", "v5e-256", 512), ("13b", "v5e-256", 512), ("2_6b", "v4-128", 256),
         ("1_3b", "v4-128", 512), ("13b", "v4-128", 256))
VOCABULARY = 40_000
# Attention's kernels: three, as ours and by MaxText's default, or one, as in its files for GPT-3.
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "MaxText": {"fused_qkv": False}, "MaxText, fused": {"fused_qkv": True}, "ours": None}


def settings(config: DecoderConfig, topology: Topology, rows: int) -> dict[str, Any]:
    """MaxText's settings for the same sizes; those of the block are as in its own files for GPT-3.

    Args:
      config: the decoder.
      topology: for which to compile.
      rows: of a device.
    """
    block = {"decoder_block": "gpt3", "mlp_activations": ["gelu"], "logits_via_embedding": True,
             "normalize_embedding_logits": False, "enable_dropout": False}
    sizes = {"base_emb_dim": config.hidden, "base_num_query_heads": config.heads, "base_num_kv_heads": config.heads,
             "head_dim": config.size_of_head, "base_mlp_dim": config.feedforward,
             "base_num_decoder_layers": config.layers, "vocab_size": config.vocabulary_size,
             "max_target_length": config.length, "trainable_position_size": config.length}
    run = {"per_device_batch_size": rows, "ici_fsdp_parallelism": -1, "remat_policy": "full", "scan_layers": True,
           "dtype": "bfloat16", "weight_dtype": "float32", "opt_type": "adamw", "attention": "flash",
           "gradient_clipping_threshold": 1.0}
    here = {"compile_topology": topology.name, "compile_topology_num_slices": 1, "skip_jax_distributed_system": True,
            "dataset_type": "synthetic", "enable_checkpointing": False, "jax_cache_dir": "", "run_name": "benchmark",
            "base_output_directory": tempfile.gettempdir(), "log_config": False}
    return block | sizes | run | here


def compile_theirs(chosen: dict[str, Any], devices: list[Any]) -> tuple[Any, Any, int]:
    """The compiled train step of MaxText, its mesh, and the number of its parameters.

    Args:
      chosen: settings of MaxText.
      devices: of the topology.
    """
    from maxtext import configs
    from maxtext.trainers.pre_train import train_compile

    made: list[tuple[Any, Any, int]] = []

    def keeping(compile_step: Callable[..., Any]) -> Callable[..., Any]:
        def compile_and_keep(step: Any, inputs: Any, keywords: Any, mesh: Any, *rest: Any) -> Any:
            compiled = compile_step(step, inputs, keywords, mesh, *rest)
            state = [leaf for leaf in jax.tree.leaves(inputs[0]) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            made.append((compiled, mesh, sum(leaf.size for leaf in state) // 3))  # parameters and two moments
            return compiled
        return compile_and_keep

    before = dict(jax.config.values)
    found = [f"{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in chosen.items()]
    with mock.patch.object(train_compile, "get_topology_desc", lambda **_: SimpleNamespace(devices=devices)), \
            mock.patch.object(train_compile, "jit_and_compile", keeping(train_compile.jit_and_compile)), \
            mock.patch.dict(os.environ), contextlib.redirect_stdout(io.StringIO()):
        train_compile.main(["", str(Path(list(configs.__path__)[0], "base.yml")), *found])
    for name, value in before.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)
    return made[0]


def described(config: DecoderConfig, topology: Topology, rows: int, devices: Sequence[Any], memory: Memory,
              program: Program | Outcome) -> dict[str, Any]:
    """The record of a compiled program: GiB per device, and seconds; both trainers' are read by the same functions.

    Args:
      config: the decoder, with full remat.
      topology, devices: for which it is compiled.
      rows: of the batch.
      memory: in bytes.
      program: for its traffic and parts.
    """
    found = estimate(config, rows * config.length, topology, devices[0].device_kind, len(devices), program.parts,
                     program.has_kernels)
    sent, beside = (sum(getattr(one, name) for one in program.traffic) / GIB for name in ("sent", "asynchronous"))
    return {"peak": memory.peak / GIB, "arguments": memory.arguments / GIB, "temporaries": memory.temporaries / GIB,
            "sent": sent, "asynchronous": beside, **found._asdict(), "unknown_loops": program.unknown_loops,
            "traffic": [[one.kind, one.operations, one.sent / GIB, one.asynchronous / GIB] for one in program.traffic]}


def ours(training: Training, topology: Topology) -> dict[str, Any]:
    """The record of our train step."""
    outcome = compile_train_step(training, topology)
    if outcome.memory is None:
        return {"refusal": outcome.refusal}
    devices = list(outcome.mesh.devices.flat)
    return {"parameters": parameter_count(outcome.config)} | described(
        outcome.config, topology, outcome.rows, devices, outcome.memory, outcome)


def theirs(training: Training, topology: Topology, changes: dict[str, Any]) -> dict[str, Any]:
    """The record of MaxText's train step.

    Args:
      training: ours.
      topology: for which to compile.
      changes: to MaxText's settings.
    """
    devices, config = compile_only_devices(topology), config_of(training)
    chosen = settings(config, topology, training.batch_size // len(devices)) | changes
    try:
        compiled, mesh, parameters = compile_theirs(chosen, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"refusal": str(error)[:300]}
    sizes: Any = compiled.memory_analysis()
    memory = Memory(sizes.argument_size_in_bytes, sizes.temp_size_in_bytes,
                    sizes.output_size_in_bytes - sizes.alias_size_in_bytes, sizes.peak_memory_in_bytes)
    program = read_program(compiled.as_text() or "", dict(mesh.shape))
    return {"parameters": parameters} | described(config, topology, training.batch_size, devices, memory, program)


def table(records: list[dict[str, Any]]) -> str:
    """All programs as Markdown; ours is compared with the faster of MaxText's."""
    lines = ["| run | whose | peak (arguments + temporaries), GiB | sent (asynchronous), GiB | computing + attention + "
             "waiting + links beside computing, s | step, s | ours / MaxText: peak, sent, step |",
             "|---|---|---|---|---|---|---|"]
    for one in records:
        case, whose = [one["size"], one["topology"], one["batch"]], one["whose"]
        row = f"| {', '.join(map(str, case))} | {whose} |"
        if "step" not in one:
            lines.append(f"{row} does not fit | | | | |")
            continue
        others = [other for other in records if whose == "ours" != other["whose"] and "step" in other
                  and [other["size"], other["topology"], other["batch"]] == case]
        fastest = min(others, key=lambda other: other["step"], default=None)
        ratios = fastest and ", ".join(f"{one[name] / fastest[name]:.2f}" for name in ("peak", "sent", "step"))
        seconds = " + ".join(f"{one[name]:.3f}" for name in ("computing", "attention", "waiting", "uncovered"))
        lines.append(f"{row} {one['peak']:.2f} ({one['arguments']:.2f} + {one['temporaries']:.2f}) | {one['sent']:.2f} "
                     f"({one['asynchronous']:.2f}) | {seconds} | {one['step']:.3f} | {ratios or ''} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", default="maxtext.jsonl", help="a line for each program (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="changes a setting of MaxText; give other records with it")
    flags = parser.parse_args()
    path, changes = Path(flags.records), dict(one.split("=", 1) for one in flags.set)
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices cannot be read back
    for size, name, batch in CASES:
        training = dataclasses.replace(training_of(size, VOCABULARY, "full"), batch_size=batch, microbatches=1)
        topology = parse_topology(name)
        for whose, differing in CONTENDERS.items():
            case = {"size": size, "topology": name, "batch": batch, "whose": whose}
            if any(case.items() <= one.items() for one in records):
                continue
            began = time.monotonic()
            found = ours(training, topology) if differing is None else theirs(training, topology, differing | changes)
            records.append(case | found | {"seconds": round(time.monotonic() - began, 1)})
            with path.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
            print(json.dumps(records[-1]), flush=True)
    print(f"\n{table(records)}")


if __name__ == "__main__":
    main()
