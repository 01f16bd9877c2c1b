"""Scores worked out by hand, against sacreBLEU and brute force, and what must hold of any answers."""

import itertools
import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from codellm_jax.results.statistics import bootstrap
from tasks.benchmarks.metrics import accuracy, bleu, bleu_of_counts, dureader, pass_at_k, sacrebleu_score

words = st.lists(st.sampled_from("a b c d".split()), max_size=12)
corpora = st.lists(st.tuples(words, words), min_size=1, max_size=6)
texts = st.text("中文字答案Ab1 =，。?", max_size=14)


# Accuracy

def test_accuracy_by_hand():
    result = accuracy([[2.0, 1.0, 3.0], [0.5, 0.5], [4.0, 4.0, 1.0], [7.0]], [1, 1, 2, 0])
    assert result == (3.5 / 4, 4, 1, [[1], [0, 1], [2], [0]], [1, 0.5, 1, 1])


def test_a_tie_of_k_counts_one_in_k_if_the_right_candidate_is_among_them():
    assert accuracy([[1.0, 1.0, 2.0]] * 3, [0, 1, 2]) == (1 / 3, 3, 3, [[0, 1]] * 3, [0.5, 0.5, 0])
    assert accuracy([[2.0, 1.0, 2.0]], [1]).ties == 0  # a tie behind the winner is none
    assert accuracy([[math.inf] * 4], [1]) == (0.25, 1, 1, [[0, 1, 2, 3]], [0.25])
    assert accuracy([[1.0] * 3] * 3, [0, 0, 0]).accuracy == 1 / 3  # whatever the right answers are, as blind choice
    assert accuracy([[1000.0, 1000.5]], [0]).ties == 0  # as perplexities both would be infinite


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(0, 3)).filter(
    lambda question: question[1] < len(question[0])), min_size=1, max_size=5))
def test_a_tie_is_worth_what_drawing_lots_is_on_average(questions):
    """Over all ways in which lots may fall, the mean share of right choices."""
    losses, answers = zip(*questions, strict=True)
    lowest = [[place for place, loss in enumerate(row) if loss == min(row)] for row in losses]
    drawn = [np.mean([choice == answer for choice, answer in zip(choices, answers, strict=True)])
             for choices in itertools.product(*lowest)]
    assert accuracy(losses, answers).accuracy == pytest.approx(np.mean(drawn))


@given(st.lists(st.tuples(st.lists(st.floats(-50, 50), min_size=5, max_size=5, unique=True), st.integers(0, 4)),
                min_size=1), st.permutations(range(5)))
def test_accuracy_knows_no_order_of_candidates_nor_of_questions(questions, order):
    losses, answers = zip(*questions, strict=True)
    result = accuracy(losses, answers)
    shuffled = accuracy([[row[position] for position in order] for row in losses],
                        [order.index(answer) for answer in answers])
    assert shuffled.credits == result.credits
    assert [[order[place] for place in tied] for tied in shuffled.chosen] == result.chosen
    assert accuracy(losses[::-1], answers[::-1]).accuracy == result.accuracy == pytest.approx(np.mean(result.credits))


# BLEU

def test_bleu_by_hand():
    """5 of 6 words, 3 of 5 pairs, 1 of 4 triples, none of 3 quadruples: 0. With a longer common run, not."""
    reference = "the cat is on the mat".split()
    result = bleu(["the cat sat on the mat".split()], [reference])
    assert result.precisions == [5 / 6, 3 / 5, 1 / 4, 0] and result.score == 0
    assert result.counts == [[6, 6, 5, 3, 1, 0, 6, 5, 4, 3]]
    result = bleu(["the cat is on a mat".split()], [reference])
    assert result.score == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_bleu_clips_and_penalizes_brevity_but_not_length():
    assert bleu([["the"] * 7], ["the cat is on the mat".split()]).precisions[0] == 2 / 7
    reference = list("abcdefgh")
    short = bleu([list("abcdef")], [reference])
    assert short.precisions == [1, 1, 1, 1] and short.brevity_penalty == pytest.approx(math.exp(1 - 8 / 6))
    assert short.score == pytest.approx(100 * math.exp(-1 / 3))
    long = bleu([list("abcdefghi")], [reference])
    assert long.brevity_penalty == 1 and long.score == pytest.approx(100 * (8 / 9 * 7 / 8 * 6 / 7 * 5 / 6) ** 0.25)


def test_bleu_pools_counts_over_questions():
    result = bleu([list("abcd"), list("wxyz")], [list("abcd"), list("efgh")])
    assert result.precisions == [0.5] * 4 and result.score == pytest.approx(50)


def test_bleu_of_nothing():
    assert bleu([[]], [list("abcd")]).score == 0 == bleu([list("abcd")], [[]]).score
    assert bleu([[]], [[]]).score == 0 and bleu([list("abc")], [list("abc")]).score == 0  # no run of four


def test_the_released_slip_finds_matches_across_questions():
    predictions, references = [list("ab"), list("cd")], [list("a"), list("bcd")]
    assert bleu(predictions, references).score == 0
    slip = bleu(predictions, references, released=True)
    assert slip.score == 100 and len(slip.counts) == 1
    # Words of one question count for another.
    swapped = bleu([list("abcde"), list("vwxyz")], [list("vwxyz"), list("abcde")], released=True)
    assert swapped.score == pytest.approx(100 * (10 / 10 * 8 / 9 * 6 / 8 * 4 / 7) ** 0.25)


@given(corpora)
@settings(deadline=None, max_examples=60)
def test_bleu_as_in_sacrebleu_where_tokens_are_the_same(corpus):
    predictions, references = ([" ".join(words) for words in side] for side in zip(*corpus, strict=True))
    for name, smoothing in (("none", "none"), ("exp", "exponential")):
        metric = sacrebleu.BLEU(tokenize="none", smooth_method=name, force=True)
        expected = metric.corpus_score(predictions, [references]).score
        ours = bleu(*zip(*corpus, strict=True))
        assert bleu_of_counts(np.sum(ours.counts, axis=0), smoothing) == pytest.approx(expected, abs=1e-9)
    assert ours.score == pytest.approx(bleu_of_counts(np.sum(ours.counts, axis=0)))
    theirs = sacrebleu_score(predictions, references, tokenize="none")
    assert theirs.counts == ours.counts and theirs.score == pytest.approx(expected, abs=1e-9)


def test_sacrebleu_of_programs():
    programs = ["def add(a, b):\n    return a + b\n", "", "print('hello, world')"]
    references = ["def add(x, y):\n    return x + y\n", "pass", "print('hello, world')"]
    result = sacrebleu_score(programs, references)
    assert 0 < result.score < 100 and "tok:13a" in result.signature and "version:" in result.signature
    assert bleu_of_counts(np.sum(result.counts, axis=0), "exponential") == pytest.approx(result.score)


@given(corpora, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_bleu_is_in_range_and_knows_no_order_of_questions(corpus, random):
    score = bleu(*zip(*corpus, strict=True)).score
    assert -1e-9 <= score <= 100 + 1e-9
    random.shuffle(corpus)
    assert bleu(*zip(*corpus, strict=True)).score == score
    # The model's tokens are numbers; any naming of tokens gives the same.
    numbered = [[[ord(word) for word in words] for words in pair] for pair in corpus]
    assert bleu(*zip(*numbered, strict=True)).score == score


@given(st.lists(words.filter(lambda tokens: len(tokens) > 3), min_size=1, max_size=4))
def test_bleu_of_the_reference_is_100(references):
    assert bleu(references, references).score == pytest.approx(100)
    assert bleu(references, references, released=True).score == pytest.approx(100)


def test_bleu_is_bootstrapped_from_its_counts():
    generator = np.random.default_rng(0)
    references = generator.integers(0, 9, (60, 20))
    predictions = np.where(generator.uniform(size=(60, 20)) < 0.7, references, 9)
    result = bleu(predictions.tolist(), references.tolist())
    interval = bootstrap(result.counts, bleu_of_counts, resamples=1000)
    assert interval.estimate == pytest.approx(result.score)
    assert interval.interval.low < result.score < interval.interval.high


# pass@k

@pytest.mark.parametrize("samples,passed", [(5, 0), (5, 2), (6, 3), (4, 4), (1, 1)])
def test_pass_at_k_over_all_choices(samples, passed):
    for k in range(1, samples + 1):
        choices = itertools.combinations([True] * passed + [False] * (samples - passed), k)
        assert pass_at_k(samples, passed, k) == pytest.approx(np.mean([any(choice) for choice in choices]))


def test_pass_at_k_of_many_samples():
    assert pass_at_k(200, 37, 1) == pytest.approx(37 / 200)
    assert pass_at_k(200, 37, 100) == pytest.approx(1) and pass_at_k(10_000, 0, 100) == 0


# DuReader

def test_dureader_by_hand():
    # One run of three of four characters: 2 * 3 / (4 + 3).
    result = dureader(["大韩民国", "韩民国", "中国", "大韩民国。"], [["大韩民国"]] * 4)
    assert result.f1s == pytest.approx([1, 6 / 7, 2 / 6, 1])
    assert result.exact_matches == [True, False, False, True] and result.exact_match == 0.5 and result.n == 4
    assert result.f1 == pytest.approx(np.mean(result.f1s))


def test_dureader_counts_the_longest_run_not_all_common_characters():
    # 一二 and 四五 are common, but apart: a run of two, of five and four.
    assert dureader(["一二三四五"], [["一二四五"]]).f1 == pytest.approx(2 * 2 / 9)


def test_dureader_takes_a_run_of_other_characters_as_one_token():
    assert dureader(["15个赛季"], [["15个"]]).f1s == pytest.approx([2 * 2 / 6])  # 15 | 个 | 赛 | 季
    assert dureader(["16个"], [["15个"]]).f1s == pytest.approx([2 * 1 / 4])
    assert dureader(["1 5个"], [["15个"]]).f1s == pytest.approx([2 * 1 / 4])  # spaces stay
    assert dureader(["x=3"], [["y=3"]]).f1s == pytest.approx([2 * 2 / 6])  # = stands alone


def test_dureader_lowers_case_and_removes_the_script_s_punctuation_alone():
    assert dureader(["《NBA》：Jordan"], [["nbajordan"]])[:2] == (1, 1)
    assert dureader(["是?"], [["是"]])[:2] == (0, pytest.approx(2 / 3))


def test_dureader_takes_the_best_reference():
    result = dureader(["15个赛季"], [["二十年", "15个", "15个赛季"]])
    assert result[:2] == (1, 1)
    assert dureader(["15个"], [["赛季", "15个赛季"]]).f1 == pytest.approx(4 / 6)


def test_dureader_of_nothing():
    assert dureader([""], [["答案"]])[:2] == (0, 0) and dureader(["。"], [["，"]])[:2] == (1, 0)


@given(texts, texts)
def test_dureader_over_all_runs(prediction, reference):
    """The same by trying every run of one list of tokens in the other."""
    def tokens(text: str) -> list[str]:
        found: list[str] = []
        joins = False
        for character in text.lower():
            if character in "，。":
                continue
            alone = character == "=" or "\u4e00" <= character <= "\u9fff"
            if joins and not alone:
                found[-1] += character
            else:
                found.append(character)
            joins = not alone
        return found

    ours, theirs = tokens(prediction), tokens(reference)
    runs = [ours[start:end] for start in range(len(ours)) for end in range(start + 1, len(ours) + 1)]
    longest = max((len(run) for run in runs
                   if any(theirs[start:start + len(run)] == run for start in range(len(theirs)))), default=0)
    expected = 0.0
    if longest:
        precision, recall = longest / len(ours), longest / len(theirs)
        expected = 2 * precision * recall / (precision + recall)
    result = dureader([prediction], [[reference]])
    assert result.f1 == pytest.approx(expected)
    assert result.exact_match == (ours == theirs)


@given(texts, st.lists(texts, min_size=1, max_size=3), texts)
def test_dureader_is_in_range_and_more_references_never_hurt(prediction, references, another):
    result, more = dureader([prediction], [references]), dureader([prediction], [[*references, another]])
    assert 0 <= result.f1 <= more.f1 <= 1 and result.exact_match <= more.exact_match
    assert dureader([prediction], [references[::-1]]) == result
    if result.exact_match and prediction.strip("，。"):
        assert result.f1 == 1


# What is refused

@pytest.mark.parametrize("call", [
    lambda: accuracy([], []), lambda: accuracy([[1.0]], [0, 0]), lambda: accuracy([[]], [0]),
    lambda: accuracy([[1.0, 2.0]], [2]), lambda: accuracy([[1.0, 2.0]], [-1]),
    lambda: accuracy([[1.0, math.nan]], [0]), lambda: bleu([], []), lambda: bleu([["a"]], []),
    lambda: bleu(["a b"], [["a"]]), lambda: bleu_of_counts(np.ones(10), "floor"), lambda: sacrebleu_score([], []),
    lambda: pass_at_k(5, 2, 6), lambda: pass_at_k(5, 6, 1), lambda: pass_at_k(0, 0, 1), lambda: dureader([], []),
    lambda: dureader(["a"], [[]]), lambda: dureader(["a"], ["a"]), lambda: dureader(["a"], []),
])
def test_nonsense_is_refused_in_one_line(call):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert "\n" not in str(error.value)
