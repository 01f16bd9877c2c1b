"""PanGu-alpha's own form of texts: jieba's words joined by spaces, a space written as U+2582, a line end as U+2583."""

from collections.abc import Mapping, Sequence
from typing import Any

from codellm_jax.tokenizing.backend import Backend, encoded_with_special

_WRITTEN = str.maketrans(" \n", "\u2582\u2583")
_READ = str.maketrans("\u2582\u2583", " \n", " ")


class PanguText:
    """A `Backend` that converts texts to PanGu's form internally; the spaces between words do not belong to the text.
    """

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self._jieba = jieba()
        self.pieces, self.begin_ids = inner.pieces, inner.begin_ids
        self.special_tokens: Mapping[str, int] = inner.special_tokens
        self.named_special = inner.named_special
        self.end_id, self.pad_id = inner.end_id, inner.pad_id
        self.id_of, self.name_of, self.is_special = inner.id_of, inner.name_of, inner.is_special

    def encode(self, texts: Sequence[str], threads: int = 1, behind: bool = False) -> list[list[int]]:
        # Words are also separated by spaces after another text, so the space before a text is correct there.
        for text in texts:
            text.encode()
        return self._inner.encode([self._written(text) for text in texts], threads)

    def encode_with_special(self, text: str) -> list[int]:
        return encoded_with_special(self, text)

    def decode(self, ids: Sequence[int], begins: bool = True) -> str:
        return self._inner.decode(ids, begins).translate(_READ)

    def bytes_of_ids(self) -> tuple[bytes, ...]:
        return tuple(map(_bytes_read, self._inner.bytes_of_ids()))

    def _written(self, text: str) -> str:
        return " ".join(word.translate(_WRITTEN) for word in self._jieba.cut(text))


def _bytes_read(piece: bytes) -> bytes:
    try:
        return piece.decode().translate(_READ).encode()
    except UnicodeDecodeError:  # a byte of a rare character
        return piece


def jieba() -> Any:
    """The jieba library; raises ValueError if it is not installed."""
    try:
        import jieba as library
    except ModuleNotFoundError:
        raise ValueError("vocabulary.text_form = 'pangu' needs jieba: pip install '.[pangu]'.") from None
    library.setLogLevel("WARNING")
    return library
