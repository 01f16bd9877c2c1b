"""Effects of stages: what code at one stage adds, the other stages held as they are, from any tree of arms.

Arms are described by their levels: for each stage the share of code and whatever else tells arms apart there. A linear
model over arms has

    an effect for each level of each stage, and for each two stages an interaction, z_j z_k, with z = 1/2 where an arm
    has code in the stage and -1/2 where it has none,

and is fitted by least squares to the arms' means, each counting equally. Its contrasts are

    code in j           the mean over the levels with code minus that over those without (a main effect, midway between
                        code and none in the others)
    more code in j      the slope over the shares of the levels with code, for 10 points of 100
    a source in j       where levels differ in the sources of a pool or their weights: the slope over the share of that
                        source by least squares over the levels, for 10 points in place of text in its proportions, or
                        where that is not estimable in place of the other sources of its pool
    j and k together    the coefficient of the interaction: what code in j adds where k has code, minus what it adds
                        where k has none

Interactions of three stages and more are taken to be none. A contrast is estimable where it lies in the row space of
the design matrix (Searle, 1971, section 5.4); others are named as holes. Interactions that are not estimable are
taken to be none, which the hole says. So each effect is a weighted sum of arms, in a full 2 x 2 the textbook's.

How sure one may be of such a sum follows `results.seeds`: runs that stand on the same run of one seed are a family; a
family's part of the sum varies between its seeds, and those of families are independent. To that comes the variance
between questions, where there are any.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codellm_jax.results.seeds import Contrast, by_parts
from codellm_jax.results.statistics import without_rounding

SMALL = 1e-9
STEP = 0.1  # of a share, that a slope is told for
SAME_WEIGHT = 0.02  # of a source within its pool


class Level(NamedTuple):
    """What an arm has at a stage; arms of equal levels everywhere are repetitions of each other."""

    share: float  # of code; where the arm goes without the stage, that of its stage before
    other: str = ""  # what else tells arms apart: the order of the mix, sources, where it begins, settings

    @property
    def code(self) -> bool:
        return self.share > 0


class Effect(NamedTuple):
    """A contrast as a weighted sum of arms."""

    kind: str  # "code", "more", "source", "together", or of a sweep "share"
    name: str
    weights: Mapping[str, float]  # of the arms that count, by label


class Design(NamedTuple):
    """What a set of arms can tell."""

    effects: Sequence[Effect]
    holes: Sequence[str]  # sentences: what they cannot tell, and which arms are missing


class Sample(NamedTuple):
    """One measure of one run: its score, and values [n] of its questions whose mean stands for it; [1] without any."""

    score: float
    values: np.ndarray


class Told(NamedTuple):
    """An effect on one measure."""

    estimate: float
    contrast: Contrast | None  # None where nothing can be said of its error
    seeds: int  # the fewest of any family


def design_of(stages: Sequence[str], arms: Mapping[str, Sequence[Level]],
              sources: Mapping[int, Mapping[str, Mapping[str, float]]] | None = None) -> Design:
    """The effects that arms can tell, and the holes.

    Args:
      stages: K names.
      arms: K levels of each arm, by label.
      sources: of the stages, by place, whose sources have effects of their own: of each arm that went through it the
        share of each source by name, "POOL.NAME". Arms of one level have the same.
    """
    labels = list(arms)
    levels = [sorted({own[k] for own in arms.values()}, key=lambda level: (level.share, level.other))
              for k in range(len(stages))]
    varying = [k for k in range(len(stages)) if len(levels[k]) > 1]
    both = [k for k in varying if len({level.code for level in levels[k]}) == 2]
    holes = [f"All arms have {_shares(levels[k])} of code in {stages[k]}: the effect of code there cannot be told."
             for k in range(len(stages)) if k not in both and levels[k][0].code]
    pairs = list(itertools.combinations(both, 2))
    columns = _columns(labels, arms, levels, varying)
    products = {pair: np.array([np.prod([0.5 if arms[label][k].code else -0.5 for k in pair]) for label in labels])
                for pair in pairs}

    def weights_of(wanted: Mapping[Any, float], kept: Sequence[tuple[int, int]]) -> np.ndarray | None:
        """Of each arm, [A]; None where the contrast is not estimable."""
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
            holes.append(f"The effects of {listed(untold)} in {stages[k]} cannot be told: their shares go along with "
                         "those of other sources.")
    for pair, weights in together.items():
        if weights is not None:
            effects.append(Effect("together", f"interaction of code in {listed([stages[k] for k in pair])}",
                                  _named(labels, weights)))
        elif not set(pair) <= set(confounded):
            holes.append(f"Whether {listed([f'code in {stages[k]}' for k in pair])} need each other cannot be told: "
                         f"{_missing([pair], stages, arms)}. The effects suppose that they do not.")
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
      weights: of arms by label.
      samples: of each arm and seed, of the same questions.
      roots: of each arm and seed the run that it stands on which no other seed stands on: families have it in common.
      level: of confidence.

    Returns:
      None where an arm has no sample, or a family no seed that all its arms have.
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
        # Families that are weighted alike are taken to vary equally, but for the size of their weights.
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
    """Arms that stand on the same runs, together."""
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
    """[A] of each level of each stage but its first, by (stage, level)."""
    return {(k, level): np.array([float(arms[label][k] == level) for label in labels])
            for k in varying for level in levels[k][1:]}


def _contrasts(k: int, levels: Sequence[Level]) -> list[tuple[str, Mapping[Any, float]]]:
    """(kind, coefficients by column) of a stage with these levels."""
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
    """(what, weights of levels) of each source whose effect the levels of a stage can tell, and the names of others
    whose weight within their pool differs; `levels` have the shares of the sources.
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
        # Text that keeps its proportions has no effects of its sources: each would be that of another amount of code.
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
    """Which cells of code and none no arm is in, for pairs of stages."""
    found = []
    for j, k in pairs:
        one, other = stages[j], stages[k]
        cells = {(own[j].code, own[k].code) for own in arms.values()}
        found += [text for cell, text in (
            ((True, True), f"code in both {one} and {other}"), ((True, False), f"code in {one} but not in {other}"),
            ((False, True), f"code in {other} but not in {one}"),
            ((False, False), f"code in neither {one} nor {other}")) if cell not in cells]
    return f"no arm has {', and no arm has '.join(found)}" if found else "what else arms differ in goes along with it"


def _shares(levels: Sequence[Level]) -> str:
    shares = sorted({round(100 * level.share, 1) for level in levels})
    return f"{shares[0]:g}%" if len(shares) == 1 else f"{shares[0]:g}% to {shares[-1]:g}%"


def listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
