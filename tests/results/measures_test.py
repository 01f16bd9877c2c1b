"""Measures of questions worked out by hand, and the ratio of signal and noise where both are known."""

import math

import numpy as np
import pytest
from scipy import stats

from codellm_jax.results.answers import compared, estimate, summaries
from codellm_jax.results.measures import MEASURES, signal_over_noise, values
from codellm_jax.results.tables import table_rows


def candidate(nats: float, tokens: int, size: int) -> dict[str, float]:
    """One whose last token is left out by "released"."""
    return {"log_likelihood": -nats, "tokens": tokens, "bytes": size, "released": -nats / 2, "released_tokens": 1}


LINES = [
    # Nats of a token: 2, 1, 3; of a byte: 1, 1/2, 1/2.
    {"id": "wrong", "answer": 0, "correct": 0.0, "tied": [], "candidates": [
        candidate(4, 2, 4), candidate(3, 3, 6), candidate(3, 1, 6)]},
    {"id": "right", "answer": 1, "correct": 1.0, "tied": [], "candidates": [candidate(5, 1, 3), candidate(6, 3, 12)]},
    {"id": "tie", "answer": 0, "correct": 0.5, "tied": [0, 1], "candidates": [
        candidate(2, 1, 2), candidate(2, 1, 2), candidate(9, 1, 2)]},
    {"id": "single", "answer": 0, "correct": 1.0, "tied": [], "candidates": [candidate(2, 2, 1)]},
]
TITLES = [measure.name for measure in MEASURES]


def test_every_measure_by_hand():
    found = values(LINES)
    assert list(found) == TITLES == ["accuracy", "bits_per_byte", "margin", "probability"]
    assert found["accuracy"].tolist() == [0, 1, 0.5, 1]
    np.testing.assert_allclose(found["bits_per_byte"], np.array([1.0, 0.5, 1.0, 2.0]) / math.log(2))
    np.testing.assert_allclose(found["margin"], [-2 + 1, -2 + 5, 0, math.nan])
    np.testing.assert_allclose(found["probability"], [
        math.exp(-2) / (math.exp(-2) + math.exp(-1) + math.exp(-3)), math.exp(-2) / (math.exp(-2) + math.exp(-5)),
        math.exp(-2) / (2 * math.exp(-2) + math.exp(-9)), 1])


@pytest.mark.parametrize(("scoring", "margins"), [
    ("per_byte", [-1 + 1 / 2, -1 / 2 + 5 / 3, 0]), ("sum", [-4 + 3, -6 + 5, 0]),
    ("released", [-2 + 1.5, -3 + 2.5, 0])])
def test_margin_and_probability_are_of_the_scores_that_choose(scoring, margins):
    found = values(LINES[:3], scoring)
    np.testing.assert_allclose(found["margin"], margins)
    np.testing.assert_allclose(found["bits_per_byte"], values(LINES[:3])["bits_per_byte"])
    scores = {"per_byte": [-1 / 2, -5 / 3], "sum": [-6, -5], "released": [-3, -2.5]}[scoring]
    assert found["probability"][1] == pytest.approx(math.exp(scores[0]) / sum(map(math.exp, scores)))


def test_sums_of_long_texts_do_not_overflow():
    lines = [{"answer": answer, "correct": 0.0, "candidates": [candidate(9000, 1, 1), candidate(1000, 1, 1)]}
             for answer in (0, 1)]
    with np.errstate(all="raise", under="ignore"):
        found = values(lines, "sum")
    assert found["probability"].tolist() == [0, 1] and found["margin"].tolist() == [-8000, 8000]


def test_written_answers_have_an_accuracy_alone():
    found = values([{"id": 1, "exact_match": 0.0, "f1": 0.25}, {"id": 2, "pass@1": 1.0, "pass@10": 1.0}])
    assert found["accuracy"].tolist() == [0.25, 1.0] and list(found) == TITLES
    assert all(np.isnan(found[name]).all() for name in TITLES[1:])
    assert summaries([{"id": 2, "pass@1": 1.0}], "per_token") == {}


def test_the_summary_of_a_result():
    found = summaries(LINES, "per_byte")
    assert list(found) == TITLES[1:]
    by_hand = values(LINES, "per_byte")
    for name, unit, n in (
            ("bits_per_byte", "bits per byte", 4), ("margin", "nats per byte", 3), ("probability", "", 4)):
        some = by_hand[name][:n]
        low, high = stats.t.interval(0.95, n - 1, some.mean(), stats.sem(some))
        assert found[name] == {"value": pytest.approx(some.mean()), "n": n, "unit": unit, "interval": pytest.approx([
            low if name == "margin" else max(low, 0.0), min(high, 1.0) if name == "probability" else high])}
    # Of a single question nothing is certain, and the one without a wrong answer has no margin.
    alone = summaries(LINES[3:], "sum")
    assert "margin" not in alone and alone["bits_per_byte"]["interval"] is None


def test_a_row_of_the_table_and_of_an_older_result():
    result = {"task": "logic", "sample": False, "metric": "accuracy", "n": 4, "value": 0.625, "interval": [0.2, 0.9],
              "chance": 0.4, "majority": 0.5, "chance_p_value": 0.5}
    older = table_rows(result)
    newer = table_rows(result | {"measures": {
        "bits_per_byte": {"value": 1.62, "n": 4, "interval": [1.5, 1.7], "unit": "bits per byte"},
        "margin": {"value": -0.5, "n": 3, "interval": None, "unit": "nats per byte"},
        "probability": {"value": 0.25, "n": 4, "interval": [0.2, 0.3], "unit": ""}}})
    assert newer.splitlines() == [older, "  right answer: 1.620 \u00b1 0.100 bits/byte, margin -0.500 nats/byte, "
                                         "probability 25.0 \u00b1 5.0%"]
    unmeasured = table_rows(result | {
        "measured": False, "ties": 3, "ties_of_all": 3, "measures": summaries(LINES, "sum")})
    assert "right answer" not in unmeasured


def test_estimates_are_not_cut_to_shares():
    """Bits per byte exceed 1 and margins lie below 0, with one seed and with several."""
    seeds = [np.array([1.5, 2.5, 2.0]), np.array([1.6, 2.4, 2.3])]
    for name, sign in (("bits_per_byte", 1), ("margin", -1)):
        for some in (seeds[:1], seeds):
            found = estimate([sign * seed for seed in some], name)
            assert found.value == pytest.approx(sign * np.mean(some))
            assert found.interval.low < found.value < found.interval.high
    assert estimate([np.array([0.9, 0.0]), np.array([0.8, 0.1])], "probability").interval == (0.0, 1.0)
    assert estimate([np.array([0.1, 3.0]), np.array([0.2, 2.0])], "bits_per_byte").interval.low == 0.0
    found = compared(seeds[:1], seeds[1:], "bits_per_byte", paired=False)
    student = stats.ttest_rel(seeds[0], seeds[1])
    assert found.test == "questions" and found.p_value == pytest.approx(student.pvalue)
    assert found.interval == pytest.approx(tuple(student.confidence_interval()))


def simulated(generator: np.random.Generator, means: dict[str, float], noise: float, seeds: int):
    """Arms of seeds that answer 50 questions: "loss" has the means and the noise given, "coarse" the same means and
    four times the noise, and "blind" no difference. Questions differ much, which is no noise between seeds.
    """
    questions = generator.normal(0, 3, 50)
    return {arm: [{"coarse": questions + generator.normal(mean, 4 * noise),
                   "blind": questions + generator.normal(0, noise),
                   "loss": questions + generator.normal(mean, noise)} for _ in range(seeds)]
            for arm, mean in means.items()}


def test_signal_and_noise_of_simulated_arms():
    generator = np.random.default_rng(0)
    rows = signal_over_noise(simulated(generator, {"A": 1.0, "B": 1.5, "C": 1.2}, 0.05, 400))
    assert [row.measure for row in rows] == ["loss", "coarse", "blind"]
    loss, coarse, blind = rows
    assert loss.arms == coarse.arms == ("B", "A")
    assert (loss.signal, loss.noise, loss.ratio) == pytest.approx((0.5, 0.05, 10.0), rel=0.05)
    assert (coarse.signal, coarse.noise, coarse.ratio) == pytest.approx((0.5, 0.2, 2.5), rel=0.1)
    assert blind.noise == pytest.approx(0.05, rel=0.05) and blind.ratio < 0.25


def test_signal_and_noise_by_hand_and_by_chance():
    def arm(*scores: float) -> list[dict[str, np.ndarray]]:
        return [{"loss": np.array([score - 1, score + 1, np.nan]), "same": np.ones(2), "none": np.array([np.nan])}
                for score in scores]

    rows = signal_over_noise({"A": arm(1.0, 2.0, 3.0), "B": arm(5.0, 6.0)})
    # Sums of squares 2 and 1/2 over 2 + 1 degrees of freedom; with two arms the range is Student's t times sqrt(2).
    noise = math.sqrt(2.5 / 3)
    assert rows[0] == ("loss", ("B", "A"), pytest.approx(3.5), pytest.approx(noise), pytest.approx(3.5 / noise),
                       pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(1 / 3 + 1 / 2), rel=1e-6))
    assert rows[1].measure == "same" and math.isnan(rows[1].ratio) and rows[1].signal == 0 and len(rows) == 2
    assert signal_over_noise({"A": arm(1.0, 2.0)}) == signal_over_noise({"A": arm(1.0), "B": arm(2.0)}) == []
    assert signal_over_noise({"A": arm(1.0, 2.0), "B": []}) == []


def test_what_is_apart_by_chance_is_so_once_in_twenty():
    generator = np.random.default_rng(1)
    beyond = []
    for _ in range(400):
        [row] = signal_over_noise({arm: [{"loss": generator.normal(size=1)} for _ in range(4)] for arm in "ABCD"})
        beyond.append(row.ratio > row.by_chance)
    assert stats.binomtest(sum(beyond), len(beyond), 0.05).pvalue > 0.01
