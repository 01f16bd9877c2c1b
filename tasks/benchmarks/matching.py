"""Decides whether a written answer is right: the same text after normalization, or the same number.

RULES describes each rule and its source.
"""

import re
import string
import unicodedata
from collections.abc import Callable
from decimal import Decimal

TEXT, NUMBER = "text", "number"
RULES = {
    TEXT: "exact match with any reference after SQuAD's normalization (Rajpurkar et al., 2016): lower case, without "
          "punctuation, without the words a, an and the, runs of blanks as one space; punctuation is that of ASCII and "
          "Unicode",
    NUMBER: "the same number: the first directly after '####', as in GSM8K (Cobbe et al., 2021), else the last in the "
            "text; commas between groups of three digits are thousands separators, currency signs and units are "
            "ignored",
}
MARK = "####"
# A hyphen is a minus sign only if no word, number or bracket ends before it: 10-20 ends with 20, and 5 - 3 with 3.
_NUMBER = (r"(?:(?<![\w.,)])[-+\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
           r"(?:[eE][-+]?\d{1,3}(?!\d))?")
_NUMBERS = re.compile(_NUMBER)
_MARKED = re.compile(rf"{MARK}\s*[$€£¥]?\s*({_NUMBER})")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(text: str) -> str:
    """Normalizes a text by SQuAD's rules; if nothing is left, as for "+", only lower-cases and strips it."""
    kept = "".join(letter for letter in text.lower()
                   if letter not in string.punctuation and not unicodedata.category(letter).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", kept).split()) or text.lower().strip()


def number_in(text: str) -> Decimal | None:
    """The number that a text answers by RULES[NUMBER]; None if it holds none."""
    marked = _MARKED.search(text)
    found = marked[1] if marked else next(iter(_NUMBERS.findall(text)[-1:]), None)
    return None if found is None else Decimal(found.replace(",", "").replace("\u2212", "-"))


def is_number(text: str) -> bool:
    """Whether a reference is a number, alone or after "####"."""
    return bool(_NUMBERS.fullmatch(text.strip()) or _MARKED.search(text))


MATCHES: dict[str, Callable[[str], object]] = {TEXT: normalized, NUMBER: number_in}


def is_right(match: str, answer: str, references: tuple[str, ...]) -> bool:
    """Whether an answer matches a reference by a rule of RULES; under NUMBER, an answer without a number does not."""
    read = MATCHES[match](answer)
    return read is not None and any(read == MATCHES[match](reference) for reference in references)
