"""Tests of the campaign's judgement of outcomes, and of repeating a trial."""

import random

import pytest

from tests.faults.drawn import KINDS, kind_of
from tests.faults.kinds import hostile, junk
from tests.faults.world import Ended

REFUSED = "t5x train: error: CODE_RATE must lie between 0 and 1, found 2."


@pytest.mark.parametrize("status, output, wrong", [
    (0, "done", ""), (1, f"step 1\n{REFUSED}\n", ""), (-9, "step 1", ""), (130, "t5x train: error: interrupted.", ""),
    (143, "Interrupted; the same command continues from here.", ""), (137, "step 1", "without a word"),
    (None, "step 1", "hangs"), (1, f"Traceback (most recent call last):\n{REFUSED}", "a traceback"),
    (0, "Exception in thread\nTraceback (most recent call last):\n  in a file\nOSError\ndone", "a traceback: OSError"),
    (1, "step 1", "without a word"), (1, "t5x train: error: KeyError: 'x' (--debug shows where)", "not expected")])
def test_how_a_command_may_end(status: int | None, output: str, wrong: str) -> None:
    found = Ended(status, output).fault()
    assert wrong in found and bool(wrong) == bool(found)


def test_a_trial_is_the_same_of_the_same_numbers() -> None:
    def drawn(seed: int, number: int) -> tuple[str, float]:
        name, dice = kind_of(seed, number)
        return name, dice.random()

    assert [drawn(3, number) for number in range(50)] == [drawn(3, number) for number in range(50)]
    assert {drawn(1, number)[0] for number in range(400)} == set(KINDS)
    assert drawn(1, 2) != drawn(2, 1)


def test_damage_changes_a_file_in_many_ways() -> None:
    dice, content = random.Random(0), b'{"splits": {"train": {"count": 3}}, "key": [1, 2]}'
    for damage in (junk, hostile):
        found = {damage(dice, content) for _ in range(200)}
        assert len(found) > 20 and all(isinstance(one, bytes) for one in found)
        damage(dice, b"")
