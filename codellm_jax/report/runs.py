"""The runs of a study as the report reads them: results with a line for each question, and their provenance.

A study's directory holds `study.json` and `runs/NAME`; any folder of run directories works without `study.json`.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from codellm_jax.results.answers import is_measured, levels_of, metrics_of, values_of
from codellm_jax.results.files import Damaged, files_of, finished_lines, read_result
from codellm_jax.results.measures import values

# The facts that determine questions and scores; where one differs, two results must not stand in one table. The order
# is that of the messages: a template, for one, makes different questions from the same data.
OF_A_MEASUREMENT = ("data", "template", "few_shot", "scoring", "sampling", "samples", "questions", "version")
# The facts that define an arm, apart from the data; the seeds of one arm share them.
OF_AN_ARM = ("model.", "adamw.", "warmup_", "inverse_square_root.", "train.learning_rate", "mixture.code_rate",
             "mixture.mix_phases", "mixture.stage", "train.batch_size", "train.train_steps")
SAME_COMPUTATION = ("model.remat", "model.scan_unroll", "model.attention")


@dataclasses.dataclass(frozen=True)
class Result:
    """One task of one run: TASK.json, and the lines of TASK.jsonl without their header."""

    run: str
    task: str  # without "_sample"
    result: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]

    @property
    def ids(self) -> list[str]:
        return [str(line["id"]) for line in self.lines]

    @property
    def measured(self) -> bool:
        """Whether the score says anything about the model; it does not where most questions are ties."""
        return is_measured(self.lines)


class Stage(NamedTuple):
    """One of the stages that a run went through, from its ledger; for a trunk, the part before the branch."""

    name: str  # the study's name for it, else its kind: "pretraining", "tuning" or "imported"
    run: str  # the run that it belongs to
    tokens: int  # counted by the loss
    code: float | None  # share of rows, or of examples in tuning; None where none were counted


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
      name: the name of the directory.
      label: the name of the arm in the study; its seeds share it.
      arm: NL, CODE, NN, NC, CN or CC, or a line of other stages; see `ledger.arm`.
      mix: for tuning with code: "uniform", "increase", "decrease" or the study's own word; None without code.
      seed: of training; None where unknown.
      stage: "pretraining" or "tuning".
      parent: the name of the run it starts from; None without one.
      settings: the settings in force, with macros resolved, as text; empty where the run has no checkpoint.
      ledger: of its newest checkpoint; empty where it has none.
      parameters: of the model; None without a checkpoint.
      step: of its newest checkpoint; None without one.
      results: by task.
      provenance: the content of provenance.json; None where it does not exist.
      records: the lines of metrics.jsonl.
      stages: the stages it went through, its own last; empty where it has no checkpoint.
    """

    name: str
    label: str
    arm: str
    mix: str | None
    seed: int | None
    stage: str
    parent: str | None
    settings: Mapping[str, str]
    ledger: Mapping[str, Any]
    parameters: int | None
    step: int | None
    results: Mapping[str, Result]
    provenance: Mapping[str, Any] | None
    records: Sequence[Mapping[str, Any]]
    stages: Sequence[Stage] = ()


@dataclasses.dataclass(frozen=True)
class Overlaps:
    """The questions of a task that occur in training sources.

    Attributes:
      sources: ids of questions by source.
      not_measurable: the number of questions that could not be tested; None where unknown.
      data: the hash of the task's files; None where unknown.
    """

    sources: Mapping[str, frozenset[str]]
    not_measurable: int | None
    data: str | None


@dataclasses.dataclass(frozen=True)
class Contamination:
    """The questions that share n words in a row, or a number of Chinese characters, with training data; tasks by the
    names of their results.
    """

    n: int
    characters: int
    tasks: Mapping[str, Overlaps]

    def of(self, result: Mapping[str, Any]) -> Overlaps | None:
        """The overlaps of a result's task; None where the task, or these files of it, were not measured."""
        found = self.tasks.get(result["task"] + "_sample" * result["sample"])
        return None if found is None or found.data not in (None, result["settings"].get("data")) else found


def read_json(path: epath.Path) -> Any:
    """The content of a JSON file; None where it does not exist. Raises ValueError for an invalid file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): create it again.") from None


def read_results(directory: epath.Path, run: str) -> dict[str, Result]:
    """The results of a run directory by task; official files take precedence over samples of the same task.

    Raises:
      ValueError: a result disagrees with its lines.
    """
    found: dict[str, Result] = {}
    folder = directory / "results"
    for path in files_of(folder, ".json"):
        try:
            result = read_result(path, ("task", "n", "settings", "metric", "value", "sample"))
        except Damaged as error:
            raise ValueError(f"{path} is not the result of an evaluation: move it away, or evaluate the task again "
                             f"({error})") from None
        lines = finished_lines(path.with_suffix(".jsonl"), result)
        if not lines:
            raise ValueError(f"{path.stem} of {run}: its lines do not match its result: finish the evaluation.")
        require_measurable(path, result, lines)
        if "correct" in lines[0] and abs(sum(line["correct"] for line in lines) / len(lines) - result["value"]) > 1e-9:
            raise ValueError(f"{path.stem} of {run}: its lines do not add up to its accuracy: evaluate it again.")
        task = result["task"]
        if task not in found or found[task].result["sample"]:
            found[task] = Result(run, task, result, lines)
    return found


def require_measurable(path: epath.Path, result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError, in one line, if scores cannot be computed from the lines of a result."""
    try:
        found = [values_of(lines, metric) for metric in metrics_of(lines)]
        levels_of(lines)
        values(lines, result["settings"].get("scoring", "per_token"))
        if not all("id" in line for line in lines) or not all(np.isfinite(each).all() for each in found):
            raise ValueError("no id, or no finite score")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(f"{path.with_suffix('.jsonl')} is damaged: {type(error).__name__} in a line of it ({error}); "
                         "evaluate the task again.") from None


def read_contamination(directory: epath.Path) -> Contamination | None:
    """The content of contamination.json; None where there is none.

    Raises:
      ValueError: the file is invalid.
    """
    path = directory / "contamination.json"
    saved = read_json(path)
    if saved is None:
        return None
    try:
        return Contamination(int(saved["n"]), int(saved.get("characters", saved["n"])), {
            task: Overlaps({source: frozenset(map(str, of_source["ids"]))
                            for source, of_source in of_task["sources"].items()},
                           of_task.get("not_measurable"), of_task.get("data"))
            for task, of_task in saved["tasks"].items()})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} does not say which questions overlap ({type(error).__name__}: {error}): measure the "
                         "contamination again.") from None


def resolve(settings: Mapping[str, str]) -> dict[str, str]:
    """Settings as saved, with each macro "%NAME" replaced by its value."""
    def value(text: str, depth: int = 0) -> str:
        name = text.removeprefix("%")
        return value(settings[name], depth + 1) if text.startswith("%") and name in settings and depth < 9 else text

    return {name: value(text) for name, text in settings.items()}


def require_same_measurement(runs: Iterable[Mapping[str, Result]]) -> None:
    """Raises ValueError with a one-line message where two runs were not asked the same questions, or were scored
    differently. Each element of `runs` maps tasks to results.
    """
    first: dict[str, Result] = {}
    for results in runs:
        for task, here in results.items():
            other = first.setdefault(task, here)
            if other.result["sample"] != here.result["sample"]:
                which = [f"{one.run} was asked {'the sample items' if one.result['sample'] else 'the official files'}"
                         for one in (other, here)]
                raise ValueError(f"{task}: {which[0]} and {which[1]}, which must not stand in one table: evaluate both "
                                 "on the same files.")
            for name in OF_A_MEASUREMENT:
                values = [one.result["settings"].get(name) for one in (other, here)]
                if values[0] != values[1]:
                    told = [f"{value[:12]}" if name in ("data", "questions") and isinstance(value, str) else f"{value}"
                            for value in values]
                    raise ValueError(f"{task}: the {name} of {other.run} and {here.run} differ ({told[0]} and "
                                     f"{told[1]}), so they must not stand in one table: evaluate both with the "
                                     "same files and settings.")
            if other.ids != here.ids:
                raise ValueError(f"{task}: {other.run} and {here.run} answered different questions, or in a different "
                                 "order: evaluate both again.")


def require_same_arm(runs: Iterable[Run]) -> None:
    """Raises ValueError with a one-line message where two seeds of an arm were trained differently, or are the same
    seed.
    """
    first: dict[str, Run] = {}
    seen: dict[tuple[str, int | None], Run] = {}
    for run in runs:
        other = first.setdefault(run.label, run)
        for name, value in of_an_arm(run.settings).items():
            before = of_an_arm(other.settings).get(name, value)
            if before != value:
                raise ValueError(f"{other.name} and {run.name} count as seeds of one arm, {run.label}, but their "
                                 f"{name} differ ({before} and {value}): give them different names.")
        twin = seen.setdefault((run.label, run.seed), run)
        if twin is not run:
            raise ValueError(f"{twin.name} and {run.name} are the same seed, {run.seed}, of the same arm, {run.label}: "
                             "leave one of them out.")


def require_same_sources(runs: Iterable[Run]) -> None:
    """Raises ValueError with a one-line message where two runs have different data under one source name."""
    first: dict[str, tuple[str, Any]] = {}
    for run in runs:
        for source, fingerprint in ((run.provenance or {}).get("data") or {}).items():
            name, before = first.setdefault(source, (run.name, fingerprint))
            if before != fingerprint:
                raise ValueError(f"{name} and {run.name} were trained on different data under one name: {source} was "
                                 f"{str(before)[:12]} and {str(fingerprint)[:12]}, so they must not stand in one "
                                 "table: train both on the same data, or give the sources different names.")


def of_an_arm(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings of a run that all seeds of its arm share."""
    return {name: value for name, value in settings.items()
            if name.startswith(OF_AN_ARM) and name not in SAME_COMPUTATION}


def name_and_seed(directory_name: str) -> tuple[str, int | None]:
    """Splits "CODE.seed1" into ("CODE", 1); a name without a seed is all label."""
    match = re.fullmatch(r"(.+)\.seed(\d+)", directory_name)
    return (match[1], int(match[2])) if match else (directory_name, None)


def by_label(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each arm, by seed; arms in order of appearance."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.label, []).append(run)
    return {label: sorted(of_arm, key=lambda run: (run.seed is None, run.seed or 0, run.name))
            for label, of_arm in arms.items()}
