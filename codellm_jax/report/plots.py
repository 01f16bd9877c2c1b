"""The plots of a report, each as PNG, SVG and PDF: for print, and legible for colour-blind readers.

The colours are those of Okabe and Ito (2008). Markers, line styles and labels distinguish arms as well.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codellm_jax.report.pages import Figure
from codellm_jax.results.statistics import Interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1)))
GREY = "#595959"
FEWEST_TO_CUT = 6  # evaluations of a run; with fewer, the first tenth of training is never cut off
WIDTH, HEIGHT = 7.2, 6.5  # inches: the text area of a page in landscape
SETTINGS: Any = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9, "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e3e3e3", "grid.linewidth": 0.7, "axes.axisbelow": True, "lines.linewidth": 1.6,
    "lines.markersize": 5, "svg.hashsalt": "codellm_jax", "pdf.fonttype": 42, "figure.constrained_layout.use": True}


class Curve(NamedTuple):
    """One seed of an arm: a value after a number of tokens."""

    arm: str
    seed: int | None
    tokens: Sequence[float]
    values: Sequence[float]


class Shares(NamedTuple):
    """The share of code over a run, by step."""

    arm: str
    unit: str  # "tokens" or "examples"
    asked: tuple[Sequence[float], Sequence[float]]  # steps, and the share asked at each
    recorded: tuple[Sequence[float], Sequence[float]]  # recorded steps, and the share of each step alone
    phases: Sequence[tuple[float, float, float]]  # first and last step of each phase, and its share in the ledger


class Point(NamedTuple):
    """A score with its interval, in per cent."""

    arm: str
    value: float
    interval: Interval | None


class Panel(NamedTuple):
    """The scores of one task, in per cent; chance and majority None where there are none."""

    title: str
    points: Sequence[Point]
    chance: float | None
    majority: float | None


class SweepPanel(NamedTuple):
    """One measure against the share of code: (share, value, interval), in its unit."""

    title: str
    unit: str
    points: Sequence[tuple[float, float, Interval | None]]
    chance: float | None = None
    majority: float | None = None


class EffectsPanel(NamedTuple):
    """Effects on measures of one unit: a row for each measure, with a point or None for each effect."""

    unit: str
    rows: Sequence[str]
    effects: Mapping[str, Sequence[tuple[float, Interval | None] | None]]


class Line(NamedTuple):
    """The losses of one run: (x, loss) of itself, and of its trunk up to the branch."""

    name: str
    points: Sequence[tuple[float, float]]
    trunk: Sequence[tuple[float, float]] = ()

    def scaled(self, scale: float) -> "Line":
        return Line(self.name, *([(x / scale, loss) for x, loss in part] for part in (self.points, self.trunk)))


class LawPanel(NamedTuple):
    """One loss, or measure of a benchmark, against a share."""

    title: str
    label: str  # of its axis
    shares: np.ndarray  # [m]
    predicted: np.ndarray  # [m]
    intervals: np.ndarray  # [m, 2]
    points: Sequence[tuple[float, float, int | None, bool]]  # share, loss, seed, and whether it is an outlier


class Profile(NamedTuple):
    """Values in per cent at consecutive named places, for several series."""

    title: str
    places: Sequence[str]
    values: Mapping[str, Sequence[float]]


def losses(name: str, caption: str, panels: Mapping[str, Sequence[Curve]], arms: Sequence[str]) -> Figure:
    """Held-out loss against tokens, with a panel for each kind of held-out text. `arms` are the arms of all plots, so
    that each arm looks the same in all of them.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.5), squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        scale, unit = _tokens_unit(max(curve.tokens[-1] for curve in curves))
        ends: dict[str, tuple[float, float]] = {}
        most = max(curve.tokens[-1] for curve in curves)
        # The initial fall would leave no room for the rest of the curve, where there is more to see.
        from_on = most / 10 if min(len(curve.values) for curve in curves) >= FEWEST_TO_CUT else 0
        late = [value for curve in curves for tokens, value in zip(curve.tokens, curve.values, strict=True)
                if tokens >= from_on or tokens == curve.tokens[-1]]
        for place, arm in enumerate(arms):
            seeds = [curve for curve in curves if curve.arm == arm]
            for curve in seeds[:len(seeds) if len(seeds) > 1 else 0]:
                axis.plot([tokens / scale for tokens in curve.tokens], curve.values, color=_style(place)["color"],
                          linewidth=0.8, alpha=0.35)
            if seeds:
                tokens, values = _mean_curve(seeds)
                every = max(1, len(values) // 6)
                axis.plot([count / scale for count in tokens], values, **_style(place), markerfacecolor="white",
                          markevery=(place % every, every))
                ends[arm] = tokens[-1] / scale, values[-1]
        margin = 0.05 * (max(late) - min(late) or 1)
        axis.set_ylim(min(late) - margin, max(late) + margin)
        _label_ends(axis, ends, arms)
        axis.set(title=f"Held-out {title}", xlabel=f"Tokens trained on{unit}", ylabel="Loss, nats per token")
        axis.set_xlim(left=0)
    return _saved(plt, figure, name, caption)


def shares(name: str, caption: str, runs: Sequence[Shares]) -> Figure:
    """The share of code asked and realised, with a panel for each run."""
    plt = _pyplot()
    columns = min(3 if len(runs) < 7 else 4, len(runs))
    lines = math.ceil(len(runs) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(WIDTH, 0.7 + 1.75 * lines), squeeze=False, sharey=True)
    for axis, run in zip(axes.flat, runs, strict=False):
        axis.plot(*run.recorded, linestyle="none", marker=".", markersize=3.5, color=COLOURS[4],
                  label="one step, as recorded")
        for place, (first, last, share) in enumerate(run.phases):
            axis.plot([first, last], [share, share], color=COLOURS[1], linewidth=3.2, solid_capstyle="butt",
                      label="realised in a phase, by the ledger" if not place else None)
        axis.plot(*run.asked, color=COLOURS[6], linestyle=LINES[1], linewidth=1.3, label="asked")
        axis.set_title(f"{run.arm} ({run.unit})", loc="left")
        axis.set_ylim(-0.04, 1.04)
        axis.set_xlabel("Step")
    for axis in axes.flat[len(runs):]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("Share of code")
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes.flat), key=lambda both: len(both[1]))
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return _saved(plt, figure, name, caption)


def scores(name: str, caption: str, panels: Sequence[Panel]) -> list[Figure]:
    """A panel for each task: arms with their intervals, and their reference levels; several pages where needed."""
    arms = list(dict.fromkeys(point.arm for panel in panels for point in panel.points))
    columns, height = min(3, len(panels)), 0.75 + 0.2 * len(arms)
    fit = columns * max(1, int((HEIGHT - 0.7) / height))
    pages = [panels[start : start + fit] for start in range(0, len(panels), fit)]
    return [_scores(f"{name}_{number}" if len(pages) > 1 else name, caption, page, arms, columns, height)
            for number, page in enumerate(pages, 1)]


def _scores(
    name: str, caption: str, panels: Sequence[Panel], arms: Sequence[str], columns: int, panel_height: float
) -> Figure:
    plt = _pyplot()
    lines = math.ceil(len(panels) / columns)
    height = 0.7 + lines * panel_height
    figure, axes = plt.subplots(lines, columns, figsize=(WIDTH, height), squeeze=False, sharey=True)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for point in panel.points:
            place = arms.index(point.arm)
            low, high = point.interval or (point.value, point.value)
            axis.plot([low, high], [place, place], color=_style(place)["color"], linewidth=1.8)
            axis.plot(point.value, place, linestyle="none", marker=_style(place)["marker"], markersize=6,
                      color=_style(place)["color"], markeredgecolor="black", markeredgewidth=0.5)
        _levels(axis.axvline, panel.chance, panel.majority)
        axis.set_title(panel.title, loc="left")
        axis.grid(axis="y", visible=False)
        axis.set_ylim(len(arms) - 0.4, -0.6)
        axis.set_yticks(range(len(arms)), arms)
        axis.set_xlim(left=min(0.0, axis.get_xlim()[0]) if axis.get_xlim()[0] < 12 else None)
    for place, axis in enumerate(axes.flat):
        axis.set_visible(place < len(panels))
        if place + columns >= len(panels):
            axis.set_xlabel("Per cent")
    _legend_of_levels(figure, panels)
    return _saved(plt, figure, name, caption)


def sweep(name: str, caption: str, panels: Sequence[SweepPanel]) -> Figure:
    """A panel for each measure against the share of code."""
    plt = _pyplot()
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(WIDTH, 0.7 + 1.9 * lines), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        shares, values = [point[0] for point in panel.points], [point[1] for point in panel.points]
        for share, value, interval in panel.points:
            low, high = interval or (value, value)
            axis.plot([share, share], [low, high], color=COLOURS[0], linewidth=1.5)
        axis.plot(shares, values, color=COLOURS[0], marker="o", markerfacecolor="white")
        _levels(axis.axhline, panel.chance, panel.majority)
        axis.set_title(panel.title, loc="left", fontsize=8.5)
        axis.set_ylabel(panel.unit)
        axis.set_xlim(-0.03, max(shares) + 0.03)
    for place, axis in enumerate(axes.flat):
        axis.set_visible(place < len(panels))
        if place + columns >= len(panels):
            axis.set_xlabel("Share of code")
    _legend_of_levels(figure, panels)
    return _saved(plt, figure, name, caption)


def profiles(name: str, caption: str, panels: Sequence[Profile]) -> Figure:
    """Values in per cent at places named along the left side, with panels side by side."""
    plt = _pyplot()
    rows = max(len(panel.places) for panel in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 1.1 + 0.2 * rows), squeeze=False)
    names = list(dict.fromkeys(name for panel in panels for name in panel.values))
    for axis, panel in zip(axes[0], panels, strict=True):
        for one, values in panel.values.items():
            axis.plot(values, range(len(values)), markerfacecolor="white", **_style(names.index(one)))
        axis.set_yticks(range(len(panel.places)), panel.places)
        axis.set_ylim(len(panel.places) - 0.5, -0.5)
        axis.set_xlim(0, 1.05 * max(max(values) for values in panel.values.values()))
        axis.set_title(panel.title, loc="left")
        axis.set_xlabel("%")
    from matplotlib.lines import Line2D

    figure.legend([Line2D([], [], **_style(number)) for number in range(len(names))], names, loc="outside upper left",
                  ncols=3, frameon=False)
    return _saved(plt, figure, name, caption)


def effects(name: str, caption: str, panels: Sequence[EffectsPanel]) -> Figure:
    """A point and an interval for each effect on each measure, with a panel for each unit."""
    plt = _pyplot()
    names = list(dict.fromkeys(effect for panel in panels for effect in panel.effects))
    heights = [0.35 + len(panel.rows) * (0.14 + 0.13 * len(names)) for panel in panels]
    figure, axes = plt.subplots(len(panels), 1, figsize=(WIDTH, 0.5 + 0.25 * len(names) / 2 + sum(heights) + 0.35 * len(
        panels)), squeeze=False, height_ratios=heights)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        axis.axvline(0.0, color=COLOURS[6], linewidth=0.9, zorder=1)
        for number, effect in enumerate(names):
            style = _style(number)
            for row, point in enumerate(panel.effects.get(effect, ())):
                if point is not None:
                    value, interval = point
                    at = row + (number - (len(names) - 1) / 2) * 0.8 / len(names)
                    axis.plot(interval or (value, value), [at, at], color=style["color"], linewidth=1.6)
                    axis.plot(value, at, linestyle="none", marker=style["marker"], color=style["color"], markersize=5,
                              markerfacecolor=style["color"] if interval else "white", markeredgecolor=style["color"])
        for row in range(1, len(panel.rows)):
            axis.axhline(row - 0.5, color="#e3e3e3", linewidth=0.7)
        axis.grid(axis="y", visible=False)
        axis.set_yticks(range(len(panel.rows)), panel.rows)
        axis.set_ylim(len(panel.rows) - 0.5, -0.5)
        axis.set_xlabel(f"Effect, {panel.unit}")
    from matplotlib.lines import Line2D

    figure.legend([Line2D([], [], color=_style(number)["color"], marker=_style(number)["marker"])
                   for number in range(len(names))], names, loc="outside upper left", ncols=2, frameon=False)
    return _saved(plt, figure, name, caption)


def runs(panels: Mapping[str, Sequence[Line]], against: str) -> Figure:
    """Losses of runs against "steps" or "tokens", with a panel for each kind of loss; dotted lines show the trunk
    before a run branches from it.
    """
    plt = _pyplot()
    scale, unit = _tokens_unit(max(x for lines in panels.values() for line in lines for x, _ in [
        *line.trunk, *line.points])) if against == "tokens" else (1.0, "")
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels) + 0.6, 3.9), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for place, line in enumerate([line.scaled(scale) for line in lines]):
            style = _style(place)
            if line.trunk:  # to its branch
                axis.plot(*zip(*line.trunk, *line.points[:1], strict=True), color=style["color"], linestyle=LINES[4],
                          linewidth=1.1)
            if line.points:
                axis.plot(*zip(*line.points, strict=True), **style, markerfacecolor="white", label=line.name,
                          markevery=max(1, len(line.points) // 6))
        whole = [[*line.trunk, *line.points] for line in lines]
        late = [loss for points in whole for _, loss in points[len(points) // 10:]]
        margin = 0.05 * (max(late) - min(late) or 1)
        axis.set_ylim(min(late) - margin, max(late) + margin)
        axis.set(title=title, xlabel=f"Tokens trained on{unit}" if against == "tokens" else "Step",
                 ylabel="Loss, nats per token")
        axis.set_xlim(left=0)
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)),
                  frameon=False)
    return _saved(plt, figure, "losses", "")


def _levels(draw: Any, chance: float | None, majority: float | None) -> None:
    if chance is not None:
        draw(chance, color=GREY, linestyle=LINES[2], linewidth=1.3, zorder=1)
    if majority is not None:
        draw(majority, color=COLOURS[6], linestyle=LINES[3], linewidth=1.1, zorder=1)


def _legend_of_levels(figure: Any, panels: Sequence[Panel | SweepPanel]) -> None:
    if any(panel.chance is not None for panel in panels):
        from matplotlib.lines import Line2D

        figure.legend([Line2D([], [], color=GREY, linestyle=LINES[2]),
                       Line2D([], [], color=COLOURS[6], linestyle=LINES[3], linewidth=1.1)],
                      ["chance", "always the commonest answer"], loc="outside upper right", ncols=2, frameon=False)


def law(name: str, caption: str, source: str, panels: Sequence[LawPanel], best: float,
        interval: tuple[float, float]) -> Figure:
    """Losses against a share with their laws, and the best share; a panel for each loss."""
    plt = _pyplot()
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(WIDTH, 0.6 + 2.9 * lines), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        axis.axvspan(*interval, color=COLOURS[5], alpha=0.22, linewidth=0, label="best share, 95% interval")
        axis.axvline(best, color=COLOURS[1], linestyle=LINES[4], linewidth=1.3, label="best share")
        axis.fill_between(panel.shares, *panel.intervals.T, color=COLOURS[4], alpha=0.35, linewidth=0,
                          label="law, 95% interval")
        axis.plot(panel.shares, panel.predicted, color=COLOURS[0], label="law")
        seeds = sorted({seed for *_, seed, _ in panel.points if seed is not None})
        for share, loss, seed, outlier in panel.points:
            marker = "x" if outlier else MARKERS[seeds.index(seed) % len(MARKERS)] if seed in seeds else "o"
            axis.plot(share, loss, linestyle="none", marker=marker, markersize=7 if outlier else 4, color=COLOURS[6],
                      markerfacecolor="none", markeredgewidth=1.6 if outlier else 0.8)
        axis.set(title=panel.title, xlabel=f"Share of {source}", ylabel=panel.label)
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return _saved(plt, figure, name, caption)


def _label_ends(axis: Any, ends: Mapping[str, tuple[float, float]], arms: Sequence[str]) -> None:
    """Labels curves at their ends, and moves labels apart where they would overlap."""
    low, high = axis.get_ylim()
    step = (high - low) * 0.055
    # From below, each label at its curve's end or just above the one before; all move down where they would leave the
    # frame.
    room = high - step * len(ends)
    placed: list[float] = []
    for arm, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        at = max(min(y, room + step * len(placed)), placed[-1] + step if placed else low)
        placed.append(at)
        style = _style(arms.index(arm))
        across = axis.get_yaxis_transform()
        axis.plot(1.045, at, color=style["color"], marker=style["marker"], markerfacecolor="white", transform=across,
                  clip_on=False)
        axis.annotate(arm, (x, y), xytext=(1.08, at), textcoords=across, color="#1a1a1a", fontsize=8.5, va="center",
                      annotation_clip=False, arrowprops={
                          "arrowstyle": "-", "color": style["color"], "linewidth": 0.8, "relpos": (0, 0.5),
                          "shrinkA": 14, "shrinkB": 3})


def _style(place: int) -> dict[str, Any]:
    """The style of the arm at this index: colour, marker and line are distinct together for up to 70 arms."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)],
            "linestyle": LINES[place % len(LINES)]}


def _mean_curve(seeds: Sequence[Curve]) -> tuple[Sequence[float], Sequence[float]]:
    """Tokens and the mean of the seeds; where seeds differ in length, up to the end of the shortest."""
    shortest = min(len(curve.values) for curve in seeds)
    return seeds[0].tokens[:shortest], [
        sum(curve.values[place] for curve in seeds) / len(seeds) for place in range(shortest)]


def _tokens_unit(most: float) -> tuple[float, str]:
    return next(((scale, name) for scale, name in ((1e9, ", billions"), (1e6, ", millions"), (1e3, ", thousands"))
                 if most >= scale), (1.0, ""))


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcdefaults()
    pyplot.rcParams.update(SETTINGS)
    return pyplot


def _saved(plt: Any, figure: Any, name: str, caption: str) -> Figure:
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        # The layout solver orders its sums by memory addresses: without rounding, the last bits (and with them the
        # names of clip paths) differ between two drawings of the same values.
        axes.set_position([round(bound, 6) for bound in axes.get_position().bounds])
    png, svg, pdf = io.BytesIO(), io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    plt.close(figure)
    return Figure(name, caption, png.getvalue(), svg.getvalue(), pdf.getvalue())
