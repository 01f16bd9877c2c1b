"""Sweeps of a share as a report presents them: losses and scores against the share, in words, a figure and a table."""

from collections.abc import Mapping, Sequence

from codellm_jax.report import plots
from codellm_jax.report.asked import Group, Measure, Sweep, models_of
from codellm_jax.report.effects import Effect, told
from codellm_jax.report.effects_page import notes_of, titles
from codellm_jax.report.pages import Block, Heading, Items, Notice, Table
from codellm_jax.report.sections import Rows, Section
from codellm_jax.report.verdicts import HARMS, HELPS, Judged, bounds, judge, scaled, shown_p
from codellm_jax.results.answers import METRICS, estimate
from codellm_jax.results.statistics import Interval

COLUMNS = ("after", "stage", "share", "arm", "measure", "task", "metric", "unit", "better", "seeds", "value", "low",
           "high", "against", "difference", "difference_low", "difference_high", "p", "p_holm", "verdict", "why")


def sweeps(compared: Sequence[Group]) -> tuple[Section, list[str]]:
    """Losses and scores against each share that was swept, and their summary in words."""
    found = [(group, sweep) for group in compared for sweep in group.sweeps]
    judged = judge([(group, differences(sweep)) for group, sweep in found])
    total = sum(one.corrected is not None for of_sweep in judged for one in of_sweep)
    blocks: list[Block] = []
    rows: Rows = []
    words: list[str] = []
    numbers: dict[str, int] = {}
    for (group, sweep), of_sweep in zip(found, judged, strict=True):
        after = group.stages[-1]
        number = numbers[sweep.stage] = numbers.get(sweep.stage, 0) + 1
        name = f"sweep_{sweep.stage.replace(' ', '_')}" + f"_{number}" * (number > 1)
        title = f"How much code in {sweep.stage}" + _held(group, sweep) + f", after {after}" * (after != sweep.stage) \
            + models_of(group, compared)
        by_place = {(one.measure, label): one for one in of_sweep for label in one.effect.weights
                    if label != sweep.arms[0][1]}
        lines, panels = [], []
        for measure in group.measures:
            if any(measure.samples.get(label) for _, label in sweep.arms):
                line, panel, numbered = _measure(group, sweep, measure, by_place)
                lines.append(line)
                rows += numbered
                panels += [panel] if measure.first else []
        if not lines:
            continue
        said = sentences(of_sweep, sweep)
        words += [f"{title}: {sentence}" for sentence in said]
        arms = ", ".join(f"{label} at {share:g}" for share, label in sweep.arms)
        blocks += [Heading(2, title), *map(Notice, said), plots.sweep(
            name, f"Against the share of code in {sweep.stage}, with 95% intervals: {arms}.", panels), Table(
            "Each measure at each share: the mean over seeds with its 95% interval; beneath it the difference from the "
            f"share {sweep.arms[0][0]:g}, paired where seeds start from the same run, and its p-value, corrected by "
            f"Holm's method for all {total} such differences.",
            ("Measure", *(f"{share:g}\n{label}" for share, label in sweep.arms)), lines)]
        if notes := notes_of(group):
            blocks.append(Items(notes))
    return Section(blocks, [("sweeps", COLUMNS, rows)] if rows else []), words


def _held(group: Group, sweep: Sweep) -> str:
    """The common stages of all arms of a sweep, where other sweeps of the same stage differ from it."""
    def at(one: Sweep, k: int) -> str:
        level = next((group.levels[label][k] for _, label in one.arms if k not in group.absent[label]), None)
        if level is None or group.stages[k] == sweep.stage:
            return level.other if level else ""
        return f"{level.share:g} in {group.stages[k]}" + f" {level.other}" * bool(level.other)

    alike = [one for one in group.sweeps if one.stage == sweep.stage]
    parts = [at(sweep, k) for k in range(len(group.stages)) if len({at(one, k) for one in alike}) > 1]
    return f" ({', '.join(filter(None, parts))})" if any(parts) else ""


def differences(sweep: Sweep) -> list[Effect]:
    """Each share against the lowest."""
    (least, lowest), *others = sweep.arms
    return [Effect("share", f"a share of {share:g} against {least:g}", {label: 1.0, lowest: -1.0})
            for share, label in others]


def sentences(found: Sequence[Judged], sweep: Sweep) -> list[str]:
    """The differences of a sweep, summarised in words."""
    said: list[str] = []
    quiet: list[Measure] = []
    untold: list[Measure] = []
    for measure in dict.fromkeys(one.measure for one in found if one.measure.first):
        own = [one for one in found if one.measure == measure]
        sure = [one for one in own if one.verdict in (HELPS, HARMS)]
        if sure:
            parts = [f"{verdict} at {', '.join(_share(one) for one in of_verdict)}" for verdict in (HELPS, HARMS)
                     if (of_verdict := [one for one in sure if one.verdict == verdict])]
            most = max(sure, key=lambda one: abs(one.estimate))
            said.append(f"{measure.title}: code {' and '.join(parts)}, most at {_share(most)} ({most.estimate:+.3g} "
                        f"{measure.unit}, {bounds(most.interval)})")
        else:
            (untold if all(one.why for one in own) else quiet).append(measure)
    lines = [f"Against {sweep.arms[0][0]:g} of code: {'; '.join(said)}."] if said else []
    if quiet:
        lines.append(f"No share shows a difference from {sweep.arms[0][0]:g} on "
                     f"{titles([measure.title for measure in quiet])}.")
    if untold:
        reasons = "; ".join(dict.fromkeys(reason for one in found if one.measure in untold
                                          for reason in one.why.split("; ")))
        what = titles([measure.title for measure in untold])
        lines.append(f"What the share does to {what} cannot be told: {reasons}.")
    return lines


def _share(one: Judged) -> str:
    return one.effect.name.split()[3]


def _measure(group: Group, sweep: Sweep, measure: Measure, by_place: Mapping[tuple[Measure, str], Judged]) -> tuple[
        list[str], plots.SweepPanel, Rows]:
    """The row of the table, the panel of the figure, and the lines of the file for one measure."""
    cells: list[str] = []
    points: list[tuple[float, float, Interval | None]] = []
    rows: Rows = []
    for share, label in sweep.arms:
        found = _level(group, measure, label)
        if found is None:
            cells.append("-")
            continue
        value, interval, seeds = found
        points.append((share, value, interval))
        one = by_place.get((measure, label))
        within = f" [{interval.low:.4g}, {interval.high:.4g}]" if interval else ""
        difference = f"\n{one.estimate:+.3g} [{bounds(one.interval)}]" if one else ""
        if one and one.corrected is not None:
            difference += f", p {shown_p(one.corrected)}" + f", {one.verdict}" * bool(one.why)
        cells.append(f"{value:.4g}{within}{difference}")
        rows.append([group.stages[-1], sweep.stage, share, label, measure.title, measure.task, measure.metric,
                     measure.unit, measure.better, seeds, value, *(interval or (None, None)), sweep.arms[0][0],
                     *((one.estimate, *(one.interval or (None, None)), one.told.contrast and one.told.contrast.p_value,
                        one.corrected, one.verdict, one.why) if one else [None] * 7)])
    levels = group.study.levels(measure.task, clean=True) if measure.task and measure.metric == "accuracy" else None
    panel = plots.SweepPanel(measure.title, measure.unit, points, *(100 * level for level in levels or ()))
    return [f"{measure.title}\n{measure.unit}, {measure.better} is better", *cells], panel, rows


def _level(group: Group, measure: Measure, label: str) -> tuple[float, Interval | None, int] | None:
    """The mean of an arm over its seeds, its interval, and the number of seeds; for a benchmark, as in the table of
    scores.
    """
    samples = measure.samples.get(label)
    if not samples:
        return None
    if measure.task is None:
        value = told({label: 1.0}, measure.samples, group.roots)
        return value and (measure.scale * value.estimate, scaled(value, measure), value.seeds)
    found = group.study.estimate(label, measure.task, measure.metric, clean=True) if measure.metric in METRICS else \
        estimate([sample.values for sample in samples.values()], measure.metric)
    return found and (measure.scale * found.value, found.interval and Interval(
        *(measure.scale * bound for bound in found.interval)), found.seeds)
