"""Two runs on the same questions: paired tests, corrected for being several.

    t5x compare runs/tune_text runs/tune_mixed

Only tasks that both runs were evaluated on are compared, and only where the questions were the very same, template and
data included.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from codellm_jax.results.files import finished_lines
from codellm_jax.results.levels import detectable_by_error, detectable_paired
from codellm_jax.results.statistics import Interval, holm, mcnemar, paired_bootstrap


class Comparison(NamedTuple):
    """One task; fractions of 1. Differences are the second run's minus the first's."""

    task: str
    n: int
    first: float
    second: float
    interval: Interval  # of the difference, 95%, by paired bootstrap
    only_first: int | None  # questions that the first run alone has right; None where answers are more or less right
    only_second: int | None
    p_value: float  # McNemar's exact test, or else of the paired bootstrap
    corrected: float  # by Holm's method, over the tasks
    detectable: float | None  # the smallest difference that these questions show


def compare(first: str, second: str) -> list[Comparison]:
    """The tasks that both run directories have results of, by name.

    Raises:
      FileNotFoundError: a run has no results, or the two have no task in common.
      ValueError: a task's questions or scoring differ between the runs.
    """
    results = [_results(first), _results(second)]
    tasks = sorted(results[0].keys() & results[1].keys())
    if not tasks:
        raise FileNotFoundError(f"{first} was evaluated on {', '.join(results[0])} and {second} on "
                                f"{', '.join(results[1])}: evaluate both on the same tasks.")
    found = []
    for task in tasks:
        (one, values), (other, other_values) = (pair[task] for pair in results)
        for name in ("questions", "scoring", "sampling", "samples"):
            if one["settings"].get(name) != other["settings"].get(name):
                raise ValueError(f"{task}: the {name} of {first} and {second} differ, so that they cannot be paired: "
                                 "evaluate both with the same files and settings.")
        n, difference = len(values), paired_bootstrap(other_values, values)
        if set(values) | set(other_values) <= {0.0, 1.0}:
            test = mcnemar([value == 1 for value in values], [value == 1 for value in other_values])
            found.append(Comparison(
                task, n, one["value"], other["value"], difference.interval, test.only_first, test.only_second,
                test.p_value, 1.0, detectable_paired(n, (test.only_first + test.only_second) / n)))
        else:
            found.append(Comparison(
                task, n, one["value"], other["value"], difference.interval, None, None, difference.p_value, 1.0,
                detectable_by_error(difference.standard_error)))
    return [comparison._replace(corrected=corrected) for comparison, corrected in zip(
        found, holm([comparison.p_value for comparison in found]), strict=True)]


def _results(run: str) -> dict[str, tuple[Mapping[str, Any], list[float]]]:
    """For each task of a run its result, and what each question added to its score."""
    folder = epath.Path(run).expanduser() / "results"
    found = {}
    for path in sorted(folder.glob("*.json")) if folder.exists() else []:
        result = json.loads(path.read_text())
        lines = finished_lines(path.with_suffix(".jsonl"), result)
        if lines is None:
            raise ValueError(f"{path.stem} of {run}: its lines are not those of its result; evaluate it to the end.")
        metric = "correct" if result["metric"] == "accuracy" else result["metric"]
        found[path.stem] = result, [float(line[metric]) for line in lines]
    if not found:
        raise FileNotFoundError(f"No results in {folder}: run t5x eval --gin_file=gin/eval.gin "
                                f"--gin.CHECKPOINT_PATH={run} first.")
    return found


def table(comparisons: list[Comparison], first: str, second: str) -> str:
    """Lines of text, in per cent."""
    lines = [f"A = {first}", f"B = {second}", "",
             f"{'task':<24} {'n':>6} {'A':>7} {'B':>7} {'B - A':>7} {'95% interval':>15} {'A only':>7} {'B only':>7} "
             f"{'p':>8} {'p, Holm':>8} {'detectable':>11}"]
    for one in comparisons:
        low, high = (100 * bound for bound in one.interval)
        detectable = "-" if one.detectable is None else f"{100 * one.detectable:.1f}"
        only = ["-" if count is None else f"{count:,}" for count in (one.only_first, one.only_second)]
        lines.append(
            f"{one.task:<24} {one.n:>6,} {100 * one.first:>7.2f} {100 * one.second:>7.2f} "
            f"{100 * (one.second - one.first):>+7.2f} {f'{low:+.1f} - {high:+.1f}':>15} {only[0]:>7} "
            f"{only[1]:>7} {one.p_value:>8.4f} {one.corrected:>8.4f} {detectable:>11}")
    return "\n".join([
        *lines, "", "p: McNemar's exact test on the questions that one run alone has right; where answers are more or "
        f"less right, of a paired bootstrap. Holm: corrected for {len(comparisons)} tasks."])
