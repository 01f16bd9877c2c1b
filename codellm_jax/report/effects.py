"""Effects of stages: what code at one stage adds while the other stages stay the same, estimated from any tree of arms.

An arm is described by its levels: for each stage, the share of code and all other facts that distinguish arms there. A
linear model over arms has

    an effect for each level of each stage, and for each pair of stages an interaction, z_j z_k, with z = 1/2 where an
    arm has code in the stage and -1/2 where it has none,

and is fitted by least squares to the arms' means, each counting equally. Its contrasts are

    code in j           the mean over the levels with code minus that over those without (a main effect, midway between
                        code and none in the others)
    more code in j      the slope over the shares of the levels with code, for 10 points of 100
    a source in j       where levels differ in the sources of a pool or their weights: the slope over the share of that
                        source by least squares over the levels, for 10 points in place of text in its proportions, or
                        where that is not estimable in place of the other sources of its pool
    j and k together    the coefficient of the interaction: what code in j adds where k has code, minus what it adds
                        where k has none

Interactions of three or more stages are assumed to be zero. A contrast is estimable where it lies in the row space of
the design matrix (Searle, 1971, section 5.4); the others are reported as holes. Interactions that are not estimable are
assumed to be zero, and the hole says so. Each effect is thus a weighted sum of arms; in a full 2 x 2 design it is the
textbook's.

The error of such a sum follows `results.seeds`: arms that start from the same run of one seed form a family; the
family's part of the sum varies between its seeds, and families are independent. The variance between questions is
added, where there are questions.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codellm_jax.results.seeds import Contrast, by_parts
from codellm_jax.results.statistics import without_rounding

SMALL = 1e-9
STEP = 0.1  # of a share: the unit of a slope
SAME_WEIGHT = 0.02  # of a source within its pool


class Level(NamedTuple):
    """The levels of an arm at a stage; arms with equal levels everywhere are repetitions of each other."""

    share: float  # of code; where the arm skips the stage, that of the stage before
    other: str = ""  # the other facts: the order of the mix, sources, where the stage begins, settings

    @property
    def code(self) -> bool:
        return self.share > 0


class Effect(NamedTuple):
    """A contrast as a weighted sum of arms."""

    kind: str  # "code", "more", "source", "together", or of a sweep "share"
    name: str
    weights: Mapping[str, float]  # of the arms that count, by label


class Design(NamedTuple):
    """The effects that a set of arms can estimate."""

    effects: Sequence[Effect]
    holes: Sequence[str]  # sentences: what they cannot estimate, and which arms are missing


class Sample(NamedTuple):
    """One measure of one run: its score, and values [n] of its questions, whose mean is the score; [1] without
    questions.
    """

    score: float
    values: np.ndarray


class Told(NamedTuple):
    """An effect on one measure."""

    estimate: float
    contrast: Contrast | None  # None where its error is unknown
    seeds: int  # the smallest number in any family


def design_of(stages: Sequence[str], arms: Mapping[str, Sequence[Level]],
              sources: Mapping[int, Mapping[str, Mapping[str, float]]] | None = None) -> Design:
    """The effects that arms can estimate, and the holes.

    Args:
      stages: K names.
      arms: the K levels of each arm, by label.
      sources: by the index of each stage whose sources have effects of their own: for each arm that went through it,
        the share of each source by name, "POOL.NAME". Arms of one level have the same shares.
    """
    labels = list(arms)
    levels = [sorted({own[k] for own in arms.values()}, key=lambda level: (level.share, level.other))
              for k in range(len(stages))]
    varying = [k for k in range(len(stages)) if len(levels[k]) > 1]
    both = [k for k in varying if len({level.code for level in levels[k]}) == 2]
    holes = [f"All arms have {_shares(levels[k])} of code in {stages[k]}: the effect of code there cannot be estimated."
             for k in range(len(stages)) if k not in both and levels[k][0].code]
    pairs = list(itertools.combinations(both, 2))
    columns = _columns(labels, arms, levels, varying)
    products = {pair: np.array([np.prod([0.5 if arms[label][k].code else -0.5 for k in pair]) for label in labels])
                for pair in pairs}

    def weights_of(wanted: Mapping[Any, float], kept: Sequence[tuple[int, int]]) -> np.ndarray | None:
        """The weight of each arm, [A]; None where the contrast is not estimable."""
        matrix = np.stack([np.ones(len(labels)), *columns.values(), *(products[pair] for pair in kept)], axis=1)
        contrast = np.array([0.0, *(wanted.get(name, 0.0) for name in (*columns, *kept))])
        weights = contrast @ np.linalg.pinv(matrix, rcond=SMALL)
        return weights if np.abs(weights @ matrix - contrast).max() < 1e-6 else None

    together = {pair: weights_of({pair: 1.0}, pairs) for pair in pairs}
    kept = [pair for pair in pairs if together[pair] is not None]
    effects: list[Effect] = []
    confounded: list[int] = []
    for k in varying:
        for kind, wanted in _contrasts(k, levels[k]):
            weights = weights_of(wanted, kept)
            if weights is not None:
                effects.append(Effect(kind, f"{'10 points more of ' * (kind == 'more')}code in {stages[k]}",
                                      _named(labels, weights)))
            elif kind == "code":
                confounded.append(k)
    for k, of_arms in (sources or {}).items():
        contrasts, untold = _source_contrasts({arms[label][k]: shares for label, shares in of_arms.items()})
        for name, wanted in contrasts:
            weights = weights_of({(k, level): weight for level, weight in wanted.items()}, kept)
            if weights is not None:
                effects.append(Effect("source", f"10 points of {name} in {stages[k]}", _named(labels, weights)))
        if untold:
            holes.append(f"The effects of {listed(untold)} in {stages[k]} cannot be estimated: their shares are "
                         "confounded with those of other sources.")
    for pair, weights in together.items():
        if weights is not None:
            effects.append(Effect("together", f"interaction of code in {listed([stages[k] for k in pair])}",
                                  _named(labels, weights)))
        elif not set(pair) <= set(confounded):
            holes.append(f"Whether {listed([f'code in {stages[k]}' for k in pair])} depend on each other cannot be "
                         f"estimated: {_missing([pair], stages, arms)}. The effects assume that they do not.")
    if confounded:
        others = [k for k in varying if k not in confounded] if len(confounded) == 1 else []
        names = [f"code in {stages[k]}" for k in (*confounded, *others)]
        holes.append(f"The effects of {listed(names)} cannot be told from each other: "
                     f"{_missing(list(itertools.combinations([*confounded, *others], 2)), stages, arms)}.")
    return Design(effects, holes)


def told(weights: Mapping[str, float], samples: Mapping[str, Mapping[int | None, Sample]],
         roots: Mapping[str, Mapping[int | None, str]], level: float = 0.95) -> Told | None:
    """A weighted sum of arms with its error.

    Args:
      weights: of arms, by label.
      samples: by arm and seed, on the same questions.
      roots: by arm and seed, the earliest run of its line on which no other seed stands; families share it.
      level: of confidence.

    Returns:
      None where an arm has no sample, or a family has no seed that all its arms have.
    """
    labels = [label for label, weight in weights.items() if abs(weight) > SMALL]
    if not labels or any(not samples.get(label) for label in labels):
        return None
    estimate, size_of_parts, seeds, questions = 0.0, 0.0, [], np.zeros(1)
    spreads: dict[tuple[float, ...], list[tuple[float, np.ndarray]]] = {}
    for family in _families(labels, samples, roots):
        common = [seed for seed in samples[family[0]] if all(seed in samples[label] for label in family)]
        if not common:
            return None
        own = np.array([weights[label] for label in family])
        parts_of_sum = own * [[samples[label][seed].score for label in family] for seed in common]  # [S, A]
        values = np.einsum("a,asn->sn", own, [[samples[label][seed].values for seed in common] for label in family])
        estimate += float(parts_of_sum.sum(axis=1).mean())
        size_of_parts += float(np.abs(parts_of_sum).sum(axis=1).mean())
        questions = questions + values.mean(axis=0)
        seeds.append(len(common))
        # Families with equal weights are assumed to vary equally, up to the size of their weights.
        size = float(np.linalg.norm(own))
        kind = tuple(np.round(np.sort(np.abs(own)) / size, 6))
        spreads.setdefault(kind, []).append((size, values.mean(axis=1) / size))
    estimate = without_rounding(estimate, size_of_parts)
    parts = []
    if min(seeds) > 1:
        for families in spreads.values():
            degrees = sum(len(of_seeds) - 1 for _, of_seeds in families)
            pooled = sum(float(((of_seeds - of_seeds.mean()) ** 2).sum()) for _, of_seeds in families) / degrees
            parts.append((pooled * sum(size**2 / len(of_seeds) for size, of_seeds in families), degrees))
    if len(questions) > 1:
        sampled = questions if np.std(questions) > 1e-12 else np.append(questions, 0.0)
        parts.append((float(np.var(sampled, ddof=1)) / len(sampled), len(sampled) - 1))
    return Told(estimate, by_parts(estimate, parts, level) if parts else None, min(seeds))


def _families(labels: Sequence[str], samples: Mapping[str, Mapping[int | None, Sample]],
              roots: Mapping[str, Mapping[int | None, str]]) -> list[list[str]]:
    """Groups of arms that start from the same runs."""
    families: list[tuple[set[str], list[str]]] = []
    for label in labels:
        own, members = {roots[label][seed] for seed in samples[label]}, [label]
        for other in [other for other in families if other[0] & own]:
            families.remove(other)
            own, members = own | other[0], other[1] + members
        families.append((own, members))
    return [members for _, members in families]


def _columns(labels: Sequence[str], arms: Mapping[str, Sequence[Level]], levels: Sequence[Sequence[Level]],
             varying: Sequence[int]) -> dict[object, np.ndarray]:
    """An indicator [A] for each level but the first of each stage, by (stage, level)."""
    return {(k, level): np.array([float(arms[label][k] == level) for label in labels])
            for k in varying for level in levels[k][1:]}


def _contrasts(k: int, levels: Sequence[Level]) -> list[tuple[str, Mapping[Any, float]]]:
    """(kind, coefficients by column) of each contrast of a stage with these levels."""
    code, none = [level for level in levels if level.code], [level for level in levels if not level.code]
    found: list[tuple[str, Mapping[Any, float]]] = []
    if code and none:
        found.append(("code", {(k, level): 1 / len(code) for level in code}
                      | {(k, level): -1 / len(none) for level in none}))
    shares = np.array([level.share for level in code])
    if len(code) > 1 and np.ptp(shares) > 0.02:
        centred = shares - shares.mean()
        found.append(("more", {(k, level): float(STEP * one / (centred**2).sum())
                               for level, one in zip(code, centred, strict=True)}))
    return found


def _source_contrasts(levels: Mapping[Level, Mapping[str, float]]) -> tuple[
        list[tuple[str, Mapping[Level, float]]], list[str]]:
    """(name, weights of levels) for each source whose effect the levels of a stage can estimate, and the names of the
    other sources whose weight within their pool differs. `levels` maps to the shares of the sources.
    """
    names = sorted({name for shares in levels.values() for name in shares})
    shares = np.array([[own.get(name, 0.0) for name in names] for own in levels.values()])  # [L, S]
    matrix = np.concatenate([np.ones((len(shares), 1)), shares], axis=1)
    inverse = np.linalg.pinv(matrix, rcond=SMALL)
    of_text = np.array([name.startswith("text.") for name in names])
    found: list[tuple[str, Mapping[Level, float]]] = []
    untold: list[str] = []
    for place, name in enumerate(names):
        others = np.arange(len(names)) != place
        # Text that keeps its proportions has no effects of its sources: each would be the effect of another amount of
        # code.
        for what, replaced in (("text", of_text), ("the others of its pool", of_text == of_text[place])):
            instead = np.where(replaced & others, shares.mean(axis=0), 0.0)
            if what == "text" and of_text[place] or not instead.sum():
                continue
            direction = STEP * ((~others).astype(float) - instead / instead.sum())
            contrast = np.append(0.0, direction)
            weights = contrast @ inverse
            if np.abs(weights @ matrix - contrast).max() < 1e-6:
                found.append((f"{name} in place of {what}", dict(zip(levels, weights.tolist(), strict=True))))
                break
        else:
            pool = shares[:, of_text == of_text[place]].sum(axis=1)
            within = shares[pool > 0, place] / pool[pool > 0]
            untold += [name] if np.ptp(within) > SAME_WEIGHT else []
    return found, untold


def _named(labels: Sequence[str], weights: np.ndarray) -> dict[str, float]:
    return {label: float(weight) for label, weight in zip(labels, weights, strict=True) if abs(weight) > SMALL}


def _missing(pairs: Sequence[tuple[int, int]], stages: Sequence[str], arms: Mapping[str, Sequence[Level]]) -> str:
    """The cells of code and no code that no arm occupies, for pairs of stages."""
    found = []
    for j, k in pairs:
        one, other = stages[j], stages[k]
        cells = {(own[j].code, own[k].code) for own in arms.values()}
        found += [text for cell, text in (
            ((True, True), f"code in both {one} and {other}"), ((True, False), f"code in {one} but not in {other}"),
            ((False, True), f"code in {other} but not in {one}"),
            ((False, False), f"code in neither {one} nor {other}")) if cell not in cells]
    return f"no arm has {', and no arm has '.join(found)}" if found else "other differences are confounded with it"


def _shares(levels: Sequence[Level]) -> str:
    shares = sorted({round(100 * level.share, 1) for level in levels})
    return f"{shares[0]:g}%" if len(shares) == 1 else f"{shares[0]:g}% to {shares[-1]:g}%"


def listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
