"""`t5x laws`: the laws of a study's mixture, from the losses of its runs.

    t5x laws studies/first --objective=text:0.5,code:0.5

Prints the best mixture and the laws, and writes to DIR/report:

  laws.json            every number: laws, intervals, outliers, predictions
  laws.svg, laws.pdf, laws.png   loss against share, where there are two sources
  ratios.csv, metrics.csv   the runs, in the format that Olmix reads
  predictions.csv      for the mixtures in --predict=FILE, whose columns are those of ratios.csv
"""

import csv
import io
import json
import math
from collections.abc import Sequence

import numpy as np
from etils import epath

from codellm_jax.report.law_page import as_json, blocks, plain, predictions
from codellm_jax.report.mixing import Analysis, analyse, parse_objective
from codellm_jax.report.pages import Block, Figure, Heading, Text, comma_separated
from codellm_jax.report.sweeps import as_files, read_sweep
from codellm_jax.results.files import write_whole
from codellm_jax.runtime.progress import StatusLine


def laws(directory: str, objective: str | None = None, size: str | None = None, tokens: str | None = None,
         mixtures: str | None = None) -> str:
    """Writes DIR/report/laws.json and the other files named above; returns the page as text.

    Args:
      directory: of a study, of any run directories, or of ratios.csv and metrics.csv.
      objective: weights of losses, such as "text:0.5,code:0.5"; all pools count equally where it is None.
      size: the parameters to predict for, such as "125M"; tokens: trained on, such as "2.5B".
      mixtures: a file of shares for which to predict the losses.

    Raises:
      FileNotFoundError: there is no such directory or file, or it holds no sweep.
      ValueError: with a one-line message; the runs make no sweep, or an objective or a number is invalid.
    """
    asked = _number("size", size), _number("tokens", tokens)
    sweep = read_sweep(directory)
    weights = parse_objective(objective, sweep)
    shares = None if mixtures is None else _mixtures(epath.Path(mixtures).expanduser(), sweep.sources)
    status: list[StatusLine] = []

    def told(done: int, total: int, text: str) -> None:
        if not status:
            status.append(StatusLine(0, total, active=True, unit="fit"))
        status[0].show(done, text)

    analysis = analyse(sweep, weights, *asked, told)
    status[0].close()
    page = blocks(analysis)
    folder = epath.Path(directory).expanduser() / "report"
    folder.mkdir(parents=True, exist_ok=True)
    files = {"laws.json": json.dumps(as_json(analysis), indent=1) + "\n"} | as_files(sweep)
    if shares is not None:
        files["predictions.csv"] = _predicted(analysis, shares)
    for name, text in files.items():
        write_whole(folder / name, text)
    for block in page:
        if isinstance(block, Figure):
            for name, content in block.files.items():
                (folder / name).write_bytes(content)
    return f"{plain(page)}\n\nAll numbers: {folder / 'laws.json'}"


def section(directory: str) -> list[Block]:
    """The laws of a study as a section of its report; for a study without a sweep, the reason why there are none."""
    try:
        sweep = read_sweep(directory)
        return blocks(analyse(sweep, parse_objective(None, sweep)))
    except (FileNotFoundError, ValueError) as error:
        return [Heading(2, "Laws of the mixture"), Text(f"There are none: {error}")]


def _number(flag: str, text: str | None) -> float:
    """A number such as 125M, 2.5B or 3e8; NaN for None."""
    if text is None:
        return math.nan
    scale = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}.get(text[-1:].lower(), 1.0)
    try:
        value = float(text[:-1] if scale != 1.0 else text) * scale
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"--{flag} must be a number above 0, such as 125M or 3e8, found {text!r}.")
    return value


def _mixtures(path: epath.Path, sources: Sequence[str]) -> np.ndarray:
    """The shares [m, S] in a file with a column for each source."""
    if not path.exists():
        raise FileNotFoundError(f"--predict: there is no file {path}.")
    lines = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"))))
    if not lines or (missing := [name for name in sources if name not in lines[0]]):
        raise ValueError(f"--predict: {path} has no column {missing[0] if lines else sources[0]}; each source of the "
                         f"sweep needs one: {', '.join(sources)}.")
    try:
        shares = np.array([[float(line[name]) for name in sources] for line in lines])
    except (TypeError, ValueError):
        raise ValueError(f"--predict: {path} has a share that is not a number.") from None
    if (shares < 0).any() or not np.allclose(shares.sum(axis=1), 1, atol=0.02):
        raise ValueError(f"--predict: the shares of each line of {path} must sum to 1, none below 0.")
    return shares / shares.sum(axis=1, keepdims=True)


def _predicted(analysis: Analysis, shares: np.ndarray) -> str:
    columns = [*analysis.sweep.sources]
    for name in analysis.sweep.losses:
        columns += [name, f"{name} low", f"{name} high", f"{name} run low", f"{name} run high"]
    rows = [[*line["shares"].values(), *(value for found in line["losses"].values() for value in (
        found["loss"], *found["interval"], *found["run_interval"]))] for line in predictions(analysis, shares)]
    return comma_separated(columns, rows)
