"""Curves as inline SVG, without a plotting library; colours and dashes are the style sheet's classes c0, c1, ..."""

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 150, 12, 40  # margins in pixels; the right one holds the names of the curves
COLOURS = 7
DASHES = ("", "7 3", "2 2", "7 3 2 3", "1 3")
CUT = 0.1  # of the steps: the initial fall of the loss would leave no room for the rest
MOST_POINTS = 200  # of a curve


def curves(title: str, unit: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A chart of loss against steps; empty if no line has two points.

    Args:
      title: of the chart, as text.
      unit: of the values.
      lines: the (step, value) points of each curve, by name.
    """
    lines = {name: _thinned(points) for name, points in lines.items() if len(points) > 1}
    if not lines:
        return ""
    least, most = min(points[0][0] for points in lines.values()), max(points[-1][0] for points in lines.values())
    from_on = least + CUT * (most - least)
    late = [value for points in lines.values() for step, value in points if step >= from_on or step == points[-1][0]]
    low, high = min(late), max(late)
    low, high = low - 0.04 * (high - low or 1), high + 0.04 * (high - low or 1)

    def x(step: float) -> float:
        return LEFT + (step - least) / (most - least or 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<figure><figcaption>{html.escape(title)}</figcaption>'
             f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for value in _ticks(low, high, 5):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step in _ticks(least, most, 5):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{step:,.0f}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">step</text>'
                 f'<text transform="translate(12 {HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">'
                 f'{html.escape(unit)}</text>')
    ends = _apart({name: y(min(high, max(low, points[-1][1]))) for name, points in lines.items()})
    for number, (name, points) in enumerate(lines.items()):
        shown = [(step, value) for step, value in points if low <= value <= high]
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in shown)
        kind, dash = f"c{number % COLOURS}", DASHES[number // COLOURS % len(DASHES)]
        parts.append(f'<polyline class="{kind}" stroke-dasharray="{dash or "none"}" points="{path}"/>'
                     f'<line class="{kind}" stroke-dasharray="{dash or "none"}" x1="{WIDTH - RIGHT + 6}" '
                     f'x2="{WIDTH - RIGHT + 26}" y1="{ends[name]:.1f}" y2="{ends[name]:.1f}"/>'
                     f'<text x="{WIDTH - RIGHT + 31}" y="{ends[name] + 4:.1f}">{html.escape(_short(name))}</text>')
    return "".join([*parts, "</svg></figure>"])


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    every = max(1, len(points) // MOST_POINTS)
    return [*points[:-1:every], points[-1]]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within bounds, at most `most` + 1 of them."""
    rough = (high - low) / most or 1.0
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= rough)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _apart(places: Mapping[str, float]) -> dict[str, float]:
    """The same values in the same order, moved apart to 14 pixels, and up if they would leave the frame."""
    placed: dict[str, float] = {}
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        last = max(placed.values(), default=-math.inf)
        room = HEIGHT - BOTTOM - 14.0 * (len(places) - len(placed) - 1)
        placed[name] = max(min(place, room), last + 14.0)
    return placed


def _short(name: str) -> str:
    return name if len(name) <= 19 else f"{name[:9]}…{name[-9:]}"
