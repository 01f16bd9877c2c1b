"""Texts that do not come back from a vocabulary, found in a sample that is the same for parts and for the whole."""

import random

import pytest

from codellm_jax.mixture.roundtrip import LOOKED_AT, SAMPLED, Looked, Sample, of_whole, warned
from codellm_jax.vocabulary import load_vocabulary

PROGRAM = "def f(x):\n    if x:\n        return value"


def looked(vocabulary, *texts):
    sample = Sample()
    for text in texts:
        sample.add([text] if isinstance(text, str) else text)
    return sample.looked_at(vocabulary)


@pytest.mark.parametrize("name, texts, differing", [
    ("t5", [PROGRAM, "the row is read"], 1),
    ("t5", [("the row", "is read"), ("the row:\n", "is read")], 1),  # blanks between prompt and answer are no loss
    ("t5", ["value\n", "龘", "the  row", "①", "e\u0301", "é"], 5),  # unknown pieces, and what is composed
    ("llama", [PROGRAM, " the  row\n", "世界 🎉", ("the row:\n", PROGRAM), ("the", " row")], 0),
    ("python_8k", [PROGRAM, " the  row\n", "世界 🎉 \u2581", ("the row:\n", PROGRAM), ("the", " row")], 0)])
def test_what_differs(other_vocabularies, name, texts, differing):
    found = looked(load_vocabulary(other_vocabularies.get(name, name)), *texts)
    assert len(found) == len(texts) and sum(one.before != one.after for one in found) == differing
    assert bool(warned("text.a", "train", found, "documents")) == bool(differing)


def test_it_is_told_with_an_example(other_vocabularies):
    found = looked(load_vocabulary(other_vocabularies["t5"]), "the row is read " * 9 + PROGRAM)
    [line] = warned("code.a", "train", found, "documents")
    assert line.startswith("WARNING: code.a, train: 1 of 1 documents checked are changed by encoding and decoding")
    assert r"read def f(x):\n    if x:\n        return " in line and "read def f(x): if x: return value" in line


def test_a_cut_text_is_no_difference(other_vocabularies):
    t5 = load_vocabulary(other_vocabularies["t5"])
    for length in range(5):
        assert looked(t5, "x" * (LOOKED_AT - length) + " the row" * 9)[0][1:] == ("", "")


def test_the_sample_of_parts_is_that_of_the_whole(other_vocabularies):
    t5, dice = load_vocabulary(other_vocabularies["t5"]), random.Random(2)
    texts = [f"the row {number}{dice.choice([' ', chr(10)])}is read" for number in range(500)]
    whole = looked(t5, *texts)
    assert len(whole) == SAMPLED and whole == sorted(whole)
    dice.shuffle(texts)
    parts = [looked(t5, *texts[start::7], *texts[:9]) for start in range(7)]
    assert of_whole(Looked(*one) for part in parts for one in part) == whole
    assert looked(t5, *texts, *texts) == whole
    assert 0 < sum(one.before != one.after for one in whole) < SAMPLED
