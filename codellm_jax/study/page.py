"""The printed plan of a study before it runs, and its table of losses afterwards."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from codellm_jax.runtime.progress import duration, read_records
from codellm_jax.study.arms import Run, Study
from codellm_jax.study.planned import Planned, Standing, evaluation_seconds

NAMES_SHOWN = 12  # of a group of arms


def losses(chosen: Sequence[Planned]) -> str:
    """The last held-out losses of each run, as a text table, for a study without benchmarks. Runs with different
    vocabularies are comparable by bits per byte alone.
    """
    measures = [f"{name}/{pool}" for name in ("loss", "bits_per_byte") for pool in ("text", "code")]
    lines = [f"{'':<28} {'':>8} {'nats per token':>19} {'bits per byte':>19}",
             f"{'held-out loss':<28} {'step':>8} {'text':>9} {'code':>9} {'text':>9} {'code':>9}"]
    for one in chosen:
        found = [line for line in read_records(one.folder) if line["split"] == "eval"]
        if found:
            values = (found[-1].get(measure) for measure in measures)
            shown = " ".join(f"{'-' if value is None else format(value, '.4f'):>9}" for value in values)
            lines.append(f"{one.run.name:<28} {found[-1]['step']:>8,} {shown}")
    return "\n".join(["", *lines, ""])


def page(
    asked: Study, chosen: Sequence[Planned], facts: Mapping[str, Any], stand: Mapping[str, Standing],
    measured: Mapping[str, Any],
) -> str:
    """The plan as a page of text: the tree of arms, each with its mix, tokens, FLOPs, time and epochs of each source,
    for its own stage and for all stages together; and the arms that are equal in compute and in text. The runs of an
    arm differ only in their seeds, and share one line.
    """
    runs: dict[str, list[Planned]] = {}  # by arm
    for one in chosen:
        runs.setdefault(one.run.arm.name, []).append(one)
    first = {name: of_arm[0].run for name, of_arm in runs.items()}
    drawn = _tree({name: run.arm.parent for name, run in first.items()})
    starts = {name: _start(run) for name, run in first.items()}
    stages = {name: run.arm.stage for name, run in first.items()}
    widths = [max(map(len, column)) for column in (
        ["arm", *drawn.values()], ["stage", *stages.values()], ["from", *starts.values()])]

    def left(*texts: str) -> str:
        return " ".join(f"{text:<{width}}" for text, width in zip(texts, widths, strict=True))

    lines = [f"{left('arm', 'stage', 'from')} {'mix':<12} {'steps':>8} {'tokens':>15} {'FLOPs':>9} {'time':>8}  "
             f"{'state':<10} {'all tokens':>15} {'FLOPs':>9}  epochs of each source, in all stages"]
    total, flops, tokens = 0.0, 0.0, 0
    for name, indented in drawn.items():
        run, fact = first[name], facts[first[name].name]
        if "error" in fact:
            lines.append(f"{left(indented, stages[name], starts[name])} {fact['error']}")
            continue
        timed = measured.get(fact["program"], {})
        seconds = timed["seconds"] * fact["steps"] * fact["rows"] / timed["rows"] if "seconds" in timed else None
        to_do = sum(not stand[one.run.name].trained for one in runs[name])
        total += (seconds or 0.0) * to_do
        flops, tokens = flops + len(runs[name]) * fact["flops"], tokens + len(runs[name]) * fact["tokens"]
        own = {(source, content): count for source, content, count in fact["epochs"]}
        epochs = ", ".join(f"{source} {count:.2f}" + (
            f" ({here:.2f} here)" if (here := own.get((source, content), count)) != count else "")
            for source, content, count in fact["line"]["epochs"] if count)
        states = collections.Counter(stand[one.run.name].state for one in runs[name])
        state = ", ".join(f"{count} {word}" if len(states) > 1 else word for word, count in states.items())
        lines.append(
            f"{left(indented, stages[name], starts[name])} {run.mix:<12} {fact['steps']:>8,} {fact['tokens']:>15,} "
            f"{fact['flops']:>9.2e} {'-' if seconds is None else duration(seconds):>8}  {state:<10} "
            f"{fact['line']['tokens']:>15,} {fact['line']['flops']:>9.2e}  {epochs}")
    outside = list(dict.fromkeys(source for run in first.values() if (source := run.arm.source)))
    sound = {name: facts[run.name] for name, run in first.items() if "error" not in facts[run.name]}
    seeds = list(dict.fromkeys(one.run.seed for one in chosen))
    lines += ["", *comparable(sound), "",
              *([f"not counted    the earlier training data of {', '.join(outside)}"] if outside else []),
              f"study        {asked.directory}, {asked.comparison}, {len(chosen)} runs: {tokens:,} tokens with "
              f"padding, {flops:.3g} FLOPs" + (f"; each arm under the seeds {', '.join(map(str, seeds))}"
                                               if len(seeds) > 1 else "")]
    for timed in measured.values():
        lines.append(f"measured     {timed['run']}: " + (
            f"{timed['steps']} steps after the first, {timed['seconds']:.3f} s each of {timed['rows']} rows on "
            f"{timed['device']}; other runs of its stage and model by their rows" if "seconds" in timed else
            f"not, for {timed['not_measured']}"))
    evaluations = [seconds for one in chosen if (seconds := evaluation_seconds(one)) is not None]
    open_ones = sum(not stand[one.run.name].evaluated for one in chosen)
    mean = sum(evaluations) / len(evaluations) if evaluations else 0.0
    lines.append(
        f"time         about {duration(total + open_ones * mean)} for the remaining work, plus some seconds for each "
        "start and held-out losses; " + (
            f"of {open_ones} evaluations {duration(mean)} each, as measured on the finished ones" if evaluations else
            f"{open_ones} evaluations of {len(chosen[0].tasks)} tasks are not included, since none is done yet"))
    return "\n".join(lines)


def _tree(parents: Mapping[str, str | None]) -> dict[str, str]:
    """The arms by name, each after the arm from which it starts, mapped to their labels, which are indented under it.
    """
    below: dict[str | None, list[str]] = {}
    for name, parent in parents.items():
        below.setdefault(parent, []).append(name)
    drawn: dict[str, str] = {}
    waiting = [(name, 0) for name in reversed(below.get(None, []))]
    while waiting:
        name, depth = waiting.pop()
        drawn[name] = "  " * depth + name
        waiting += [(child, depth + 1) for child in reversed(below.get(name, []))]
    return drawn


def _start(run: Run) -> str:
    """The start of an arm's runs: an arm, with the step of the branch if any, or a source outside of the study."""
    if run.branch_step is not None:
        return f"{run.arm.parent}@{run.branch_step}"
    return run.arm.parent or run.arm.source or "-"


def comparable(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines that report which arms are equal in compute, and which in text, over all their stages.

    Two arms are equal if they differ by at most one step: in FLOPs, padding included; in tokens of text documents; and
    in text examples for tuning.

    Args:
      facts: by arm, as returned by `survey`.
    """
    compute = {name: (fact["line"]["flops"],) for name, fact in facts.items()}
    step_of_compute = {name: (fact["flops"] / fact["steps"],) for name, fact in facts.items()}
    text = {name: (fact["line"]["text_tokens"], fact["line"]["text_examples"]) for name, fact in facts.items()}
    step_of_text = {name: (fact["batch_size"] * fact["length"], fact["batch_size"]) for name, fact in facts.items()}
    return _groups("equal compute", compute, step_of_compute, lambda values: f"{values[0]:.3g} FLOPs") + _groups(
        "equal text", text, step_of_text, lambda values: f"{values[0]:,.0f} tokens" + (
        f", {values[1]:,.0f} examples" if values[1] else ""))


def _groups(
    title: str, values: Mapping[str, Sequence[float]], a_step: Mapping[str, Sequence[float]],
    shown: Callable[[Sequence[float]], str],
) -> list[str]:
    """A line for each group of names whose values are within one step of the group's first value."""
    groups: dict[str, list[str]] = {}
    for name, own in values.items():
        near = next((first for first in groups if all(
            abs(one - other) <= max(steps) * (1 + 1e-9) for one, other, *steps in zip(
                own, values[first], a_step[name], a_step[first], strict=True))), name)
        groups.setdefault(near, []).append(name)
    told = [f"{shown(values[first])}: {_listed(names)}" for first, names in groups.items() if len(names) > 1]
    if alone := [first for first, names in groups.items() if len(names) == 1]:
        told.append(f"like no other: {_listed(alone)}")
    return [f"{title if number == 0 else '':<14} {line}" for number, line in enumerate(told)]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
