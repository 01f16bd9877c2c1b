"""What every kind of tokenizer does, and which kind a file is: its content says so, never its name."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

TEXT_FORMS = ("plain", "pangu")


class Backend(Protocol):
    """A tokenizer as read from its file. Ids that it gives are in [0, pieces); special tokens in texts are text."""

    @property
    def pieces(self) -> int:
        """Number of ids, gaps included."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The text of each token that stands for no text, and its id."""
        ...

    @property
    def named_special(self) -> tuple[str, ...]:
        """The names of those among them that the file itself takes for text."""
        ...

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """What the file puts before each text, where it says so."""
        ...

    @property
    def end_id(self) -> int | None:
        """The id that ends a text, where the file names one; `pad_id` likewise."""
        ...

    @property
    def pad_id(self) -> int | None: ...

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None where there is no such token."""
        ...

    def name_of(self, token: int) -> str:
        """The name of the token of an id in [0, pieces)."""
        ...

    def is_special(self, token: int) -> bool:
        """Whether an id in [0, pieces) stands for no text."""
        ...

    def encode(self, texts: Sequence[str], threads: int = 1, behind: bool = False) -> list[list[int]]:
        """The ids of each text; `behind` others without a space that the file puts before a text.

        Raises:
          UnicodeEncodeError: a text holds lone surrogates.
        """
        ...

    def encode_with_special(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens are these tokens."""
        ...

    def decode(self, ids: Sequence[int], begins: bool = True) -> str:
        """The text of ids, of which those from `pieces` on are unknown; `begins` drops a space put before a text."""
        ...

    def bytes_of_ids(self) -> tuple[bytes, ...]:
        """For each id in [0, pieces) the bytes of UTF-8 that it stands for."""
        ...


@functools.lru_cache(maxsize=4)
def read_backend(content: bytes, file: str, text_form: str = "plain", special: Sequence[str] = ()) -> Backend:
    """The tokenizer in a file's content.

    Args:
      content: all bytes of the file.
      file: its address, for messages.
      text_form: one of TEXT_FORMS.
      special: names of tokens that are special beside those that the file says are.

    Raises:
      ValueError: in one line; the file is no tokenizer that is read here, or jieba is missing.
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
    """What `Backend.encode_with_special` gives where the library knows no such thing: between the names it is text."""
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
    """Whether a file's content is a JSON object, as a tokenizer.json is."""
    return re.match(rb'(\xef\xbb\xbf)?\s*\{\s*["}]', content) is not None
