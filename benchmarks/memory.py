"""The memory tables of docs/precompile.md: each shipped size compiled for each pod, in GiB per device.

    python -m benchmarks.memory --records=memory.jsonl
    python -m benchmarks.memory --policies --records=policies.jsonl     each remat policy, for one pod

Needs libtpu (pip install '.[tpu]') but no TPU. Programs are compiled one after the other, a minute or two each; an
interrupted run continues after the last record. A step that does not fit is split into more microbatches until it does;
a batch that the mesh does not divide is raised to the next size that it divides.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from codellm_jax.configuration import build, read_configuration  # noqa: E402
from codellm_jax.model.decoder import REMAT_POLICIES, DecoderConfig, flops_per_token  # noqa: E402
from codellm_jax.pods.programs import compile_train_step, with_slices, with_vocabulary_size  # noqa: E402
from codellm_jax.pods.roofline import recomputed_flops_per_token  # noqa: E402
from codellm_jax.pods.topologies import Topology, parse_topology  # noqa: E402
from codellm_jax.training.plan import GIB, Training  # noqa: E402

SIZES = ("2_6b", "13b", "1_3b", "350m")  # the most informative first
BY_SIZE = ("350m", "1_3b", "2_6b", "13b")
TOPOLOGIES = ("v4-8", "v4-128", "v5e-256", "v5p-128", "2xv5e-256")
VOCABULARIES = (40_000, 130_344)
POLICIES_ON = "v4-128"


def training_of(size: str, vocabulary: int, remat: str | None = None) -> Training:
    """The shipped run of a size; the learning rate and the mixture are irrelevant."""
    configuration = read_configuration(["gin/mixed_pretrain.gin", f"gin/models/{size}.gin"], [])
    training = with_vocabulary_size(build(configuration, "train"), vocabulary)
    if remat is None:
        return training
    return dataclasses.replace(training, model=functools.partial(training.model, remat=remat))


def config_of(training: Training) -> DecoderConfig:
    return training.model(vocabulary_size=training.vocabulary.size, length=training.mixture.length)


def measure(training: Training, topology: Topology) -> dict[str, Any]:
    """Compiles the train step with the fewest microbatches that fit."""
    training = with_slices(training, topology)
    devices = topology.chips * topology.chip.devices
    batch = math.lcm(training.batch_size, devices)
    for parts in (2**power for power in range((batch // devices).bit_length())):
        tried = dataclasses.replace(training, batch_size=batch, microbatches=parts)
        outcome = compile_train_step(tried, topology)
        found = {"batch": batch, "microbatches": parts, "seconds": round(outcome.seconds, 1),
                 "refusal": outcome.refusal}
        if outcome.memory is not None:
            return found | {"arguments": outcome.memory.arguments / GIB,
                            "temporaries": outcome.memory.temporaries / GIB, "total": outcome.memory.total / GIB,
                            "peak": outcome.memory.peak / GIB}
    return found


def cell(found: dict[str, Any], shipped_batch: int) -> str:
    """An entry of the table."""
    if "peak" not in found:
        return "does not fit"
    notes = [f"{found['microbatches']} microbatches"] if found["microbatches"] > 1 else []
    notes += [f"batch {found['batch']}"] if found["batch"] != shipped_batch else []
    return (f"{found['peak']:.2f} ({found['arguments']:.2f} + {found['temporaries']:.2f})"
            + (f", {', '.join(notes)}" if notes else ""))


def table(records: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    """All measurements as Markdown."""
    lines = [f"| size, vocabulary | batch | {' | '.join(TOPOLOGIES)} |", "|---|---|" + "---|" * len(TOPOLOGIES)]
    for size in BY_SIZE:
        for vocabulary in VOCABULARIES:
            batch = training_of(size, vocabulary).batch_size
            cells = [cell(records[key], batch) if (key := (size, vocabulary, name, None)) in records
                     else "not measured" for name in TOPOLOGIES]
            lines.append(f"| {size}, {vocabulary:,} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_policies(records: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    """Peaks, and recomputation as a fraction of the model FLOPs, with causal attention counted as half."""
    lines = ["| size | batch | " + " | ".join(REMAT_POLICIES) + " |", "|---|---|" + "---|" * len(REMAT_POLICIES)]
    for size in BY_SIZE:
        cells = []
        for remat in REMAT_POLICIES:
            training = training_of(size, VOCABULARIES[0], remat)
            config = config_of(training)
            again = recomputed_flops_per_token(config) / flops_per_token(config, causal=True)
            found = records.get((size, VOCABULARIES[0], POLICIES_ON, remat))
            cells.append("not measured" if found is None else f"{cell(found, training.batch_size)}; {again:.1%}")
        lines.append(f"| {size} | {training.batch_size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", default="memory.jsonl", help="a line for each program (default: %(default)s)")
    parser.add_argument("--policies", action="store_true", help="the table of remat policies instead")
    flags = parser.parse_args()
    path = Path(flags.records)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    records = {(line["size"], line["vocabulary"], line["topology"], line["remat"]): line for line in lines}
    programs = [(size, vocabulary, name, None) for vocabulary in VOCABULARIES for size in SIZES for name in TOPOLOGIES]
    if flags.policies:
        programs = [(size, VOCABULARIES[0], POLICIES_ON, remat) for size in SIZES for remat in REMAT_POLICIES]
    for program in programs:
        if program in records:
            continue
        size, vocabulary, name, remat = program
        found = measure(training_of(size, vocabulary, remat), parse_topology(name))
        records[program] = {"size": size, "vocabulary": vocabulary, "topology": name, "remat": remat} | found
        with path.open("a") as file:
            file.write(json.dumps(records[program]) + "\n")
        print(json.dumps(records[program]), flush=True)
    print(table_of_policies(records) if flags.policies else table(records))


if __name__ == "__main__":
    main()
