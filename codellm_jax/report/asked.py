"""The questions that a study answers, derived from its arms: comparable arms, sweeps of a share, and trees of stages.

Arms are compared after the same stages. An arm that skips a stage is compared with arms that have it where both were
trained on equally many tokens of documents and belong to one tree: a trunk trained to its end, and its branches that
end at the same point. While the branches are in that stage, the trunk continues with its own share of code.
"""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codellm_jax.mixture.ledger import rows_of_code, stages_of
from codellm_jax.report import questions
from codellm_jax.report.effects import SAME_WEIGHT, Design, Level, Sample, design_of
from codellm_jax.report.runs import Run, of_an_arm
from codellm_jax.report.study import Study, code_rate
from codellm_jax.results.answers import METRICS

POOLS = ("text", "code")
FEWEST_SHARES = 3  # of a sweep
SAME_LENGTH = 0.02  # of all tokens of documents
SAME_SHARE = 0.01  # within this distance, the share asked is printed instead of the share drawn
OF_THE_MIX = ("mixture.code_rate", "mixture.mix_phases", "mixture.stage")
ABSENT = "without the stage"
OF_SOURCES = frozenset(f"{pool} {what}" for pool in POOLS for what in ("of", "weights"))  # facts


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity
class Measure:
    """One measure of each arm of a group.

    Attributes:
      title: the name shown to readers.
      unit: the unit shown; "points" of 100 for fractions.
      better: "higher" or "lower".
      task: the benchmark; None for held-out losses.
      metric: the metric of the benchmark, or the pool of a loss.
      scale: the factor from values to the numbers shown.
      first: whether it belongs in the first table.
      samples: by arm and seed.
    """

    title: str
    unit: str
    better: str
    task: str | None
    metric: str
    scale: float
    first: bool
    samples: Mapping[str, Mapping[int | None, Sample]]

    @property
    def labels(self) -> frozenset[str]:
        """The arms that have this measure."""
        return frozenset(label for label, of_arm in self.samples.items() if of_arm)


class Sweep(NamedTuple):
    """Arms that differ only in the share of code at one stage, by share."""

    stage: str
    arms: Sequence[tuple[float, str]]


Facts = dict[str, str]  # what distinguishes arms at a stage besides the share; without what an arm cannot have


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Arms that may be compared with each other.

    Attributes:
      stages: all stages that any of them went through, in order.
      shares: for each arm, the share of code at each stage; where it skips a stage, the share of the stage before.
      absent: for each arm, the indices of the stages that it skips.
      facts: by arm and stage.
      sources: by arm and stage, the share of each source by name; empty where the arm skips the stage.
      tokens: for each arm, the document tokens that the loss counted, in all stages.
      parameters: of their model; None where it is unknown.
    """

    study: Study
    stages: Sequence[str]
    shares: Mapping[str, Sequence[float]]
    absent: Mapping[str, frozenset[int]]
    facts: Mapping[str, Sequence[Facts]]
    sources: Mapping[str, Sequence[Mapping[str, float]]]
    tokens: Mapping[str, int]
    parameters: int | None

    @functools.cached_property
    def levels(self) -> dict[str, list[Level]]:
        """By arm; facts appear where arms differ in them."""
        found: dict[str, list[Level]] = {label: [] for label in self.shares}
        for k in range(len(self.stages)):
            differing = self._differing(k)
            for label, shares in self.shares.items():
                own = self.facts[label][k]
                other = ABSENT if k in self.absent[label] else "; ".join(
                    f"{name} {own[name]}" for name in differing if name in own)
                found[label].append(Level(shares[k], other))
        return found

    def _differing(self, k: int) -> list[str]:
        """The names of the facts in which arms differ at a stage."""
        present = [facts[k] for label, facts in self.facts.items() if k not in self.absent[label]]
        return [name for name in dict.fromkeys(name for facts in present for name in facts)
                if len({facts[name] for facts in present if name in facts}) > 1]

    @functools.cached_property
    def by_source(self) -> frozenset[int]:
        """The indices of the stages where arms differ in the sources of a pool or their weights, and otherwise only in
        the share: there, sources have effects of their own.
        """
        return frozenset(k for k in range(len(self.stages))
                         if (differing := self._differing(k)) and set(differing) <= OF_SOURCES)

    @functools.cached_property
    def design(self) -> Design:
        return self.design_of(frozenset(self.shares))

    @functools.cache  # noqa: B019  # lives as long as the study
    def design_of(self, labels: frozenset[str]) -> Design:
        """The effects that a subset of the arms can estimate, such as the arms evaluated on one benchmark."""
        return design_of(
            self.stages, {label: levels for label, levels in self.levels.items() if label in labels},
            {k: {label: self.sources[label][k] for label in self.sources if label in labels and k not in
                 self.absent[label]} for k in self.by_source})

    @functools.cached_property
    def sweeps(self) -> list[Sweep]:
        found: dict[frozenset[str], Sweep] = {}
        for k, stage in enumerate(self.stages):
            for base, of_base in self.shares.items():
                if not 0 < of_base[k] < 1 or k in self.absent[base]:
                    continue  # an arm without code, or without text, does not determine them
                members: dict[float, str] = {}
                for label, shares in self.shares.items():
                    if self._alike(base, label, k):
                        members.setdefault(shares[k], label)
                if len(members) >= FEWEST_SHARES:
                    found.setdefault(frozenset(members.values()), Sweep(stage, sorted(members.items())))
        return [sweep for arms, sweep in found.items() if not any(arms < others for others in found)]

    def _alike(self, one: str, other: str, k: int) -> bool:
        """Whether two arms differ only in the share at a stage."""
        for j, (first, second) in enumerate(zip(self.facts[one], self.facts[other], strict=True)):
            if j != k and self.shares[one][j] != self.shares[other][j]:
                return False
            if any(first[name] != second[name] for name in first.keys() & second.keys()):
                return False
        return True

    @functools.cached_property
    def roots(self) -> dict[str, dict[int | None, str]]:
        return {label: {run.seed: _root(run, self.study) for run in _finished(self.study, label)}
                for label in self.shares}

    @functools.cached_property
    def measures(self) -> list[Measure]:
        """Held-out losses first, then benchmarks, without questions that overlap with training data."""
        runs = {label: _finished(self.study, label) for label in self.shares}
        return [*_losses(runs), *(measure for task in self.study.tasks for measure in _of_task(self.study, runs, task))]


def groups(study: Study) -> list[Group]:
    """The arms that may be compared, those with most stages first. Arms that stand alone, or have no run trained to its
    end, are in no group.
    """
    lines: dict[tuple[Any, ...], list[str]] = {}
    for label in study.arms:
        runs = _finished(study, label)
        if runs and runs[0].stages:
            names = _names(runs[0])
            model = runs[0].parameters, runs[0].ledger.get("vocabulary_hash")
            lines.setdefault((model, runs[0].stage, tuple(names)), []).append(label)
    merged: list[tuple[tuple[Any, ...], list[str], list[list[str]], float]] = []
    for (model, kind, names), labels in lines.items():
        runs = [_finished(study, label)[0] for label in labels]
        key = model, kind, sum(stage["stage"] == "tuning" for stage in stages_of(runs[0].ledger))
        length = statistics.median(map(_document_tokens, runs))
        near = next((place for place, other in enumerate(merged) if other[0] == key
                     and abs(other[3] - length) <= SAME_LENGTH * max(length, other[3])), None)
        if near is None:
            merged.append((key, list(names), [labels], length))
        else:
            merged[near] = key, _in_order(merged[near][1], names), [*merged[near][2], labels], merged[near][3]
    found = []
    for _, stages, parts, _ in merged:
        tree = _tree(study, [label for part in parts for label in part], len(stages))
        found.append((stages, tree))
        # A sweep whose points are trunks is also shown whole, beside the tree that grows from some of them.
        found += [(_names(_finished(study, part[0])[0]), part) for part in parts if not set(part) <= set(tree)]
    return sorted((_group(study, stages, labels) for stages, labels in found if len(labels) > 1),
                  key=lambda group: -len(group.stages))


def _tree(study: Study, labels: Sequence[str], stages: int) -> list[str]:
    """The arms that went through all stages or through several, or that another of them branches from."""
    runs = {label: _finished(study, label) for label in labels}
    trunks = {stage.run for of_arm in runs.values() for run in of_arm for stage in run.stages[:-1]}
    return [label for label, of_arm in runs.items()
            if len(of_arm[0].stages) > 1 or stages == 1 or any(run.name in trunks for run in of_arm)]


def _group(study: Study, stages: Sequence[str], labels: Sequence[str]) -> Group:
    shares: dict[str, list[float]] = {}
    facts: dict[str, list[Facts]] = {}
    rows: dict[str, list[Mapping[str, int]]] = {}
    absent: dict[str, frozenset[int]] = {}
    by_name = {run.name: run for run in study.runs}
    for label in labels:
        run = _finished(study, label)[0]
        own = dict(zip(_names(run), zip(run.stages, stages_of(run.ledger), strict=True), strict=True))
        absent[label] = frozenset(k for k, name in enumerate(stages) if name not in own)
        shares[label], facts[label], rows[label] = [], [], []
        for name in stages:
            rows[label].append(own[name][1]["rows"] if name in own else {})
            if name in own:
                share = _share(own[name][1], by_name.get(own[name][0].run))
                facts[label].append(_facts(own[name][1], by_name.get(own[name][0].run), study.comparison))
            else:
                share = shares[label][-1] if shares[label] else 0.0
                facts[label].append({})
            shares[label].append(share)
    # A branch with its trunk's own share continues the trunk unchanged, so it is bound to score the same.
    again = {label for label in labels if absent[label] and any(
        shares[other] == shares[label] and not absent[other] and _stands_on(study, other, label) for other in labels)}
    kept = [label for label in labels if label not in again]
    sources: dict[str, list[dict[str, float]]] = {label: [{} for _ in stages] for label in kept}
    for k in range(len(stages)):
        for pool, of_pool in zip(POOLS, (lambda share: 1 - share, lambda share: share), strict=True):
            weights = _weights({label: rows[label][k] for label in kept}, pool)
            for label, own_weights in weights.items():
                sources[label][k] |= {name: weight * of_pool(shares[label][k]) for name, weight in own_weights.items()}
                if max(map(len, weights.values())) > 1:
                    facts[label][k][f"{pool} weights"] = ", ".join(
                        f"{name.partition('.')[2]} {100 * weight:.0f}%" for name, weight in own_weights.items())
    return Group(
        study, stages, {label: shares[label] for label in kept}, {label: absent[label] for label in kept},
        {label: facts[label] for label in kept}, sources,
        {label: _document_tokens(_finished(study, label)[0]) for label in kept},
        _finished(study, labels[0])[0].parameters)


def _weights(rows: Mapping[str, Mapping[str, int]], pool: str) -> dict[str, dict[str, float]]:
    """For each arm with rows of a pool, the weights of its sources within the pool; those of an earlier arm where they
    agree to within `SAME_WEIGHT` and three rows.

    Args:
      rows: by arm and source at a stage.
    """
    found: dict[str, dict[str, float]] = {}
    totals: dict[str, int] = {}
    for label, of_arm in rows.items():
        mine = {name: count for name, count in sorted(of_arm.items()) if name.startswith(f"{pool}.") and count}
        if total := sum(mine.values()):
            own = {name: count / total for name, count in mine.items()}
            same = next((other for other, weights in found.items() if all(
                abs(weights.get(name, 0.0) - own.get(name, 0.0)) <= SAME_WEIGHT + 3 / min(total, totals[other])
                for name in weights.keys() | own.keys())), None)
            found[label], totals[label] = own if same is None else found[same], total
    return found


def models_of(group: Group, among: Sequence[Group]) -> str:
    """The end of a title that names the size of a group's model, where other groups have models of other sizes."""
    sizes = {other.parameters for other in among}
    return f", {group.parameters:,} parameters" if len(sizes) > 1 and group.parameters else ""


def _stands_on(study: Study, label: str, trunk: str) -> bool:
    trunks = {run.name for run in _finished(study, trunk)}
    return any(stage.run in trunks for run in _finished(study, label) for stage in run.stages[:-1])


def _names(run: Run) -> list[str]:
    """The stages of a run, numbered where several have one name."""
    names: list[str] = []
    for stage in run.stages:
        again = sum(name.partition(" ")[0] == stage.name for name in names)
        names.append(f"{stage.name} {again + 1}" if again else stage.name)
    return names


def _in_order(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """The stages of two lines merged: each stage of the second that the first lacks stands before the one that follows
    it there.
    """
    found = list(first)
    for place, name in enumerate(second):
        if name not in found:
            following = [found.index(later) for later in second[place + 1:] if later in found]
            found.insert(following[0] if following else len(found), name)
    return found


def _document_tokens(run: Run) -> int:
    return sum(sum(stage["tokens"].values()) for stage in stages_of(run.ledger) if stage["stage"] != "tuning")


def _share(ledger: Mapping[str, Any], run: Run | None) -> float:
    """The share of code at a stage: what its run asked for, where that is constant and was drawn; else the share drawn.
    """
    drawn = rows_of_code(ledger) / max(1, sum(ledger["rows"].values()))
    asked = code_rate(run) if run else None
    return asked if asked is not None and abs(asked - drawn) < SAME_SHARE else round(drawn, 3)


def _facts(ledger: Mapping[str, Any], run: Run | None, comparison: str | None) -> Facts:
    """The other facts that distinguish arms at a stage. Facts of code alone are absent without code, likewise those of
    text.
    """
    facts: Facts = {}
    if branch := ledger.get("branch"):
        facts["from step"] = str(branch["step"])
    trained = [name for name, rows in ledger["rows"].items() if rows]
    for pool in POOLS:
        if sources := sorted(name for name in trained if name.startswith(f"{pool}.")):
            facts[f"{pool} of"] = ", ".join(name.partition(".")[2] for name in sources)
    if rows_of_code(ledger):
        drawn = [rows_of_code(phase) / rows for phase in ledger.get("phases", [])
                 if (rows := sum(phase["rows"].values()))]
        changes = drawn and max(drawn) - min(drawn) > 2 * SAME_SHARE
        facts["mix"] = " ".join(f"{100 * share:.0f}%" for share in drawn) if changes else "constant"
    lengths = ("train.train_steps",) if comparison == "data-matched" else ()
    if run:
        facts |= {name: value for name, value in of_an_arm(run.settings).items() if name not in (*OF_THE_MIX, *lengths)}
    return facts


def _root(run: Run, study: Study) -> str:
    """The first run of its line on which no other seed stands."""
    for stage in run.stages:
        seeds = {other.seed for other in study.runs if any(one.run == stage.run for one in other.stages)}
        if stage.run and seeds == {run.seed}:
            return stage.run
    return run.name


def _finished(study: Study, label: str) -> list[Run]:
    """The runs of an arm that are trained to their end, or whose state is unknown."""
    return [run for run in study.arms[label] if (run.provenance or {}).get("finished") is not False]


def _losses(runs: Mapping[str, Sequence[Run]]) -> list[Measure]:
    """By pool, the losses at the runs' ends: in bits per byte where all runs recorded them, else in nats per token."""
    ends = {label: {run.seed: evaluations[-1] for run in of_arm if (evaluations := [
        line for line in run.records if line["split"] == "eval"])} for label, of_arm in runs.items()}
    found = []
    for pool in POOLS:
        lines = [line for of_arm in ends.values() for line in of_arm.values()]
        known = {name: [line.get(f"{name}/{pool}") is not None for line in lines] for name in ("bits_per_byte", "loss")}
        name = "bits_per_byte" if lines and known["bits_per_byte"] == known["loss"] else "loss"
        if any(known[name]):
            found.append(Measure(
                f"held-out loss on {pool}", "bits per byte" if name == "bits_per_byte" else "nats per token", "lower",
                None, pool, 1.0, True, {label: {
                    seed: Sample(line[f"{name}/{pool}"], np.array([line[f"{name}/{pool}"]]))
                    for seed, line in of_arm.items() if line.get(f"{name}/{pool}") is not None}
                    for label, of_arm in ends.items()}))
    return found


def _of_task(study: Study, runs: Mapping[str, Sequence[Run]], task: str) -> list[Measure]:
    """The contributions of a benchmark's questions under each metric and measure, for the arms evaluated and measured.
    """
    results = {(label, run.seed): run.results[task] for label, of_arm in runs.items() for run in of_arm
               if task in run.results}
    found, sample = [], " (sample)" * study.is_sample(task)
    for one in questions.asked(results, study.overlapping(task)):
        samples: dict[str, dict[int | None, Sample]] = {label: {} for label in runs}
        for (label, seed), values in one.values.items():
            samples[label][seed] = Sample(one.scores[label, seed], values)
        found.append(Measure(
            f"{task} {one.title}{sample}", one.unit or "points", one.better, task, one.metric,
            1.0 if one.unit else 100.0, one.metric in (*METRICS, "bits_per_byte"), samples))
    return found
