"""Effects of stages against other libraries, by hand, and over simulated studies whose truth is known."""

import itertools

import numpy as np
import pandas
import pytest
import statsmodels.formula.api as formula
from scipy import stats

from codellm_jax.report.effects import Effect, Level, Sample, design_of, told

STAGES = ("pretraining", "tuning")
NONE = Level(0.0)
SQUARE = {"NN": [NONE, NONE], "NC": [NONE, Level(0.375)], "CN": [Level(1 / 3), NONE],
          "CC": [Level(1 / 3), Level(0.375)]}
SEEDS = range(4)


def samples_of(values: dict[str, np.ndarray]) -> dict[str, dict[int, Sample]]:
    """Of [S] losses, or [S, n] what questions add, for each arm."""
    return {label: {seed: Sample(float(np.mean(one)), np.atleast_1d(one)) for seed, one in enumerate(of_arm)}
            for label, of_arm in values.items()}


def roots_of(labels, seeds=SEEDS) -> dict[str, dict[int, str]]:
    """Arms of one first letter stand on the same run of each seed."""
    return {label: {seed: f"{label[0]}.seed{seed}" for seed in seeds} for label in labels}


def named(effects: list[Effect]) -> dict[str, Effect]:
    return {effect.name: effect for effect in effects}


def test_a_full_square_has_the_textbooks_effects():
    means = {"NN": 1.0, "NC": 3.0, "CN": 2.0, "CC": 10.0}
    design = design_of(STAGES, SQUARE)
    found = {effect.name: sum(weight * means[label] for label, weight in effect.weights.items())
             for effect in design.effects}
    assert not design.holes
    assert found == pytest.approx({
        "code in pretraining": (2 - 1 + 10 - 3) / 2, "code in tuning": (3 - 1 + 10 - 2) / 2,
        "interaction of code in pretraining and tuning": 10 - 2 - 3 + 1})


@pytest.mark.parametrize("left_out", [(), ("CCC",), ("NNN",), ("CNC",)])
def test_three_stages_are_fitted_as_statsmodels_does(left_out):
    """Arms need not be balanced: a cell may be missing, and another have two arms."""
    cells = ["".join(letters) for letters in itertools.product("NC", repeat=3)]
    arms = {cell: [Level(0.5 * (letter == "C")) for letter in cell] for cell in cells if cell not in left_out}
    arms["NCN again"] = arms["NCN"]
    dice = np.random.default_rng(0)
    table = pandas.DataFrame([{name: 0.5 - (level.share == 0) for name, level in zip("abc", levels, strict=True)}
                              for levels in arms.values()]).assign(y=dice.normal(size=len(arms)))
    fitted = formula.ols("y ~ (a + b + c) ** 2", table).fit().params
    found = {name: float(np.dot([effect.weights.get(label, 0.0) for label in arms], table.y))
             for name, effect in named(design_of(("a", "b", "c"), arms).effects).items()}
    assert found == pytest.approx({**{f"code in {name}": fitted[name] for name in "abc"}, **{
        f"interaction of code in {one} and {other}": fitted[f"{one}:{other}"]
        for one, other in itertools.combinations("abc", 2)}})


def test_several_shares_and_kinds_of_a_stage_are_levels():
    """Code or none is the mean over levels; more of it is the slope, by numpy's polynomial."""
    arms = {"TEXT": [Level(0.0, "without the stage")]} | {
        f"{start}-{share}": [Level(share, f"from step {start}")] for start in (6, 30) for share in (0.1, 0.2, 0.5)}
    y = dict(zip(arms, np.random.default_rng(1).normal(size=len(arms)), strict=True))
    found = {name: sum(weight * y[label] for label, weight in effect.weights.items())
             for name, effect in named(design_of(["midtraining"], arms).effects).items()}
    code = [(levels[0].share, y[label]) for label, levels in arms.items() if label != "TEXT"]
    assert found == pytest.approx({
        "code in midtraining": np.mean([value for _, value in code]) - y["TEXT"],
        "10 points more of code in midtraining": 0.1 * np.polyfit(*zip(*code, strict=True), 1)[0]})


def test_sources_have_effects_where_arms_tell_them_apart():
    """By hand: y = 3 - 1 python - 0.5 java, of the shares of all that is drawn."""
    mixes = {"TEXT": (0.0, 0.0), "PY": (0.2, 0.0), "JAVA": (0.0, 0.2), "BOTH": (0.3, 0.1)}
    arms = {label: [Level(round(sum(mix), 2), label)] for label, mix in mixes.items()}
    shares = {label: {"text.books": 0.6 * (1 - sum(mix)), "text.web": 0.4 * (1 - sum(mix)), "code.python": mix[0],
                      "code.java": mix[1]} for label, mix in mixes.items()}

    def effects_of(labels):
        design = design_of(["pretraining"], {label: arms[label] for label in labels},
                           {0: {label: shares[label] for label in labels}})
        found = {effect.name.removeprefix("10 points of "): sum(
            weight * (3 - mixes[label][0] - 0.5 * mixes[label][1]) for label, weight in effect.weights.items())
            for effect in design.effects if effect.kind == "source"}
        return found, design.holes

    for labels in (mixes, ("TEXT", "PY", "JAVA")):
        found, holes = effects_of(labels)
        assert not holes and found == pytest.approx({
            "code.python in place of text in pretraining": -0.1, "code.java in place of text in pretraining": -0.05})
    # As much code everywhere: one kind can be told in place of the other alone.
    found, holes = effects_of(("PY", "JAVA"))
    assert found == pytest.approx({
        "code.java in place of the others of its pool in pretraining": 0.05,
        "code.python in place of the others of its pool in pretraining": -0.05})
    assert "All arms have 20% of code in pretraining" in holes[0]
    # Three kinds in two mixes: none of them by itself.
    mixes |= {"A": (0.2, 0.1), "B": (0.1, 0.2)}
    arms |= {"A": [Level(0.4, "A")], "B": [Level(0.4, "B")]}
    shares |= {"A": {"text.books": 0.6, "code.python": 0.2, "code.java": 0.1, "code.c": 0.1},
               "B": {"text.books": 0.6, "code.python": 0.1, "code.java": 0.2, "code.c": 0.1}}
    found, holes = effects_of(("A", "B"))
    assert not found and holes[-1] == ("The effects of code.java and code.python in pretraining cannot be estimated: "
                                       "their shares are confounded with those of other sources.")


def test_a_missing_cell_is_named_and_not_filled():
    design = design_of(STAGES, {label: SQUARE[label] for label in ("NN", "NC", "CN")})
    assert {name: effect.weights for name, effect in named(design.effects).items()} == {
        "code in pretraining": pytest.approx({"CN": 1.0, "NN": -1.0}),
        "code in tuning": pytest.approx({"NC": 1.0, "NN": -1.0})}
    [hole] = design.holes
    assert hole == ("Whether code in pretraining and code in tuning depend on each other cannot be estimated: no arm "
                    "has code in both pretraining and tuning. The effects assume that they do not.")


def test_what_goes_together_is_named_and_not_told_apart():
    design = design_of(STAGES, {label: SQUARE[label] for label in ("NN", "CC")})
    assert not design.effects
    [hole] = design.holes
    assert hole == ("The effects of code in pretraining and code in tuning cannot be told from each other: no arm has "
                    "code in pretraining but not in tuning, and no arm has code in tuning but not in pretraining.")
    # Code everywhere in pre-training: its effect there is nowhere.
    design = design_of(STAGES, {label: SQUARE[label] for label in ("CN", "CC")})
    assert [effect.name for effect in design.effects] == ["code in tuning"]
    assert design.holes == ["All arms have 33.3% of code in pretraining: the effect of code there cannot be estimated."]
    # Half of 2 x 2 x 2: each interaction is another stage's effect, and none is told.
    half = {cell: [Level(0.5 * (letter == "C")) for letter in cell] for cell in ("NNN", "NCC", "CNC", "CCN")}
    design = design_of(("a", "b", "c"), half)
    assert [effect.name for effect in design.effects] == ["code in a", "code in b", "code in c"]
    assert len(design.holes) == 3 and all("other differences are confounded with it" in hole
                                          for hole in design.holes)


def test_seeds_of_one_run_are_paired_and_others_are_not():
    dice = np.random.default_rng(2)
    values = {label: dice.normal(size=4) for label in SQUARE}
    paired = told({"NC": 1.0, "NN": -1.0}, samples_of(values), roots_of(SQUARE))
    by_scipy = stats.ttest_rel(values["NC"], values["NN"])
    assert paired.contrast.p_value == pytest.approx(by_scipy.pvalue)
    assert paired.contrast.interval == pytest.approx(tuple(by_scipy.confidence_interval()))
    apart = told({"CN": 1.0, "NN": -1.0}, samples_of(values), roots_of(SQUARE))
    by_scipy = stats.ttest_ind(values["CN"], values["NN"])
    assert apart.contrast.p_value == pytest.approx(by_scipy.pvalue)
    assert apart.contrast.interval == pytest.approx(tuple(by_scipy.confidence_interval()))
    assert apart.estimate == pytest.approx(values["CN"].mean() - values["NN"].mean()) and apart.seeds == 4


def test_of_one_seed_a_loss_has_no_interval_and_of_none_nothing_is_told():
    values = samples_of({label: np.ones(1) for label in SQUARE})
    one = told({"NC": 1.0, "NN": -1.0}, values, roots_of(SQUARE, [0]))
    assert one.contrast is None and one.seeds == 1 and one.estimate == 0
    assert told({"NC": 1.0, "NN": -1.0}, values | {"NN": {}}, roots_of(SQUARE, [0])) is None
    other_seed = {"NC": {0: values["NC"][0]}, "NN": {1: values["NN"][0]}}
    roots = {"NC": {0: "trunk"}, "NN": {1: "trunk"}}
    assert told({"NC": 1.0, "NN": -1.0}, other_seed, roots) is None


def test_what_only_rounding_makes_an_effect_is_none():
    """Thirds of equal scores do not cancel in floating point."""
    values = samples_of({label: np.full((3, 7), 0.1) for label in SQUARE})
    for effect in design_of(STAGES, SQUARE).effects:
        thirds = {label: weight / 3 for label, weight in effect.weights.items()}
        found = told(thirds, values, roots_of(SQUARE, range(3)))
        assert found.estimate == 0 and found.contrast.p_value == 1 and f"{found.estimate:+.3g}" == "+0"


TRUTH = {"code in pretraining": 0.3, "code in tuning": 0.0, "interaction of code in pretraining and tuning": -0.2}


def simulated(dice: np.random.Generator, questions: int) -> dict[str, np.ndarray]:
    """[S, n] of each arm: the effects, a trunk's and a run's own luck, and where there are questions theirs, of which
    some are harder, and of which some gain more than others."""
    hard = dice.normal(0, 0.5, questions) if questions else 0.0
    trunks = {first: dice.normal(0, 0.1, (4, 1)) for first in "NC"}
    found = {}
    for label in SQUARE:
        first, second = (0.5 if letter == "C" else -0.5 for letter in label)
        mean = (TRUTH["code in pretraining"] * first + TRUTH["code in tuning"] * second
                + TRUTH["interaction of code in pretraining and tuning"] * first * second)
        own = dice.normal(0, 0.05, (4, 1)) + (
            dice.normal(0, 0.3, questions) + dice.normal(0, 0.5, (4, questions)) if questions else 0.0)
        found[label] = mean + hard + trunks[label[0]] + own
    return found


@pytest.mark.parametrize("questions, studies", [(0, 1000), (40, 400)])
def test_intervals_cover_and_nothing_is_found_where_nothing_is(questions, studies):
    dice = np.random.default_rng(3)
    effects, roots = named(design_of(STAGES, SQUARE).effects), roots_of(SQUARE)
    covered, found = dict.fromkeys(TRUTH, 0), dict.fromkeys(TRUTH, 0)
    for _ in range(studies):
        samples = samples_of(simulated(dice, questions))
        for name, truth in TRUTH.items():
            contrast = told(effects[name].weights, samples, roots).contrast
            covered[name] += contrast.interval.low <= truth <= contrast.interval.high
            found[name] += contrast.p_value < 0.05
    # With questions there are two sources of variance, and the interval is at least as wide as needed. The limits are
    # four standard errors of so many studies from 95%.
    spread = 4 * (0.05 * 0.95 / studies) ** 0.5
    for name in TRUTH:
        assert 0.95 - spread <= covered[name] / studies <= (1.0 if questions else 0.95 + spread), name
    assert found["code in tuning"] / studies <= 0.05 + spread
    assert found["code in pretraining"] / studies > 0.5
