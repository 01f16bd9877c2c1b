"""Named transforms of a corpus's documents, to study which aspects of code a model learns from.

A corpus's option `transform` lists them, and they are applied in turn. Each is a name, or {"name": name, "seed": 1}
if it has a seed (0 by default).

DESCRIPTIONS describes each; `python_names` and `tree_code` define which names are renamed, `words` has the words of
pseudocode, and `adjacent` the form of a notebook.

They are pure functions of a text, its language and their seed. They are idempotent except for
`rename_identifiers_randomly`, `pseudocode` and `prose_only`. A text that cannot be parsed becomes a `Lost`.

The first five parse code: Python with the grammar of the running Python, other languages with tree-sitter (the extra
`tree_sitter`).
"""

import functools
import hashlib
import importlib.metadata
import platform
import random
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tasks.corpora import adjacent, python_code, tree_code
from tasks.corpora.files import Lost
from tasks.corpora.renaming import consistent_names, random_names

# Part of the key of each cache of transformed documents; increase it whenever a transform gives different texts.
TRANSFORMS_VERSION = 1

DESCRIPTIONS: dict[str, str] = {
    "strip_comments": "Removes comments and docstrings; the rest of Python's syntax tree stays.",
    "comments_only": "Keeps only comments and docstrings; Python docstrings become comments.",
    "rename_identifiers": "Renames the file's own names to v0, v1 ... in order of appearance, consistently.",
    "rename_identifiers_randomly": "Gives each occurrence of such a name its own new name; has a seed.",
    "pseudocode": "Writes operators and keywords as words, and separates tokens by a blank.",
    "shuffle_lines": "Puts the lines into another order; has a seed.",
    "flatten_indentation": "Removes the blanks at the beginning of each line.",
    "code_cells_only": "Keeps only the code of a notebook.",
    "prose_only": "Keeps only the prose of a notebook.",
}
NAMES = tuple(DESCRIPTIONS)
_OF_CODE = ("strip_comments", "comments_only", "rename_identifiers", "rename_identifiers_randomly", "pseudocode")
OF_NOTEBOOKS = ("code_cells_only", "prose_only")
_SEEDED = ("rename_identifiers_randomly", "shuffle_lines")
_LEAVE_NO_CODE = ("pseudocode", "shuffle_lines", "prose_only")

EMPTY = "left empty by"  # prefix of the reason when a transform leaves a document empty
LANGUAGES = ("python", *tree_code.LANGUAGES)
_ALIASES = {"py": "python", "python3": "python", "ipython": "python", "js": "javascript", "golang": "go"}


class Step(NamedTuple):
    """One transform of a list."""

    name: str
    seed: int = 0

    @property
    def reads_code(self) -> bool:
        return self.name in _OF_CODE


def steps_of(transform: Sequence[str | Mapping[str, Any]]) -> list[Step]:
    """Converts a valid list of transforms to steps."""
    return [Step(each) if isinstance(each, str) else Step(**each) for each in transform]


def malformed(transform: Any) -> str | None:
    """Why a list of transforms is invalid, as the end of a sentence; None if it is valid."""
    if not isinstance(transform, list | tuple) or not transform:
        return f"must be a list of {', '.join(NAMES)}; found {transform!r}."
    for each in transform:
        options = {"name": each} if isinstance(each, str) else each
        if not isinstance(options, Mapping) or "name" not in options:
            return f"must hold names, or mappings such as {{'name': 'shuffle_lines', 'seed': 1}}; found {each!r}."
        name, seed = options["name"], options.get("seed", 0)
        if name not in NAMES:
            return f"has no transform {name!r}; there are {', '.join(NAMES)}."
        if others := set(options) - {"name", "seed"} or ({"seed"} & set(options) if name not in _SEEDED else set()):
            return (f"has {name!r}, which has no option {min(map(str, others))!r}; "
                    f"only {', '.join(_SEEDED)} have a seed.")
        if not isinstance(seed, int) or isinstance(seed, bool):
            return f"must have whole numbers as seeds; found {seed!r}."
    steps = steps_of(transform)
    for number, step in enumerate(steps):
        ended = next((before.name for before in steps[:number] if before.name in _LEAVE_NO_CODE), None)
        if ended and (step.reads_code or step.name in OF_NOTEBOOKS):
            return f"has {step.name!r} after {ended!r}, which leaves no code; put it first."
        if number and step.name in OF_NOTEBOOKS:
            return f"must begin with {step.name!r}, which reads the original notebook."
    return None


def language_named(name: str) -> str | None:
    """The language of this name, in any case; None if no transform reads it."""
    known = _ALIASES.get(name.strip().lower(), name.strip().lower())
    return known if known in LANGUAGES else None


def language_of_file(file: str) -> str | None:
    """The language of a file, by the suffix of its name; None if no transform reads it."""
    suffixes = {suffix: name for name, grammar in tree_code.LANGUAGES.items() for suffix in grammar.suffixes}
    return next((name for suffix, name in {**suffixes, ".py": "python", ".pyi": "python"}.items()
                 if file.endswith(suffix)), None)


def grammars(language: str | None) -> dict[str, str | None]:
    """The versions of the grammar packages that read a language, or all languages; None for those not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()} if language in (None, "python") else {}
    for name, grammar in tree_code.LANGUAGES.items():
        if language in (None, name):
            try:
                found[name] = importlib.metadata.version(grammar.package)
            except importlib.metadata.PackageNotFoundError:
                found[name] = None
    return found


@functools.cache
def missing(language: str) -> str | None:
    """A line with the packages to install for reading a language; None if all are installed."""
    packages = tree_code.missing(tree_code.LANGUAGES[language]) if language in tree_code.LANGUAGES else []
    return f"transforms of {language} need the extra tree_sitter, whose {' and '.join(packages)} " \
        "are not installed: pip install 'codellm_jax[tree_sitter]'." if packages else None


def transformed(text: str, language: str | None, steps: Sequence[Step]) -> str | Lost:
    """A text after all steps, or why there is none.

    Args:
      language: one of LANGUAGES that is not `missing`; None if no transform reads it.
    """
    for step in steps:
        if step.reads_code and language is None:
            return Lost("in a language that transforms do not read")
        try:
            text = _transformed(text, language or "", step)
            text.encode()  # an escape in a docstring may be half a surrogate pair
        except (SyntaxError, UnicodeError, RecursionError):
            return Lost(f"not parsed by {step.name}" + f" as {language}" * step.reads_code)
        if not text.strip():
            return Lost(f"{EMPTY} {step.name}")
    return text


def _transformed(text: str, language: str, step: Step) -> str:
    """A text after one step; raises SyntaxError if it cannot be read."""
    # Both have the same functions.
    code: types.ModuleType | tree_code.Grammar = tree_code.LANGUAGES.get(language, python_code)
    match step.name:
        case "strip_comments":
            return code.strip_comments(text)
        case "comments_only":
            return code.comments_only(text)
        case "rename_identifiers":
            return code.renamed(text, consistent_names)
        case "rename_identifiers_randomly":
            key = f"{step.seed} {hashlib.sha256(text.encode()).hexdigest()}"
            return code.renamed(text, lambda names, taken: random_names(names, taken, random.Random(key)))
        case "pseudocode":
            return code.pseudocode(text)
        case "shuffle_lines":
            return shuffle_lines(text, step.seed)
        case "flatten_indentation":
            return "\n".join(line.lstrip(" \t\f\v") for line in text.split("\n"))
        case "code_cells_only":
            return adjacent.code_cells(text)
        case _:
            return adjacent.prose_cells(text)


def shuffle_lines(text: str, seed: int) -> str:
    """The lines of a text in an order that depends only on the seed and the set of lines."""
    lines = sorted(text.removesuffix("\n").split("\n"))
    key = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    random.Random(f"{seed} {key}").shuffle(lines)
    return "\n".join(lines) + "\n"
