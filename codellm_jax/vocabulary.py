"""The vocabulary: text to token ids and back, with a SentencePiece file or a tokenizer.json.

A `Vocabulary` is a small frozen description of the file (its path, number of ids, end-of-document id and hash), so that
it can be a static argument of `jax.jit`, be written beside a checkpoint, and be compared. The tokenizer itself is
loaded at the first use and kept; `tokenizing` has a module for each kind of file.
"""

import dataclasses
import difflib
import functools
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from codellm_jax import contents
from codellm_jax.tokenizing import files, training
from codellm_jax.tokenizing.backend import TEXT_FORMS, Backend, read_backend
from codellm_jax.tokenizing.published import published
from codellm_jax.tokenizing.sentence_pieces import SentencePieces

if TYPE_CHECKING:
    import numpy as np  # describing a vocabulary does not need it

SHIPPED = pathlib.Path(__file__).parent / "vocabularies"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The description of a vocabulary.

    Attributes:
      path: the tokenizer's file, or its folder.
      pieces: number of ids in the file.
      size: number of rows of the model's embedding. Ids in [pieces, size) have no text and are never produced by
        encoding.
      pad_id: the id that fills unused positions; may be the one that ends a document.
      end_of_document_id: the id that ends every document. `encode` does not append it.
      content_hash: SHA-256, in hexadecimal, of the file's bytes and of everything else that changes ids.
      begin_ids: the ids that each document and each prompt begins with; usually none or one. `encode`
        does not add them.
      special_tokens: the name of each token that has no text, and its id.
      chat_template: Jinja that turns messages into a prompt; None if none was published.
      template_tokens: variables of the template, such as ("bos_token", "<s>").
      text_form: "plain", or "pangu" for texts segmented by jieba.
    """

    path: str
    pieces: int
    size: int
    pad_id: int
    end_of_document_id: int
    content_hash: str
    begin_ids: tuple[int, ...] = ()
    special_tokens: tuple[tuple[str, int], ...] = ()
    chat_template: str | None = None
    template_tokens: tuple[tuple[str, str], ...] = ()
    text_form: str = "plain"

    @property
    def file(self) -> str:
        """The tokenizer's file."""
        return files.tokenizer_file(self.path)

    @property
    def is_sentence_pieces(self) -> bool:
        """Whether a SentencePiece processor of `file` gives exactly the same ids."""
        return isinstance(self._backend, SentencePieces) and not self._backend.named_special

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without those that begin or end a document.

        The names of special tokens in `text` are plain text.

        Raises:
          UnicodeEncodeError: `text` holds lone surrogates, which UTF-8 cannot hold.
        """
        return self.encode_all([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt: `begin_ids`, then those of `text`."""
        return [*self.begin_ids, *self.encode(text)]

    def encode_after(self, context: Sequence[int], text: str) -> list[int]:
        """Token ids of `text` where it follows `context`, as an answer follows its prompt.

        Many tokenizers (Llama's) put a space before a text. After another text that space would be wrong: it is left
        out, and `decode_after` restores the text. Tokenizers that also merge blanks (T5's) lose those between the two
        anyway; for them the result is that of `encode`, with the separating space.
        """
        return self.encode(text) if self._begins_text(context) else self.encode_all([text], behind=True)[0]

    def encode_all(self, texts: Sequence[str], threads: int = 1, behind: bool = False) -> list[list[int]]:
        """`encode` of each text, with several threads; with `behind`, as `encode_after` some context."""
        return self._backend.encode(texts, threads, behind)

    def encode_with_special(self, text: str) -> list[int]:
        """Token ids of a text in which the names of special tokens become these tokens, as in a chat template."""
        return self._backend.encode_with_special(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids.

        Special tokens, including padding and end of document, have no text. An id in [pieces, size), which an untrained
        model may sample, becomes the unknown piece, in a tokenizer.json U+FFFD; invalid UTF-8 becomes U+FFFD.

        Raises:
          ValueError: an id is not in [0, size).
        """
        return self._decoded(ids, begins=True)

    def decode_after(self, context: Sequence[int], ids: Iterable[int]) -> str:
        """The text that `ids` add after `context`: the text of both without that of the context.

        Unlike `decode`, it keeps the space that a tokenizer puts before a text, because after a context that space is
        part of the text. A character whose bytes begin in the context belongs to `ids`. After nothing, or an end
        of document, a text begins, and `decode` is right.

        Raises:
          ValueError: an id is not in [0, size).
        """
        if self._begins_text(context):
            return self.decode(ids)
        tail = list(context[-3:])  # the most bytes that a UTF-8 character has before its last
        before, both = self._decoded(tail, begins=False), self._decoded([*tail, *ids], begins=False)
        return both[len(os.path.commonprefix([before, both])) :]

    def _begins_text(self, context: Sequence[int]) -> bool:
        """Whether the text after `context` begins a document."""
        for token in reversed(context):
            if token == self.end_of_document_id or token in self.begin_ids:
                return True
            if token >= self.pieces or not self._backend.is_special(int(token)):
                return False
        return True

    def _decoded(self, ids: Iterable[int], begins: bool) -> str:
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < self.size:
                raise ValueError(
                    f"Token id {token} is not in vocabulary {self.path}, "
                    f"whose ids are 0 to {self.size - 1}."
                )
        return self._backend.decode(ids, begins)

    def byte_count(self, ids: Iterable[int]) -> int:
        """UTF-8 bytes of token ids in [0, pieces), including those of a cut character."""
        table = _bytes_of_ids(self)
        return sum(len(table[token]) for token in ids)

    def bytes_behind(self, before: "np.ndarray", ids: "np.ndarray") -> "np.ndarray":
        """UTF-8 bytes that each token adds to the text after the token before it: int64, shaped like the two int
        arrays.

        The bytes of a text are those of `decode`, so a space that a tokenizer puts before a text does not count. The
        bytes of its tokens sum to them even where a token cuts a character; special tokens, including the end of
        document, have 0. Text that a tokenizer drops (T5's line ends) has no bytes; only the remaining text counts.
        """
        import numpy as np

        counts, dropped = _counts_of_ids(self)
        begins = np.isin(before, (self.end_of_document_id, *self.begin_ids))
        return counts[ids] - begins * dropped[ids]

    def bytes_of_ids(self) -> list[bytes]:
        """For each id in [0, pieces) its UTF-8 bytes; joined, they are the text.

        A text can thus be cut between any two ids, even within a character. Special tokens are empty. Vocabularies not
        trained here may put a space before the text.
        """
        return list(_bytes_of_ids(self))

    @property
    def _backend(self) -> Backend:
        return _backend(self.path, self.content_hash, self.text_form, tuple(name for name, _ in self.special_tokens))


def shipped_vocabularies() -> list[str]:
    """Names of the shipped vocabularies, sorted."""
    return sorted(file.stem for file in SHIPPED.glob("*.model"))


def load_vocabulary(
    path: str = "python_8k",
    pad_id: int | None = None,
    end_of_document_id: int | None = None,
    multiple: int = 128,
    size: int | None = None,
    begin_id: int | None = None,
    text_form: str | None = None,
) -> Vocabulary:
    """Reads a vocabulary's description.

    Values that are None come from the files beside the tokenizer (tokenizer_config.json and others, for a folder or a
    file named tokenizer.json), else from its own file.

    Args:
      path: the name of a shipped vocabulary (no slash, no suffix); a SentencePiece model file or a tokenizer.json,
        local or gs://; a folder that holds either; or hf://ORG/NAME[@REVISION].
      pad_id: the padding id; if nothing names one, the id that ends a document.
      end_of_document_id: the id that ends a document.
      multiple: the embedding's size is padded up to a multiple of this, for even shards and full tiles.
      size: rows of the embedding, instead of the size from `multiple`.
      begin_id: the id that documents and prompts begin with; -1 for none.
      text_form: how texts are transformed before tokenization: "plain" (unchanged) or "pangu".

    Raises:
      FileNotFoundError: the vocabulary does not exist.
      ValueError: in one line; the file is not a supported tokenizer, an id is missing or out of range, or
        `multiple` or `size` is too small.
    """
    if multiple < 1:
        raise ValueError(f"vocabulary.multiple must be at least 1, found {multiple}.")
    if text_form not in (None, *TEXT_FORMS):
        raise ValueError(f"vocabulary.text_form must be one of {', '.join(TEXT_FORMS)}, found {text_form!r}.")
    path = _resolve(path)
    content, file = _read(path)
    try:
        backend = read_backend(content, file)
        beside = published(backend, files.configurations(path), files.chat_template_file(path), file)
    except ValueError as error:
        raise ValueError(f"{error} {_wanted()}") from error
    text_form = beside.text_form if text_form is None else text_form
    end_of_document_id = _id("end_of_document", end_of_document_id, beside.end_id, backend.pieces, file)
    begin_ids = beside.begin_ids
    if begin_id is not None:
        begin_ids = () if begin_id == -1 else (_id("begin", begin_id, None, backend.pieces, file),)
    padded = -(-backend.pieces // multiple) * multiple
    if size is not None and size < backend.pieces:
        raise ValueError(f"vocabulary.size is {size}, fewer rows than vocabulary {file} has ids, {backend.pieces}.")
    special = {name: backend.id_of(name) for name in beside.special}
    return Vocabulary(
        path=path,
        pieces=backend.pieces,
        size=padded if size is None else size,
        pad_id=_id("pad", pad_id, end_of_document_id if beside.pad_id is None else beside.pad_id, backend.pieces, file),
        end_of_document_id=end_of_document_id,
        content_hash=files.content_hash(content, beside.special, _version(text_form)),
        begin_ids=begin_ids,
        special_tokens=tuple((name, token) for name, token in (dict(backend.special_tokens) | special).items()
                             if token is not None),
        chat_template=beside.chat_template,
        template_tokens=beside.template_tokens,
        text_form=text_form,
    )


def train_vocabulary(documents: Iterable[str], size: int, output: str) -> Vocabulary:
    """Trains a lossless vocabulary and writes it to a file; see `tokenizing.training.train`."""
    training.train(documents, size, output)
    return load_vocabulary(output)


def _id(name: str, given: int | None, own: int | None, pieces: int, file: str) -> int:
    setting = f"vocabulary.{name}_id"
    chosen = own if given is None else given
    if chosen is None:
        raise ValueError(
            f"Vocabulary {file} names no {name} id; set {setting} to one of its {pieces} ids."
        )
    if not 0 <= chosen < pieces:
        raise ValueError(
            f"{setting} is {chosen}, but vocabulary {file} has the ids 0 to {pieces - 1}."
        )
    return chosen


def _resolve(path: str) -> str:
    if re.search(r"[./\\]", path):
        return files.resolve(path)
    names = shipped_vocabularies()
    if path not in names:
        near = difflib.get_close_matches(path, names, n=1)
        raise FileNotFoundError(
            f"No vocabulary {path!r} is shipped, only {', '.join(names)}"
            f"{f'; did you mean {near[0]!r}?' if near else '.'} "
            f"For a file of your own give its path, such as './{path}.model'."
        )
    return str(SHIPPED / f"{path}.model")


@functools.lru_cache(maxsize=8)
def _backend(path: str, content_hash: str, text_form: str, special: tuple[str, ...]) -> Backend:
    """The tokenizer of a file, which must still have the given hash."""
    content, file = _read(path)
    backend = read_backend(content, file, text_form, special)
    found = files.content_hash(content, backend.named_special, _version(text_form))
    if found != content_hash:
        raise ValueError(
            f"Vocabulary {file} changed since it was loaded: "
            f"expected the hash {content_hash[:12]}, found {found[:12]}; load it again."
        )
    return backend


@functools.lru_cache(maxsize=8)
def _bytes_of_ids(vocabulary: Vocabulary) -> tuple[bytes, ...]:
    return vocabulary._backend.bytes_of_ids()


@functools.lru_cache(maxsize=8)
def _counts_of_ids(vocabulary: Vocabulary) -> "tuple[np.ndarray, np.ndarray]":
    """For each id in [0, size) its bytes, and how many of them are not text at the start of a text; both int64."""
    import numpy as np

    table, backend = _bytes_of_ids(vocabulary), vocabulary._backend
    counts, dropped = np.zeros((2, vocabulary.size), np.int64)
    counts[: len(table)] = list(map(len, table))
    for token, piece in enumerate(table):
        if piece.startswith(b" "):
            within, first = (len(backend.decode([token], begins).encode()) for begins in (False, True))
            dropped[token] = within - first
    for token in (vocabulary.end_of_document_id, *vocabulary.begin_ids):  # which a tokenizer may treat as text
        counts[token] = dropped[token] = 0
    return counts, dropped


def _version(text_form: str) -> str:
    """A text form and the version of the library that implements it."""
    if text_form == "plain":
        return text_form
    from codellm_jax.tokenizing.pangu import jieba

    return f"{text_form}, jieba {jieba().__version__}"


def _read(path: str) -> tuple[bytes, str]:
    """The content of the tokenizer's file, and its path."""
    try:
        file = files.tokenizer_file(path)
        return files.read(file), file
    except (OSError, contents.UnreadableFile) as error:
        raise type(error)(f"{error} {_wanted()}") from None


def _wanted() -> str:
    return ("Give a SentencePiece model file, a tokenizer.json, a folder or hf:// name that holds either, or a shipped "
            f"name: {', '.join(shipped_vocabularies())}.")
