"""What a person reads of a study's plan before it runs, and of its losses after."""

from collections.abc import Mapping, Sequence
from typing import Any

from codellm_jax.runtime.progress import duration, read_records
from codellm_jax.study.arms import Study
from codellm_jax.study.planned import Planned, Standing, evaluation_seconds


def losses(chosen: Sequence[Planned]) -> str:
    """The last held-out losses of each run, as a table of text: what there is to see where no benchmark is asked."""
    lines = [f"{'held-out loss, nats a token':<28} {'step':>8} {'text':>9} {'code':>9}"]
    for one in chosen:
        found = [line for line in read_records(one.folder) if line["split"] == "eval"]
        if found:
            values = (found[-1].get(f"loss/{pool}") for pool in ("text", "code"))
            shown = " ".join(f"{'-' if value is None else format(value, '.4f'):>9}" for value in values)
            lines.append(f"{one.run.name:<28} {found[-1]['step']:>8,} {shown}")
    return "\n".join(["", *lines, ""])


def page(
    asked: Study, chosen: Sequence[Planned], facts: Mapping[str, Any], stand: Mapping[str, Standing],
    measured: Mapping[str, Any],
) -> str:
    """The plan as a page of text: for each run its mix, tokens, FLOPs, time and epochs."""
    named, started = (max(map(len, texts)) for texts in (
        ["run", *(one.run.name for one in chosen)], ["from", *(one.run.start or "-" for one in chosen)]))
    lines = [f"{'run':<{named}} {'from':<{started}} {'mix':<12} {'steps':>8} {'tokens':>15} {'FLOPs':>9} {'time':>8}  "
             f"{'state':<10} epochs of each source"]
    total, flops, tokens = 0.0, 0.0, 0
    for one in chosen:
        run, fact = one.run, facts[one.run.name]
        if "error" in fact:
            lines.append(f"{run.name:<{named}} {fact['error']}")
            continue
        timed = measured.get(fact["program"], {})
        seconds = timed["seconds"] * fact["steps"] * fact["rows"] / timed["rows"] if "seconds" in timed else None
        to_do = not stand[run.name].trained
        total, flops, tokens = total + (seconds or 0.0) * to_do, flops + fact["flops"], tokens + fact["tokens"]
        epochs = ", ".join(f"{source['name']} {source['epochs']:.2f}" for source in fact["sources"])
        lines.append(
            f"{run.name:<{named}} {run.start or '-':<{started}} {run.mix:<12} {fact['steps']:>8,} "
            f"{fact['tokens']:>15,} "
            f"{fact['flops']:>9.2e} {'-' if seconds is None else duration(seconds):>8}  {stand[run.name].state:<10} "
            f"{epochs}")
    lines += ["", f"study        {asked.directory}, {asked.comparison}, {len(chosen)} runs: {tokens:,} tokens with "
              f"padding, {flops:.3g} FLOPs"]
    for timed in measured.values():
        lines.append(f"measured     {timed['run']}: " + (
            f"{timed['steps']} steps after the first, {timed['seconds']:.3f} s each of {timed['rows']} rows on "
            f"{timed['device']}; other runs of its stage and model by their rows" if "seconds" in timed else
            f"not, for {timed['not_measured']}"))
    evaluations = [seconds for one in chosen if (seconds := evaluation_seconds(one)) is not None]
    open_ones = sum(not stand[one.run.name].evaluated for one in chosen)
    mean = sum(evaluations) / len(evaluations) if evaluations else 0.0
    lines.append(
        f"time         about {duration(total + open_ones * mean)} for what is to do, besides some seconds for each "
        "start and held-out losses; " + (
            f"of {open_ones} evaluations {duration(mean)} each, as those that are done took" if evaluations else
            f"{open_ones} evaluations of {len(chosen[0].tasks)} tasks are not in it, as none is done yet"))
    return "\n".join(lines)
