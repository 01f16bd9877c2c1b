"""A sweep of shares as a table: the runs of a study, or `ratios.csv` and `metrics.csv` in the format of Olmix.

Olmix (Chen et al., 2026) stores a sweep in two files with a line for each run, joined by the column `run` or `run_id`:
`ratios.csv` has the share of each source, `metrics.csv` the losses. Here either file may also have the columns `seed`,
`parameters` and `tokens`, and a run may have lines at several token counts.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from codellm_jax.report.pages import comma_separated
from codellm_jax.report.questions import asked
from codellm_jax.report.runs import (
    Contamination,
    Result,
    name_and_seed,
    read_contamination,
    read_json,
    read_results,
    require_same_measurement,
)
from codellm_jax.results.files import Damaged, read_provenance, require_plain_runs
from codellm_jax.runtime.progress import read_records

SAME_SHARE = 0.002  # smaller differences between two arms' shares count as none: the draw was half a row off
CHECKPOINTS = 5  # the most per run used for how losses fall with its length
EARLIEST = 0.25  # of a run; earlier checkpoints are not used
NAMED = 3  # the most names printed of runs that are left out
IDS = ("run", "run_id", "index")
NO_SOURCES = ("", "run", "run_id", "name", "index", "seed", "parameters", "tokens")
POOLS = ("text", "code")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The losses of runs, with a line for each run and each length at which it was evaluated.

    Attributes:
      name: of the study.
      runs: [n] names.
      seeds: [n]; None where unknown.
      sources: [S] what the shares refer to: pools where only the pools' shares vary, else sources.
      shares: [n, S], each line sums to 1.
      losses: [D] names.
      values: [n, D] in nats per token, or the metric of a file; NaN where there is none.
      parameters, tokens: [n] of the model and of its training; NaN where unknown.
      final: [n] whether the line belongs to the end of its run.
      epochs: [n, S] of each source; NaN where unknown.
      notes: facts for the reader, such as the runs that were left out.
      units: the units of losses by name, shown to readers; names that are absent have that of a loss.
      more_is_better: names of the measures of benchmarks, among `losses`, for which higher is better.
      questions: for measures of benchmarks by name, [n, q], the contribution of each question, whose mean is the value;
        NaN where there is none.
    """

    name: str
    runs: Sequence[str]
    seeds: Sequence[int | None]
    sources: Sequence[str]
    shares: np.ndarray
    losses: Sequence[str]
    values: np.ndarray
    parameters: np.ndarray
    tokens: np.ndarray
    final: np.ndarray
    epochs: np.ndarray
    notes: Sequence[str] = ()
    units: Mapping[str, str] = dataclasses.field(default_factory=dict)
    more_is_better: frozenset[str] = frozenset()
    questions: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def only(self, lines: np.ndarray) -> "Sweep":
        """The sweep restricted to some lines, by a mask or indices."""
        numbers = np.arange(len(self.runs))[lines]
        return dataclasses.replace(
            self, runs=[self.runs[n] for n in numbers], seeds=[self.seeds[n] for n in numbers],
            questions={name: values[numbers] for name, values in self.questions.items()},
            **{name: getattr(self, name)[numbers] for name in
               ("shares", "values", "parameters", "tokens", "final", "epochs")})

    def of(self, losses: Sequence[str]) -> "Sweep":
        """The sweep restricted to some losses."""
        places = [self.losses.index(name) for name in losses]
        return dataclasses.replace(
            self, losses=list(losses), values=self.values[:, places],
            questions={name: values for name, values in self.questions.items() if name in losses})

    @property
    def groups(self) -> np.ndarray:
        """[n] the index of each line's share, in order of appearance."""
        found: list[np.ndarray] = []
        numbers = []
        for line in self.shares:
            number = next((n for n, other in enumerate(found) if np.abs(line - other).max() < SAME_SHARE), len(found))
            if number == len(found):
                found.append(line)
            numbers.append(number)
        return np.array(numbers, int)


def read_sweep(directory: str) -> Sweep:
    """The sweep of a study's directory, of any folder of run directories, or of a folder with ratios.csv and
    metrics.csv.

    Raises:
      FileNotFoundError: the directory does not exist, or holds no sweep.
      ValueError: with a one-line message; the runs make no sweep, or the files do not fit together.
    """
    folder = epath.Path(directory).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no directory {folder}: name that of a study, or one that holds ratios.csv "
                                "and metrics.csv.")
    files = [folder / name for name in ("ratios.csv", "metrics.csv")]
    if any(file.exists() for file in files):
        if missing := [file for file in files if not file.exists()]:
            raise FileNotFoundError(f"{missing[0]} is missing: a sweep in files consists of ratios.csv and "
                                    "metrics.csv.")
        sweep = read_files(*files)
    else:
        sweep = read_runs(folder)
    if (number := len(np.unique(sweep.groups))) < 3:
        found = [describe(sweep.sources, line) for line in sweep.shares[np.unique(sweep.groups, return_index=True)[1]]]
        raise ValueError(f"{folder}: the runs have only {'one share' if number == 1 else 'two shares'} "
                         f"({'; '.join(found)}): a law needs three or more.")
    return sweep


def describe(sources: Sequence[str], shares: np.ndarray) -> str:
    """A mixture as text, such as "text 0.75, code 0.25"."""
    return ", ".join(f"{source} {share:.3g}" for source, share in zip(sources, shares, strict=True))


def read_files(ratios: epath.Path, metrics: epath.Path) -> Sweep:
    """Olmix's two files. Raises ValueError with a one-line message where they do not fit together."""
    (by_run, sources), (losses_of, losses) = _table(ratios), _table(metrics)
    if extra := sorted({key for key, _ in by_run} ^ {key for key, _ in losses_of}):
        here, there = (ratios, metrics) if extra[0] in {key for key, _ in by_run} else (metrics, ratios)
        raise ValueError(f"run {extra[0]} is in {here.name} but not in {there.name}: each run needs a line in both.")
    lines = []
    for key, cells in losses_of:
        of_run = next(cells for other, cells in by_run if other == key)
        lines.append((key, of_run, of_run | cells))
    shares = np.array([[_number(cells[name], ratios, name) for name in sources] for _, cells, _ in lines])
    totals = shares.sum(axis=1)
    off = (np.abs(totals - 1) > 0.02) | (shares < 0).any(axis=1)
    if off.any():
        wrong = int(np.argmax(off))
        raise ValueError(f"{ratios}: the shares of run {lines[wrong][0]} sum to {totals[wrong]:.4g}; they must sum to "
                         "1, and none may be negative. Columns that are not sources must be named "
                         f"{', '.join(name for name in NO_SOURCES if name)}.")
    kept = (shares > 0).any(axis=0)
    shares = shares[:, kept] / totals[:, None]
    values = np.array([[_number(cells[name], metrics, name) for name in losses] for _, _, cells in lines])
    facts = {name: np.array([_number(cells.get(name) or "nan", metrics, name) for _, _, cells in lines])
             for name in ("seed", "parameters", "tokens")}
    names = [key for key, _, _ in lines]
    last: dict[str, float] = {}
    for name, tokens in zip(names, facts["tokens"], strict=True):
        last[name] = max(tokens, last.get(name, tokens))
    return Sweep(
        ratios.parent.name, names, [name_and_seed(name)[1] if math.isnan(seed) else int(seed)
                                    for name, seed in zip(names, facts["seed"], strict=True)],
        [sources[place] for place in np.flatnonzero(kept)], shares, losses, values,
        facts["parameters"], facts["tokens"], np.array([
            math.isnan(tokens) or tokens == last[name] for name, tokens in zip(names, facts["tokens"], strict=True)]),
        np.full(shares.shape, np.nan))


def _table(path: epath.Path) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """(run, cells by column) of each line, and the columns that are not facts about the run."""
    lines = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"))))
    columns = list(lines[0]) if lines else []
    key = next((name for name in IDS if name in columns), None)
    named = [name for name in columns if name not in NO_SOURCES]
    if key is None or not named:
        raise ValueError(f"{path} must have a line for each run, a column run or run_id, and columns of its "
                         f"sources or losses, found {', '.join(map(str, columns[:6])) or 'nothing'}.")
    if short := [number for number, line in enumerate(lines, 2) if None in line or None in line.values()]:
        raise ValueError(f"{path}, line {short[0]}: its number of cells differs from the number of columns.")
    return [(line[key], line) for line in lines], named


def _number(text: str, path: epath.Path, column: str) -> float:
    try:
        return float(text) if text.strip() else math.nan
    except ValueError:
        raise ValueError(f"{path}: column {column} has {text!r}, which is not a number. Columns that are not sources "
                         f"or losses must be named {', '.join(name for name in NO_SOURCES if name)}.") from None


def read_runs(folder: epath.Path) -> Sweep:
    """The largest sweep among the runs of a study, or of a folder of run directories: runs of one stage with the same
    start and a constant mix. Raises as `read_sweep`.
    """
    plan = read_json(folder / "study.json")
    below = folder / "runs" if (folder / "runs").is_dir() else folder
    listed = (plan or {}).get("runs", []) if isinstance(plan, dict | None) else None
    if not isinstance(listed, list):
        raise ValueError(f"{folder / 'study.json'} lists no runs: create it again with t5x study.")
    require_plain_runs(folder / "study.json", listed)
    entries = {entry["run"]: entry for entry in listed}
    names = list(entries) or sorted(path.name for path in below.iterdir() if (path / "metrics.jsonl").exists())
    sweeps: dict[tuple[Any, ...], list[_Read]] = {}
    notes = []
    for name in names:
        if not (below / name).is_dir():
            continue
        read = _read(below / name, entries.get(name, {}))
        if isinstance(read, str):
            notes.append(f"{name} is left out: {read}.")
        else:
            sweeps.setdefault(read.kind, []).append(read)
    if not sweeps:
        raise FileNotFoundError(f"No run in {below} has losses on held-out rows and a ledger: train a sweep, such as "
                                "{'RATE': {'sweep': {'CODE_RATE': [0.0, 0.25, 0.5]}}}, with an EVAL_PERIOD."
                                + (f" {notes[0]}" if notes else ""))
    runs = max(sweeps.values(), key=lambda runs: (len({tuple(run.rows.items()) for run in runs}), len(runs)))
    _require_alike(runs)
    if others := [other.name for group in sweeps.values() if group is not runs for other in group]:
        named = f"{', '.join(others[:NAMED])}{f' and {len(others) - NAMED} more' * (len(others) > NAMED)}"
        notes.append(f"Left out, because they have another stage or start from another arm: {named}.")
    return _with_benchmarks(_sweep(folder.name, runs, notes), runs, read_contamination(folder))


@dataclasses.dataclass(frozen=True)
class _Read:
    name: str
    seed: int | None
    kind: tuple[Any, ...]
    rows: Mapping[str, int]
    epoch_rows: Mapping[str, int]
    tokens: float
    parameters: float
    evaluations: Sequence[Mapping[str, Any]]  # the last is at the end
    vocabulary: str
    data: Mapping[str, str]
    results: Mapping[str, Result]


def _read(path: epath.Path, entry: Mapping[str, Any]) -> _Read | str:
    """A run, or the reason why it is left out."""
    try:
        provenance = read_provenance(path) or {}
    except Damaged:
        return "its provenance.json is damaged"
    ledger = provenance.get("ledger") or {}
    evaluations = [line for line in read_records(str(path)) if line["split"] == "eval"
                   and any(name.startswith("loss/") and value is not None for name, value in line.items())]
    if not evaluations:
        return "it has no losses on held-out rows"
    if not sum(ledger.get("rows", {}).values()):
        return "its provenance.json has no ledger"
    if provenance.get("finished") is False:
        return "it is not trained to its end"
    if _changes(ledger):
        return "its mix changes while it trains"
    parent = name_and_seed(str(entry.get("from") or "").partition("@")[0])[0]
    before = [(stage.get("stage"), _share_of_code(stage)) for stage in ledger.get("before", [])]
    seed = next((int(known) for known in (entry.get("seed"), provenance.get("seed"), name_and_seed(path.name)[1])
                 if known is not None), None)
    return _Read(path.name, seed, (ledger.get("stage"), parent, str(before)), ledger["rows"],
                 ledger.get("epoch_rows", {}), float(sum(ledger.get("tokens", {}).values()) or math.nan),
                 float(provenance.get("parameters") or math.nan), evaluations, str(ledger.get("vocabulary_hash")),
                 provenance.get("data") or {}, read_results(path, path.name))


def _changes(ledger: Mapping[str, Any]) -> bool:
    phases = [phase for phase in ledger.get("phases", []) if sum(phase["rows"].values())]
    codes = [_share_of_code(phase) for phase in phases]
    return bool(codes) and max(codes) - min(codes) > 0.02


def _share_of_code(counts: Mapping[str, Any]) -> float:
    rows = counts.get("rows", {})
    return round(sum(count for name, count in rows.items() if name.startswith("code.")) / max(1, sum(rows.values())), 3)


def _require_alike(runs: Sequence[_Read]) -> None:
    first = runs[0]
    for run in runs:
        if run.vocabulary != first.vocabulary:
            raise ValueError(f"{first.name} and {run.name} have different vocabularies, so their losses must not "
                             "stand in one law: leave one of them out.")
        for source in run.data.keys() & first.data.keys():
            if run.data[source] != first.data[source]:
                raise ValueError(f"{first.name} and {run.name} were trained on different data under the name {source}: "
                                 "leave one of them out.")


def _sweep(name: str, runs: Sequence[_Read], notes: list[str]) -> Sweep:
    sources = list(dict.fromkeys(source for run in runs for source in run.rows))
    rows = np.array([[run.rows.get(source, 0) for source in sources] for run in runs], float)
    of_epoch = np.array([[run.epoch_rows.get(source, math.nan) for source in sources] for run in runs])
    in_pools, pools = _pools(sources, rows)
    if pools:
        rows, sources = rows @ in_pools, list(pools)
        of_epoch = of_epoch @ in_pools
    shares = rows / rows.sum(axis=1, keepdims=True)
    losses = [loss for loss in dict.fromkeys(
        found.removeprefix("loss/") for run in runs for found, value in run.evaluations[-1].items()
        if found.startswith("loss/") and value is not None)]
    losses = [loss for loss in losses if loss in POOLS or not any(  # a source that equals its pool adds nothing
        all(run.evaluations[-1].get(f"loss/{loss}") == run.evaluations[-1].get(f"loss/{pool}") for run in runs)
        for pool in POOLS)]
    lines: list[tuple[int, Mapping[str, Any], float]] = []
    for number, run in enumerate(runs):
        last = run.evaluations[-1]["step"]
        late = [line for line in run.evaluations if line["step"] >= EARLIEST * last and line["step"] > 0]
        chosen = {round(place) for place in np.linspace(0, len(late) - 1, min(CHECKPOINTS, len(late)))}
        lines += [(number, late[place], run.tokens * late[place]["step"] / last) for place in sorted(chosen)]
    of_run = np.array([number for number, _, _ in lines])
    tokens = np.array([tokens for _, _, tokens in lines])
    return Sweep(
        name, [runs[number].name for number in of_run], [runs[number].seed for number in of_run], sources,
        shares[of_run], losses, np.array([[_or_nan(line.get(f"loss/{loss}")) for loss in losses]
                                          for _, line, _ in lines]),
        np.array([runs[number].parameters for number in of_run]), tokens,
        np.array([line is runs[number].evaluations[-1] for number, line, _ in lines]),
        rows[of_run] / of_epoch[of_run], notes)


def _with_benchmarks(sweep: Sweep, runs: Sequence[_Read], contamination: Contamination | None) -> Sweep:
    """The sweep with the measures of benchmarks, TASK/MEASURE, at runs' ends; questions that training sources contain
    are left out.
    """
    require_same_measurement(run.results for run in runs)
    names, columns, questions, units, more = list(sweep.losses), [sweep.values], {}, {}, set()
    for task in dict.fromkeys(task for run in runs for task in run.results):
        results = {run.name: run.results[task] for run in runs if task in run.results}
        overlaps = contamination and contamination.of(next(iter(results.values())).result)
        for measure in asked(results, frozenset().union(*overlaps.sources.values()) if overlaps else frozenset()):
            name, number = f"{task}/{measure.metric}", len(next(iter(measure.values.values())))
            values = np.full((len(sweep.runs), 1 + number), np.nan)
            for line in np.flatnonzero(sweep.final).tolist():
                if (run := sweep.runs[line]) in measure.values:
                    values[line] = measure.scores[run], *measure.values[run]
            names.append(name)
            columns.append(values[:, :1])
            questions[name], units[name] = values[:, 1:], measure.unit or "fraction"
            more |= {name} if measure.better == "higher" else set()
    return dataclasses.replace(sweep, losses=names, values=np.concatenate(columns, axis=1), questions=questions,
                               units=dict.fromkeys(sweep.losses, "nats per token") | units,
                               more_is_better=frozenset(more))


def _or_nan(value: Any) -> float:
    return math.nan if value is None else float(value)


def _pools(sources: Sequence[str], rows: np.ndarray) -> tuple[np.ndarray, Sequence[str]]:
    """Sources to pools [sources, pools] and the pools, where the sources of each of two pools keep their proportions.
    """
    of_pool = [source.partition(".")[0] for source in sources]
    if set(of_pool) != set(POOLS):
        return np.zeros((0, 0)), ()
    member = np.array([[one == pool for pool in POOLS] for one in of_pool], float)
    totals = rows @ member
    for place, pool in enumerate(POOLS):
        mine = [number for number, one in enumerate(of_pool) if one == pool]
        inside = [line[mine] / total[place] for line, total in zip(rows, totals, strict=True) if total[place] > 20]
        if inside and np.ptp(inside, axis=0).max() > 0.02:
            return np.zeros((0, 0)), ()
    return member, POOLS


def as_files(sweep: Sweep) -> dict[str, str]:
    """ratios.csv and metrics.csv of the runs' ends, in the format of Olmix."""
    ends = sweep.only(sweep.final)
    return {"ratios.csv": comma_separated(["run", *sweep.sources], [
                [run, *shares] for run, shares in zip(ends.runs, ends.shares.tolist(), strict=True)]),
            "metrics.csv": comma_separated(["run", *sweep.losses], [
                [run, *(None if math.isnan(value) else value for value in values)]
                for run, values in zip(ends.runs, ends.values.tolist(), strict=True)])}
