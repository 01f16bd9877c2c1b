"""The paper's three conclusions and the verdict of the data on each, by rules that were fixed before any data.

Each conclusion consists of one or more contrasts. A contrast is the difference between two arms in the mean over its
tasks, each task counting equally. All m contrasts of all conclusions are corrected together: their intervals have the
level 1 - 5% / m (Bonferroni), and their p-values are Holm's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from codellm_jax.report.study import Study
from codellm_jax.results.answers import linear, score_of
from codellm_jax.results.seeds import Contrast, contrast
from codellm_jax.results.statistics import Interval, holm

SUPPORTED, CONTRADICTED, OPEN = "supported", "contradicted", "open"
MARGIN = 0.02  # of a score: a loss up to this size counts as "almost" none

Measure = tuple[str, str]  # task and metric
REASONING: tuple[Measure, ...] = tuple((task, "accuracy") for task in ("logic", "jecqa", "scienceqa", "ekar"))
OTHERS: tuple[Measure, ...] = tuple((task, "accuracy") for task in ("c3", "ocnli", "cmnli"))
CODE: tuple[Measure, ...] = (("cosqa", "accuracy"), ("mbpp", "bleu"))


class Planned(NamedTuple):
    """A planned contrast: (arm, mix) minus (arm, mix) over tasks."""

    name: str
    first: tuple[str, str | None]
    second: tuple[str, str | None]
    measures: tuple[Measure, ...]
    no_loss: bool = False  # tests whether the difference is above -MARGIN, not above 0


class Conclusion(NamedTuple):
    number: int
    claim: str
    contrasts: tuple[Planned, ...]


class Judged(NamedTuple):
    """The verdict on a contrast. Fractions of 1; None where nothing could be computed."""

    planned: Planned
    verdict: str
    why: str
    estimate: float | None
    interval: Interval | None  # at the corrected level
    p_value: float | None
    corrected: float | None  # by Holm's method, over the contrasts of all conclusions that could be computed


CONCLUSIONS = (
    Conclusion(1, "Code in pre-training lifts general reasoning almost without negative transfer.", (
        Planned("reasoning: CODE - NL", ("CODE", None), ("NL", None), REASONING),
        Planned("other tasks: CODE - NL", ("CODE", None), ("NL", None), OTHERS, no_loss=True))),
    Conclusion(2, "Code in tuning lifts task-specific (code) reasoning.", (
        Planned("code tasks: NC - NN", ("NC", None), ("NN", None), CODE),)),
    Conclusion(3, "More code early and less later is the best tuning mix for code tasks.", (
        Planned("code tasks: CC decrease - CC uniform", ("CC", "decrease"), ("CC", "uniform"), CODE),
        Planned("code tasks: CC decrease - CC increase", ("CC", "decrease"), ("CC", "increase"), CODE))),
)
CONTRASTS = sum(len(conclusion.contrasts) for conclusion in CONCLUSIONS)
LEVEL = 1 - 0.05 / CONTRASTS

RULES = (
    "A contrast is the difference between two arms in the mean over its tasks, each counting equally; its interval "
    f"has the level {100 * LEVEL:g}%, which is 95% corrected for the {CONTRASTS} contrasts of all conclusions "
    "(Bonferroni), whether or not all could be computed.",
    "A contrast is supported where its interval lies above 0, contradicted where it lies below 0, and open otherwise. "
    f"Where the claim is that nothing is lost, it is supported above -{100 * MARGIN:g} points, contradicted below, and "
    f"open where the interval contains -{100 * MARGIN:g}.",
    "A contrast is always open where one of its tasks or arms is missing; most questions of a task are ties; an arm "
    "has a single seed (the difference may then be one between seeds); the better arm's mean score is not above what "
    "answering without reading reaches (the larger of chance and majority of each task; 0 where answers are "
    "written), by a one-sided 97.5% bound; the questions are samples; or the models are too small to say anything.",
    "A conclusion is contradicted where any of its contrasts is, supported where all are, and open otherwise.",
    "Where contamination was measured, questions that overlap with a training source are excluded here.",
)


def judge(study: Study) -> list[tuple[Conclusion, str, list[Judged]]]:
    """Each conclusion with its verdict and its contrasts."""
    judged = [[_judged(study, planned) for planned in conclusion.contrasts] for conclusion in CONCLUSIONS]
    p_values = [one.p_value for each in judged for one in each if one.p_value is not None]
    corrected = iter(holm(p_values) if p_values else [])
    judged = [[one if one.p_value is None else one._replace(corrected=next(corrected)) for one in each]
              for each in judged]
    return [(conclusion, overall([one.verdict for one in each]), each)
            for conclusion, each in zip(CONCLUSIONS, judged, strict=True)]


def has_papers_arms(study: Study) -> bool:
    """Whether the arms of any contrast are there and were evaluated."""
    asked = {label for label, runs in study.arms.items() if any(run.results for run in runs)}
    return any({study.find(*planned.first), study.find(*planned.second)} <= asked
               for conclusion in CONCLUSIONS for planned in conclusion.contrasts)


def overall(verdicts: Sequence[str]) -> str:
    """A conclusion's verdict from those of its contrasts."""
    if CONTRADICTED in verdicts:
        return CONTRADICTED
    return SUPPORTED if all(verdict == SUPPORTED for verdict in verdicts) else OPEN


def _judged(study: Study, planned: Planned) -> Judged:
    labels = [study.find(*arm) for arm in (planned.first, planned.second)]
    missing = [" ".join(filter(None, arm)) for arm, label in zip((planned.first, planned.second), labels, strict=True)
               if label is None]
    first, second = labels
    if first is None or second is None:
        return Judged(planned, OPEN, f"no run of {' and '.join(missing)}", None, None, None, None)
    seeds = [set.intersection(*(set(study.values(label, *measure, clean=True)) if measure[0] in study.tasks else set()
                                for measure in planned.measures)) for label in (first, second)]
    lacking = [task for task, metric in planned.measures if task not in study.tasks
               or not study.values(first, task, metric) or not study.values(second, task, metric)]
    tied = [task for task in lacking if task in study.tasks
            and (study.unmeasured(first, task) or study.unmeasured(second, task))]
    if lacking or not all(seeds):
        unasked = [task for task in lacking if task not in tied]
        why = "; ".join([*([f"not evaluated on {', '.join(unasked)}"] if unasked else []),
                         *([f"most questions of {', '.join(tied)} are ties"] if tied else [])])
        why = why or "no seed was evaluated on all of its tasks"
        return Judged(planned, OPEN, why, None, None, None, None)
    arms = [[[study.values(label, *measure, clean=True)[seed] for seed in sorted(of_arm, key=str)]
             for measure in planned.measures] for label, of_arm in zip((first, second), seeds, strict=True)]
    if any(len(task[0]) < 2 for task in arms[0]):
        return Judged(planned, OPEN, "a task has fewer than two questions that do not overlap", None, None, None, None)
    several = min(map(len, seeds)) > 1
    found = _contrast(arms, paired=several and study.paired(first, second, *seeds), several=several)
    verdict, why = _verdict(found, planned.no_loss)
    reasons = []
    if not several:
        alone = [label for label, of_arm in zip((first, second), seeds, strict=True) if len(of_arm) == 1]
        reasons.append(f"a single seed of {' and of '.join(alone)}")
    if _at_baseline(study, planned, arms, several):
        reasons.append("neither arm is above what answering without reading would reach")
    reasons += study.blockers([first, second], [task for task, _ in planned.measures])
    if reasons:
        verdict, why = OPEN, "; ".join(reasons)
    return Judged(planned, verdict, why, found.estimate, found.interval, found.p_value, None)


def _contrast(arms: list[list[list[np.ndarray]]], paired: bool, several: bool) -> Contrast:
    """`arms`: of either arm, for each task, the values of each seed."""
    means = [[np.mean([score_of(values) for values in task]) for task in arm] for arm in arms]
    return contrast(*([linear(task) for task in arm] for arm in arms), paired=paired, seeds=several,
                    estimate=float(np.mean(means[0]) - np.mean(means[1])), level=LEVEL)


def _verdict(found: Contrast, no_loss: bool) -> tuple[str, str]:
    bound, named = (-MARGIN, f"-{100 * MARGIN:g} points") if no_loss else (0.0, "0")
    if found.interval.low > bound:
        return SUPPORTED, f"the interval lies above {named}"
    if found.interval.high < bound:
        return CONTRADICTED, f"the interval lies below {named}"
    return OPEN, f"the interval holds {named}"


def _at_baseline(study: Study, planned: Planned, arms: list[list[list[np.ndarray]]], several: bool) -> bool:
    """Whether the better arm's mean over the tasks is not above that of the tasks' baselines."""
    levels = [study.levels(task, clean=True) for task, _ in planned.measures]
    baseline = float(np.mean([max(level) if level else 0.0 for level in levels]))
    better = max(arms, key=lambda arm: np.mean([score_of(values) for task in arm for values in task]))
    score = float(np.mean([score_of(values) for task in better for values in task]))
    found = contrast([linear(task) for task in better], seeds=several, estimate=score)
    return found.interval.low <= baseline
