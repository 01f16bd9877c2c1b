"""A study as the report sees it: arms with their seeds, tasks with their questions, and the size of the models."""

import ast
import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from codellm_jax.report.runs import Contamination, Result, Run, by_label
from codellm_jax.results.answers import Compared, Estimate, Levels, compared, estimate, levels_of, metrics_of, values_of

# Scores of models below these limits say nothing about reasoning: the study's smallest model has 2.6e9 parameters and
# 42e9 tokens, and no model far below a hundredth of either is distinguishable from chance on its benchmarks.
FEWEST_PARAMETERS = 100_000_000
FEWEST_TOKENS = 1_000_000_000
UNKNOWN = "the size or training"
TASKS = ("logic", "jecqa", "scienceqa", "ekar", "cosqa", "mbpp", "scienceqa_cot", "ekar_cot", "c3", "ocnli", "cmnli",
         "dureader")  # in the paper's order; others follow
PAPER_ARMS = ("NL", "CODE", "NN", "NC", "CN", "CC")
# The paper's shares of code: 50 GB beside 100 GB of text in pre-training, 150,000 of 400,000 examples in tuning.
PAPER_RATES = {"pretraining": 1 / 3, "tuning": 3 / 8}
SAME_RATE = 0.02
MIXES = ("decrease", "uniform", "increase")  # where the paper's tables name no mix, they show the first


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, for the caches
class Study:
    """Attributes:
      name: the name of its directory.
      runs: the runs with results.
      pending: the names of runs that are planned and have no results yet.
      comparison: "compute-matched" or "data-matched"; None where the study does not say.
      contamination: None where it was not measured.
    """

    name: str
    runs: Sequence[Run]
    pending: Sequence[str]
    comparison: str | None
    contamination: Contamination | None

    @functools.cached_property
    def arms(self) -> Mapping[str, Sequence[Run]]:
        """The runs of each arm by its label."""
        return by_label(self.runs)

    @functools.cached_property
    def tasks(self) -> Sequence[str]:
        """Every task on which any run was evaluated, in the paper's order."""
        ranks = {task: rank for rank, task in enumerate(TASKS)}
        return sorted({task for run in self.runs for task in run.results},
                      key=lambda task: (ranks.get(task, len(ranks)), task))

    def find(self, arm: str, mix: str | None = None) -> str | None:
        """The label of one of the paper's arms: the label equal to its name, else the label of its first mix in MIXES,
        else the first label found; None where there is none. With `mix`, only labels of that mix count.
        """
        labels = [label for label, runs in self.arms.items()
                  if runs[0].arm == arm and mix in (None, runs[0].mix) and is_papers(runs[0])]
        ranks = {mix: rank for rank, mix in enumerate(MIXES)}
        return min(labels, key=lambda label: (
            label != arm, ranks.get(self.arms[label][0].mix or "", len(MIXES))), default=None)

    def is_sample(self, task: str) -> bool:
        return bool(self.result(task).result["sample"])

    def metrics(self, task: str) -> list[str]:
        return metrics_of(self.result(task).lines)

    def overlapping(self, task: str) -> frozenset[str]:
        """The ids of a task's questions that occur in a training source, as far as that was measured."""
        return frozenset().union(*self.overlaps(task).values())

    def overlaps(self, task: str) -> dict[str, frozenset[str]]:
        """By source, the ids of a task's evaluated questions that overlap with it; empty where overlaps were not
        measured.
        """
        found = self.contamination.of(self.result(task).result) if self.contamination else None
        return {source: ids & set(self.result(task).ids) for source, ids in found.sources.items()} if found else {}

    def measured(self, task: str) -> bool:
        """Whether overlaps were measured on the questions of a task as they were evaluated."""
        return self.contamination is not None and self.contamination.of(self.result(task).result) is not None

    def levels(self, task: str, clean: bool = False) -> Levels | None:
        """Chance and majority of a task; with `clean`, over the questions that do not overlap."""
        lines = self.result(task).lines
        kept = [line for line, keep in zip(lines, self._kept(task, clean), strict=True) if keep]
        return levels_of(kept) if kept else None

    def values(self, label: str, task: str, metric: str, clean: bool = False) -> dict[int | None, np.ndarray]:
        """The contribution of each question to the score, for each seed of an arm that was evaluated and measured."""
        kept = self._kept(task, clean)
        return {run.seed: values_of(run.results[task].lines, metric)[kept] for run in self.arms[label]
                if task in run.results and run.results[task].measured
                and metric in metrics_of(run.results[task].lines)}

    def unmeasured(self, label: str, task: str) -> bool:
        """Whether an arm was evaluated on a task but not measured, because most of its questions are ties."""
        results = [run.results[task] for run in self.arms[label] if task in run.results]
        return bool(results) and not any(result.measured for result in results)

    @functools.cache  # noqa: B019  # a process reads a study once
    def estimate(self, label: str, task: str, metric: str, clean: bool = False) -> Estimate | None:
        """The score of an arm; None where it was not evaluated or not measured, or where no question is left."""
        seeds = list(self.values(label, task, metric, clean).values())
        return estimate(seeds, metric) if seeds and len(seeds[0]) else None

    @functools.cache  # noqa: B019
    def compared(self, first: str, second: str, task: str, metric: str, clean: bool = False) -> Compared | None:
        """The score of the first arm minus that of the second; None where either has none."""
        ours, theirs = self.values(first, task, metric, clean), self.values(second, task, metric, clean)
        if not ours or not theirs or not len(next(iter(ours.values()))):
            return None
        return compared(list(ours.values()), list(theirs.values()), metric, self.paired(first, second, ours, theirs))

    def paired(self, first: str, second: str, ours: Collection[int | None], theirs: Collection[int | None]) -> bool:
        """Whether the seeds of two arms are paired: each seed of one arm has one of the other that started from the
        same run. Equal seed numbers alone share nothing that pairing could use.
        """
        parents = [{run.seed: run.parent for run in self.arms[label] if run.seed in seeds}
                   for label, seeds in ((first, ours), (second, theirs))]
        return parents[0] == parents[1] and None not in parents[0].values()

    def blockers(self, labels: Sequence[str] | None = None, tasks: Sequence[str] | None = None) -> list[str]:
        """The reasons why no measurement of these arms on these tasks (by default of all on all) says anything about
        reasoning; empty where there are none.
        """
        reasons = []
        runs = [run for run in self.runs if labels is None or run.label in labels]
        unknown = [run.name for run in runs
                   if run.parameters is None or pretraining_tokens(run) is None and not _is_imported(run)]
        sizes = [run.parameters for run in runs if run.parameters is not None]
        if sizes and min(sizes) < FEWEST_PARAMETERS:
            reasons.append(f"the models are tiny ({_range(sizes)} parameters, fewer than {FEWEST_PARAMETERS:,})")
        # Pre-training decides: a tuned model counts the tokens of the run it started from.
        tokens = [count for run in runs if (count := pretraining_tokens(run)) is not None]
        if tokens and min(tokens) < FEWEST_TOKENS:
            reasons.append(f"they were pre-trained on little ({_range(tokens)} tokens, fewer than {FEWEST_TOKENS:,})")
        if unknown:
            reasons.append(f"{UNKNOWN} of {len(unknown)} of {len(runs)} models is unknown, as there is no "
                           f"checkpoint ({unknown[0]})")
        asked = list(self.tasks if tasks is None else tasks)
        samples = [task for task in asked if self.is_sample(task)]
        if samples:
            which = "all" if len(samples) == len(asked) else ", ".join(sorted(samples))
            reasons.append(f"the questions are a few sample items of this package ({which})")
        return reasons

    def warning(self) -> str:
        """The opening warning of a report; empty where nothing speaks against its results."""
        reasons = self.blockers()
        if not reasons:
            return ""
        unknown = len(reasons) == 1 and reasons[0].startswith(UNKNOWN)
        first = "Whether such models say anything about reasoning is not known" if unknown else \
            "Such models say nothing about reasoning"
        return f"{first}: {'; '.join(reasons)}."

    def result(self, task: str) -> Result:
        """The result of the first run on a task; its questions and settings are those of all runs."""
        return next(run.results[task] for run in self.runs if task in run.results)

    def _kept(self, task: str, clean: bool) -> np.ndarray:
        ids, gone = self.result(task).ids, self.overlapping(task) if clean else frozenset()
        return np.array([id_ not in gone for id_ in ids])


def is_papers(run: Run) -> bool:
    """Whether an arm is one of the paper's: pre-training, with or without tuning after it, and the paper's shares of
    code where there is code. An arm that the study calls by the paper's name, and whose ledger agrees, may have other
    shares.
    """
    if run.arm not in PAPER_ARMS or [stage.name for stage in run.stages] not in (
            [], ["pretraining"], ["pretraining", "tuning"]):
        return False
    return run.label in (run.arm, f"{run.arm}-{run.mix}") or all(
        not stage.code or abs(stage.code - PAPER_RATES[stage.name]) < SAME_RATE for stage in run.stages)


def code_rate(run: Run) -> float | None:
    """The constant share of code that a run's settings ask for; None where it changes or is unknown."""
    try:
        rate = ast.literal_eval(run.settings.get("mixture.code_rate", "None"))
        phases = ast.literal_eval(run.settings.get("mixture.mix_phases", "None"))
    except (ValueError, SyntaxError):
        return None
    return float(rate) if phases is None and isinstance(rate, int | float) else None


def pretraining_tokens(run: Run) -> int | None:
    """The pre-training tokens that the ledger counts, of the run or of those it started from; None without a ledger,
    and for published weights, whose pre-training is not counted here.
    """
    ledgers = [ledger for ledger in [*run.ledger.get("before", []), run.ledger] if ledger]
    return sum(sum(ledger["tokens"].values()) for ledger in ledgers if ledger["stage"] == "pretraining") \
        if ledgers and not _is_imported(run) else None


def _is_imported(run: Run) -> bool:
    return any(ledger.get("stage") == "imported" for ledger in [*run.ledger.get("before", []), run.ledger])


def _range(numbers: Sequence[int]) -> str:
    return f"{min(numbers):,}" if min(numbers) == max(numbers) else f"{min(numbers):,} to {max(numbers):,}"
