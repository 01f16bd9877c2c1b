"""Compares two runs on the same questions, by paired tests corrected for multiple comparisons.

    t5x compare runs/tune_text runs/tune_mixed

Accuracies come with the other measures of the same questions (`results.measures`), which can distinguish small models
where accuracy cannot.

Only tasks on which both runs were evaluated are compared, and only if the questions were identical, including template
and data. The stages of the runs are also listed, because a difference is due to one of them only if the others are
equal.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from codellm_jax.mixture.ledger import rows_of_code, stages_of
from codellm_jax.results.answers import Compared, compared, is_measured, ties_of
from codellm_jax.results.files import files_of, finished_lines, read_provenance, read_result
from codellm_jax.results.levels import detectable_by_error, detectable_paired
from codellm_jax.results.measures import MEASURES, UNITS, values
from codellm_jax.results.statistics import Interval, holm, mcnemar, paired_bootstrap, sign_flips


class OfMeasure(NamedTuple):
    """One of `results.measures` beside an accuracy, in its unit; the second run's minus the first's."""

    name: str
    unit: str
    n: int  # questions with this measure
    first: float
    second: float
    found: Compared
    corrected: float  # p by Holm's method, over the tasks with this measure


class Comparison(NamedTuple):
    """One task; fractions of 1. Differences are the second run's minus the first's."""

    task: str
    n: int
    first: float
    second: float
    interval: Interval  # of the difference, 95%, by paired bootstrap
    only_first: int | None  # questions that only the first run answers correctly; None where scores are graded
    only_second: int | None
    p_value: float  # of McNemar's exact test, sign flips, or the paired bootstrap
    corrected: float  # by Holm's method, over the tasks
    detectable: float | None  # the smallest difference that these questions can show
    ties: tuple[int, int] = (0, 0)  # of each run; they count 1 / k
    measures: tuple[OfMeasure, ...] = ()  # other than the accuracy


class NotMeasured(NamedTuple):
    """A task without a result, because most questions of a run are ties."""

    task: str
    n: int
    ties: tuple[int, int]  # of each run


def compare(first: str, second: str) -> list[Comparison | NotMeasured]:
    """The tasks for which both run directories have results, by name.

    Raises:
      FileNotFoundError: a run has no results, or the two have no task in common.
      ValueError: a task's questions or scoring differ between the runs.
    """
    results = [_results(first), _results(second)]
    tasks = sorted(results[0].keys() & results[1].keys())
    if not tasks:
        raise FileNotFoundError(f"{first} was evaluated on {', '.join(results[0])} and {second} on "
                                f"{', '.join(results[1])}: evaluate both on the same tasks.")
    found: list[Comparison | NotMeasured] = []
    for task in tasks:
        (one, lines), (other, other_lines) = (pair[task] for pair in results)
        for name in ("questions", "scoring", "sampling", "samples", "version"):
            if one["settings"].get(name) != other["settings"].get(name):
                raise ValueError(f"{task}: the {name} of {first} and {second} differ, so they cannot be paired: "
                                 "evaluate both with the same files, settings and version.")
        ties = ties_of(lines), ties_of(other_lines)
        if not is_measured(lines) or not is_measured(other_lines):
            found.append(NotMeasured(task, len(lines), ties))
            continue
        metric = "correct" if one["metric"] == "accuracy" else one["metric"]
        ours, theirs = ([float(line[metric]) for line in each] for each in (lines, other_lines))
        n, difference = len(ours), paired_bootstrap(theirs, ours)
        measures = _measures(lines, other_lines, one["settings"].get("scoring", "per_token"))
        if set(ours) | set(theirs) <= {0.0, 1.0}:
            test = mcnemar([value == 1 for value in ours], [value == 1 for value in theirs])
            found.append(Comparison(
                task, n, one["value"], other["value"], difference.interval, test.only_first, test.only_second,
                test.p_value, 1.0, detectable_paired(n, (test.only_first + test.only_second) / n), ties, measures))
        else:
            p_value = sign_flips(theirs, ours) if metric == "correct" else difference.p_value
            found.append(Comparison(
                task, n, one["value"], other["value"], difference.interval, None, None, p_value, 1.0,
                detectable_by_error(difference.standard_error), ties, measures))
    return _corrected(found)


def _measures(lines: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]],
              scoring: str) -> tuple[OfMeasure, ...]:
    """The measures of two runs on the same questions other than the accuracy; none for written answers."""
    ours, theirs = (values(each, scoring) for each in (lines, others))
    found = []
    for measure in MEASURES:
        one, other = (of_run[measure.name][np.isfinite(of_run[measure.name])] for of_run in (ours, theirs))
        if measure.name != "accuracy" and len(one):
            unit = UNITS[scoring] if measure.name == "margin" else measure.unit
            found.append(OfMeasure(measure.name, unit, len(one), one.mean(), other.mean(),
                                   compared([other], [one], measure.name, paired=False), 1.0))
    return tuple(found)


def _corrected(found: Sequence[Comparison | NotMeasured]) -> list[Comparison | NotMeasured]:
    """The comparisons with p-values corrected for the number of tasks, separately for each measure."""
    told = [one for one in found if isinstance(one, Comparison)]
    scores = _holm_by_task({one.task: one.p_value for one in told})
    beside = {measure.name: _holm_by_task({one.task: of.found.p_value for one in told for of in one.measures
                                           if of.name == measure.name}) for measure in MEASURES}
    return [one if isinstance(one, NotMeasured) else one._replace(
        corrected=scores[one.task],
        measures=tuple(of._replace(corrected=beside[of.name][one.task]) for of in one.measures)) for one in found]


def _holm_by_task(p_values: Mapping[str, float]) -> dict[str, float]:
    return dict(zip(p_values, holm(list(p_values.values())), strict=True)) if p_values else {}


def _results(run: str) -> dict[str, tuple[Mapping[str, Any], list[dict[str, Any]]]]:
    """For each task of a run, its result and the lines of its questions."""
    folder = epath.Path(run).expanduser() / "results"
    found: dict[str, tuple[Mapping[str, Any], list[dict[str, Any]]]] = {}
    for path in files_of(folder, ".json"):
        result = read_result(path)
        lines = finished_lines(path.with_suffix(".jsonl"), result)
        if lines is None:
            raise ValueError(f"{path.stem} of {run}: its lines do not match its result; evaluate it to the end.")
        found[path.stem] = result, lines
    if not found:
        raise FileNotFoundError(f"No results in {folder}: run t5x eval --gin_file=gin/eval.gin "
                                f"--gin.CHECKPOINT_PATH={run} first.")
    return found


def table(comparisons: Sequence[Comparison | NotMeasured], first: str, second: str) -> str:
    """Lines of text, in per cent."""
    lines = [f"A = {first}", f"B = {second}", "",
             f"{'task':<24} {'n':>6} {'A':>7} {'B':>7} {'B - A':>7} {'95% interval':>15} {'A only':>7} {'B only':>7} "
             f"{'p':>8} {'p, Holm':>8} {'detectable':>11}"]
    for one in comparisons:
        if isinstance(one, NotMeasured):
            lines.append(f"{one.task:<24} {one.n:>6,} not measured: most questions are ties, {one.ties[0]:,} in A and "
                         f"{one.ties[1]:,} in B")
            continue
        low, high = (100 * bound for bound in one.interval)
        detectable = "-" if one.detectable is None else f"{100 * one.detectable:.1f}"
        only = ["-" if count is None else f"{count:,}" for count in (one.only_first, one.only_second)]
        lines.append(
            f"{one.task:<24} {one.n:>6,} {100 * one.first:>7.2f} {100 * one.second:>7.2f} "
            f"{100 * (one.second - one.first):>+7.2f} {f'{low:+.1f} - {high:+.1f}':>15} {only[0]:>7} "
            f"{only[1]:>7} {one.p_value:>8.4f} {one.corrected:>8.4f} {detectable:>11}")
        lines += [_row_of_measure(measure) for measure in one.measures]
        if any(one.ties):
            lines.append(f"  ties, which count 1 / k: {one.ties[0]:,} in A and {one.ties[1]:,} in B")
    told = [one for one in comparisons if isinstance(one, Comparison)]
    beside = any(one.measures for one in told) * [
        "", "Below an accuracy, of the right answer: bits per byte, lower is better; the margin over the best "
        "wrong answer; the probability among the candidates, in per cent. Their p is that of Student's "
        "test of the questions' differences, and Holm's correction takes each measure by itself."]
    return "\n".join([
        *lines, *beside, "", "p: McNemar's exact test on the questions that only one run answers correctly; with ties, "
        "a test of the differences against random signs; for graded answers, a paired bootstrap. Holm: "
        f"corrected for {len(told)} tasks."])


def _row_of_measure(one: OfMeasure) -> str:
    """The table's line for a measure; probabilities in per cent, others in their unit."""
    name, scale, digits = {"bits_per_byte": ("bits per byte", 1, 3), "probability": ("probability", 100, 2)}.get(
        one.name, (f"{one.name}, {one.unit}", 1, 3))
    interval = one.found.interval and " - ".join(f"{scale * bound:+.{digits}f}" for bound in one.found.interval)
    detectable = "-" if one.found.detectable is None else f"{scale * one.found.detectable:.{digits}f}"
    first, second, difference = (scale * value for value in (one.first, one.second, one.found.difference))
    return (f"  {name:<22} {one.n:>6,} {first:>7.{digits}f} {second:>7.{digits}f} {difference:>+7.{digits}f} "
            f"{interval or '-':>15} {'':>7} {'':>7} {one.found.p_value:>8.4f} {one.corrected:>8.4f} {detectable:>11}")


def stages(first: str, second: str) -> str:
    """Lines of text: the stages of each run, and the number in which the two differ if it is more than one; empty if a
    run's stages are unknown.
    """
    lines_of_stages = [_stages(run) for run in (first, second)]
    if not all(lines_of_stages):
        return ""
    lines = [f"{name}: {'; '.join(map(_told, of_run))}" for name, of_run in zip("AB", lines_of_stages, strict=True)]
    differing = _differing(*lines_of_stages)
    if differing > 1:
        lines.append(f"A and B were trained on different data in {differing} stages: these two runs cannot show which "
                     "stage causes a difference in scores.")
    return "\n".join(lines)


def _stages(run: str) -> list[Mapping[str, Any]]:
    """The ledgers of a run's stages, its own last; empty if it has no provenance.json."""
    folder = epath.Path(run).expanduser()
    provenance = read_provenance(folder, ("ledger",), ("stage", "rows", "tokens"))
    if provenance is None:
        return []
    *before, own = stages_of(provenance["ledger"])
    return [*before, {**own, "model_dir": run if "://" in run else os.path.realpath(folder)}]


def _told(stage: Mapping[str, Any]) -> str:
    if stage["stage"] == "imported":
        return "imported, training data unknown"
    rows = sum(stage["rows"].values())
    share = 100 * rows_of_code(stage) / rows if rows else 0.0
    return f"{stage['stage']}, {sum(stage['tokens'].values()):,} tokens, {share:.1f}% code"


def _differing(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> int:
    """The number of stages in which two sequences differ, after removing equal ones at both ends and the part of a
    trunk that both share.
    """
    one, other = list(first), list(second)
    while one and other and _equal(one[-1], other[-1]):
        del one[-1], other[-1]
    while one and other and _equal(one[0], other[0]):
        del one[0], other[0]
    if one and other and one[0]["model_dir"] == other[0]["model_dir"]:
        del min(one, other, key=lambda line: sum(line[0]["rows"].values()))[0]
    return max(len(one), len(other))


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two stages were trained on equal amounts of the same sources; with different seeds, to a row or two."""
    sources = one["rows"].keys() | other["rows"].keys()
    return one["stage"] == other["stage"] and one.get("epoch_rows") == other.get("epoch_rows") and all(
        abs(one["rows"].get(name, 0) - other["rows"].get(name, 0)) <= len(sources) for name in sources) and (
            one["stage"] != "imported" or one["model_dir"] == other["model_dir"])
