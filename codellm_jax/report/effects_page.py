"""The effects of stages as a report presents them: in words, in a figure, in a table, and the effects that are missing.
"""

from collections.abc import Sequence

from codellm_jax.report import plots
from codellm_jax.report.asked import SAME_LENGTH, Group, models_of
from codellm_jax.report.effects import listed
from codellm_jax.report.pages import Block, Heading, Items, Notice, Table, Text
from codellm_jax.report.sections import Rows, Section
from codellm_jax.report.verdicts import HARMS, HELPS, OPEN, TOGETHER, Judged, bounds, judge, shown_p

EFFECT_COLUMNS = ("after", "effect", "measure", "task", "metric", "unit", "better", "estimate", "low", "high", "p",
                  "p_holm", "seeds", "verdict", "why", "weights")

MOST_TITLES = 5  # of measures in a sentence
VERBS = {verdict: f"adds {verdict} than apart to" for verdict in TOGETHER.values()}


def effects(compared: Sequence[Group]) -> tuple[Section, list[str]]:
    """The effects of stages in every group of arms that is a tree, and their summary in words."""
    trees = [group for group in compared if is_tree(group)]
    judged = judge([(group, None) for group in trees])
    total = sum(one.corrected is not None for found in judged for one in found)
    blocks: list[Block] = []
    rows: Rows = []
    words: list[str] = []
    for number, (group, found) in enumerate(zip(trees, judged, strict=True), 1):
        after = group.stages[-1] + models_of(group, compared)
        said = sentences(found)
        words += [f"After {after}: {sentence}" for sentence in said]
        blocks += [Heading(2, "At which stage code helps" + f", after {after}" * (number > 1)),
                   Text(f"Arms after {after}: {', '.join(group.shares)}."), *map(Notice, said)]
        first, others = ([one for one in found if one.measure.first is kind] for kind in (True, False))
        if first:
            blocks += [_figure(first, number, after), _table(first, total)]
        if group.design.holes:
            blocks += [Text("These arms leave open:"), Items(group.design.holes)]
        if notes := notes_of(group):
            blocks.append(Items(notes))
        if others:
            blocks += [Heading(3, f"Effects on other measures, after {after}"), _table(others, total)]
        rows += [[group.stages[-1], one.effect.name, one.measure.title, one.measure.task, one.measure.metric,
                  one.measure.unit, one.measure.better, one.estimate, *(one.interval or (None, None)),
                  one.told.contrast and one.told.contrast.p_value, one.corrected, one.told.seeds, one.verdict, one.why,
                  " ".join(f"{weight:+.6g}*{label}" for label, weight in one.effect.weights.items())] for one in found]
    return Section(blocks, [("effects", EFFECT_COLUMNS, rows)] if rows else []), words


def is_tree(group: Group) -> bool:
    """Whether the stages have effects that no sweep shows: several stages differ, or one stage has few shares or also
    differs in the weights of sources.
    """
    varying = [k for k in range(len(group.stages)) if len({levels[k].share for levels in group.levels.values()}) > 1
               or k in group.by_source]
    return len(varying) > 1 or len(varying) == 1 and (not group.sweeps or varying[0] in group.by_source)


def sentences(found: Sequence[Judged]) -> list[str]:
    """The effects of a group, summarised in words."""
    if not found:
        return ["These arms cannot tell at which stage code helps."]
    said, untold = [], []
    for name in dict.fromkeys(one.effect.name for one in found):
        own = [one for one in found if one.effect.name == name]
        sure = [f"{VERBS.get(verdict, verdict)} {'; '.join(_in_words(one) for one in of_verdict)}"
                for verdict in (HELPS, HARMS, *TOGETHER.values())
                if (of_verdict := [one for one in own if one.verdict == verdict and one.measure.first])]
        quiet = sum(one.verdict == OPEN for one in own)
        if sure:
            said.append(f"{_capital(name.removeprefix('interaction of '))} {', and '.join(sure)}.")
        elif quiet:
            said.append(f"{_capital(name)}: no effect is shown on any of {quiet} measures.")
        else:
            untold.append(name)
    unsure = [one for one in found if one.why]
    if unsure:
        reasons = "; ".join(dict.fromkeys(reason for one in unsure for reason in one.why.split("; ")))
        what = f"What {listed(untold)} does" if untold else \
            f"What code does to {titles([one.measure.title for one in unsure])}"
        said.append(f"{what} cannot be told: {reasons}.")
    return said


def titles(names: Sequence[str]) -> str:
    """Titles of measures in a sentence, each once; of many only the first few, since the table below has all."""
    once = list(dict.fromkeys(names))
    return listed(once if len(once) <= MOST_TITLES else [*once[:MOST_TITLES - 1], f"{len(once) - MOST_TITLES + 1} "
                                                         "other measures"])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _in_words(one: Judged) -> str:
    return f"{one.measure.title} ({one.estimate:+.3g} {one.measure.unit}, {bounds(one.interval)})"


def _table(found: Sequence[Judged], total: int) -> Table:
    names = list(dict.fromkeys(one.effect.name for one in found))
    rows = []
    for title in dict.fromkeys(one.measure.title for one in found):
        own = {one.effect.name: one for one in found if one.measure.title == title}
        measure = next(iter(own.values())).measure
        rows.append([f"{title}\n{measure.unit}, {measure.better} is better",
                     *(_cell(own[name]) if name in own else "-" for name in names)])
    return Table("The effect of code in a stage on each measure with its 95% interval, and beneath it the "
                 f"verdict and the p-value, corrected by Holm's method over all {total} effects that have one. An "
                 "effect is the difference between arms with code and without, averaged over code and no code in the "
                 "other stages.", ("Measure", *map(_capital, names)), rows)


def _cell(one: Judged) -> str:
    p_value = "" if one.corrected is None else f", p {shown_p(one.corrected)}"
    return f"{one.estimate:+.3g} [{bounds(one.interval)}]\n{one.verdict}{p_value}"


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
                         f"{after}, with 95% intervals over seeds and questions; an open point has no "
                         "interval.", panels)


def notes_of(group: Group) -> list[str]:
    """Differences between these arms that are confounded with code."""
    notes = []
    for k, stage in enumerate(group.stages):
        absent = {k in group.absent[label] for label, shares in group.shares.items() if not shares[k]}
        if absent == {True} and any(shares[k] for shares in group.shares.values()):
            notes.append(f"Arms without code in {stage} skip that stage: the effect is that of the stage with "
                         "its code, against continuing as before.")
    least, most = min(group.tokens.values()), max(group.tokens.values())
    if most > (1 + SAME_LENGTH) * least:
        notes.append(f"These arms were trained on {least:,} to {most:,} tokens of documents: the effect of code may be "
                     "due to more training.")
    return notes


