"""Draws the pictures of docs/concepts.md: python docs/pictures/draw.py writes them beside itself.

Where a picture shows rows or shares, they are those that the package draws (`mixture.schedules`).
"""

from pathlib import Path

import numpy as np

from codellm_jax.mixture.schedules import Schedule, phases

# Told apart by colour-blind readers, and in print.
TEXT, CODE, INK, FAINT, RED = "#4c78a8", "#e8913a", "#1b1f24", "#8a929b", "#c0392b"
FONT = "font-family='system-ui, sans-serif'"


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """An SVG on a white ground, so that it can be read on a dark page."""
    return (f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' {FONT}>\n"
            f"<title>{title}</title>\n<rect width='{width}' height='{height}' rx='8' fill='#ffffff'/>\n"
            "<defs><marker id='arrow' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
            "orient='auto'>"
            f"<path d='M0 0 L8 4 L0 8 z' fill='{INK}'/></marker></defs>\n" + "\n".join(parts) + "\n</svg>\n")


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='2' fill='{fill}' stroke='{stroke}'/>"


def words(x: float, y: float, text: str, size: int = 13, fill: str = INK, anchor: str = "start") -> str:
    return f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{fill}' text-anchor='{anchor}'>{text}</text>"


def line(x1: float, y1: float, x2: float, y2: float, arrow: bool = True, stroke: str = INK) -> str:
    end = " marker-end='url(#arrow)'" if arrow else ""
    return f"<path d='M{x1:g} {y1:g} L{x2:g} {y2:g}' stroke='{stroke}' stroke-width='1.4' fill='none'{end}/>"


def curve(points: np.ndarray, stroke: str, width: float = 2) -> str:
    """A line through points [n, 2]."""
    path = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f"<path d='M{path}' stroke='{stroke}' stroke-width='{width:g}' fill='none'/>"


def drawn(schedule: Schedule, rows: int) -> np.ndarray:
    """Whether each of the first rows is code, bool [rows]: the quota rises where it is."""
    return np.diff(schedule.quota(np.arange(rows + 1))) == 1


def legend(x: float, y: float) -> list[str]:
    return [box(x, y - 10, 12, 12, TEXT), words(x + 18, y, "text"), box(x + 62, y - 10, 12, 12, CODE),
            words(x + 80, y, "code")]


def pools() -> str:
    """Documents of two pools become rows of equally many tokens."""
    parts = [words(20, 28, "pool text", 14), words(20, 118, "pool code", 14)]
    for y, fill, lengths, names in ((40, TEXT, (90, 40, 70), ("text.books", "text.web")),
                                    (130, CODE, (50, 85, 60), ("code.python", "code.github"))):
        x = 20
        for number, length in enumerate(lengths):
            parts += [box(x, y, length, 26, fill), box(x + length - 5, y, 5, 26, INK)]
            x += length + 6
            if number == 0:
                parts.append(words(20, y + 44, names[0] + ", " + names[1], 12, FAINT))
        parts.append(line(x + 4, y + 13, x + 50, y + 13))
        parts.append(words(x + 2, y - 4, "tokenize, join, cut", 11, FAINT))
    parts += [words(370, 28, "rows of equally many tokens", 14)]
    for y, fill in ((40, TEXT), (130, CODE)):
        for number in range(3):
            parts += [box(370 + 92 * number, y, 84, 26, fill)]
        for end in ((75, 150) if fill == TEXT else (48, 130, 228)):
            parts.append(box(370 + end, y, 5, 26, INK))
    parts += [box(20, 190, 5, 14, INK), words(34, 202, "end of a document", 12, FAINT)]
    return picture(660, 216, "Documents of the pools text and code become rows of equally many tokens", parts)


def rates() -> str:
    """The batches that schedules of the share draw."""
    shown = (("CODE_RATE = 0.25", ["3:1"]), ("MIX_PHASES = ['3:1', '1:1']", ["3:1", "1:1"]),
             ("MIX_PHASES = ['1:0 to 1:1']", ["1:0 to 1:1"]),
             ("MIX_PHASES = ['1:0 to 1:1 cosine']", ["1:0 to 1:1 cosine"]))
    steps, batch, size, rows = 40, 8, 9, 40 * 8
    parts = legend(20, 28) + [words(180, 28, f"each column is a step with a batch of {batch} rows", 13, FAINT)]
    for number, (label, ratios) in enumerate(shown):
        is_code = drawn(phases(ratios, rows, batch), rows).reshape(steps, batch)
        top = 56 + number * (batch * size + 34)
        parts.append(words(20, top + 4, label, 13))
        for step in range(steps):
            count = int(is_code[step].sum())
            parts.append(box(20 + step * 15, top + 12, 13, (batch - count) * size, TEXT))
            parts.append(box(20 + step * 15, top + 12 + (batch - count) * size, 13, count * size, CODE))
    height = 56 + len(shown) * (batch * size + 34)
    return picture(640, height, "The share of code in each batch under four settings", parts)


def order() -> str:
    """Rows of code drawn minus rows asked for: by sampling at random, and by the closed form."""
    rows, share, left, top, height = 2000, 1 / 3, 70, 50, 170
    schedule = phases(["2:1"], rows)
    positions = np.arange(rows + 1)
    exact = schedule.quota(positions) - positions * share
    parts = [words(20, 28, "rows of code drawn minus rows asked for, CODE_RATE = 1/3", 14)]
    scale = height / 60

    def points(deviation: np.ndarray) -> np.ndarray:
        return np.stack([left + positions[::5] * (560 / rows), top + height / 2 - deviation[::5] * scale], axis=1)

    for value in (-20, 0, 20):
        y = top + height / 2 - value * scale
        parts += [line(left, y, left + 560, y, arrow=False, stroke="#d8dde3"),
                  words(left - 8, y + 4, f"{value:+d}" if value else "0", 12, FAINT, "end")]
    for seed in range(3):
        random = np.random.default_rng(seed).random(rows) < share
        parts.append(curve(points(np.concatenate([[0], np.cumsum(random)]) - positions * share), FAINT, 1.3))
    parts += [curve(points(exact), CODE, 2.5), words(left, top + height + 28, "0 rows", 12, FAINT),
              words(left + 560, top + height + 28, "2,000 rows", 12, FAINT, "end"),
              line(left + 90, top + height + 24, left + 120, top + height + 24, False, FAINT),
              words(left + 128, top + height + 28, "three seeds of random sampling", 12),
              line(left + 330, top + height + 24, left + 360, top + height + 24, False, CODE),
              words(left + 368, top + height + 28, "this package", 12)]
    return picture(660, 264, "Random sampling drifts by tens of rows; the closed form stays within half a row", parts)


def stages() -> str:
    """The stages of a model, and where the paper's arms have code."""
    parts = [*legend(500, 28), words(20, 28, "stages of training, from left to right", 14)]
    columns = ((130, 200, "pre-training"), (340, 120, "mid-training"), (470, 60, "cooldown"), (540, 100, "tuning"))
    for x, width, name in columns:
        parts.append(words(x + width / 2, 58, name, 13, INK, "middle"))
    arms = (("NN", (0, None, None, 0)), ("NC", (0, None, None, 3 / 8)), ("CC", (1 / 3, None, None, 3 / 8)),
            ("code late", (0, 1 / 2, 1 / 4, 3 / 8)))
    for number, (name, shares) in enumerate(arms):
        y = 72 + number * 44
        parts.append(words(20, y + 19, name, 13))
        for (x, width, _), share in zip(columns, shares, strict=True):
            if share is None:
                parts.append(line(x, y + 14, x + width, y + 14, False, "#d8dde3"))
                continue
            parts += [box(x, y, width, 28 * (1 - share), TEXT), box(x, y + 28 * (1 - share), width, 28 * share, CODE)]
    return picture(660, 256, "Four arms: code in no stage, in tuning, in pre-training and tuning, and late", parts)


def branches() -> str:
    """A trunk, and branches that read on where it stood."""
    parts = [*legend(500, 28), words(20, 28, "a trunk and its branches: each reads on where the trunk stood", 14)]
    left, unit = 60, 50
    rows = ((60, 0, 10, ["text"] * 10, "TEXT"), (120, 5, 10, ["mixed"] * 5, "TEXT@0.5, half code"),
            (180, 8, 10, ["code"] * 2, "TEXT@0.8, code alone"))
    for y, first, last, kinds, name in rows:
        for step in range(first, last):
            kind, x = kinds[step - first], left + step * unit
            share = {"text": 0.0, "mixed": 0.5, "code": 1.0}[kind]
            parts += [box(x, y, unit - 3, 24 * (1 - share), TEXT),
                      box(x, y + 24 * (1 - share), unit - 3, 24 * share, CODE)]
        if first == 0:
            parts.append(words(left, y - 6, name, 12))
        else:
            parts.append(words(left + first * unit - 12, y + 17, name, 12, INK, "end"))
            parts.append(line(left + first * unit + 6, 86, left + first * unit + 6, y - 1))
    parts += [words(left, 236, "step 0", 12, FAINT), words(left + 10 * unit, 236, "last step", 12, FAINT, "end"),
              words(left + 5 * unit, 236, "optimizer, random state and place in the data are taken over", 12, FAINT,
                    "middle")]
    return picture(660, 250, "A branch starts from a kept checkpoint and reads on in its trunk's data", parts)


def ledger() -> str:
    """What a checkpoint holds, and what a resume checks."""
    parts = [words(20, 28, "the ledger: counted in training, saved with checkpoints, checked at each resume", 14)]
    heads, table = ("source", "rows", "tokens", "epochs"), (
        ("text.python", "2,133", "546,048", "0.85"), ("code.python", "1,067", "273,152", "0.13"))
    parts.append(box(20, 48, 330, 108, "#f5f7f9", "#d8dde3"))
    for place, head in zip((32, 190, 265, 338), heads, strict=True):
        parts.append(words(place, 70, head, 12, FAINT, "start" if place == 32 else "end"))
    for number, values in enumerate(table):
        for place, value in zip((32, 190, 265, 338), values, strict=True):
            parts.append(words(place, 98 + 28 * number, value, 13, INK, "start" if place == 32 else "end"))
    parts += [line(352, 102, 420, 102), words(386, 94, "resume", 12, FAINT, "middle"),
              box(424, 48, 216, 108, "#ffffff", "#8a929b"), words(436, 72, "the order, computed anew", 13),
              words(436, 94, "quota(text, row 3,200) = 2,133", 12, FAINT),
              words(436, 114, "quota(code, row 3,200) = 1,067", 12, FAINT),
              words(436, 140, "equal: training continues", 13), words(20, 184, "Where they differ, the run refuses to "
              "continue and names the source.", 13, RED)]
    return picture(660, 200, "The ledger counts what was trained on and is checked against the order", parts)


PICTURES = {"pools": pools, "rates": rates, "order": order, "stages": stages, "branches": branches, "ledger": ledger}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (Path(__file__).parent / f"{name}.svg").write_text(draw(), encoding="utf-8")
