"""Questions too long for a model: by hand, and for all small ones the rule itself."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellm_jax.evaluation.cuts import fitted


def texts(candidates: list[str], length: int) -> list[str]:
    """Each letter a token; "prompt|continuation" before and after."""
    parted = [tuple(part.split("|")) for part in candidates]
    found = fitted([(list(map(ord, prompt)), list(map(ord, continuation))) for prompt, continuation in parted], length)
    for (prompt, continuation), one in zip(parted, found, strict=True):
        assert one.prompt_tokens_cut == len(prompt) - len(one.prompt)
        assert one.continuation_tokens_cut == len(continuation) - len(one.continuation)
    return ["|".join("".join(map(chr, part)) for part in one[:2]) for one in found]


@pytest.mark.parametrize("candidates, length, kept", [
    # What fits is left as it is: length + 1 tokens.
    (["abcX|q", "abcYY|qr"], 6, ["abcX|q", "abcYY|qr"]),
    # The common beginning goes first, as much of each, though one alone is too long.
    (["abcX|q", "abcYY|qr"], 5, ["bcX|q", "bcYY|qr"]),
    (["abcX|q", "abcYY|qr"], 3, ["X|q", "YY|qr"]),
    # Then what follows the choice, but not what stands next to the question.
    (["answer:X, answers|question", "answer:Y, answers|question"], 13, ["Xswers|question", "Yswers|question"]),
    # Then the end of the question, as much of each, so that the same tokens are scored.
    (["answer:X, answers|question", "answer:Y, answers|question"], 4, ["X|ques", "Y|ques"]),
    (["answer:XXX:|question", "answer:Y:|question"], 4, ["XXX|qu", "Y|qu"]),
    # A choice too long by itself keeps its end, and one token of the question.
    (["abcdeX|question", "bbcdeY|question"], 3, ["deX|q", "deY|q"]),
    # Prompts alike: they keep their end, at least one token.
    (["question:|X", "question:|YYY"], 5, ["on:|X", "on:|YYY"]),
    (["question:|X", "question:|YYY"], 2, [":|X", ":|YY"]),
    # Continuations then lose what they have in common, its beginning first, then its end.
    (["?|the answer is X.", "?|the answer is YY."], 5, ["?|s X.", "?|s YY."]),
    (["?|the answer is X.", "?|the answer is YY."], 2, ["?|X", "?|YY"]),
    (["?|aaX", "?|aa"], 2, ["?|aX", "?|a"]),
    (["?|X.", "?|."], 1, ["?|X", "?|."]),
    # Nothing tells them apart: the beginning of what is scored stays.
    (["p:|question", "p:|question"], 4, [":|ques", ":|ques"]),
    # One alone is too long, and no continuation loses more than it must.
    (["XX|abcdef", "YYYYYYY|b"], 7, ["XX|abcdef", "YYYYYYY|b"]),
    (["XX|abcdefgh", "YYYYYYY|b"], 7, ["XX|abcdef", "YYYYYYY|b"]),
])
def test_by_hand(candidates, length, kept):
    assert texts(candidates, length) == kept


candidate = st.tuples(st.text("ab", min_size=1, max_size=7), st.text("ab", min_size=1, max_size=7))


@given(st.lists(candidate, min_size=1, max_size=4), st.text("ab", max_size=5), st.text("ab", max_size=5),
       st.integers(1, 16))
@settings(max_examples=400, deadline=None)
def test_what_is_kept_fits_and_tells_apart(parts, beginning, end, length):
    whole = [(beginning + prompt + end, continuation) for prompt, continuation in parts]
    found = fitted(whole, length)
    room = length + 1
    for one in found:
        assert one.prompt and one.continuation and len(one.prompt) + len(one.continuation) <= room
    if all(len(prompt) + len(continuation) <= room for prompt, continuation in whole):
        assert [(one.prompt, one.continuation) for one in found] == [(list(p), list(c)) for p, c in whole]
        return
    # No more is cut than must be: the longest fills the model.
    assert any(len(one.prompt) + len(one.continuation) == room for one in found)
    prompts = {prompt for prompt, _ in whole}
    if len(prompts) > 1 and all(len(prompt) <= length for prompt in prompts):
        # What differs leaves room for a token of the continuation, so all prompts that differ still do.
        for one, other in itertools.combinations(range(len(whole)), 2):
            assert (whole[one][0] == whole[other][0]) == (found[one].prompt == found[other].prompt)
    elif len(prompts) == 1 and all(len(continuation) <= length for _, continuation in whole):
        for one, other in itertools.combinations(range(len(whole)), 2):
            assert (whole[one][1] == whole[other][1]) == (found[one].continuation == found[other].continuation)


def test_candidates_are_cut_alike():
    """Of the same question the same tokens are scored after each choice, whatever the choices' lengths."""
    question = list(range(100, 160))
    choices = [[1], [2, 3, 4], [5, 6]]
    found = fitted([([10, 11, *choice, 12, 13], question) for choice in choices], 32)
    assert [list(one.prompt) for one in found] == choices
    assert {tuple(one.continuation) for one in found} == {tuple(question[:30])}
    assert [(one.prompt_tokens_cut, one.continuation_tokens_cut) for one in found] == [(4, 30)] * 3
