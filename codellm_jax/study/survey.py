"""The shape and cost of a study's runs, determined before any of them begins, by a subprocess that releases the devices
when it ends.

    python -m codellm_jax.study.survey REQUEST.json ANSWER.json

The overlap of benchmarks with the training data is found in the same way (`contamination.py`).
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from codellm_jax.configuration import LEARNING_RATES, build, read_configuration
from codellm_jax.evaluation.contamination import measure_into, mixtures_behind
from codellm_jax.model.decoder import flops_per_token, parameter_count
from codellm_jax.runtime.process import use_compilation_cache
from codellm_jax.runtime.state import TrainState, bytes_per_device, initial_state
from codellm_jax.settings import Configuration, references
from codellm_jax.training.begin import place, trunk_at
from codellm_jax.training.plan import Plan, Training, make_plan
from codellm_jax.training.train import batch_of_step, jit_train_step

MEASURED_STEPS = 3


def survey(
    requests: Sequence[Mapping[str, Any]], search_paths: Sequence[str], measure: bool,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Makes the plan of each run, and caches rows that are not cached yet; does not train, except to time steps.

    Args:
      requests: for each run its "name", "files", "overrides" ([[name, value], ...]); "parent", the settings of the run
        from which it starts, or None; "after", the name of that run if it is one of these, or None; and "step", the
        step at which it branches from that run, or None.
      search_paths: additional folders in which to look for gin files.
      measure: whether to time some steps: for each stage and model, those of the run with the most rows.
      report: called with lines of progress.

    Returns:
      "runs": for each name its facts, or {"error": a line}. "measured": the timed steps, in seconds per step.
    """
    runs: dict[str, dict[str, Any]] = {}
    programs: dict[str, tuple[str, Training, Plan]] = {}  # by stage and model, the one with the most rows
    planned: dict[str, tuple[Training, Plan, Line | None]] = {}  # by run, with its line before it begins
    places: dict[tuple[str, int], dict[str, Any]] = {}  # the states of runs where others branch from them
    states: dict[str, TrainState] = {}  # abstract states, each traced once
    for request in requests:
        name = request["name"]
        try:
            configuration = read_configuration(
                request["files"], [tuple(pair) for pair in request["overrides"]], search_paths, request["parent"])
            training = build(configuration, "train")
            after, step, trunk = request["after"], request["step"], None
            before = line_of(*planned[after], step) if after else None
            if step is not None:
                if (after, step) not in places:
                    places[after, step] = {"step": step} | place(*planned[after][:2], step)
                trunk = trunk_at(places[after, step], training)
            shapes = _of_state(configuration)
            plan = make_plan(training, report, trunk, states.get(shapes))
            states[shapes] = plan.state
            planned[name] = training, plan, before
        except KeyError:
            runs[name] = {"error": f"{request['after']}, from which it starts, cannot be planned"}
            continue
        except (ValueError, OSError) as error:
            runs[name] = {"error": " ".join(str(error).split())}
            continue
        runs[name] = facts(training, plan, before)
        program = runs[name]["program"]
        if program not in programs or plan.rows > programs[program][2].rows:
            programs[program] = (name, training, plan)
    measured = {program: {"run": name} | measured_step(training, plan)
                for program, (name, training, plan) in programs.items()} if measure else {}
    return {"runs": runs, "measured": measured}


def _of_state(configuration: Configuration) -> str:
    """The settings that determine the shapes of a run's state: those of its model, vocabulary, mesh and optimizer."""
    free = ("train.", "mixture.", "tasks.", "benchmarks.", "evaluation.", *(f"{name}." for name in LEARNING_RATES))
    names = [name for name in configuration.effective if name in ("train.optimizer", "train.model", "mixture.lengths")
             or "." in name and not name.startswith(free)]
    values = [str(configuration.resolved(name)) for name in names]
    macros = {macro: configuration.resolved(macro) for value in values for macro in references("%", value)}
    return str([*zip(names, values, strict=True), *macros.items()])


def measure_contamination(
    requests: Sequence[Mapping[str, Any]], search_paths: Sequence[str], asked: Sequence[tuple[str, str]], path: str,
) -> None:
    """Searches the training data of all runs for the questions of the benchmarks, and writes the result to a file.

    Args:
      requests, search_paths: as for `survey`.
      asked: settings of gin/contamination.gin.
      path: of the file, local or gs://.
    """
    mixtures: dict[str, list[Any]] = {}
    for request in requests:
        configuration = read_configuration(
            request["files"], [tuple(pair) for pair in request["overrides"]], search_paths, request["parent"])
        # Once for all arms of a stage: they differ in shares and steps, not in sources.
        key = [configuration.resolved(name) for name in (
            "mixture.name", "mixture.lengths", "mixture.stage", "tasks.corpora", "vocabulary.path")]
        if str(key) not in mixtures:
            mixtures[str(key)] = [(build(configuration, "mixture"), build(configuration, "vocabulary"))]
        start = str(configuration.resolved("train.initial_checkpoint_path"))
        if request["after"] is None and start not in mixtures:  # otherwise it starts from one of these
            mixtures[start] = mixtures_behind(configuration)
    settings = read_configuration(["gin/contamination.gin"], asked)
    measure_into(path, build(settings, "contamination"), [pair for found in mixtures.values() for pair in found])


class Line(NamedTuple):
    """The totals of a run at its end, including all runs before it; a trunk counts up to the branch."""

    tokens: int  # with padding
    flops: float
    text_tokens: int  # of documents
    text_examples: int  # of instructions
    epochs: list[tuple[str, str, float]]  # of each source: name, hash of the content, epochs


def line_of(training: Training, plan: Plan, before: Line | None, step: int | None = None) -> Line:
    """The totals of a run, continuing those `before` it, up to a step; None for its last step."""
    step = plan.last_step if step is None else step
    order, tuning = plan.mixture.order, plan.mixture.stage == "tuning"
    before = before or Line(0, 0.0, 0, 0, [])
    tokens = (step - plan.first_step) * plan.rows * training.mixture.length
    epochs, text = {(name, content): count for name, content, count in before.epochs}, 0
    for source, count in zip(order.sources, order.counts(step * training.batch_size).tolist(), strict=True):
        key = source.name, source.content_hash
        epochs[key] = epochs.get(key, 0.0) + count / source.rows
        text += count if source.pool == "text" else 0
    return Line(before.tokens + tokens, before.flops + flops_per_token(plan.model.config, causal=False) * tokens,
                before.text_tokens + (0 if tuning else text * training.mixture.length),
                before.text_examples + (text if tuning else 0),
                [(*key, count) for key, count in epochs.items()])


def facts(training: Training, plan: Plan, before: Line | None) -> dict[str, Any]:
    """The facts of one run: its own steps, tokens, FLOPs and epochs, and its "line", which continues `before`; as JSON.
    """
    config, own = plan.model.config, line_of(training, plan, None)
    return {
        "stage": plan.mixture.stage, "steps": plan.last_step - plan.first_step, "rows": plan.rows,
        "length": training.mixture.length, "batch_size": training.batch_size, "tokens": own.tokens, "flops": own.flops,
        "epochs": own.epochs, "line": line_of(training, plan, before)._asdict(), "parameters": parameter_count(config),
        "order": plan.mixture.order.fingerprint(), "warnings": list(plan.mixture.warnings),
        # Steps of one stage, model and length differ only in rows, and their cost is proportional to the rows.
        "program": f"{plan.mixture.stage}, {config}",
    }


def measured_step(training: Training, plan: Plan) -> dict[str, Any]:
    """"seconds" of a step, the median of some steps after the one that compiles; or "not_measured" with the reason."""
    need, free = 2 * bytes_per_device(plan.state), free_memory()
    if need > free:
        return {"not_measured": f"state and gradients need {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free here"}
    with jax.set_mesh(plan.mesh), nn.logical_axis_rules(training.mesh.all_rules()):
        state = initial_state(plan.model, plan.optimizer, plan.state, training.seed)
        step_fn = jit_train_step(
            plan.model, plan.optimizer, plan.state, len(plan.mixture.order.sources), training.microbatches)
        seconds = []
        for step in range(min(1 + MEASURED_STEPS, plan.last_step)):
            batch, _ = batch_of_step(training, plan, step)
            began = time.perf_counter()
            state, metrics = step_fn(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - began)
    timed = sorted(seconds[1:] or seconds)
    return {"seconds": timed[len(timed) // 2], "steps": len(timed), "rows": plan.rows,
            "device": jax.devices()[0].device_kind}


def free_memory() -> int:
    """The free bytes of a device; on a CPU, those of the machine."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def main(request: str, answer: str) -> None:
    """Reads {"runs", "search_paths", "measure"} from one file and writes the answer of `survey` to another; or reads
    {"runs", "search_paths", "asked"} and writes the contamination.
    """
    wanted = json.loads(Path(request).read_text())
    if "asked" in wanted:
        measure_contamination(
            wanted["runs"], wanted["search_paths"], [tuple(pair) for pair in wanted["asked"]], answer)
        return
    use_compilation_cache()
    found = survey(wanted["runs"], wanted["search_paths"], wanted["measure"], lambda line: print(line, flush=True))
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError) as user_error:
        sys.exit(f"error: {' '.join(str(user_error).split())}")
