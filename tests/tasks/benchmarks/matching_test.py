"""Whether a written answer is right, by hand, and against the scripts that the rules come from."""

import re
import string
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.benchmarks.matching import NUMBER, TEXT, is_number, is_right, normalized, number_in


def official_squad(text: str) -> str:
    """`normalize_answer` of SQuAD's evaluation script, version 1.1."""
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def official_gsm8k(text: str) -> str | None:
    """`extract_answer` of GSM8K's repository; None for its "[invalid]"."""
    match = re.compile(r"#### (\-?[0-9\.\,]+)").search(text)
    return match.group(1).strip().replace(",", "") if match else None


@settings(deadline=None)
@given(st.lists(st.sampled_from("The|a|an|An-other|cat|sat!|U.S.|$5|  |\t|it's|x+y".split("|"))))
def test_normalized_as_squad_does(words: list[str]) -> None:
    text = " ".join(words)
    assert normalized(text) == (official_squad(text) or text.lower().strip())


def test_normalized_by_hand() -> None:
    assert normalized("  The “Cat”, sat… ") == "cat sat"
    assert normalized("答案：巴黎。") == "答案巴黎"
    assert normalized("+") == "+" and normalized("The") == "the"  # nothing would be left, and nothing would be right
    assert is_right(TEXT, "An Apple.", ("pear", "apple")) and not is_right(TEXT, "", ("+",))
    assert not is_right(TEXT, "apple pie", ("apple",))


@settings(deadline=None)
@given(st.integers(-10**9, 10**9), st.sampled_from(["{}", "{:,}", "{}.00", "{:,}.50"]))
def test_a_number_behind_the_mark_as_gsm8k_reads_it(value: int, form: str) -> None:
    text = f"He has 3 + 4 = 7.\n#### {form.format(value)}"
    assert number_in(text) == Decimal(str(official_gsm8k(text)))
    assert is_number(text) and is_number(form.format(value))


@pytest.mark.parametrize("text,number", [
    ("So 3 and 4 make 7.", "7"), ("It costs $1,234.50!", "1234.50"), ("18", "18"), ("-5", "-5"), ("\u22125", "-5"),
    ("from 10-20", "20"), ("5 - 3 = 2", "2"), ("x=-2", "-2"), ("(7)-3", "3"), ("a .5", "0.5"), ("1.5.", "1.5"),
    ("1,2,3", "3"), ("12,345,678", "12345678"), ("1,2345", "2345"), ("6.02e23", "6.02e23"), ("2e", "2"),
    ("18 %", "18"), ("+4", "4"), ("５", "5"), ("约为１２元", "12"), ("5 m²", "5"),
    ("#### 18\n#### 20", "18"), ("####   $1,000 dollars, not 3", "1000"), ("#### -7", "-7"),
    ("#### Step 1\n so 9", "9"), ("####18", "18"), ("1e9999", "9999")])
def test_numbers_by_hand(text: str, number: str) -> None:
    assert number_in(text) == Decimal(number)


def test_equal_numbers() -> None:
    assert is_right(NUMBER, "so 1,000.0", ("#### 1000",)) and is_right(NUMBER, "0.50", ("1/3 is 3", ".5"))
    assert not is_right(NUMBER, "none", ("0",)) and number_in("") is number_in("none") is None
    assert not is_right(NUMBER, "18.5", ("18",))
    assert not is_number("in 1867") and not is_number("") and is_number(" 42 ")
    assert is_right(NUMBER, "9" * 100_000, ("9" * 100_000,))
