"""The steps of a preparation by name, with their options: rules for one document, and steps that need all documents.

A step is a name, or a mapping with the name and options:

  ["special_symbols", {"name": "chinese_share", "at_least": 0.5, "sources": ["text.web"]}]

`sources` selects the corpora that a step applies to: names, or pools ("text", "code"). By default a rule for prose
applies to the pool text, a rule for code to the pool code, and all other steps to both.
"""

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from codellm_jax.mixture.ngrams import CHARACTERS, MOST, WORDS
from codellm_jax.prepare import code, quality, web
from codellm_jax.prepare.language import language, require_known
from codellm_jax.settings import nearest

# Part of every step's hash; increase it whenever the same steps would leave other documents.
STEPS_VERSION = 2

# Each takes a text, and those `FIELDS` that are among its parameters.
FILTERS: dict[str, Callable[..., str | None]] = {
    "chinese_share": web.chinese_share, "minimum_length": web.minimum_length, "title_only": web.title_only,
    "advertising": web.advertising, "language": language, "gopher_quality": quality.gopher_quality,
    "gopher_repetition": quality.gopher_repetition, "c4_page": quality.c4_page,
    "fineweb_quality": quality.fineweb_quality, "licence": code.licence, "generated": code.generated,
    "minified": code.minified, "line_lengths": code.line_lengths, "alphanumeric_share": code.alphanumeric_share,
    "parses": code.parses, "test_files": code.test_files,
}
EDITS: dict[str, Callable[..., str]] = {
    "special_symbols": web.special_symbols, "repeated_paragraphs": web.repeated_paragraphs,
    "navigation_bars": web.navigation_bars, "c4_lines": quality.c4_lines, "mask_e_mails": code.mask_e_mails,
    "mask_secrets": code.mask_secrets,
}
FIELDS = ("text", "license", "language", "file")
UNITS = ("bytes", "tokens")  # of budgets
_OF_CODE = ("licence", "generated", "minified", "line_lengths", "alphanumeric_share", "parses", "test_files")
_OF_BOTH = ("mask_e_mails", "mask_secrets")


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a preparation.

    Attributes:
      name: of a filter, an edit, or one of `GLOBAL` or "decontaminate".
      options: all options, with defaults for those that were omitted.
      sources: the corpora and pools it applies to; empty for all.
    """

    name: str
    options: Mapping[str, Any]
    sources: tuple[str, ...]

    def looks_at(self, source: str) -> bool:
        """Whether the step applies to the documents of a corpus."""
        return not self.sources or source in self.sources or source.partition(".")[0] in self.sources

    @property
    def needs_all(self) -> bool:
        """Whether the documents that it removes depend on all documents."""
        return self.name in GLOBAL


# ---- Options of the steps that are not rules ------------------------------------------------------


def decontaminate(
    ngram: int = WORDS.n, minimum: int = WORDS.minimum, characters: int = CHARACTERS.n,
    minimum_characters: int = CHARACTERS.minimum, most: int = MOST,
) -> None:
    """Removes documents that contain an n-gram of a benchmark's question, found as by `t5x contamination`.

    The questions are those that the benchmark uses: without JEC-QA's questions with several right answers.

    Args:
      ngram: words of an n-gram.
      minimum: words that a shorter part of a question must have to be searched as a whole.
      characters, minimum_characters: the same for Chinese and other scripts without spaces.
      most: questions of one task that may contain an n-gram; with more, it is part of the task's wording.
    """


def exact_duplicates() -> None:
    """Removes documents that equal another except for case, white space and Unicode compatibility forms."""


def duplicated_paragraphs(characters: int = 50) -> None:
    """Removes lines of at least this many characters that occur in another document, from all but one of the documents.
    """


def near_duplicates(ngram: int = 5, bands: int = 14, rows: int = 8, similarity: float = 0.85) -> None:
    """Removes near duplicates, found by MinHash with bands (see `duplicates`).

    Args:
      ngram: words of a shingle; each Chinese character is a word.
      bands, rows: hashes of a signature; documents that agree in all rows of a band are compared. The default finds
        98.8% of the pairs at a similarity of 0.85; for 98% at 0.8 use 22 x 8, at 0.7 30 x 6.
      similarity: the minimum Jaccard similarity of the shingles; 0 takes all that agree in a band, as FineWeb does.
    """


def sample(budgets: Mapping[str, float], unit: str = "bytes", seed: int = 0) -> None:
    """Keeps documents of each corpus, drawn by a hash of their text, up to its budget.

    Args:
      budgets: the amount of each corpus; a corpus without a budget stays whole.
      unit: "bytes" of UTF-8, or "tokens" of the preparation's vocabulary, including begin and end tokens.
      seed: another seed draws other documents.
    """


GLOBAL: dict[str, Callable[..., None]] = {
    "exact_duplicates": exact_duplicates, "duplicated_paragraphs": duplicated_paragraphs,
    "near_duplicates": near_duplicates, "sample": sample}
ALL: dict[str, Callable[..., Any]] = {**EDITS, **FILTERS, **GLOBAL, "decontaminate": decontaminate}


# ---- Reading -----------------------------------------------------------------------------------


def steps_of(asked: Sequence[Any], sources: Sequence[str]) -> list[Step]:
    """The steps in a list, in the format that the module describes.

    Args:
      asked: names, or mappings with a "name".
      sources: all corpora in the preparation.

    Raises:
      ValueError: with a one-line message; a name, an option or a value is unknown.
    """
    if isinstance(asked, str) or not isinstance(asked, Sequence):
        raise ValueError(f"STEPS must be a list such as ['exact_duplicates'], found {asked!r}.")
    found = []
    for number, each in enumerate(asked, 1):
        given = {"name": each} if isinstance(each, str) else dict(each) if isinstance(each, Mapping) else {}
        name = given.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f"STEPS, number {number}: a step is a name or a mapping with a 'name', found {each!r}.")
        if name not in ALL:
            raise ValueError(f"STEPS, number {number}: there is no step {name!r}" + nearest(name, ALL))
        of_step = given.pop("sources", None)
        if of_step is None:
            pools: tuple[str, ...] = ("code",) if name in _OF_CODE else (
                "text",) if name in (*FILTERS, *EDITS) and name not in _OF_BOTH else ()
        else:
            pools = _sources(name, of_step, sources)
        found.append(Step(name, _options(name, given, sources), pools))
    return found


def _sources(name: str, asked: Any, sources: Sequence[str]) -> tuple[str, ...]:
    known = [*sources, "text", "code"]
    if isinstance(asked, str) or not isinstance(asked, Sequence) or not asked:
        raise ValueError(f"{name}: 'sources' must be a list of corpora or pools, found {asked!r}.")
    for each in asked:
        if each not in known:
            raise ValueError(f"{name}: 'sources' names {each!r}, which is neither a corpus of CORPORA nor a pool"
                             + nearest(str(each), known))
    return tuple(asked)


def _options(name: str, given: dict[str, Any], sources: Sequence[str]) -> dict[str, Any]:
    parameters = {key: parameter for key, parameter in inspect.signature(ALL[name]).parameters.items()
                  if key not in FIELDS or parameter.default is not inspect.Parameter.empty}
    for key, value in given.items():
        if key not in parameters:
            raise ValueError(f"{name} has no option {key!r}; it has {', '.join(parameters) or 'none'}"
                             + nearest(key, parameters))
        _require(name, key, value, parameters[key].default)
    for key, parameter in parameters.items():
        if key not in given and parameter.default is inspect.Parameter.empty:
            raise ValueError(f"{name} needs the option {key!r}.")
    options = {key: given.get(key, parameter.default) for key, parameter in parameters.items()}
    if name == "sample":
        _require_budgets(options, sources)
    if name == "language":
        require_known(options["languages"])
    return json.loads(json.dumps(options, ensure_ascii=False))


def _require(name: str, key: str, value: Any, default: Any) -> None:
    """Raises ValueError if the value of an option has another type than its default."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool):
        good, wanted = isinstance(value, bool), "True or False"
    elif isinstance(default, int) and not isinstance(default, bool) and type(default) is int:
        least = 0 if key == "seed" or name in FILTERS or name in EDITS else 1
        float_option = name in ("gopher_quality",) and key.endswith("_mean")
        good = is_number and value >= least and (float_option or isinstance(value, int))
        wanted = f"a whole number, {least} or more"
    elif isinstance(default, float):
        good, wanted = is_number and value >= 0, "a number, 0 or more"
    elif isinstance(default, tuple):
        of = str if isinstance(default[0], str) else (int, float)
        good = isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(each, of) for each in value)
        wanted = "a list of " + ("texts" if of is str else "numbers")
    else:
        return
    if not good:
        raise ValueError(f"{name}: {key!r} must be {wanted}, found {value!r}.")


def _require_budgets(options: Mapping[str, Any], sources: Sequence[str]) -> None:
    budgets, unit = options["budgets"], options["unit"]
    if unit not in UNITS:
        raise ValueError(f"sample: 'unit' must be one of {', '.join(UNITS)}, found {unit!r}.")
    if not isinstance(budgets, Mapping) or not budgets:
        raise ValueError(f"sample: 'budgets' maps corpora to {unit}, such as {{'text.web': 1e9}}, found {budgets!r}.")
    for source, value in budgets.items():
        if source not in sources:
            raise ValueError(f"sample: 'budgets' names {source!r}, which is not a corpus of CORPORA"
                             + nearest(str(source), sources))
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"sample: the budget of {source} must be a positive number of {unit}, found {value!r}.")


def described(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """The steps as JSON, with all options."""
    return [{"name": step.name, **step.options, "sources": list(step.sources)} for step in steps]


def counts_tokens(steps: Sequence[Step]) -> bool:
    """Whether the output of a step depends on a vocabulary."""
    return any(step.options.get("unit") == "tokens" for step in steps)


def hash_of(steps: Sequence[Step], vocabulary: str | None = None) -> str:
    """SHA-256 of the steps, their options and the version of their rules, in hexadecimal; for steps that count tokens
    also of the vocabulary's hash.
    """
    counted = [vocabulary] if counts_tokens(steps) else []
    text = json.dumps([STEPS_VERSION, described(steps), *counted], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


# ---- Applying ----------------------------------------------------------------------------------


def apply(step: Step, fields: Mapping[str, Any]) -> tuple[str, str | None]:
    """Applies a rule to a document.

    Args:
      step: a filter or an edit.
      fields: `FIELDS` of the document.

    Returns:
      The text, and the reason for removing the document, or None.
    """
    text = fields["text"]
    if step.name in FILTERS:
        rule = FILTERS[step.name]
        return text, rule(**{name: fields[name] for name in _reads(step.name)}, **step.options)
    edited = EDITS[step.name](text, **step.options)
    return edited, None if edited.strip() else "nothing is left"


_READS = {name: tuple(key for key, parameter in inspect.signature(rule).parameters.items()
                      if key in FIELDS and parameter.default is inspect.Parameter.empty)
          for name, rule in FILTERS.items()}


def _reads(name: str) -> tuple[str, ...]:
    return _READS[name]
