"""Seeds and questions: by hand, against the analysis of variance of another library, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from codellm_jax.results.seeds import by_parts, contrast, pseudo_values


def half_interval(parts, level: float = 0.95) -> float:
    """Banerjee's, by hand."""
    return math.sqrt(sum(variance * stats.t(degrees).ppf((1 + level) / 2) ** 2 for variance, degrees in parts))


def test_by_hand():
    """Two seeds, three questions: the seeds' means are 1/3 and 1, the questions' 1/2, 1/2 and 1."""
    found = contrast([np.array([[0, 0, 1], [1, 1, 1]])])
    seeds = ((1 / 3 - 2 / 3) ** 2 + (1 - 2 / 3) ** 2) / 1 / 2
    questions = (2 * (1 / 2 - 2 / 3) ** 2 + (1 - 2 / 3) ** 2) / 2 / 3
    assert found.estimate == pytest.approx(2 / 3)
    assert found.standard_error == pytest.approx(math.sqrt(seeds + questions))
    half = half_interval([(seeds, 1), (questions, 2)])
    assert found.interval == pytest.approx((2 / 3 - half, 2 / 3 + half))
    # The interval at the level of the p-value just reaches 0.
    assert half_interval([(seeds, 1), (questions, 2)], 1 - found.p_value) == pytest.approx(2 / 3)


def test_one_term_alone_is_students_test():
    """Where questions do not differ it is the two-sample t-test of the seeds' means, from another library."""
    first, second = np.array([0.3, 0.5, 0.6]), np.array([0.2, 0.1, 0.3, 0.2])
    found = contrast([np.repeat(first[:, None], 9, axis=1)], [np.repeat(second[:, None], 9, axis=1)])
    questions = (found.estimate**2 * 9 / 100 * 10 / 9 / 10, 9)  # of the one that is imagined
    expected = stats.ttest_ind(first, second)
    seeds = ((first.mean() - second.mean()) / expected.statistic) ** 2
    assert found.standard_error == pytest.approx(math.sqrt(seeds + questions[0]))
    assert by_parts(found.estimate, [(seeds, 5)]).p_value == pytest.approx(expected.pvalue)
    paired = contrast([np.repeat(first[:, None], 9, axis=1)], [np.repeat(second[:3, None], 9, axis=1)], paired=True)
    related = stats.ttest_rel(first, second[:3])
    assert by_parts(paired.estimate, [((paired.estimate / related.statistic) ** 2, 2)]).p_value == pytest.approx(
        related.pvalue)


def test_the_variance_is_min_f_of_the_analysis_of_variance():
    """1 / F' = 1 / F_seeds + 1 / F_questions for the mean of paired differences, each F from statsmodels' table."""
    pandas = pytest.importorskip("pandas")
    formula = pytest.importorskip("statsmodels.formula.api")
    anova = pytest.importorskip("statsmodels.api").stats.anova_lm
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 2, (4, 30)), generator.integers(0, 2, (4, 30))
    difference = first - second
    table = anova(formula.ols("y ~ C(seed) + C(question)", pandas.DataFrame({
        "y": difference.ravel().astype(float), "seed": np.repeat(np.arange(4), 30),
        "question": np.tile(np.arange(30), 4)})).fit())
    of_mean = difference.size * difference.mean() ** 2
    by_seeds, by_questions = (of_mean / table.loc[name, "mean_sq"] for name in ("C(seed)", "C(question)"))
    found = contrast([first], [second], paired=True)
    assert (found.estimate / found.standard_error) ** 2 == pytest.approx(1 / (1 / by_seeds + 1 / by_questions))


def test_several_tasks_count_equally_and_share_their_seeds():
    generator = np.random.default_rng(1)
    first, second = [[generator.random((3, n)) for n in (10, 40)] for _ in range(2)]
    found = contrast(first, second)
    means = [[task.mean() for task in arm] for arm in (first, second)]
    assert found.estimate == pytest.approx(np.mean(means[0]) - np.mean(means[1]))
    seeds = sum(np.var([np.mean([task[seed].mean() for task in arm]) for seed in range(3)], ddof=1) / 3
                for arm in (first, second))
    questions = sum(np.var(one.mean(0) - other.mean(0), ddof=1) / one.shape[1]
                    for one, other in zip(first, second, strict=True)) / 4
    assert found.standard_error == pytest.approx(math.sqrt(seeds + questions))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize("paired", [False, True])
def test_no_effect_is_found_no_more_often_than_promised(seeds, spread, paired):
    """Two arms of equal distribution, whose seeds differ in skill by `spread`: 5% would be found, or fewer, and of the
    1% that conclusions are drawn at likewise.
    """
    generator = np.random.default_rng(seeds)
    trials, found, surely = 400, 0, 0
    for _ in range(trials):
        difficulty = generator.normal(size=120)
        arms = [(difficulty + generator.normal(0, spread, (seeds, 1)) + generator.normal(size=(seeds, 120)) > 0)
                for _ in range(2)]
        p_value = contrast([arms[0]], [arms[1]], paired=paired).p_value
        found, surely = found + (p_value < 0.05), surely + (p_value < 0.01)
    assert found / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    assert surely / trials < 0.01 + 3 * math.sqrt(0.01 * 0.99 / trials)


def test_an_effect_is_found_and_seeds_that_differ_hide_it():
    generator = np.random.default_rng(2)

    def answers(skill: float, spread: float) -> np.ndarray:
        return generator.normal(size=(3, 400)) + skill + spread * np.array([[-1], [0], [1]]) > 0

    assert contrast([answers(0.5, 0)], [answers(0, 0)]).p_value < 0.01
    assert contrast([answers(0.5, 1)], [answers(0, 1)]).p_value > 0.2


def test_one_that_is_right_everywhere_is_told_from_one_that_is_wrong_everywhere():
    found = contrast([np.ones((3, 50))], [np.zeros((3, 50))])
    assert found.estimate == 1 and 0 < found.p_value < 1e-6 and found.interval.low < 1
    nothing = contrast([np.zeros((3, 50))], [np.zeros((3, 50))])
    assert nothing.estimate == 0 and nothing.p_value == 1


def test_pseudo_values_of_a_mean_are_the_values_and_of_a_ratio_the_jackknife():
    values = np.random.default_rng(3).random((20, 2))
    assert pseudo_values(values[:, 0]).tolist() == values[:, 0].tolist()
    assert pseudo_values(values[:, :1], lambda sums: sums[..., 0] / 20) == pytest.approx(
        20 * values[:, 0].mean() - (values[:, 0].sum() - values[:, 0]) * 19 / 20)
    found = pseudo_values(values, lambda sums: sums[..., 0] / sums[..., 1])
    ratio = values[:, 0].sum() / values[:, 1].sum()
    for place in range(20):
        rest = np.delete(values, place, axis=0)
        assert found[place] == pytest.approx(20 * ratio - 19 * rest[:, 0].sum() / rest[:, 1].sum())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="Two seeds"):
        contrast([np.ones((1, 5))])
    with pytest.raises(ValueError, match="Two seeds"):
        contrast([])
    with pytest.raises(ValueError, match="paired only"):
        contrast([np.ones((2, 5))], [np.ones((3, 5))], paired=True)
    assert by_parts(0.3, [(0.0, 4)]).p_value == 1
