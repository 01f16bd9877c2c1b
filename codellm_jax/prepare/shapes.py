"""Statistics of documents: lengths, shares of Chinese and of repeated text, licences and languages."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from codellm_jax.prepare.quality import repeated_share
from codellm_jax.prepare.web import share_of_chinese

SHARES = 10  # equal bins of a share; 1 falls into the last
LICENCES = 1000  # counted by name in a part


class Shape:
    """Accumulates the statistics of documents.

    Facts are {"documents", "bytes", "tokens" (0 without a vocabulary), "characters": {exponent: documents of at least
    2^exponent and under 2^(exponent + 1) characters}, "chinese" and "repeated": {bin: documents}, "licences",
    "languages": {name or "": documents}}.
    """

    def __init__(self) -> None:
        self._documents = self._bytes = self._tokens = 0
        self._counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("characters", "chinese", "repeated", "licences", "languages")}

    def add(self, document: Mapping[str, Any], size: int) -> None:
        """Counts a document of `size` bytes; its number of tokens is in `document`."""
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
        """The facts as JSON."""
        return {"documents": self._documents, "bytes": self._bytes, "tokens": self._tokens,
                **{name: dict(sorted(found.items())) for name, found in self._counts.items()}}


def joined(shapes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the facts of several shapes."""
    whole: dict[str, Any] = {}
    for shape in shapes:
        for name, value in shape.items():
            if isinstance(value, dict):
                whole[name] = Counter(whole.get(name, {})) + Counter(value)
            else:
                whole[name] = whole.get(name, 0) + value
    return whole
