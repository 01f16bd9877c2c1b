"""A profile in numbers: the steps, the gaps between them, the host's part, and the operations that take the time.

    t5x train --gin_file=gin/mixed_pretrain.gin --profile_steps=10:15
    python -m benchmarks.profile runs/mixed_pretrain

For runs on a CPU; for TPU and GPU, XProf's own pages show this. A trace names operations as in the compiled program.
Their part of the model is read from that program, which is compiled again from the run's config.gin; this needs the
software of the run.
"""

import argparse
import collections
import os
import re
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

PARTS = (  # an operation belongs to the first part whose words its name all contains
    ("feed-forward: matmuls", ("feedforward", "dot_general")), ("feed-forward: the rest", ("feedforward",)),
    ("attention: scores and sums", ("attention", "BHL", "dot_general")),
    ("attention: projections", ("attention", "dot_general")), ("attention: softmax and the rest", ("attention",)),
    ("layer norms", ("norm",)), ("decoder: scan, embeddings", ("Decoder",)),
    ("loss: matmuls", ("jvp()", "dot_general")), ("loss: the rest", ("jvp()",)),
    ("optimizer, metrics", ("train_step",)))


def names_of_operations(run: Path) -> dict[str, str]:
    """Maps operations of the run's train step to their origin in the model."""
    from benchmarks.growth import lowered_train_step
    from codellm_jax.configuration import build, read_configuration

    text = lowered_train_step(build(read_configuration([str(run / "config.gin")], []), "train")).compile().as_text()
    found: dict[str, str] = {}
    for name, source in re.findall(r'%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', text):
        found.setdefault(name, source)
    return found


def part_of(source: str) -> str:
    return next((part for part, words in PARTS if all(word in source for word in words)), "copies and the like")


def operations(lines: list[Any]) -> tuple[collections.Counter[str], dict[int, tuple[float, float]]]:
    """Nanoseconds of each operation of the train step, without nested ones, and each run's (begin, end)."""
    taken: collections.Counter[str] = collections.Counter()
    runs: dict[int, tuple[float, float]] = {}
    for line in lines:
        inside: list[tuple[float, str]] = []
        events = [(event.start_ns, event.duration_ns, event.name, dict(event.stats)) for event in line.events]
        for begin, duration, name, stats in sorted(events, key=lambda event: (event[0], -event[1])):
            while inside and begin >= inside[-1][0]:
                inside.pop()
            if inside and inside[-1][1]:
                taken[inside[-1][1]] -= duration
            ours = stats.get("hlo_module") == "jit_train_step" and not name.startswith("end: ")
            if ours:
                taken[name] += duration
                first, last = runs.get(stats["run_id"], (begin, begin))
                runs[stats["run_id"]] = min(first, begin), max(last, begin + duration)
            inside.append((begin + duration, name if ours else ""))
    return taken, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory with a profile")
    run = parser.parse_args().run
    traces = sorted(run.glob("tensorboard/plugins/profile/*/process_0.xplane.pb"),
                    key=lambda path: path.stat().st_mtime)
    if not traces:
        sys.exit(f"{run} has no profile: train with --profile_steps=10:15.")
    import jax

    lines = [line for plane in jax.profiler.ProfileData.from_file(str(traces[-1])).planes for line in plane.lines]
    taken, runs = operations(lines)
    host: dict[str, list[float]] = collections.defaultdict(list)
    for line in lines:
        for event in line.events:
            host[event.name].append(event.duration_ns / 1e6)
    spans = sorted(runs.values())
    print(f"{traces[-1].parent.name}, milliseconds")
    print("a step on the device      " + " ".join(f"{(last - first) / 1e6:9.1f}" for first, last in spans))
    print("idle until the next       " + " ".join(
        f"{(following[0] - step[1]) / 1e6:9.1f}" for step, following in zip(spans, spans[1:], strict=False)))
    for name in ("Meter.next_batch", "PjitFunction(train_step)", "Meter._record", "batch_of_step"):
        if host[name]:
            print(f"{name:<26}{statistics.median(host[name]):9.2f}, {max(host[name]):.2f} at most")
    names = names_of_operations(run)
    parts: collections.Counter[str] = collections.Counter()
    for name, nanoseconds in taken.items():
        parts[part_of(names.get(name, ""))] += nanoseconds
    for part, nanoseconds in parts.most_common():
        print(f"{part:<34} {nanoseconds / parts.total():6.1%}")


if __name__ == "__main__":
    main()
