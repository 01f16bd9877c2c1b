"""The presentation of a sweep's laws: blocks of a report, the same as plain text, and a file of all numbers."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from codellm_jax.report import plots
from codellm_jax.report.mixing import Analysis
from codellm_jax.report.optimum import Best, lines_to_paste, weigh
from codellm_jax.report.pages import Block, Heading, Items, Notice, Table, Text
from codellm_jax.report.questions import task_of
from codellm_jax.report.sweeps import describe

WIDTH = 110  # of plain text
SHOWN = 12  # mixtures of more than two sources in a table
ENDS = {"least": "smallest", "most": "largest"}


def blocks(analysis: Analysis) -> list[Block]:
    """The section of a report."""
    return [Heading(2, "Laws of the mixture"), *_answer(analysis), *_caveats(analysis), *_figures(analysis),
            _laws(analysis), _predictions(analysis), *_misses(analysis)]


def _answer(analysis: Analysis) -> list[Block]:
    found, sources = analysis.best, analysis.sweep.sources
    objective = " ".join(f"{'-' if weight < 0 else '+'} {abs(weight):.3g} x {name}" for name, weight in
                         analysis.objective.items()).removeprefix("+ ")
    what = "held-out losses" if not any(map(task_of, analysis.objective)) else "losses and measures of benchmarks"
    lines: list[Block] = [Text(f"The objective is {objective}: a weighted sum of {what}, lower is better"
                               f"{_where(analysis)}.")]
    low, high = found.objective_interval
    if len(sources) == 2:
        name, swept = sources[1], analysis.fitted.points.shares[:, 1]
        interval = f"95% interval {found.intervals[1, 0]:.3f} to {found.intervals[1, 1]:.3f}"
        if found.verdict == "interior":
            lines.append(Notice(f"The best share of {name} is {found.shares[1]:.3f} ({interval})."))
        elif found.verdict == "edge":
            assert found.edge is not None
            end = swept.min() if found.edge[1] == "least" else swept.max()
            beyond = "" if end in (0.0, 1.0) else " The optimum may lie beyond, where there is no run."
            lines.append(Notice("There is no interior optimum: the best share is at the edge, the "
                                f"{ENDS[found.edge[1]]} share of {name} that was swept, {end:.3f} "
                                f"({interval}).{beyond}"))
        else:
            lines.append(Notice(f"These runs do not determine the best share of {name}: it is predicted at "
                                f"{found.shares[1]:.3f}, and may be anywhere from {found.intervals[1, 0]:.3f} to "
                                f"{found.intervals[1, 1]:.3f} (95% interval). The probability that it is the smallest "
                                f"share swept is {100 * found.edges[0]:.0f}%, the largest "
                                f"{100 * found.edges[1]:.0f}%."))
        if found.verdict != "interior" and sum(weight > 0 for weight in analysis.objective.values()) == 1:
            lines.append(Text("The objective is a single loss. Where its law only falls or only rises with the share, "
                              "it has no interior optimum, however many runs there are: name a weighted sum of "
                              "several losses as the objective."))
    else:
        told = found.verdict != "cannot tell"
        lines.append(Notice(("The best mixture is " if told else "These runs cannot distinguish the best mixture from "
                             "their average; it is predicted at ") + f"{describe(sources, found.shares)}."))
        if found.edge:
            lines.append(Text(f"It has as much {sources[found.edge[0]]} as any run: there is no interior optimum, and "
                              "more of it may be better still."))
        lines.append(Table("The best mixture within the convex hull of the runs' mixtures: the share of each "
                           "source with its 95% interval, beside the shares that were swept.", (
                               "Source", "Share", "95% interval", "Swept"), [
            [name, f"{found.shares[n]:.3f}", f"{found.intervals[n, 0]:.3f} - {found.intervals[n, 1]:.3f}",
             f"{analysis.fitted.points.shares[:, n].min():.3f} - {analysis.fitted.points.shares[:, n].max():.3f}"]
            for n, name in enumerate(sources)]))
    lines.append(Text(f"The objective there is {found.objective:.4f} ({low:.4f} to {high:.4f}), lower than at the "
                      f"average of the runs' mixtures by {found.gain[0]:.4f} ({found.gain[1]:.4f} to "
                      f"{found.gain[2]:.4f})."))
    if analysis.beyond is not None:
        lines.append(_beyond(analysis, analysis.beyond))
    if analysis.design is not None and len(analysis.design.shares):
        runs = len(analysis.design.shares) * analysis.design.seeds
        lines += [Text(f"These {runs} further runs would narrow the interval of the best share most: it is expected to "
                       f"be {analysis.design.width_then:.3f} wide, instead of {analysis.design.width_now:.3f}. In the "
                       "study's gin file:"),
                  Items([f"`{line}`" for line in lines_to_paste(
                      analysis.design, sources, analysis.fitted.sweep.seeds).splitlines()])]
    return lines


def _beyond(analysis: Analysis, found: Best) -> Block:
    low, high = found.objective_interval
    shares = ", ".join(f"{name} {share:.3f} ({low:.3f} to {high:.3f})" for name, share, (low, high) in zip(
        analysis.sweep.sources, found.shares, found.intervals, strict=True))
    return Text("EXTRAPOLATED: over all mixtures, the laws predict the lowest objective beyond those of the runs, "
                f"{found.objective:.4f} ({low:.4f} to {high:.4f}), at {shares}, with 95% intervals. No run is near it: "
                "the laws are untested there, so train a run there before you rely on it.")


def _where(analysis: Analysis) -> str:
    parts = [f"{_count(value)} {unit}" for value, unit in ((analysis.size, "parameters"), (analysis.tokens, "tokens"))
             if math.isfinite(value)]
    return f", at {' and '.join(parts)}" if parts else ""


def _caveats(analysis: Analysis) -> list[Block]:
    found: list[Block] = []
    if analysis.extrapolated:
        tested = [f"Left out, the largest {'size' if miss.axis == 'size' else 'number of tokens'} was mispredicted by "
                  f"{_misses_of(miss.misses)}, {miss.factor:.3g} times beyond the rest."
                  for miss in analysis.misses if miss.axis in analysis.extrapolated]
        names = " and the ".join({"size": "size", "tokens": "number of tokens"}[axis] for axis in analysis.extrapolated)
        found.append(Notice(f"EXTRAPOLATED: the {names} lies beyond all runs. " + (" ".join(tested) or (
            "The runs have too few values to leave one out and test this: no interval covers that error."))))
    sweep = analysis.sweep
    for name, line, outlier in analysis.outliers:
        mixture = describe(sweep.sources, sweep.shares[line])
        side = "above" if outlier.deviation > 0 else "below"
        found.append(Text(
            f"Outlier, left out of the law: {sweep.runs[line]} ({mixture}{_at(analysis, line)}) has a loss on {name} "
            f"of {outlier.loss:.4f}, {abs(outlier.deviation):.4f} {side} the law of all other runs (p "
            f"{outlier.p_value:.2g}). Check this run."))
    for name, cells in zip(sweep.losses, analysis.fitted.cells, strict=True):
        variance = cells.variance[cells.runs > 0]
        if variance.max() > 1.001 * variance.min():
            worst = analysis.fitted.points.shares[np.flatnonzero(cells.runs > 0)[variance.argmax()]]
            times = math.sqrt(variance.max() / variance.min())
            found.append(Text(f"The noise of {name} differs between shares: it is largest at "
                              f"{describe(sweep.sources, worst)}, {times:.1f} times that at the least noisy share. The "
                              "fits weigh runs accordingly."))
    if of_benchmarks := [name for name in sweep.losses if task_of(name)]:
        found.append(Text(f"{', '.join(of_benchmarks)}: measures of benchmarks at the ends of runs, TASK/MEASURE. "
                          "A law's interval covers all questions that might be asked: the questions are "
                          "resampled with each curve, as seeds and shares are."
                          + (f" Higher is better for {', '.join(sorted(more))}, which count with a minus." if (
                              more := sweep.more_is_better & set(sweep.losses)) else "")))
    seeds = analysis.fitted.cells[0].runs.max()
    if seeds <= 1 and not analysis.fitted.axes:
        found.append(Text("No share was trained with several seeds: the noise is estimated from the distance between "
                          "runs and the law, and is assumed to be the same at all shares."))
    return found + [Text(note) for note in sweep.notes]


def _at(analysis: Analysis, line: int) -> str:
    several = [(values[line], unit) for values, unit in ((analysis.sweep.parameters, "parameters"),
                                                         (analysis.sweep.tokens, "tokens"))
               if np.isfinite(values).all() and np.ptp(values) > 0]
    return "".join(f", {_count(value)} {unit}" for value, unit in several)


def _misses_of(misses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {miss:.4f}" for name, miss in misses.items())


def _laws(analysis: Analysis) -> Block:
    rows = []
    for name, law, cells in zip(analysis.sweep.losses, analysis.fitted.laws, analysis.fitted.cells, strict=True):
        there = cells.runs > 0
        others = sorted((_error(fit.left_out, cells, there), _named(analysis, fit.family.name))
                        for fit in law.fits if fit is not law.chosen)
        rows.append([name, f"{_named(analysis, law.chosen.family.name)}: {law.chosen.family.formula}",
                     f"{_error(law.chosen.left_out, cells, there):.4f}", f"{_error(law.left_out, cells, there):.4f}",
                     f"{math.sqrt(law.noise):.4f}",
                     ", ".join(f"{other} {miss:.4f}" for miss, other in others[:2])])
    return Table("The law of each loss and its accuracy. The miss is the root mean square error on shares "
                 "left out in turn: for the law chosen, and for the weighted average of all candidates, which the "
                 "predictions use.",
                 ("Loss", "Law", "Miss", "Of all", "Noise of a run", "Next best"), rows, words=(1, 5))


def _named(analysis: Analysis, name: str) -> str:
    for number, source in enumerate(analysis.sweep.sources):
        name = name.replace(f"of source {number}", f"of {source}")
    return name


def _error(left_out: np.ndarray, cells: Any, there: np.ndarray) -> float:
    return float(np.sqrt(np.nanmean((left_out - cells.mean)[there] ** 2)))


def _predictions(analysis: Analysis) -> Block:
    two = len(analysis.sweep.sources) == 2
    objective = weigh(analysis.objective, analysis.sweep.losses, analysis.predicted)
    every = np.arange(0, len(analysis.shares), 10) if two else np.argsort(objective, kind="stable")[:SHOWN]
    rows = [[f"{analysis.shares[n, 1]:.3f}" if two else describe(analysis.sweep.sources, analysis.shares[n]),
             *(f"{analysis.predicted[d, n]:.4f} ({analysis.intervals[d, n, 0]:.4f} - {analysis.intervals[d, n, 1]:.4f})"
               for d in range(len(analysis.sweep.losses)))] for n in every]
    which = "" if two or len(analysis.shares) <= SHOWN else f", of the {SHOWN} best mixtures of runs"
    heading = f"Share of {analysis.sweep.sources[1]}" if two else "Mixture"
    return Table("The losses that the laws predict, with 95% intervals of the mean over seeds"
                 + (", extrapolated" if analysis.extrapolated else "") + which + ".",
                 (heading, *analysis.sweep.losses), rows)


def _misses(analysis: Analysis) -> list[Block]:
    if not analysis.misses:
        return []
    return [Table("The root mean square error of the laws of size and length on runs that were left out.", (
        "Left out", "Beyond the rest", *analysis.misses[0].misses, "Within 95% intervals"), [
            [f"{_count(miss.left_out)} {'parameters' if miss.axis == 'size' else 'tokens'}", f"{miss.factor:.3g} times",
             *(f"{value:.4f}" for value in miss.misses.values()), f"{100 * miss.coverage:.0f}%"]
            for miss in analysis.misses])]


def _count(value: float) -> str:
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.4g}{letter}"
    return f"{value:.4g}"


def _figures(analysis: Analysis) -> list[Block]:
    if len(analysis.sweep.sources) != 2:
        return []
    found, panels = analysis.best, []
    named = {(name, line) for name, line, _ in analysis.outliers}
    shown = [n for n, name in enumerate(analysis.sweep.losses) if name in analysis.objective or task_of(name)]
    lines = np.flatnonzero(analysis.lines).tolist()
    for place in shown:
        name = analysis.sweep.losses[place]
        points = [(float(analysis.sweep.shares[n, 1]), float(analysis.sweep.values[n, place]), analysis.sweep.seeds[n],
                   (name, n) in named) for n in lines if not math.isnan(analysis.sweep.values[n, place])]
        panels.append(plots.LawPanel(
            name if task_of(name) else f"Held-out {name}",
            analysis.sweep.units.get(name, "value") if task_of(name) else "Loss, nats per token", analysis.shares[:, 1],
            analysis.predicted[place], analysis.intervals[place], points))
    caption = (f"Losses against the share of {analysis.sweep.sources[1]}: the law with its 95% interval, a mark "
               "for each seed, and a cross for each outlier. The band of the share is the 95% interval of the best for "
               "the objective, the dotted line the best."
               + (" The law is extrapolated to where there is no run." if analysis.extrapolated else ""))
    return [plots.law("laws", caption, analysis.sweep.sources[1], panels, float(found.shares[1]),
                      (float(found.intervals[1, 0]), float(found.intervals[1, 1])))]


def plain(parts: Sequence[Block]) -> str:
    """Blocks as text for a terminal; figures are left out."""
    lines: list[str] = []
    for block in parts:
        if isinstance(block, Heading):
            lines += [block.text, "=" * len(block.text), ""]
        elif isinstance(block, Text | Notice):
            lines += [*textwrap.wrap(block.text, WIDTH), ""]
        elif isinstance(block, Items):
            lines += [*(f"    {text.strip('`')}" for text in block.texts), ""]
        elif isinstance(block, Table):
            lines += [*textwrap.wrap(block.caption, WIDTH), *_plain_table(block), ""]
    return "\n".join(lines).rstrip()


def _plain_table(table: Table) -> list[str]:
    rows = [table.columns, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    return ["  " + "  ".join(cell.ljust(width) if column == 0 or column in table.words else cell.rjust(width)
                             for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows]


def as_json(analysis: Analysis) -> dict[str, Any]:
    """All numbers, for programs."""
    found, sweep = analysis.best, analysis.sweep
    return {
        "sources": list(sweep.sources), "losses": list(sweep.losses),
        "units": {name: sweep.units[name] for name in sweep.losses if name in sweep.units},
        "objective": dict(analysis.objective),
        "parameters": _known(analysis.size), "tokens": _known(analysis.tokens),
        "extrapolated": list(analysis.extrapolated),
        "best": {
            "verdict": found.verdict, "shares": _by_name(sweep.sources, found.shares),
            "intervals": _by_name(sweep.sources, found.intervals), "objective": found.objective,
            "objective_interval": list(found.objective_interval),
            "edge": None if found.edge is None else {"source": sweep.sources[found.edge[0]], "end": found.edge[1]},
            "gain": list(found.gain)},
        "beyond": None if (beyond := analysis.beyond) is None else {
            "shares": _by_name(sweep.sources, beyond.shares), "intervals": _by_name(sweep.sources, beyond.intervals),
            "objective": beyond.objective, "objective_interval": list(beyond.objective_interval)},
        "further_runs": None if analysis.design is None else {
            "shares": [_by_name(sweep.sources, mixture) for mixture in analysis.design.shares],
            "seeds": analysis.design.seeds, "width_now": analysis.design.width_now,
            "width_then": analysis.design.width_then,
            "gin": lines_to_paste(analysis.design, sweep.sources, analysis.fitted.sweep.seeds)},
        "laws": {name: {
            "chosen": _named(analysis, law.chosen.family.name), "noise": math.sqrt(law.noise),
            "candidates": {_named(analysis, fit.family.name): {
                "weight": float(weight), "formula": fit.family.formula,
                "miss": _error(fit.left_out, cells, cells.runs > 0)}
                for fit, weight in zip(law.fits, law.weights, strict=True)}}
            for name, law, cells in zip(sweep.losses, analysis.fitted.laws, analysis.fitted.cells, strict=True)},
        "outliers": [{"loss": name, "run": sweep.runs[line], "seed": sweep.seeds[line],
                      "shares": _by_name(sweep.sources, sweep.shares[line]), "tokens": _known(sweep.tokens[line]),
                      "value": outlier.loss, "deviation": outlier.deviation, "p_value": outlier.p_value}
                     for name, line, outlier in analysis.outliers],
        "left_out": [{"axis": miss.axis, "value": miss.left_out, "factor": miss.factor,
                      "misses": dict(miss.misses), "coverage": miss.coverage}
                     for miss in analysis.misses],
        "predictions": predictions(analysis, analysis.shares), "notes": list(sweep.notes)}


def predictions(analysis: Analysis, shares: np.ndarray) -> list[dict[str, Any]]:
    """The predicted losses of each mixture [m, S], their 95% intervals, and those of one further run."""
    predicted, intervals, of_runs = analysis.predict(shares)
    return [{"shares": _by_name(analysis.sweep.sources, mixture), "losses": {
        name: {"loss": float(predicted[place, number]), "interval": intervals[place, number].tolist(),
               "run_interval": of_runs[place, number].tolist()}
        for place, name in enumerate(analysis.sweep.losses)}} for number, mixture in enumerate(shares)]


def _by_name(names: Sequence[str], values: np.ndarray) -> dict[str, Any]:
    return dict(zip(names, np.asarray(values).tolist(), strict=True))


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
