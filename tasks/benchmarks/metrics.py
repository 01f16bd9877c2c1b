"""Scores of the benchmarks: accuracy by lowest perplexity, BLEU-4, pass@k, and DuReader's EM and F1.

Each takes plain lists, one entry per question, and returns plain numbers with the contribution of every question, so
that a score can be recomputed, and bootstrapped over questions, from the stored results. BLEU is in 0 ... 100, as
usual; all other scores are in 0 ... 1. `codellm_jax/results` computes intervals, chance and majority levels.
"""

import collections
import difflib
import math
import re
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

ORDERS = 4  # of n-grams in BLEU
# The characters that DuReader-robust's official script removes: neither "?", "!" nor "." of ASCII.
_REMOVED = str.maketrans("", "", ":_`，。：？！()“”；’《》·、,「」（）－～『』|")
# Each Chinese character and each "=" is a token; so is any run of other characters, spaces included.
_CHINESE = ("\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
            "\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f")
_TOKEN = re.compile(f"[={_CHINESE}]|[^={_CHINESE}]+")


class Accuracy(NamedTuple):
    accuracy: float  # the mean credit
    n: int
    ties: int  # questions whose lowest perplexity is shared by several candidates
    chosen: list[list[int]]  # positions of the candidates with the lowest perplexity, several if they tie
    credits: list[float]  # 1, 0, or 1 / k if the right candidate is among k that tie


class Bleu(NamedTuple):
    score: float  # 0 ... 100
    precisions: list[float]  # 0 ... 1, of 1-grams to 4-grams
    brevity_penalty: float
    prediction_length: int
    reference_length: int
    # A row per question for `bleu_of_counts`: both lengths, matching n-grams and all predicted n-grams of each order.
    counts: list[list[int]]


class SacreBleu(NamedTuple):
    score: float  # 0 ... 100
    signature: str  # settings and version, in the form that sacreBLEU asks to quote
    counts: list[list[int]]  # as in Bleu, of sacreBLEU's tokens; for `bleu_of_counts(..., smoothing="exponential")`


class DuReader(NamedTuple):
    exact_match: float
    f1: float
    n: int
    exact_matches: list[bool]
    f1s: list[float]


def accuracy(losses: Sequence[Sequence[float]], answers: Sequence[int]) -> Accuracy:
    """The share of questions whose right candidate has the lowest perplexity.

    Losses are compared, which have the order of the perplexities but cannot overflow. If k candidates share the lowest
    loss exactly, the question counts 1 / k if the right candidate is among them: the expected score of a random
    choice. A question whose candidates all tie thus scores at chance level.

    Args:
      losses: negative log-likelihoods of each question's candidates, as sums or per token or byte; inf is allowed.
      answers: the position of each question's right candidate.

    Raises:
      ValueError: no questions, a different number of answers, a question without candidates or with NaN, or an
        answer that is not the position of a candidate.
    """
    _check_paired(losses, answers)
    chosen, credits = [], []
    for question, (row, answer) in enumerate(zip(losses, answers, strict=True)):
        if not len(row) or any(math.isnan(loss) for loss in row):
            raise ValueError(f"Question {question} has no candidates, or a loss that is not a number: {list(row)}")
        if not 0 <= answer < len(row):
            raise ValueError(f"Question {question}: the answer is candidate {answer} of {len(row)}, counted from 0")
        lowest = min(row)
        tied = [position for position, loss in enumerate(row) if loss == lowest]
        chosen.append(tied)
        credits.append((answer in tied) / len(tied))
    n = len(credits)
    return Accuracy(math.fsum(credits) / n, n, sum(len(tied) > 1 for tied in chosen), chosen, credits)


def bleu(predictions: Sequence[Sequence[Hashable]], references: Sequence[Sequence[Hashable]],
         released: bool = False) -> Bleu:
    """Corpus BLEU-4 with one reference and without smoothing (Papineni et al., 2002), times 100.

    BP exp(sum of log p_n / 4 over n = 1 ... 4), where p_n is the share of predicted n-grams that are in the reference,
    each counted at most as often as there, over all questions; BP = min(1, exp(1 - references' / predictions' length)).
    The score is 0 if any p_n is 0, and for empty predictions.

    Args:
      predictions, references: each question's tokens, in the study those of the model's vocabulary.
      released: scores all predictions joined against all references joined, as the study's notebook does; there is
        then a single row of counts, and no bootstrap.

    Raises:
      ValueError: no questions, or a different number of references.
      TypeError: a text instead of its tokens.
    """
    _check_paired(predictions, references)
    if any(isinstance(tokens, str) for tokens in (*predictions, *references)):
        raise TypeError("BLEU needs lists of tokens; given a text, it would take each character as a token")
    if released:
        predictions = [[token for tokens in predictions for token in tokens]]
        references = [[token for tokens in references for token in tokens]]
    counts = [_ngram_counts(*pair) for pair in zip(predictions, references, strict=True)]
    total = np.sum(counts, axis=0)
    lengths, matches, possible = total[:2], total[2:2 + ORDERS], total[2 + ORDERS:]
    return Bleu(
        score=float(bleu_of_counts(total)), precisions=(matches / np.maximum(possible, 1)).tolist(),
        brevity_penalty=float(_brevity_penalty(*lengths)),
        prediction_length=int(lengths[0]), reference_length=int(lengths[1]), counts=counts)


def bleu_of_counts(counts: np.ndarray, smoothing: str = "none") -> np.ndarray:
    """BLEU, times 100, from counts summed over questions: [..., 10] -> [...]; used for the bootstrap.

    Args:
      counts: lengths of predictions and of references, four counts of matching n-grams, four of predicted ones.
      smoothing: "none", or "exponential" for sacreBLEU's default: the k-th order without a match has precision
        1 / (2^k predicted n-grams), unless no order has one (Chen and Cherry, 2014, method 3).

    Raises:
      ValueError: unknown smoothing.
    """
    if smoothing not in ("none", "exponential"):
        raise ValueError(f'Smoothing is "none" or "exponential", not "{smoothing}"')
    counts = np.asarray(counts, np.float64)
    matches, possible = counts[..., 2:2 + ORDERS], counts[..., 2 + ORDERS:]
    matched = matches.any(axis=-1)
    if smoothing == "exponential":
        missed = (matches == 0) & (possible > 0)
        matches = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), matches)
    with np.errstate(divide="ignore"):  # log 0 = -inf: a precision of 0 makes the score 0
        logarithms = np.log(matches / np.maximum(possible, 1)).mean(axis=-1)
    return np.where(matched, 100 * _brevity_penalty(counts[..., 0], counts[..., 1]) * np.exp(logarithms), 0.0)


def sacrebleu_score(predictions: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> SacreBleu:
    """BLEU as sacreBLEU computes it from texts (Post, 2018), with its tokens and smoothing, and one reference.

    Args:
      predictions, references: each question's text.
      tokenize: sacreBLEU's name of a tokenizer; "none" splits at spaces.

    Raises:
      ValueError: no questions, or a different number of references.
    """
    import sacrebleu  # imported here since it takes a third of a second

    _check_paired(predictions, references)
    metric = sacrebleu.BLEU(tokenize=tokenize, force=True)  # force: no warning that texts look tokenized already
    scored = metric.corpus_score(list(predictions), [list(references)])
    rows = [metric.corpus_score([prediction], [[reference]])
            for prediction, reference in zip(predictions, references, strict=True)]
    counts = [[row.sys_len, row.ref_len, *row.counts, *row.totals] for row in rows]
    return SacreBleu(float(scored.score), str(metric.get_signature()), counts)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k programs passes, without bias from n samples (Chen et al., 2021).

    1 - C(n - c, k) / C(n, k), where c of the n samples passed: exact, in whole numbers.

    Raises:
      ValueError: not 1 <= k <= n, or not 0 <= c <= n.
    """
    if not (1 <= k <= samples and 0 <= passed <= samples):
        raise ValueError(f"pass@{k} of {samples} samples, of which {passed} passed: k and passed are at most samples")
    every = math.comb(samples, k)
    return (every - math.comb(samples - passed, k)) / every


def dureader(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> DuReader:
    """Exact match and F1 of DuReader-robust (Tang et al., 2021), averaged over questions.

    Texts are lower-cased and stripped of punctuation. A prediction matches exactly if it then equals a reference. For
    F1 each Chinese character is a token, and so is any run of other characters. With L the length of the longest run of
    tokens common to both texts, precision is L / tokens predicted, recall L / tokens of the reference, F1 = 2 P R /
    (P + R). The best reference counts. If nothing is left of a text, F1 = 0, even for an exact match.

    Args:
      predictions: each question's text.
      references: each question's right answers, at least one.

    Raises:
      ValueError: no questions, a different number of references, or a question without any.
      TypeError: a question's references are a text, not a list.
    """
    _check_paired(predictions, references)
    exact_matches, f1s = [], []
    for question, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
        if isinstance(answers, str):
            raise TypeError(f"Question {question}: the references must be a list of texts")
        if not answers:
            raise ValueError(f"Question {question} has no reference")
        normalized, wanted = _normalized(prediction), [_normalized(answer) for answer in answers]
        exact_matches.append(normalized in wanted)
        f1s.append(max(_overlap_f1(normalized, answer) for answer in wanted))
    n = len(f1s)
    return DuReader(sum(exact_matches) / n, math.fsum(f1s) / n, n, exact_matches, f1s)


def _ngram_counts(prediction: Sequence[Hashable], reference: Sequence[Hashable]) -> list[int]:
    """A row of counts for `bleu_of_counts`."""
    matches = []
    for order in range(1, ORDERS + 1):
        clipped = _ngrams(prediction, order) & _ngrams(reference, order)  # the smaller count of each
        matches.append(clipped.total())
    possible = [max(0, len(prediction) - order + 1) for order in range(1, ORDERS + 1)]
    return [len(prediction), len(reference), *matches, *possible]


def _ngrams(tokens: Sequence[Hashable], order: int) -> collections.Counter[tuple[Hashable, ...]]:
    return collections.Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def _brevity_penalty(prediction_length: np.ndarray, reference_length: np.ndarray) -> np.ndarray:
    ratio = reference_length / np.maximum(prediction_length, 1)
    return np.where(prediction_length > 0, np.exp(np.minimum(0, 1 - ratio)), 0.0)


def _normalized(text: str) -> str:
    return text.lower().translate(_REMOVED)


def _overlap_f1(prediction: str, reference: str) -> float:
    ours, theirs = _TOKEN.findall(prediction), _TOKEN.findall(reference)
    common = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).find_longest_match().size
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0  # equal to 2 P R / (P + R)


def _check_paired(first: Sequence[object], second: Sequence[object]) -> None:
    if not len(first):
        raise ValueError("There are no questions, so there is no score")
    if len(first) != len(second):
        raise ValueError(f"there are {len(first)} predictions, but {len(second)} references or answers")
