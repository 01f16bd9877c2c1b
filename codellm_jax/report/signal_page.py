"""The measures that distinguish arms best at this model size: signal over noise, as a section of the report."""

import math
from collections.abc import Sequence

import numpy as np

from codellm_jax.report.asked import Group
from codellm_jax.report.pages import Heading, Table, Text
from codellm_jax.report.sections import Rows, Section
from codellm_jax.results.measures import signal_over_noise

COLUMNS = ("after", "measure", "first", "second", "signal", "unit", "noise", "ratio", "by_chance")


def signals(compared: Sequence[Group]) -> Section:
    """A row for each measure of each group of arms, in decreasing order of its ratio; no section where no arm has two
    seeds.
    """
    found = []
    for group in compared:
        for measure in group.measures:
            arms = {label: [{measure.title: np.array([sample.score])} for sample in of_arm.values()]
                    for label, of_arm in measure.samples.items() if of_arm}
            found += [(group.stages[-1], measure, row) for row in signal_over_noise(arms)]
    if not found:
        return Section([], [])
    found.sort(key=lambda one: (-one[2].ratio if math.isfinite(one[2].ratio) else math.inf))
    rows = [[measure.title, stage, f"{row.arms[0]} - {row.arms[1]}",
             f"{measure.scale * row.signal:.4g} {measure.unit}", f"{measure.scale * row.noise:.4g}",
             f"{row.ratio:.1f}" if math.isfinite(row.ratio) else "-", f"{row.by_chance:.1f}"]
            for stage, measure, row in found]
    numbers: Rows = [[
        stage, measure.title, *row.arms, measure.scale * row.signal, measure.unit, measure.scale * row.noise, row.ratio,
        row.by_chance] for stage, measure, row in found]
    return Section([
        Heading(2, "Which measures tell arms apart"),
        Text("Signal is the difference between the two arms whose means lie farthest apart; noise is the standard "
             "deviation between seeds of an arm. The last column is the ratio that arms without any "
             "difference exceed by chance once in 20 times."),
        Table("The measures, the one that tells arms apart best first.",
              ("Measure", "After", "Arms", "Signal", "Noise", "Ratio", "By chance"),
              rows, words=(1, 2))], [("signals", COLUMNS, numbers)])
