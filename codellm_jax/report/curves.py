"""`t5x plot`: training and held-out losses of any runs in one figure.

    t5x plot runs/NL.seed0 runs/MID.seed0 --output=losses.svg

The curve of a branched run continues that of its trunk, which is dotted up to the branch. Steps and tokens of a branch
are counted from the start of its trunk.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from codellm_jax.report import plots
from codellm_jax.results.files import read_provenance
from codellm_jax.runtime.progress import read_records

PANELS = {"Training": ("train", "loss"), "Held-out text": ("eval", "loss/text"), "Held-out code": ("eval", "loss/code")}
Points = list[tuple[float, float, float]]


class Curves(NamedTuple):
    """The losses of a run: points (step, tokens, loss) of each panel, with those of its trunks apart."""

    own: Mapping[str, Points]
    trunk: Mapping[str, Points]
    counted: Sequence[tuple[float, float]]  # (step, tokens) from the first step of its first trunk on
    notes: Sequence[str]


def plot(runs: Sequence[str], output: str | None = None, against: str = "steps") -> str:
    """Draws the losses of runs and returns a line that names the file written.

    Args:
      runs: run directories.
      output: a file name ending in .png, .svg or .pdf; by default RUN/losses.png for one run, otherwise losses.png.
      against: "steps" or "tokens".

    Raises:
      FileNotFoundError: a run, or its records, do not exist.
      ValueError: with a one-line message; the output has another suffix, or no run has a loss.
    """
    folders = [epath.Path(run).expanduser() for run in runs]
    path = epath.Path(output).expanduser() if output else folders[0] / "losses.png" if len(runs) == 1 else epath.Path(
        "losses.png")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output must end in .png, .svg or .pdf, found {output}.")
    names = [folder.name for folder in folders]
    column = ("steps", "tokens").index(against)
    lines: dict[str, list[plots.Line]] = {}
    notes: list[str] = []
    for folder, name in zip(folders, names, strict=True):
        curves = read_curves(folder)
        notes += curves.notes
        for title in PANELS:
            points, trunk = ([(point[column], point[2]) for point in part.get(title, [])]
                             for part in (curves.own, curves.trunk))
            if points or trunk:
                lines.setdefault(title, []).append(plots.Line(
                    name if names.count(name) == 1 else str(folder), points, trunk))
    if not lines:
        raise ValueError(f"{', '.join(runs)}: no loss is recorded yet. Train with a LOG_PERIOD or an EVAL_PERIOD.")
    figure = plots.runs({title: lines[title] for title in PANELS if title in lines}, against)
    path.write_bytes({".png": figure.png, ".svg": figure.svg, ".pdf": figure.pdf}[path.suffix])
    return "\n".join([*notes, f"Losses of {', '.join(names)}: {path}"])


def read_curves(folder: epath.Path, branches: Collection[epath.Path] = ()) -> Curves:
    """The losses of a run directory and of the runs it branches from. Raises FileNotFoundError where there are none.

    Args:
      folder: the run directory.
      branches: the runs that branch from it; it cannot branch from them.
    """
    if not (folder / "metrics.jsonl").exists():
        raise FileNotFoundError(f"There is no {folder / 'metrics.jsonl'}: name a trained run.")
    records = read_records(str(folder))
    ledger = (read_provenance(folder) or {}).get("ledger") or {}
    step, before, notes = 0.0, None, []
    if branch := ledger.get("branch"):
        step = float(branch["step"])
        named = epath.Path(ledger["before"][-1]["model_dir"])
        found = [path for path in (named, folder.parent / named.name)
                 if (path / "metrics.jsonl").exists() and path not in (folder, *branches)]
        if found:  # the second place is that of a study that was moved
            before = read_curves(found[0], (folder, *branches))
        else:
            notes = [f"{folder.name} is drawn without its trunk {named}, which is not there."]
    counted = [point for point in before.counted if point[0] <= step] if before else []
    so_far = _at([step], before.counted)[0] if before else 0.0
    counted = [*counted, (step, so_far), *((line["step"], so_far + line["tokens"]) for line in records
                                           if line["split"] == "train" and line.get("tokens") is not None)]
    own: dict[str, Points] = {}
    for title, (split, name) in PANELS.items():
        told = [(line["step"], line[name]) for line in records
                if line["split"] == split and line.get(name) is not None]
        tokens = _at([at for at, _ in told], counted)
        own[title] = [(at, of_tokens, loss) for (at, loss), of_tokens in zip(told, tokens, strict=True)]
    trunk = {title: [*before.trunk[title], *(point for point in before.own[title] if point[0] <= step)]
             for title in PANELS} if before else {title: [] for title in PANELS}
    return Curves(own, trunk, counted, [*notes, *(before.notes if before else ())])


def _at(steps: Sequence[float], counted: Sequence[tuple[float, float]]) -> list[float]:
    """The tokens that were counted up to each of these steps."""
    return np.interp(steps, [at for at, _ in counted], [tokens for _, tokens in counted]).tolist()
