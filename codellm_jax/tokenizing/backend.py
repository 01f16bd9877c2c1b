"""The interface of all tokenizers, and the detection of a file's kind from its content, not from its name."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

TEXT_FORMS = ("plain", "pangu")


class Backend(Protocol):
    """A tokenizer read from a file. Its ids are in [0, pieces); special tokens in texts are plain text."""

    @property
    def pieces(self) -> int:
        """The number of ids, including gaps."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The name of each token that does not represent text, and its id."""
        ...

    @property
    def named_special(self) -> tuple[str, ...]:
        """The names of those special tokens that the file itself treats as text."""
        ...

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The ids that the file puts before each text, if any."""
        ...

    @property
    def end_id(self) -> int | None:
        """The id that ends a text, if the file names one; `pad_id` likewise."""
        ...

    @property
    def pad_id(self) -> int | None: ...

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None if there is no such token."""
        ...

    def name_of(self, token: int) -> str:
        """The name of the token with an id in [0, pieces)."""
        ...

    def is_special(self, token: int) -> bool:
        """Whether an id in [0, pieces) does not represent text."""
        ...

    def encode(self, texts: Sequence[str], threads: int = 1, behind: bool = False) -> list[list[int]]:
        """The ids of each text; with `behind`, without the space that the file puts before a text.

        Raises:
          UnicodeEncodeError: a text holds lone surrogates.
        """
        ...

    def encode_with_special(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens are parsed as these tokens."""
        ...

    def decode(self, ids: Sequence[int], begins: bool = True) -> str:
        """The text of ids; ids from `pieces` on are unknown. `begins` drops a space put before a text."""
        ...

    def bytes_of_ids(self) -> tuple[bytes, ...]:
        """For each id in [0, pieces), the UTF-8 bytes that it represents."""
        ...


@functools.lru_cache(maxsize=4)
def read_backend(content: bytes, file: str, text_form: str = "plain", special: Sequence[str] = ()) -> Backend:
    """The tokenizer in a file's content.

    Args:
      content: all bytes of the file.
      file: its address, for messages.
      text_form: one of TEXT_FORMS.
      special: names of special tokens in addition to those in the file.

    Raises:
      ValueError: with a one-line message; the file is not a supported tokenizer, or jieba is missing.
    """
    backend: Backend
    if is_json(content):
        from codellm_jax.tokenizing.fast import FastTokenizer

        backend = FastTokenizer(content, file, special)
    else:
        from codellm_jax.tokenizing.sentence_pieces import SentencePieces

        backend = SentencePieces(content, file, special)
    if text_form == "plain":
        return backend
    from codellm_jax.tokenizing.pangu import PanguText

    return PanguText(backend)


def encoded_with_special(backend: Backend, text: str) -> list[int]:
    """A fallback for `Backend.encode_with_special` if the library has none: everything between the names is text."""
    names = sorted(backend.special_tokens, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    ids: list[int] = []
    for number, part in enumerate(parts):
        if number % 2:
            ids.append(backend.special_tokens[part])
        elif part:
            ids += backend.encode([part], behind=number > 0)[0]
    return ids


def is_json(content: bytes) -> bool:
    """Whether a file's content is a JSON object, as in a tokenizer.json."""
    return re.match(rb'(\xef\xbb\xbf)?\s*\{\s*["}]', content) is not None
