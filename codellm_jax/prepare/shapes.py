"""What documents are like, counted: their lengths, how Chinese and how repetitive they are, and their licences."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from codellm_jax.prepare.quality import repeated_share
from codellm_jax.prepare.web import share_of_chinese

SHARES = 10  # bins of a share, each as wide; 1 falls into the last
LICENCES = 1000  # of a part, that are counted by name


class Shape:
    """Counts documents as they come.

    Facts are {"documents", "bytes", "tokens" (0 without a vocabulary), "characters": {exponent: documents of 2^exponent
    characters and more, under twice as many}, "chinese" and "repeated": {bin: documents}, "licences", "languages":
    {name or "": documents}}.
    """

    def __init__(self) -> None:
        self._documents = self._bytes = self._tokens = 0
        self._counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("characters", "chinese", "repeated", "licences", "languages")}

    def add(self, document: Mapping[str, Any], size: int) -> None:
        """Counts a document of so many bytes; its tokens stand in it."""
        self._documents += 1
        self._bytes += size
        self._tokens += document["tokens"] or 0
        text = document["text"]
        self._counts["characters"][str(len(text).bit_length() - 1)] += 1
        self._counts["chinese"][str(min(int(share_of_chinese(text) * SHARES), SHARES - 1))] += 1
        self._counts["repeated"][str(min(int(repeated_share(text) * SHARES), SHARES - 1))] += 1
        for name, value in (("licences", document["license"]), ("languages", document["language"])):
            of = self._counts[name]
            value = value or ""
            of[value if value in of or len(of) < LICENCES else "others"] += 1

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {"documents": self._documents, "bytes": self._bytes, "tokens": self._tokens,
                **{name: dict(sorted(found.items())) for name, found in self._counts.items()}}


def joined(shapes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of several shapes as those of one."""
    whole: dict[str, Any] = {}
    for shape in shapes:
        for name, value in shape.items():
            if isinstance(value, dict):
                whole[name] = Counter(whole.get(name, {})) + Counter(value)
            else:
                whole[name] = whole.get(name, 0) + value
    return whole
