"""Rules for source code: CodeParrot's and StarCoder's, and masks for personal data and secrets in any text.

  CodeParrot  Tunstall et al. (2022), "Natural Language Processing with Transformers", and the data set's card
  Codex       Chen et al. (2021), arXiv:2107.03374, section 3.1
  StarCoder   Li et al. (2023), arXiv:2305.06161, sections 3 and 4

A filter returns the reason for removing a text, or None. An edit returns the remaining text.
"""

import ast
import re
import warnings
from collections.abc import Sequence

# SPDX identifiers, and those of GitHub's API, in lower case.
PERMISSIVE = (
    "mit", "mit-0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "bsd", "0bsd", "isc", "unlicense", "cc0-1.0", "zlib",
    "python-2.0", "psf-2.0", "bsl-1.0", "artistic-2.0",
)
_SPDX = re.compile(r"SPDX-License-Identifier:\s*([^\s*]+)", re.IGNORECASE)
_GENERATED = re.compile(
    r"auto-?generated|automatically generated|generated (?:by|from|file|code)|@generated|do not (?:edit|modify)",
    re.IGNORECASE)
_TEST_FILE = re.compile(
    r"(^|/)(tests?|testing|__tests__|spec)/|(^|/)test_[^/]*$|(^|/)(conftest\.py)$|[_.-](test|tests|spec)\.[A-Za-z]+$|"
    r"(^|/)[^/]*Tests?\.(java|cs|kt|scala|php)$")


# ---- Filters -----------------------------------------------------------------------------------


def licence(
    text: str, license: str | None, allowed: Sequence[str] = PERMISSIVE, unknown: bool = False
) -> str | None:
    """Removes files whose licence is not among those allowed, as StarCoder does (section 3.1); case does not count.

    Args:
      license: the record's; without one, from a line "SPDX-License-Identifier:" in the first 2,000 characters.
      allowed: SPDX identifiers.
      unknown: whether files without a stated licence stay.
    """
    if not license:
        found = _SPDX.search(text[:2000])
        license = found[1] if found else None
    if license is None:
        return None if unknown else "licence: none told"
    return None if license.lower() in {each.lower() for each in allowed} else f"licence: {license}"


def generated(text: str, lines: int = 5) -> str | None:
    """Removes files that say in their first lines that a program wrote them (CodeParrot: in the first five)."""
    found = _GENERATED.search("\n".join(text.split("\n", lines)[:lines]))
    return f"generated: {found[0].lower()}" if found else None


def minified(text: str, white: float = 0.05, longest: int = 500) -> str | None:
    """Removes files with a line of over `longest` characters, of which less than the share `white` is white space."""
    for line in text.split("\n"):
        if len(line) > longest and sum(map(str.isspace, line)) / len(line) < white:
            return "minified"
    return None


def line_lengths(text: str, longest: int = 1000, mean: float = 100) -> str | None:
    """Removes files whose longest line or mean line is longer than this (Codex, section 3.1; CodeParrot)."""
    lengths = [len(line) for line in text.splitlines()] or [0]
    if max(lengths) > longest:
        return f"a line over {longest} characters"
    return f"lines over {mean:g} characters on average" if sum(lengths) / len(lengths) > mean else None


def alphanumeric_share(text: str, at_least: float = 0.25) -> str | None:
    """Removes files with a smaller share of letters and digits (CodeParrot; StarCoder, section 3.2)."""
    share = sum(map(str.isalnum, text)) / max(len(text), 1)
    return None if share >= at_least else f"under {at_least:.0%} letters and digits"


def parses(text: str, language: str | None) -> str | None:
    """Removes Python that Python cannot parse; files of other languages stay."""
    if language is None or language.lower() not in ("python", "py"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in the files
            ast.parse(text)
    except (SyntaxError, ValueError):
        return "does not parse"
    except (RecursionError, MemoryError):
        return "nested too deep to parse"
    return None


def test_files(text: str, file: str) -> str | None:
    """Removes tests, recognized by the name of the file or the record's path."""
    del text
    return "a test" if _TEST_FILE.search(file) else None


# ---- Edits: masks -------------------------------------------------------------------------------

_E_MAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w@]|:\w)")
_SECRETS = re.compile("|".join((
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----.*?(?:-----END (?:[A-Z]+ )*PRIVATE KEY-----|\Z)",
    r"\b(?:AKIA|ASIA|AGPA|AIDA|AROA)[0-9A-Z]{16}\b",  # Amazon
    r"\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{22,}\b|\bglpat-[\w-]{20,}",  # GitHub, GitLab
    r"\bxox[abeprs]-[A-Za-z0-9-]{10,}",  # Slack
    r"\bAIza[\w-]{35}(?![\w-])|\bya29\.[\w-]{20,}",  # Google
    r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}\b",  # Stripe
    r"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{20,}|\bhf_[A-Za-z0-9]{30,}\b|\bnpm_[A-Za-z0-9]{36}\b|\bpypi-[\w-]{50,}",
    r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",  # JSON Web Token
)), re.DOTALL)
# A quoted value of at least eight characters without blanks, assigned to a name that suggests a secret.
_ASSIGNED = re.compile(
    r"""((?:pass(?:word|wd)|secret|api_?key|access_?key|auth_?token|access_?token|private_?key|client_?secret)"""
    r"""[\w-]{0,20}["']?\s{0,4}(?:=|:|=>)\s{0,4})(["'])(?!<)([^\s"'<>{}$%]{8,200})\2""", re.IGNORECASE)
# Every match of the patterns contains one of these. Searching for them first is faster than the patterns alone.
_MARKS = ("PRIVATE KEY-----", "AKIA", "ASIA", "AGPA", "AIDA", "AROA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_",
          "github_pat_", "glpat-", "xox", "AIza", "ya29.", "k_live_", "k_test_", "sk-", "hf_", "npm_", "pypi-", "eyJ")
_NAMES = ("password", "passwd", "secret", "api_key", "apikey", "access_key", "accesskey", "auth_token", "authtoken",
          "access_token", "accesstoken", "private_key", "privatekey")
E_MAIL_MASK, SECRET_MASK = "<EMAIL>", "<KEY>"  # StarCoder, section 4


def mask_e_mails(text: str) -> str:
    """Replaces e-mail addresses by <EMAIL> (StarCoder, section 4)."""
    return _E_MAIL.sub(E_MAIL_MASK, text) if "@" in text else text


def mask_secrets(text: str) -> str:
    """Replaces private keys, tokens of known forms, and quoted values of names such as api_key by <KEY>."""
    if any(mark in text for mark in _MARKS):
        text = _SECRETS.sub(SECRET_MASK, text)
    folded = text.casefold()
    if not any(name in folded for name in _NAMES):
        return text
    return _ASSIGNED.sub(lambda found: f"{found[1]}{found[2]}{SECRET_MASK}{found[2]}"
                         if _looks_random(found[3]) else found[0], text)


def _looks_random(value: str) -> bool:
    """Whether a value has both digits and letters, unlike "changeme" or the name of a field."""
    return any(map(str.isdigit, value)) and any(map(str.isalpha, value))
