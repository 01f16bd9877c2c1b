"""Published quality rules for English web text: Gopher's, C4's and FineWeb's, with their thresholds.

  Gopher   Rae et al. (2021), arXiv:2112.11446, appendix A.1.1: `gopher_quality` and, from its table A1,
           `gopher_repetition`
  C4       Raffel et al. (2020), JMLR 21(140), section 2.2, as implemented in TensorFlow Datasets' `c4_utils.py`
  FineWeb  Penedo et al. (2024), arXiv:2406.17557, section 3.6

A filter returns the reason for removing a text, or None. An edit returns the remaining text. The papers do not define
a word. Here, nearly as in spaCy's English tokenizer and so in datatrove, it is a run of letters and digits, with
underscores and apostrophes within; "don't" is "do" and "n't", "she's" is "she" and "'s"; "3.5", "U.S." and "Mr." are
one word each, and any other symbol except white space is a word, not counted where the rule says so.
"""

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(
    r"(?:[^\W\d_]\.){2,}|\b(?:[A-Za-z]|Mrs?|Ms|Dr|St|Prof|Gen|Gov|Rev|Rep|Sen|Jr|Co|Corp|Inc|Ltd|Bros|Messrs|vs)\."
    r"|\d+(?:[.,]\d+)*|[^\W_]+?(?=n['’]t(?![^\W_]))|n['’]t(?![^\W_])"
    r"|[^\W_]+(?:(?:_+|['’](?!(?:s|m|d|ll|re|ve)(?![^\W_])))[^\W_]+)*"
    r"|(?<=\w)['’](?:s|m|d|ll|re|ve)(?![^\W_])|\.{3,}|-{2,}|[^\w\s]|_")
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"[.!?。！？]+[\"'”’)]*(?=\s|$)|[。！？]")
TERMINAL = tuple(".?!。！？…．｡؟۔।‼⁇⁈⁉‽։።၊။។")


def words(text: str) -> list[str]:
    """The words of a text, including symbols."""
    return _WORD.findall(text)


def gopher_quality(
    text: str, fewest_words: int = 50, most_words: int = 100_000, shortest_mean: float = 3, longest_mean: float = 10,
    symbols: float = 0.1, bullets: float = 0.9, ellipses: float = 0.3, alphabetic: float = 0.8,
    stop_words: Sequence[str] = STOP_WORDS, fewest_stop_words: int = 2,
) -> str | None:
    """Gopher's quality rules (arXiv:2112.11446, A.1.1 "Quality Filtering").

    Args:
      fewest_words, most_words: bounds on the number of words, without symbols.
      shortest_mean, longest_mean: bounds on their mean length in characters.
      symbols: the maximum number of "#", and of "..." and "…", per word.
      bullets, ellipses: the maximum share of lines that begin with a bullet or dash, and that end with an ellipsis.
      alphabetic: the minimum share of words with a letter.
      stop_words, fewest_stop_words: at least this many different stop words must occur; case counts.
    """
    found = words(text)
    plain = [word for word in found if word[0].isalnum() or word[-1].isalnum()]
    if len(plain) < fewest_words:
        return f"Gopher: under {fewest_words} words"
    if len(plain) > most_words:
        return f"Gopher: over {most_words} words"
    mean = sum(map(len, plain)) / len(plain)
    if mean < shortest_mean or mean > longest_mean:
        return f"Gopher: mean word length {'under' if mean < shortest_mean else 'over'} " + (
            f"{shortest_mean if mean < shortest_mean else longest_mean:g}")
    if text.count("#") / len(found) > symbols:
        return f"Gopher: over {symbols:g} hashes a word"
    if (text.count("...") + text.count("…")) / len(found) > symbols:
        return f"Gopher: over {symbols:g} ellipses a word"
    lines = text.splitlines()
    if sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) > bullets:
        return f"Gopher: over {bullets:.0%} of lines are bullets"
    if sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) > ellipses:
        return f"Gopher: over {ellipses:.0%} of lines end with an ellipsis"
    if sum(any(map(str.isalpha, word)) for word in found) / len(found) < alphabetic:
        return f"Gopher: under {alphabetic:.0%} of words have a letter"
    if len(set(stop_words).intersection(found)) < fewest_stop_words:
        return f"Gopher: under {fewest_stop_words} stop words"
    return None


def gopher_repetition(
    text: str, lines: float = 0.3, paragraphs: float = 0.3, line_characters: float = 0.2,
    paragraph_characters: float = 0.2, top: Sequence[float] = (0.2, 0.18, 0.16),
    repeated: Sequence[float] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
) -> str | None:
    """Gopher's repetition rules (arXiv:2112.11446, table A1).

    Args:
      lines, paragraphs: the maximum share of lines and paragraphs that repeat an earlier one.
      line_characters, paragraph_characters: the maximum share of characters in these.
      top: the maximum share of characters in the most common word n-gram, for n = 2, 3, 4.
      repeated: the maximum share of characters in repeated n-grams, none counted twice, for n = 5 ... 10.
    """
    of_text = max(len(text), 1)
    for name, parts, most, most_characters in (
            ("paragraphs", re.split(r"\n{2,}", text.strip()), paragraphs, paragraph_characters),
            ("lines", re.split(r"\n+", text), lines, line_characters)):
        again, characters = _repeated(parts)
        if again / len(parts) > most:
            return f"Gopher: over {most:.0%} of {name} are repeated"
        if characters / of_text > most_characters:
            return f"Gopher: over {most_characters:.0%} of characters are in repeated {name}"
    found = words(text)
    for n, most in enumerate(top, 2):
        grams = Counter(zip(*(found[offset:] for offset in range(n)), strict=False))
        if grams:
            gram, count = grams.most_common(1)[0]
            # Includes the blanks between the words.
            if count > 1 and (sum(map(len, gram)) + n - 1) * count / of_text > most:
                return f"Gopher: over {most:.0%} of characters are in one {n}-gram"
    for n, most in enumerate(repeated, 5):
        if _in_repeated(found, n) / of_text > most:
            return f"Gopher: over {most:.0%} of characters are in repeated {n}-grams"
    return None


def _repeated(parts: Sequence[str]) -> tuple[int, int]:
    """The number of parts that repeat an earlier one, and of their characters."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count, characters = count + 1, characters + len(part)
        seen.add(part)
    return count, characters


def _in_repeated(found: Sequence[str], n: int) -> int:
    """Characters in repeated word n-grams, matched from the left without overlap."""
    seen: set[tuple[str, ...]] = set()
    characters = position = 0
    while position + n <= len(found):
        gram = tuple(found[position : position + n])
        if gram in seen:
            characters += sum(map(len, gram))
            position += n
        else:
            seen.add(gram)
            position += 1
    return characters


def repeated_share(text: str) -> float:
    """The share of a text's characters in lines that repeat an earlier one."""
    return _repeated(re.split(r"\n+", text))[1] / max(len(text), 1)


def c4_lines(text: str, fewest_words: int = 5, longest_word: int = 1000) -> str:
    """C4's rules for lines: keeps those that end a sentence and have enough words.

    Drops lines with a word of over `longest_word` characters, with "javascript", or with phrases about cookies and
    policies; removes citation marks such as [1] and [edit].
    """
    kept = []
    for line in text.splitlines():
        if any(len(word) > longest_word for word in line.split()):
            continue
        line = _CITATION.sub("", line.strip())
        if not line.endswith((".", "?", "!", '"')) or line.endswith("...") or len(line.split()) < fewest_words:
            continue
        lower = line.lower()
        if "javascript" not in lower and not any(phrase in lower for phrase in _POLICY):
            kept.append(line)
    return "\n".join(kept).strip()


def c4_page(text: str, fewest_sentences: int = 3) -> str | None:
    """C4's rules for pages: removes those with a curly bracket, with "lorem ipsum", or with fewer sentences.

    C4 counts sentences after its rules for lines: put `c4_lines` first. A sentence ends with . ! or ? before a blank.
    """
    if "{" in text:
        return "C4: a curly bracket"
    if "lorem ipsum" in text.lower():
        return "C4: lorem ipsum"
    return f"C4: under {fewest_sentences} sentences" if len(_SENTENCE_END.findall(text)) < fewest_sentences else None


def fineweb_quality(
    text: str, punctuated: float = 0.12, short_lines: float = 0.67, short: int = 30, repeated: float = 0.01,
    line_ends: float = 0.3,
) -> str | None:
    """FineWeb's rules (arXiv:2406.17557, section 3.6), without empty lines.

    Args:
      punctuated: the minimum share of lines that end a sentence.
      short_lines, short: the maximum share of lines with at most `short` characters.
      repeated: the maximum share of characters in lines that repeat an earlier one.
      line_ends: the maximum number of line ends per word.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return "FineWeb: empty"
    if sum(line.endswith(TERMINAL) for line in lines) / len(lines) < punctuated:
        return f"FineWeb: under {punctuated:.0%} of lines end a sentence"
    if sum(len(line) <= short for line in lines) / len(lines) > short_lines:
        return f"FineWeb: over {short_lines:.0%} of lines are short"
    if _repeated(lines)[1] / len(text.replace("\n", "")) > repeated:
        return f"FineWeb: over {repeated:.0%} of characters are in repeated lines"
    if text.count("\n") / max(len(words(text)), 1) > line_ends:
        return f"FineWeb: over {line_ends:g} line ends a word"
    return None
