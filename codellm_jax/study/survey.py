"""What the runs of a study will be and cost, found before any of them begins, by a process of its own: devices are
free again when it ends.

    python -m codellm_jax.study.survey REQUEST.json ANSWER.json

What of the benchmarks stands in what they are trained on is found in the same way (`contamination.py`).
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
    """Makes the plan of each run, which caches rows that are not cached yet; trains nothing that is kept.

    Args:
      requests: for each run its "name", "files", "overrides" ([[name, value], ...]), "parent", the settings of the
        run that it starts from, or None; "after", the name of that run where it is one of these, or None; and "step",
        where it branches from that, or None.
      search_paths: where gin files are looked for besides.
      measure: whether to time some steps: of each stage and model, those of the run with the most rows.
      report: is told lines of progress.

    Returns:
      "runs": for each name its facts, or {"error": a line}. "measured": what was timed, the seconds of a step of each.
    """
    runs: dict[str, dict[str, Any]] = {}
    programs: dict[str, tuple[str, Training, Plan]] = {}  # of each stage and model, the one with the most rows
    planned: dict[str, tuple[Training, Plan, Line | None]] = {}  # of each run, and what is behind it when it begins
    places: dict[tuple[str, int], dict[str, Any]] = {}  # of runs, where others branch from them
    states: dict[str, TrainState] = {}  # the abstract ones, each traced once
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
    """What the shapes of a run's state follow from: the settings of its model, vocabulary, mesh and optimizer."""
    free = ("train.", "mixture.", "tasks.", "benchmarks.", "evaluation.", *(f"{name}." for name in LEARNING_RATES))
    names = [name for name in configuration.effective if name in ("train.optimizer", "train.model", "mixture.lengths")
             or "." in name and not name.startswith(free)]
    values = [str(configuration.resolved(name)) for name in names]
    macros = {macro: configuration.resolved(macro) for value in values for macro in references("%", value)}
    return str([*zip(names, values, strict=True), *macros.items()])


def measure_contamination(
    requests: Sequence[Mapping[str, Any]], search_paths: Sequence[str], asked: Sequence[tuple[str, str]], path: str,
) -> None:
    """Searches everything that the runs train on for the questions of the benchmarks, into a file.

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
        if request["after"] is None and start not in mixtures:  # else it starts from one of these
            mixtures[start] = mixtures_behind(configuration)
    settings = read_configuration(["gin/contamination.gin"], asked)
    measure_into(path, build(settings, "contamination"), [pair for found in mixtures.values() for pair in found])


class Line(NamedTuple):
    """What a run has taken at its end, with all that it stands on: a trunk's part is that up to the branch."""

    tokens: int  # with padding
    flops: float
    text_tokens: int  # of documents
    text_examples: int  # of instructions
    epochs: list[tuple[str, str, float]]  # of each source, by its name and the hash of its content


def line_of(training: Training, plan: Plan, before: Line | None, step: int | None = None) -> Line:
    """What a run, after what is `before` it, has taken up to a step; None for its last."""
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
    """Of one run: steps, tokens, FLOPs and epochs by itself, and its "line", after what is `before` it; as JSON."""
    config, own = plan.model.config, line_of(training, plan, None)
    return {
        "stage": plan.mixture.stage, "steps": plan.last_step - plan.first_step, "rows": plan.rows,
        "length": training.mixture.length, "batch_size": training.batch_size, "tokens": own.tokens, "flops": own.flops,
        "epochs": own.epochs, "line": line_of(training, plan, before)._asdict(), "parameters": parameter_count(config),
        "order": plan.mixture.order.fingerprint(), "warnings": list(plan.mixture.warnings),
        # Steps of one stage, model and length differ in nothing but rows, to which their cost is proportional.
        "program": f"{plan.mixture.stage}, {config}",
    }


def measured_step(training: Training, plan: Plan) -> dict[str, Any]:
    """"seconds" of a step, the median of some after the one that compiles; or why there are none, "not_measured"."""
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
    """Bytes of a device that may still be taken; on a CPU those of the machine."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def main(request: str, answer: str) -> None:
    """Reads {"runs", "search_paths", "measure"} from one file and writes what `survey` returns into another; or
    {"runs", "search_paths", "asked"}, and writes the contamination.
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
