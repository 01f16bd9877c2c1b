"""A train step compiled for an NVIDIA H200 that is not attached: its memory, and the bytes that its kernels move.

    pip install 'jax[cuda13]'
    python -m benchmarks.absent_gpu "1_3b,BATCH_SIZE=16,model.remat='dots'" "1_3b,BATCH_SIZE=16,model.remat='none'"

A program is a file of gin/models/ with changed settings, a vocabulary of 40,000, and `model.attention='cudnn'`, whose
calls need no card to be compiled. Counted are the operands and results of all kernels but matmuls and attention, each
once for each iteration of the loops around it; of an array that a kernel only slices or updates, the slice. At RATE,
nine tenths of the vendor's 4.8 TB/s, they give a time for these kernels: arithmetic, no measurement.
"""

import argparse
import collections
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

RATE = 4.3e12  # bytes/s, read and written
H200 = """
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 19 } runtime_version { major: 13 }
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 149000000000
}"""
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "custom-call", "while", "after-all"}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    operands: list[str]
    line: str
    is_root: bool


def size_of(shape: str) -> int:
    """Bytes of an array or a tuple."""
    return sum(ITEM_BYTES.get(kind, 4) * math.prod(int(side) for side in sides.split(",") if side)
               for kind, sides in _ARRAY.findall(shape))


def read(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a compiled program, and the name of the first to run."""
    computations: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            computations[name] = []
            entry = name if found[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            operands = re.findall(r"%([\w.\-]+)", found[5].split("), ")[0])
            computations[name].append(Instruction(found[2], found[3], found[4], operands, line, bool(found[1])))
    return computations, entry


def bytes_of_fusion(instructions: list[Instruction]) -> int:
    by_name = {one.name: one for one in instructions}
    users = collections.defaultdict(list)
    for one in instructions:
        for operand in one.operands:
            users[operand].append(one)

    def read_of(one: Instruction) -> int:
        """The bytes read of a parameter."""
        total = 0
        for user in users[one.name]:
            if user.operation in ("dynamic-slice", "slice"):
                total += size_of(user.shape)
            elif user.operation == "bitcast":
                total += read_of(user)
            elif user.operation != "dynamic-update-slice" or user.operands[0] != one.name:
                return size_of(one.shape)
        return min(total, size_of(one.shape))

    def written_of(one: Instruction) -> int:
        if one.operation == "tuple":
            return sum(written_of(by_name[operand]) for operand in one.operands)
        if one.operation == "bitcast":
            return written_of(by_name[one.operands[0]])
        return size_of(by_name[one.operands[1]].shape if one.operation == "dynamic-update-slice" else one.shape)

    return sum(read_of(one) for one in instructions if one.operation == "parameter") + sum(
        written_of(one) for one in instructions if one.is_root)


def kernels(computations: dict[str, list[Instruction]], name: str, times: int = 1) -> Iterator[tuple[int, str]]:
    """The bytes of each kernel, times its runs, and its line."""
    shapes = {one.name: one.shape for one in computations[name]}
    for one in computations[name]:
        if one.operation == "while":
            body = re.search(r"body=%?([\w.\-]+)", one.line)
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.line)
            if body is None or turns is None:
                raise ValueError(f"a loop of unknown length: {one.line[:300]}")
            yield from kernels(computations, body[1], times * int(turns[1]))
        elif one.operation == "fusion":
            called = re.search(r"calls=%?([\w.\-]+)", one.line)
            assert called is not None
            yield times * bytes_of_fusion(computations[called[1]]), one.line
        elif one.operation not in FREE:
            read_too = sum(size_of(shapes.get(operand, "")) for operand in one.operands)
            yield times * (size_of(one.shape) + read_too), one.line


def compiled_step(program: str, settings: list[str]) -> Any:
    """The compiled train step of a program."""
    import jax
    import numpy as np
    from flax import linen as nn
    from jax.experimental import topologies

    from benchmarks.accelerator import training_of
    from codellm_jax.mixture.batches import Batch
    from codellm_jax.model.decoder import Decoder
    from codellm_jax.runtime.partitioning import batch_sharding
    from codellm_jax.runtime.state import abstract_state
    from codellm_jax.training.train import jit_train_step

    training = training_of(f"{program},model.attention='cudnn'", settings)
    devices = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1").devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(1, 1, 1), ("data", "fsdp", "model"))
    model = Decoder(training.model(vocabulary_size=training.vocabulary.size, length=training.mixture.length))
    optimizer = training.optimizer(training.learning_rate)
    shape = training.batch_size, training.mixture.length
    batch = Batch(*(jax.ShapeDtypeStruct(shape, np.float32 if name == "weights" else np.int32,
                                         sharding=batch_sharding(mesh)) for name in Batch._fields))
    state = abstract_state(model, optimizer, mesh, training.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(training.mesh.all_rules()):
        step = jit_train_step(model, optimizer, state, 2, training.microbatches)
        return step.lower(state, batch).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="+")
    parser.add_argument("--settings", nargs="*", default=[], help="gin files, and settings, of all programs")
    parser.add_argument("--kernels", type=int, default=0, help="also the kernels that move the most bytes")
    flags = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}
    print("| program | GiB | GB moved | ms at 4.3 TB/s |\n|---|---|---|---|")
    for program in flags.programs:
        step = compiled_step(program, flags.settings)
        found = sorted(kernels(*read(step.as_text())), reverse=True)
        total = sum(size for size, _ in found)
        print(f"| {program} | {step.memory_analysis().peak_memory_in_bytes / 2**30:.1f} | {total / 1e9:.0f} | "
              f"{1e3 * total / RATE:.1f} |", flush=True)
        for size, line in found[:flags.kernels]:
            print(f"    {size / 1e9:6.1f} GB {line.strip()[:200]}", flush=True)


if __name__ == "__main__":
    main()
