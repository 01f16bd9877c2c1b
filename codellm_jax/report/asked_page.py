"""What a report says first: effects of stages, and sweeps of a share, by the arms that are there."""

from collections.abc import Sequence
from typing import NamedTuple

from codellm_jax.report import plots
from codellm_jax.report.asked import SAME_LENGTH, Group, Measure, Sweep
from codellm_jax.report.effects import Effect, Told, told
from codellm_jax.report.pages import Block, Heading, Items, Notice, Table, Text
from codellm_jax.report.sections import Rows, Section
from codellm_jax.report.study import Study
from codellm_jax.results.statistics import Interval, holm

LEVEL = 0.05  # of a p-value, corrected
EFFECT_COLUMNS = ("after", "effect", "measure", "task", "metric", "unit", "better", "estimate", "low", "high", "p",
                  "p_holm", "seeds", "verdict", "why", "weights")
SWEEP_COLUMNS = ("after", "stage", "share", "arm", "measure", "task", "metric", "unit", "better", "seeds", "value",
                 "low", "high", "against", "difference", "difference_low", "difference_high", "p", "p_holm")
HELPS, HARMS, OPEN, UNTOLD = "helps", "harms", "no effect told", "cannot be told"
TOGETHER = {HELPS: "helps more together", HARMS: "helps less together"}


class Judged(NamedTuple):
    """An effect on a measure, in the measure's unit."""

    effect: Effect
    measure: Measure
    told: Told
    corrected: float | None  # by Holm's method
    verdict: str
    why: str  # it cannot be told; else empty

    @property
    def interval(self) -> Interval | None:
        return _scaled(self.told, self.measure)

    @property
    def estimate(self) -> float:
        return self.measure.scale * self.told.estimate


def effects(study: Study, compared: Sequence[Group]) -> tuple[Section, list[str]]:
    """The effects of stages in every group of arms that is a tree, and what they come to, in words."""
    trees = [group for group in compared if is_tree(group)]
    judged = judge(trees)
    total = sum(one.corrected is not None for found in judged for one in found)
    blocks: list[Block] = []
    rows: Rows = []
    words: list[str] = []
    for number, (group, found) in enumerate(zip(trees, judged, strict=True), 1):
        after = group.stages[-1]
        said = sentences(found)
        words += [f"After {after}: {sentence}" for sentence in said]
        blocks += [Heading(2, "At which stage code helps" + f", after {after}" * (number > 1)),
                   Text(f"Arms after {after}: {', '.join(group.shares)}."), *map(Notice, said)]
        first, others = ([one for one in found if one.measure.first is kind] for kind in (True, False))
        if found:
            blocks += [_figure(first, number, after), _table(first, total)]
        if group.design.holes:
            blocks += [Text("These arms cannot tell:"), Items(group.design.holes)]
        if notes := _notes(group):
            blocks.append(Items(notes))
        if others:
            blocks += [Heading(3, f"Effects on other measures, after {after}"), _table(others, total)]
        rows += [[after, one.effect.name, one.measure.title, one.measure.task, one.measure.metric, one.measure.unit,
                  one.measure.better, one.estimate, *(one.interval or (None, None)),
                  one.told.contrast and one.told.contrast.p_value, one.corrected, one.told.seeds, one.verdict, one.why,
                  " ".join(f"{weight:+.6g}*{label}" for label, weight in one.effect.weights.items())] for one in found]
    return Section(blocks, [("effects", EFFECT_COLUMNS, rows)] if rows else []), words


def is_tree(group: Group) -> bool:
    """Whether stages have effects here that no sweep shows: several stages differ, or the one has few shares."""
    varying = [k for k in range(len(group.stages)) if len({levels[k].share for levels in group.levels.values()}) > 1]
    return len(varying) > 1 or len(varying) == 1 and not group.sweeps


def judge(trees: Sequence[Group]) -> list[list[Judged]]:
    """Every effect on every measure, of each group; corrected for all of them together."""
    found = [[(effect, measure, one) for measure in group.measures
              for effect in group.design_of(frozenset(label for label, of_arm in measure.samples.items() if of_arm)).effects
              if (one := told(effect.weights, measure.samples, group.roots)) is not None] for group in trees]
    p_values = [one.contrast.p_value for of_group in found for _, _, one in of_group if one.contrast]
    corrected = iter(holm(p_values) if p_values else [])
    return [[_judged(group, effect, measure, one, next(corrected) if one.contrast else None)
             for effect, measure, one in of_group] for group, of_group in zip(trees, found, strict=True)]


def _judged(group: Group, effect: Effect, measure: Measure, one: Told, corrected: float | None) -> Judged:
    reasons = why_untold(group, list(effect.weights), measure, one)
    if reasons:
        return Judged(effect, measure, one, corrected, UNTOLD, "; ".join(reasons))
    assert corrected is not None
    better = (one.estimate > 0) == (measure.better == "higher")
    verdict = OPEN if corrected >= LEVEL else HELPS if better else HARMS
    return Judged(effect, measure, one, corrected,
                  TOGETHER.get(verdict, verdict) if effect.kind == "together" else verdict, "")


def why_untold(group: Group, labels: Sequence[str], measure: Measure, one: Told) -> list[str]:
    """Why nothing is concluded, whatever the numbers are: the rules of the paper's conclusions."""
    reasons = []
    if one.seeds < 2:
        reasons.append("a single seed")
    elif one.contrast is None:
        reasons.append("nothing tells its error")
    if measure.task is not None:
        reasons += group.study.blockers(labels, [measure.task])
        if measure.metric == "accuracy" and _at_baseline(group, labels, measure):
            reasons.append("no arm is above what answering without reading would reach")
    return reasons


def _at_baseline(group: Group, labels: Sequence[str], measure: Measure) -> bool:
    assert measure.task is not None
    levels = group.study.levels(measure.task, clean=True)
    alone = [told({label: 1.0}, measure.samples, group.roots) for label in labels]
    return levels is not None and all(
        one is None or one.contrast is None or one.contrast.interval.low <= max(levels) for one in alone)


def sentences(found: Sequence[Judged]) -> list[str]:
    """What the effects of a group come to, in words."""
    if not found:
        return ["Nothing was measured of arms that differ in code."]
    said, untold = [], []
    for name in dict.fromkeys(one.effect.name for one in found):
        own = [one for one in found if one.effect.name == name]
        sure = [f"{verdict} {'; '.join(_in_words(one) for one in of_verdict)}"
                for verdict in (HELPS, HARMS, *TOGETHER.values())
                if (of_verdict := [one for one in own if one.verdict == verdict and one.measure.first])]
        quiet = sum(one.verdict == OPEN for one in own)
        if sure:
            said.append(f"{_capital(name)} {', and '.join(sure)}.")
        elif quiet:
            said.append(f"{_capital(name)}: no effect is told on any of {quiet} measures.")
        else:
            untold.append(name)
    unsure = [one for one in found if one.why]
    if unsure:
        reasons = "; ".join(dict.fromkeys(reason for one in unsure for reason in one.why.split("; ")))
        what = f"What {_listed(untold)} does" if untold else \
            f"What code does to {_listed(list(dict.fromkeys(one.measure.title for one in unsure)))}"
        said.append(f"{what} cannot be told: {reasons}.")
    return said


def _in_words(one: Judged) -> str:
    return f"{one.measure.title} ({one.estimate:+.3g} {one.measure.unit}, {_bounds(one.interval)})"


def _table(found: Sequence[Judged], total: int) -> Table:
    names = list(dict.fromkeys(one.effect.name for one in found))
    rows = []
    for title in dict.fromkeys(one.measure.title for one in found):
        own = {one.effect.name: one for one in found if one.measure.title == title}
        measure = next(iter(own.values())).measure
        rows.append([f"{title}\n{measure.unit}, {measure.better} is better",
                     *(_cell(own[name]) if name in own else "-" for name in names)])
    return Table("The effect with its 95% interval, whether it helps, and its p-value, corrected by Holm's method for "
                 f"all {total} effects that have one. Effects are differences between arms with code and without, "
                 "midway between code and none in the other stages", ("Measure", *map(_capital, names)), rows)


def _cell(one: Judged) -> str:
    p_value = "" if one.corrected is None else f", p {_p(one.corrected)}"
    return f"{one.estimate:+.3g} [{_bounds(one.interval)}]\n{one.verdict}{p_value}"


def _figure(found: Sequence[Judged], number: int, after: str) -> plots.Figure:
    panels = []
    for unit, better in dict.fromkeys((one.measure.unit, one.measure.better) for one in found):
        own = [one for one in found if (one.measure.unit, one.measure.better) == (unit, better)]
        rows = list(dict.fromkeys(one.measure.title for one in own))
        points = {(one.effect.name, one.measure.title): (one.estimate, one.interval) for one in own}
        panels.append(plots.EffectsPanel(f"{unit} ({better} is better)", rows, {
            name: [points.get((name, row)) for row in rows]
            for name in dict.fromkeys(one.effect.name for one in found)}))
    return plots.effects(f"effects_{number}" if number > 1 else "effects", "What code adds at each stage, after "
                         f"{after}, with 95% intervals over seeds and questions; an open point has none.", panels)


def _notes(group: Group) -> list[str]:
    """What goes along with code in these arms besides code."""
    notes = []
    for k, stage in enumerate(group.stages):
        with_code = {shares[k] is None for shares in group.shares.values() if not shares[k]}
        if with_code == {True} and any(shares[k] for shares in group.shares.values()):
            notes.append(f"Arms without code in {stage} go without that stage: what it adds is that of the stage with "
                         "its code, beside going on as before.")
    least, most = min(group.tokens.values()), max(group.tokens.values())
    if most > (1 + SAME_LENGTH) * least:
        notes.append(f"These arms were trained on {least:,} to {most:,} tokens of documents: what code adds may be due "
                     "to more training.")
    return notes


def sweeps(study: Study, compared: Sequence[Group]) -> Section:
    """Losses and scores against each share that was swept."""
    found = [(group, sweep) for group in compared for sweep in group.sweeps]
    blocks: list[Block] = []
    rows: Rows = []
    names: dict[str, int] = {}
    tests = [[(measure, against(group, sweep, measure)) for measure in group.measures] for group, sweep in found]
    p_values = [one.contrast.p_value for of_sweep in tests for _, differences in of_sweep
                for one in differences.values() if one and one.contrast]
    corrected = iter(holm(p_values) if p_values else [])
    for (group, sweep), of_sweep in zip(found, tests, strict=True):
        number = names[sweep.stage] = names.get(sweep.stage, 0) + 1
        after = group.stages[-1]
        title = f"How much code in {sweep.stage}" + (f", after {after}" if after != sweep.stage else "")
        arms = ", ".join(f"{label} at {share:g}" for share, label in sweep.arms)
        lowest = sweep.arms[0][0]
        lines, panels = [], []
        for measure, differences in of_sweep:
            cells, points = [], []
            for share, label in sweep.arms:
                value, difference = told({label: 1.0}, measure.samples, group.roots), differences.get(label)
                p_holm = next(corrected) if difference and difference.contrast else None
                if value is None:
                    cells.append("-")
                    continue
                interval = _scaled(value, measure)
                points.append((share, measure.scale * value.estimate, interval))
                cells.append(f"{measure.scale * value.estimate:.4g}{_within(interval)}" + (
                    f"\n{measure.scale * difference.estimate:+.3g} [{_bounds(_scaled(difference, measure))}]"
                    + ("" if p_holm is None else f", p {_p(p_holm)}") if difference else ""))
                rows.append([after, sweep.stage, share, label, measure.title, measure.task, measure.metric,
                             measure.unit, measure.better, value.seeds, points[-1][1], *(interval or (None, None)),
                             lowest, *((measure.scale * difference.estimate,
                                        *(_scaled(difference, measure) or (None, None)),
                                        difference.contrast and difference.contrast.p_value, p_holm)
                                       if difference else [None] * 5)])
            if points:
                lines.append([f"{measure.title}\n{measure.unit}, {measure.better} is better", *cells])
                if measure.first:
                    levels = group.study.levels(measure.task) if measure.task and measure.metric == "accuracy" else None
                    panels.append(plots.SweepPanel(measure.title, measure.unit, points, *(
                        100 * level for level in levels or ())))
        if not lines:
            continue
        name = f"sweep_{sweep.stage.replace(' ', '_')}" + (f"_{number}" if number > 1 else "")
        blocks += [Heading(2, title), plots.sweep(
            name, f"Against the share of code in {sweep.stage}, with 95% intervals: {arms}.", panels), Table(
            f"The mean over seeds with its 95% interval; beneath it the difference from the share {lowest:g}, paired "
            "where seeds stand on the same run, and its p-value, corrected by Holm's method for all "
            f"{len(p_values)} such differences", ("Measure", *(f"{share:g}\n{label}" for share, label in sweep.arms)),
            lines)]
        if min(len(runs) for label, runs in study.arms.items() if label in dict(map(reversed, sweep.arms))) < 2:
            blocks.append(Text("Of a single seed nothing tells how far another seed would be: what share is best "
                               "cannot be told from it."))
        if notes := _notes(group):
            blocks.append(Items(notes))
    return Section(blocks, [("sweeps", SWEEP_COLUMNS, rows)] if rows else [])


def against(group: Group, sweep: Sweep, measure: Measure) -> dict[str, Told | None]:
    """Of each arm but that of the lowest share its difference from that one, by label."""
    (_, lowest), *others = sweep.arms
    return {label: told({label: 1.0, lowest: -1.0}, measure.samples, group.roots) for _, label in others}


def _scaled(one: Told, measure: Measure) -> Interval | None:
    return one.contrast and Interval(*(measure.scale * bound for bound in one.contrast.interval))


def _within(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval.low:.4g}, {interval.high:.4g}]"


def _bounds(interval: Interval | None) -> str:
    return "no interval" if interval is None else f"{interval.low:+.3g} to {interval.high:+.3g}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
