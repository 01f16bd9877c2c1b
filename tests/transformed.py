"""Names of transforms, and their results, for the tests of transforms."""

import textwrap

from tasks.corpora import transforms
from tasks.corpora.files import Lost

# A second time changes nothing.
AGAIN_THE_SAME = ("strip_comments", "comments_only", "rename_identifiers", "shuffle_lines", "flatten_indentation",
                  "code_cells_only")
OF_PYTHON = ("strip_comments", "comments_only", "rename_identifiers", "rename_identifiers_randomly", "pseudocode",
             "shuffle_lines", "flatten_indentation")


def apply(text: str, *names: str, language: str | None = "python") -> str | Lost:
    return transforms.transformed(text, language, [transforms.Step(name) for name in names])


def dedent(text: str) -> str:
    return textwrap.dedent(text).removeprefix("\n")
