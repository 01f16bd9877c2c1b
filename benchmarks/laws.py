"""The coverage of the intervals of `t5x laws`, and the errors of its laws.

    python -m benchmarks.laws                  simulated studies: how often intervals contain the truth
    python -m benchmarks.laws --data=FOLDER    also published sweeps: errors at left-out shares

The laws, noise and best share of a simulated study are known. Reported for each kind: how often the 95% interval of the
predicted loss contains the true one, over all shares; the same for the best share; the verdicts if the best share is
inside the sweep, and if it is at the edge; how many planted outliers are named, and how many other runs.

Published sweeps are `pile_two_domains.csv`, `pile_three_domains.csv` (Data Mixing Laws) and `regmix_*` (RegMix); absent
ones are skipped. Our laws are compared with a constant, linear interpolation, and the papers' fits: c + k exp(sum t r)
by least squares from several starts, and linear regression.
"""

import argparse
import csv
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import optimize, stats

from codellm_jax.report.fitted import Fitted, fit_sweep, predict
from codellm_jax.report.mixing import objective_at
from codellm_jax.report.optimum import Best, best, lowest
from codellm_jax.report.sweeps import Sweep

SIX = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
Truth = Callable[[np.ndarray], np.ndarray]  # shares [n, S] -> losses [D, n]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of simulated study.

    Attributes:
      shares: shares of the second of two sources; or the numbers of sources and random mixtures.
      seeds: runs of each mixture.
      noise: the standard deviation of a run.
      truth: "exponential", "power", "repetition", "edge", "flat".
      loud: the factor by which the noise grows from share 0 to share 1.
      loud_last: a further factor at the largest share alone.
      outliers: number of outliers in each loss.
      questions: number of questions of a benchmark, whose mean replaces each loss; 0 for losses. Questions differ in
        difficulty and in their gain with the share; intervals should contain the mean over all possible questions.
    """

    name: str
    shares: Sequence[float] | tuple[int, int]
    seeds: int
    noise: float
    truth: str = "exponential"
    loud: float = 1.0
    loud_last: float = 1.0
    outliers: int = 0
    questions: int = 0


KINDS = (
    Kind("six shares, 3 seeds", SIX, 3, 0.01),
    Kind("loud", SIX, 3, 0.05),
    Kind("quiet", SIX, 3, 0.001),
    Kind("one seed, 10 shares", tuple(np.linspace(0, 1, 10)), 1, 0.01),
    Kind("one seed, 5 shares", (0.0, 0.25, 0.5, 0.75, 1.0), 1, 0.005),
    Kind("four shares, 2 seeds", (0.0, 0.2, 0.4, 0.6), 2, 0.01),
    Kind("three shares, 5 seeds", (0.1, 0.5, 0.9), 5, 0.01),
    Kind("power laws", SIX, 3, 0.01, "power"),
    Kind("repetition", tuple(np.linspace(0, 1, 8)), 3, 0.01, "repetition"),
    Kind("best at the edge", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5), 3, 0.01, "edge"),
    Kind("no difference", SIX, 3, 0.02, "flat"),
    Kind("an outlier", SIX, 3, 0.01, outliers=1),
    Kind("three outliers, 5 seeds", SIX, 5, 0.01, outliers=3),
    Kind("an outlier, one seed", tuple(np.linspace(0, 1, 11)), 1, 0.01, outliers=1),
    Kind("noise 20 times larger", SIX, 5, 0.005, loud=20.0),
    Kind("noise 25 times at all code", SIX, 5, 0.005, loud_last=25.0),
    Kind("a benchmark of 100 questions", SIX, 3, 0.01, questions=100),
    Kind("a benchmark of 12 questions", SIX, 3, 0.01, questions=12),
    Kind("three sources, 20 runs", (3, 20), 1, 0.01),
    Kind("five sources, 40 runs", (5, 40), 1, 0.01),
    Kind("seven sources, 60 runs", (7, 60), 1, 0.01),
    Kind("seven sources, 30 runs, loud", (7, 30), 1, 0.03),
)


@dataclasses.dataclass
class Tally:
    """The results of the studies of a kind; lists have an entry per study."""

    law: list[float] = dataclasses.field(default_factory=list)
    run: list[float] = dataclasses.field(default_factory=list)
    best: list[float] = dataclasses.field(default_factory=list)
    width: list[float] = dataclasses.field(default_factory=list)
    inside: list[bool] = dataclasses.field(default_factory=list)  # whether the true best share is inside the sweep
    verdicts: list[str] = dataclasses.field(default_factory=list)
    planted: int = 0
    named: int = 0
    falsely: int = 0

    def said(self, verdict: str, inside: bool) -> float:
        """The fraction of a verdict among the studies whose best share is inside the sweep, or not."""
        of = [said == verdict for said, where in zip(self.verdicts, self.inside, strict=True) if where == inside]
        return float(np.mean(of)) if of else float("nan")


def truth_of(kind: Kind, dice: np.random.Generator) -> Truth:
    """A random law of a kind, with a loss for each source."""
    if isinstance(kind.shares[1], int):
        sources = int(kind.shares[0])
        rates = dice.uniform(0, 1.5, (sources, sources)) + np.diag(dice.uniform(1, 5, sources))
        sizes, floors = dice.uniform(0.5, 2, sources), dice.uniform(1, 3, sources)
        return lambda shares: floors[:, None] + sizes[:, None] * np.exp(-rates @ shares.T)
    rates, sizes, floors = dice.uniform(1, 8, 2), dice.uniform(0.2, 1, 2), np.array([3.0, 1.0])
    if kind.truth == "edge":
        sizes[0] /= 20
    if kind.truth == "flat":
        sizes[:] = 0
    powers = dice.uniform(0.2, 0.6, 2)

    def losses(shares: np.ndarray) -> np.ndarray:
        if kind.truth == "power":
            found = floors[:, None] + 0.5 * sizes[:, None] * (shares.T + 0.05) ** -powers[:, None]
        else:
            found = floors[:, None] + sizes[:, None] * np.exp(-rates[:, None] * shares.T)
        if kind.truth == "repetition":  # code is repeated beyond a share of a third
            found[1] += 0.6 * np.maximum(shares[:, 1] - 1 / 3, 0) ** 2
        return found

    return losses


def deviation_of(kind: Kind, shares: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The standard deviation of runs at these shares, [n]; `last` marks the largest share of the study."""
    return kind.noise * kind.loud ** shares[:, 1] * np.where(last, kind.loud_last, 1)


def simulated(kind: Kind, dice: np.random.Generator) -> tuple[Sweep, Truth, list[set[int]]]:
    """A study, its truth, and the positions of the outliers of each loss."""
    truth = truth_of(kind, dice)
    if isinstance(kind.shares[1], int):
        mixes = dice.dirichlet(np.ones(int(kind.shares[0])), kind.shares[1])
    else:
        mixes = np.stack([1 - np.array(kind.shares), np.array(kind.shares)], axis=1)
    shares = np.repeat(mixes, kind.seeds, axis=0)
    last = shares[:, 1] == shares[:, 1].max()
    deviation = deviation_of(kind, shares, last)
    values = truth(shares).T
    values = values + dice.normal(size=values.shape) * deviation[:, None]
    planted = []
    for loss in range(values.shape[1]):
        lines = dice.choice(len(shares), kind.outliers, replace=False)
        values[lines, loss] += dice.choice([-1, 1], len(lines)) * dice.uniform(8, 20, len(lines)) * deviation[lines]
        planted.append({int(line) for line in lines})
    sweep = sweep_of(shares, values)
    if kind.questions:
        sweep = asked_questions(sweep, kind.questions, dice)
    return sweep, truth, planted


def asked_questions(sweep: Sweep, number: int, dice: np.random.Generator) -> Sweep:
    """The sweep with this many random questions in place of each loss, which is the mean over all possible ones."""
    questions = {}
    for place, name in enumerate(sweep.losses):
        hard, gain, curve = dice.normal(0, 0.5, number), dice.normal(0, 0.1, number), dice.normal(0, 0.1, number)
        share = sweep.shares[:, 1:2]
        questions[f"{name}/bits_per_byte"] = (
            sweep.values[:, place, None] + hard + gain * share + curve * np.sin(3 * share)
            + dice.normal(0, 0.05, (len(share), number)))
    return dataclasses.replace(sweep, losses=list(questions), questions=questions, values=np.stack(
        [values.mean(axis=1) for values in questions.values()], axis=1))


def answer(sweep: Sweep) -> tuple[Fitted, Best]:
    """The fitted laws, and the best mixture for the mean of all losses."""
    fitted = fit_sweep(sweep, (), lambda name: None)
    swept = fitted.points.shares
    curves_at = objective_at(fitted, {name: 1 / len(sweep.losses) for name in sweep.losses})
    return fitted, best(swept, swept, swept.mean(axis=0), curves_at)


def tally(kind: Kind, studies: int, seed: int = 0) -> Tally:
    """Compares the answers of `studies` simulated studies with their truth."""
    found = Tally()
    for number in range(studies):
        dice = np.random.default_rng([seed, number])
        sweep, truth, planted = simulated(kind, dice)
        fitted, answered = answer(sweep)
        ends = sweep.shares[:, 1].min(), sweep.shares[:, 1].max()
        asked = np.stack([1 - (second := np.linspace(*ends, 51)), second], axis=1) if len(
            sweep.sources) == 2 else dice.dirichlet(np.ones(len(sweep.sources)), 50)
        true = truth(asked)
        _, intervals, of_runs = predict(fitted, fitted.at(asked), np.zeros(len(sweep.losses)))
        found.law.append(float(np.mean((intervals[..., 0] <= true) & (true <= intervals[..., 1]))))
        last = asked[:, 1] >= sweep.shares[:, 1].max()
        run = true + dice.normal(size=true.shape) * deviation_of(kind, asked, last)
        if not kind.questions:  # a further run gets the same questions, whose mean differs from the truth
            found.run.append(float(np.mean((of_runs[..., 0] <= run) & (run <= of_runs[..., 1]))))
        at_best = lowest(fitted.points.shares, lambda shares, truth=truth: truth(shares).mean(axis=0)[None])[0]
        low, high = answered.intervals.T
        step = 0.00125 * np.ptp(ends) if len(sweep.sources) == 2 else 0.005  # the resolution of both searches
        found.best.append(float(np.mean((low - step <= at_best) & (at_best <= high + step))))
        found.width.append(float((high - low).mean()))
        found.inside.append(kind.truth != "flat" and (len(sweep.sources) > 2 or ends[0] < at_best[1] < ends[1]))
        found.verdicts.append(answered.verdict.replace("told", "interior"))
        for mine, named in zip(planted, fitted.outliers, strict=True):
            lines = {outlier.run for outlier in named}
            found.planted, found.named = found.planted + len(mine), found.named + len(lines & mine)
            found.falsely += len(lines - mine)
    return found


def coverage(studies: int, only: str = "") -> None:
    """Prints a line for each kind of study."""
    print(f"{studies} simulated studies of each kind. Coverage of 95% intervals, in per cent: of a predicted loss, of\n"
          "one further run, and of the best share. 'inside' and 'edge': what was said where the best share is inside\n"
          "of the sweep, and where it is at its edge or there is none: interior / edge / cannot tell.\n")
    print(f"{'kind':<30} {'loss':>5} {'run':>5} {'best':>5} {'width':>6}  {'inside':>14} {'edge':>14}  "
          "outliers named, falsely   s")
    for kind in KINDS:
        if only not in kind.name:
            continue
        begin = time.perf_counter()
        found = tally(kind, studies)
        said = ["/".join(f"{100 * found.said(verdict, inside):.0f}" for verdict in ("interior", "edge", "cannot tell"))
                if inside in found.inside else "-" for inside in (True, False)]
        print(f"{kind.name:<30} {100 * np.mean(found.law):>5.1f} "
              f"{f'{100 * np.mean(found.run):.1f}' if found.run else '-':>5} "
              f"{100 * np.mean(found.best):>5.1f} {np.mean(found.width):>6.3f}  {said[0]:>14} {said[1]:>14}  "
              f"{found.named}/{found.planted}, {found.falsely} in {2 * studies} losses"
              f"  {(time.perf_counter() - begin) / studies:.2f}", flush=True)


def sweep_of(shares: np.ndarray, values: np.ndarray) -> Sweep:
    """A sweep of runs with shares [n, S] and losses [n, D]."""
    n, sources, losses = len(shares), shares.shape[1], values.shape[1]
    nothing = np.full(n, np.nan)
    return Sweep("", [f"run{number}" for number in range(n)], [None] * n,
                 [f"source{place}" for place in range(sources)], shares,
                 [f"loss{place}" for place in range(losses)], values, nothing, nothing, np.ones(n, bool),
                 np.full(shares.shape, np.nan))


def left_out(shares: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Predictions of our laws for each mixture from all others, [n]."""
    sweep = sweep_of(shares, values[:, None])
    found = np.empty(len(values))
    for out in range(len(values)):
        fitted = fit_sweep(sweep.only(np.arange(len(values)) != out), (), lambda name: None)
        found[out] = fitted.laws[0].mean(fitted.at(shares[[out]]))[0]
    return found


def mixing_law(shares: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """c + k exp(sum_j t_j r_j) by least squares from several starts (Ye et al., 2024), at `asked`."""
    best_cost, found = np.inf, np.full(len(asked), values.mean())
    free = shares[:, 1:]
    for c, t in itertools.product((values.min() - 0.05, values.min() - 0.5), (-3.0, -0.5, 0.5, 3.0)):
        start = np.concatenate([[c, np.log(max(values.mean() - c, 1e-3))], np.full(free.shape[1], t)])
        try:
            fit = optimize.least_squares(lambda p: p[0] + np.exp(np.minimum(p[1] + free @ p[2:], 50)) - values, start,
                                         method="trf", max_nfev=300)
        except ValueError:
            continue
        if fit.cost < best_cost:
            best_cost, found = fit.cost, fit.x[0] + np.exp(np.minimum(fit.x[1] + asked[:, 1:] @ fit.x[2:], 50))
    return found


def linear_fit(shares: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    def design(mixes: np.ndarray) -> np.ndarray:
        return np.concatenate([np.ones((len(mixes), 1)), mixes[:, 1:]], axis=1)

    return design(asked) @ np.linalg.lstsq(design(shares), values, rcond=None)[0]


def interpolation(shares: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Linear interpolation between the nearest shares of two sources; extrapolates linearly beyond the ends."""
    order = np.argsort(shares[:, 1])
    x, y = shares[order, 1], values[order]
    place = np.clip(np.searchsorted(x, asked[:, 1]) - 1, 0, len(x) - 2)
    return y[place] + (asked[:, 1] - x[place]) * (y[place + 1] - y[place]) / (x[place + 1] - x[place])


def published(folder: Path) -> None:
    """Prints errors on published sweeps."""
    for name, columns in (("pile_two_domains.csv", ("share_pile_cc", "share_github")),
                          ("pile_three_domains.csv", ("share_pile_cc", "share_github", "share_books3"))):
        if not (folder / name).exists():
            print(f"\n{name} is not in {folder}: passed over.")
            continue
        with open(folder / name) as file:
            lines = [line for line in csv.DictReader(file) if line["loss"] and float(line[columns[0]]) >= 0]
        groups: dict[tuple[str, int, str], dict[tuple[float, ...], float]] = {}
        for line in lines:
            groups.setdefault((line["size"], int(line["step"]), line["domain"]), {})[
                tuple(float(line[column]) for column in columns)] = float(line["loss"])
        last = {(size, domain): max(step for other, step, what in groups if (other, what) == (size, domain)
                                    and len(groups[size, step, domain]) >= 5)
                for size, step, domain in groups if len(groups[size, step, domain]) >= 5}
        if len(columns) == 2:
            chosen = [key for key in groups if len(groups[key]) >= 5]
        else:
            chosen = [(size, step, domain) for (size, domain), step in last.items()]
        fits = {"ours": None, "constant": lambda x, y, z: np.full(len(z), y.mean()), "linear": linear_fit,
                "c + k exp(t r)": mixing_law} | ({"interpolation": interpolation} if len(columns) == 2 else {})
        misses: dict[str, list[np.ndarray]] = {fit: [] for fit in fits}
        for key in chosen:
            shares, values = np.array(list(groups[key])), np.array(list(groups[key].values()))
            shares = shares / shares.sum(axis=1, keepdims=True)
            misses["ours"].append(left_out(shares, values) - values)
            for fit, function in fits.items():
                if function:
                    misses[fit].append(np.concatenate([
                        function(np.delete(shares, n, 0), np.delete(values, n), shares[[n]])
                        for n in range(len(values))]) - values)
        print(f"\n{name}: a mixture left out, {len(chosen)} groups of size, step and domain")
        for fit, errors in misses.items():
            every = np.abs(np.concatenate(errors))
            print(f"  {fit:<16} root mean square {np.sqrt((every**2).mean()):.4f}, median {np.median(every):.4f}")
    _regmix(folder)


def _regmix(folder: Path) -> None:
    files = [folder / f"regmix_{part}_{what}.csv"
             for part in ("train", "test") for what in ("mixture_1m", "pile_loss_1m")]
    if not all(file.exists() for file in files):
        print(f"\nregmix_* are not in {folder}: passed over.")
        return
    shares, values, asked, true = (np.loadtxt(file, delimiter=",", skiprows=1)[:, 1:] for file in files)
    shares, asked = (part / part.sum(axis=1, keepdims=True) for part in (shares, asked))
    for runs in (40, 128, 512):
        losses = range(0, values.shape[1], 3)
        sweep = sweep_of(shares[:runs], values[:runs, ::3])
        fitted = fit_sweep(sweep, (), lambda name: None)
        predicted, _, intervals = predict(fitted, fitted.at(asked), np.zeros(len(sweep.losses)))
        seen = true[:, ::3].T
        inside = ((intervals[..., 0] <= seen) & (seen <= intervals[..., 1])).mean()
        print(f"\nRegMix, {runs} runs, {len(asked)} others predicted: means over {len(losses)} losses; runs within "
              f"their 95% intervals {100 * inside:.1f}%")
        rows = {"ours": predicted, "constant": np.repeat(values[:runs, ::3].mean(axis=0)[:, None], len(asked), axis=1),
                "linear": np.stack([linear_fit(shares[:runs], values[:runs, n], asked) for n in losses]),
                "c + k exp(t r)": np.stack([mixing_law(shares[:runs], values[:runs, n], asked) for n in losses])}
        for fit, found in rows.items():
            ranks = [stats.spearmanr(one, two)[0] if np.ptp(one) > 0 else 0.0
                     for one, two in zip(found, seen, strict=True)]
            print(f"  {fit:<16} root mean square {np.sqrt(((found - seen) ** 2).mean()):.4f}, rank correlation "
                  f"{np.mean(ranks):.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=200, help="simulated of each kind (default: %(default)s)")
    parser.add_argument("--kind", default="", help="only kinds whose names have this")
    parser.add_argument("--data", type=Path, help="a folder of published sweeps")
    flags = parser.parse_args()
    if flags.studies:
        coverage(flags.studies, flags.kind)
    if flags.data:
        published(flags.data)
