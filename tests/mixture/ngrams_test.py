"""Words and n-grams, against what is written out by hand and an obvious search."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellm_jax.mixture.ngrams import END, Lengths, NGrams, Question, index, words


@pytest.mark.parametrize("text, found", [
    ("The cat's 2 hats, UPPER_case; x+=1", "the cat s 2 hats upper case x 1"),
    ("def is_prime(n):\n\treturn n>1", "def is prime n return n 1"),
    ("男：你好，ＧＰＴ４！", "男 你 好 gpt4"),
    ("二〇二三年第3季度", "二 〇 二 三 年 第 3 季 度"),
    ("これはテスト・です。", "こ れ は テ ス ト で す"),
    ("한국어 문장", "한국어 문장"),
    ("ﬁne Café naïve ß", "fine café naïve ß"),
    ("Cafe\u0301", "café"),
    ("", ""), ("...—!?", ""), ("a\u2028b\u3000c", "a b c")])
def test_words(text, found):
    assert words(text) == found.split()


def questions(*parts: str | tuple[str, ...], task: str = "t") -> list[Question]:
    return [Question(task, str(number), (one,) if isinstance(one, str) else one) for number, one in enumerate(parts)]


def found(ngrams: NGrams, text: str) -> set[int]:
    numbers = ngrams.number(words(text))
    return set(ngrams.question[ngrams.matches(numbers, np.zeros(len(ngrams.measurable), bool))].tolist())


def numbered(first: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


def test_n_consecutive_words_and_no_fewer():
    ngrams = index(questions(numbered(0, 20)), most=10)
    assert len(ngrams.start) == 8
    assert found(ngrams, f"before {numbered(3, 13)} after") == {0}
    assert found(ngrams, f"before {numbered(3, 12)} after {numbered(0, 12)}") == set()
    assert found(ngrams, numbered(0, 6) + " other " + numbered(6, 12)) == set()
    assert found(ngrams, "W3, w4; (w5)\nw6_w7 " + numbered(8, 8)) == {0}


def test_scripts_without_spaces_have_lengths_of_their_own():
    def han(first: int, count: int) -> str:
        return "".join(chr(0x4E00 + number) for number in range(first, first + count))

    ngrams = index(questions(
        han(0, 40), numbered(0, 20),
        (han(100, 15), "no more"), (han(200, 12), han(300, 9)),  # too short; joined a whole of 21
        f"{han(400, 10)} {numbered(40, 12)}",  # in the main words with spaces
        (han(500, 16), "x")), Lengths(13, 8), Lengths(26, 16))
    assert ngrams.measurable.tolist() == [True] * 6
    assert found(ngrams, han(5, 26)) == {0} and found(ngrams, han(5, 25)) == set()
    assert found(ngrams, numbered(3, 13)) == {1}
    assert found(ngrams, han(100, 15)) == set() and found(ngrams, f"{han(100, 15)} no more") == {2}
    assert found(ngrams, han(200, 12)) == set() and found(ngrams, han(200, 12) + han(300, 9)) == {3}
    assert found(ngrams, f"{han(405, 5)} {numbered(40, 8)}") == {4}
    assert found(ngrams, f"a{han(500, 16)}b") == {5}
    assert len(index(questions(han(0, 40)), unspaced=Lengths(13, 8)).start) == 28


def test_short_questions_count_as_a_whole_or_not_at_all():
    ngrams = index(questions(
        numbered(0, 8), numbered(10, 7),
        (numbered(20, 9), numbered(30, 3)),  # its first part alone
        (numbered(40, 5), numbered(50, 5)),  # joined
        (numbered(60, 13), numbered(80, 9)),
        (numbered(100, 7), numbered(110, 8))))
    assert ngrams.measurable.tolist() == [True, False, True, True, True, True]
    assert found(ngrams, f"a {numbered(0, 8)} b {numbered(10, 7)} c") == {0}
    assert found(ngrams, numbered(20, 9)) == {2} and found(ngrams, numbered(30, 3)) == set()
    assert found(ngrams, f"{numbered(40, 5)}: {numbered(50, 5)}") == {3}
    assert found(ngrams, f"{numbered(40, 5)} x {numbered(50, 5)}") == set()
    assert found(ngrams, numbered(80, 9)) == found(ngrams, numbered(60, 13)) == {4}
    assert found(ngrams, numbered(110, 8)) == {5}
    joined = index(questions((numbered(0, 7), numbered(7, 7))))  # long enough together for two n-grams
    assert len(joined.start) == 2 and found(joined, numbered(1, 13)) == {0}


def test_parts_are_apart():
    ngrams = index(questions((numbered(0, 13), numbered(13, 13))))
    assert len(ngrams.start) == 2
    assert found(ngrams, numbered(5, 13)) == set()


def test_what_many_questions_of_a_task_have_is_its_manner_of_asking():
    asked = [Question("many", str(number), (f"{numbered(0, 13)} and q{number}",)) for number in range(11)]
    alike = [Question("few", str(number), (numbered(0, 13),)) for number in range(10)]
    ngrams = index([*asked, *alike], most=10)
    assert ngrams.boilerplate == {"many": 2, "few": 0}  # with "and" behind it twice, without the last word
    assert found(ngrams, numbered(0, 13)) == set(range(11, 21))
    assert found(ngrams, f"{numbered(2, 11)} and q3") == {3}
    alone = index(alike + questions(numbered(0, 13), task="few"), most=10)
    assert not alone.measurable.any() and alone.boilerplate == {"few": 1}
    # A question that says it twice says it once.
    twice = index(questions(*[f"{numbered(0, 13)} {numbered(0, 13)}"] * 10), most=10)
    assert found(twice, numbered(0, 13)) == set(range(10))


def test_equal_hashes_are_no_proof():
    """All words with one value: every window of eight looks the same."""
    ngrams = index(questions(numbered(0, 8), numbered(20, 13), numbered(40, 8)))
    values = np.full_like(ngrams.values, 7)
    hashes = np.full_like(ngrams.hashes, 7 * sum(pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(8)) % 2**64)
    blind = dataclasses.replace(ngrams, values=values, hashes=hashes, maybe=np.ones_like(ngrams.maybe))
    for text in (numbered(0, 30), numbered(21, 27), f"{numbered(40, 7)} x", "a b c d e f g h i j k"):
        assert found(blind, text) == found(ngrams, text)


def test_the_words_of_an_ngram():
    ngrams = index(questions("Is it, or is it not, so? Yes.", numbered(0, 14)))
    assert sorted(ngrams.texts(range(3))) == ["is it or is it not so yes", numbered(0, 13), numbered(1, 13)]


def test_nothing_to_look_for():
    ngrams = index(questions("too short", ""))
    assert not ngrams.measurable.any() and ngrams.longest == 0
    assert found(ngrams, numbered(0, 40)) == set() and found(index([]), "a b") == set()


def test_the_end_of_a_document_is_a_word_of_no_question():
    ngrams = index(questions(numbered(0, 13)))
    end = END.decode("utf-8", "surrogateescape")
    assert found(ngrams, numbered(0, 13) + end) == {0}
    assert found(ngrams, numbered(0, 6) + end + numbered(6, 7)) == set()


def obvious(asked: list[tuple[str, ...]], text: str, n: int, minimum: int, most: int) -> set[int]:
    """The same by sets of tuples."""

    def grams(sequence: list[str], size: int) -> set[tuple[str, ...]]:
        return {tuple(sequence[at : at + size]) for at in range(len(sequence) - size + 1)}

    of = []
    for parts in asked:
        split = [part.split() for part in parts]
        own = set().union(*[grams(part, n) for part in split])
        own |= {tuple(part) for part in split if minimum <= len(part) < n}
        whole = sum(split, [])
        if not own and len(whole) >= n:
            own = grams(whole, n)
        if not own and len(whole) >= minimum:
            own = {tuple(whole)}
        of.append(own)
    rare = [{gram for gram in own if sum(gram in other for other in of) <= most} for own in of]
    sequence = text.split()
    return {number for number, own in enumerate(rare) if any(gram in grams(sequence, len(gram)) for gram in own)}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(2, 6))
def test_as_the_obvious_search(seed, n, minimum, most, letters):
    dice = random.Random(seed)

    def some(least: int, longest: int) -> str:
        return " ".join(dice.choices("abcdef"[:letters], k=dice.randint(least, longest)))

    asked = [tuple(some(0, 9) for _ in range(dice.randint(1, 3))) for _ in range(dice.randint(1, 8))]
    text = some(0, 60)
    ngrams = index(questions(*asked), Lengths(n, minimum), most=most)
    assert found(ngrams, text) == obvious(asked, text, n, minimum, most)
    but = np.array([dice.random() < 0.5 for _ in asked])
    matched = ngrams.matches(ngrams.number(words(text)), but)
    assert set(ngrams.question[matched].tolist()) == {one for one in found(ngrams, text) if not but[one]}
