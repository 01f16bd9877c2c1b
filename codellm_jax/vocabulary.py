"""The vocabulary: text to token ids and back, from a SentencePiece model file.

A `Vocabulary` is a small frozen description of the file (where it lies, how many ids it has, which
id ends a document, the hash of its bytes), so that it can be a static argument of `jax.jit`, be
written beside a checkpoint, and be compared there. The SentencePiece processor itself is loaded at
the first use and kept.

`train_vocabulary` makes vocabularies that lose nothing: `decode(encode(text)) == text` for every
text that UTF-8 can hold. SentencePiece alone cannot promise that, because it writes a space as
U+2581 and reads U+2581 back as a space; the trained file is therefore rewritten to hold plain
spaces and to escape nothing (see `_with_plain_spaces`).
"""

import dataclasses
import difflib
import functools
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from codellm_jax import contents

SHIPPED = pathlib.Path(__file__).parent / "vocabularies"

# A run of spaces up to this length is one token; a longer one takes a token for each 64 spaces and
# one for the rest.
LONGEST_SPACES = 64
LONGEST_TABS = 16

PAD_PIECE = "<|pad|>"
END_OF_DOCUMENT_PIECE = "<|endofdocument|>"
UNKNOWN_PIECE = "<|unknown|>"

_SPACE_SYMBOL = "\u2581"  # SentencePiece's stand-in for a space
# SentencePiece packs positions within a segment into 16 bits.
_LONGEST_SEGMENT = 2000


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a vocabulary file holds.

    Attributes:
      path: the SentencePiece model file.
      pieces: number of ids in the file.
      size: number of rows of the model's embedding: `pieces` padded up to a multiple. Ids in
        [pieces, size) stand for nothing and are never encoded.
      pad_id: the id that fills unused positions.
      end_of_document_id: the id that ends every document. `encode` does not append it.
      content_hash: SHA-256 of the file's bytes, in hexadecimal.
    """

    path: str
    pieces: int
    size: int
    pad_id: int
    end_of_document_id: int
    content_hash: str

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-document id.

        The names of special pieces in `text` are plain text.

        Raises:
          UnicodeEncodeError: `text` holds lone surrogates, which UTF-8 cannot hold.
        """
        return _processor(self.path, self.content_hash).EncodeAsIds(text.encode("utf-8"))

    def encode_after(self, context: Sequence[int], text: str) -> list[int]:
        """Token ids of `text` where it stands behind `context`, as an answer stands behind its prompt.

        Many files (Llama's) put a space before a text. Behind another text that space would be one too many: there is
        none, and `decode_after` gives the text back. Files that also squeeze blanks (T5's) lose those between the two
        anyway; of them it is what `encode` gives, with the space that parts the two.
        """
        return self.encode(text) if self._begins_text(context) else self.encode_all([text], behind=True)[0]

    def encode_all(self, texts: Sequence[str], threads: int = 1, behind: bool = False) -> list[list[int]]:
        """What `encode` gives for each text, by several threads; `behind` others, what `encode_after` gives."""
        encoded = [text.encode("utf-8") for text in texts]
        inner, squeezes = _inner_processor(self.path, self.content_hash)
        processor = inner if behind and not squeezes else _processor(self.path, self.content_hash)
        return processor.encode(encoded, out_type=int, num_threads=threads)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids.

        In a file of ours padding and end of document are no text. An id in [pieces, size), as an
        untrained model may sample it, is read as the unknown piece; bytes that are no valid UTF-8
        become U+FFFD.

        Raises:
          ValueError: an id is not in [0, size).
        """
        return self._decoded(_processor(self.path, self.content_hash), ids)

    def decode_after(self, context: Sequence[int], ids: Iterable[int]) -> str:
        """The text that `ids` add behind `context`: what both give together beyond what the context gives.

        Unlike `decode` it keeps the space that a file puts before a text, for behind a context that space is meant. A
        character whose bytes begin in the context belongs to `ids`. Behind nothing, or an end of document, a text
        begins, and `decode` is right.

        Raises:
          ValueError: an id is not in [0, size).
        """
        if self._begins_text(context):
            return self.decode(ids)
        inner, _ = _inner_processor(self.path, self.content_hash)
        tail = list(context[-3:])  # the bytes that a character of UTF-8 may have before its last
        before, both = self._decoded(inner, tail), self._decoded(inner, [*tail, *ids])
        return both[len(os.path.commonprefix([before, both])) :]

    def _begins_text(self, context: Sequence[int]) -> bool:
        """Whether what stands behind `context` begins a text."""
        processor = _processor(self.path, self.content_hash)
        for token in reversed(context):
            if token == self.end_of_document_id:
                return True
            if token >= self.pieces or not processor.IsControl(int(token)):
                return False
        return True

    def _decoded(self, processor: Any, ids: Iterable[int]) -> str:
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < self.size:
                raise ValueError(
                    f"Token id {token} is none of vocabulary {self.path}, "
                    f"whose ids are 0 to {self.size - 1}."
                )
        return processor.DecodeIds(
            [token if token < self.pieces else processor.unk_id() for token in ids]
        )

    def byte_count(self, ids: Iterable[int]) -> int:
        """Bytes of UTF-8 that token ids in [0, pieces) stand for, those of a character that is cut included."""
        table = _bytes_of_ids(self.path, self.content_hash)
        return sum(len(table[token]) for token in ids)

    def bytes_of_ids(self) -> list[bytes]:
        """For each id in [0, pieces) the bytes of UTF-8 that it stands for; joined, they are the text.

        So a text can be cut between any two ids, and within a character. Padding and end of
        document are empty. A vocabulary that is not ours may put a space before the text.
        """
        return list(_bytes_of_ids(self.path, self.content_hash))


def shipped_vocabularies() -> list[str]:
    """Names of the vocabularies that come with the library, sorted."""
    return sorted(file.stem for file in SHIPPED.glob("*.model"))


def load_vocabulary(
    path: str = "python_8k",
    pad_id: int | None = None,
    end_of_document_id: int | None = None,
    multiple: int = 128,
) -> Vocabulary:
    """Reads a vocabulary's description.

    Args:
      path: the name of a shipped vocabulary (no slash, no suffix), or a SentencePiece model file,
        local or gs://.
      pad_id: the id that pads; by default the file's own.
      end_of_document_id: the id that ends a document; by default the file's own end of sentence.
      multiple: the embedding's size is padded up to a multiple of this, for even shards and full
        tiles.

    Raises:
      FileNotFoundError: there is no such vocabulary.
      ValueError: the file is no SentencePiece model, an id is missing, out of range or double, or
        `multiple` is below 1.
    """
    if multiple < 1:
        raise ValueError(f"vocabulary.multiple must be at least 1, found {multiple}.")
    file = _resolve(path)
    content = _read(file)
    processor = _parse(content, file)
    pieces = processor.GetPieceSize()
    pad_id = _special_id(pad_id, processor.pad_id(), "pad", pieces, file)
    end_of_document_id = _special_id(
        end_of_document_id, processor.eos_id(), "end_of_document", pieces, file
    )
    if pad_id == end_of_document_id:
        raise ValueError(
            f"vocabulary.pad_id and vocabulary.end_of_document_id are both {pad_id}; "
            f"give two ids of {file}."
        )
    return Vocabulary(
        path=file,
        pieces=pieces,
        size=-(-pieces // multiple) * multiple,
        pad_id=pad_id,
        end_of_document_id=end_of_document_id,
        content_hash=hashlib.sha256(content).hexdigest(),
    )


def train_vocabulary(documents: Iterable[str], size: int, output: str) -> Vocabulary:
    """Trains a lossless SentencePiece BPE vocabulary and writes it to a file.

    Ids: 0 pads, 1 ends a document, 2 is the unknown piece (never encoded); then the newline, runs
    of 1 to 16 tabs, runs of 2 to 64 spaces, the 256 bytes, and the learned pieces. A learned piece
    holds one space at most, at its head, and no other whitespace of ASCII; digits are encoded one
    by one, rare characters as their bytes of UTF-8. The same documents give the same file, byte for
    byte, under one version of SentencePiece.

    Args:
      documents: texts to learn from; held in memory by the trainer.
      size: number of ids, the special ones included; at least about 500.
      output: the file to write, local or gs://; its name ends in ".model".

    Raises:
      ValueError: `output` does not end in ".model", or the documents cannot fill a vocabulary of
        that size.
    """
    import sentencepiece

    if not output.endswith(".model"):
        raise ValueError(f"A vocabulary's file name must end in '.model', found {output!r}.")
    whitespace = [
        "\n",
        *("\t" * n for n in range(1, LONGEST_TABS + 1)),
        *(" " * n for n in range(2, LONGEST_SPACES + 1)),
    ]
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_segments(documents),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=size,
            byte_fallback=True,
            character_coverage=0.9995,
            required_chars=_SPACE_SYMBOL + "".join(map(chr, range(ord("!"), ord("~") + 1))),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            user_defined_symbols=whitespace,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece=PAD_PIECE,
            eos_piece=END_OF_DOCUMENT_PIECE,
            unk_piece=UNKNOWN_PIECE,
            max_sentence_length=4 * _LONGEST_SEGMENT,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"Cannot train a vocabulary of {size} ids on these documents; "
            f"give more text or another size (SentencePiece says: {reason})."
        ) from error
    _write(output, _with_plain_spaces(buffer.getvalue()))
    return load_vocabulary(output)


def _segments(documents: Iterable[str]) -> Iterator[str]:
    """Cuts documents where the encoder cuts them, lest pieces be learned that can never be used.

    Newlines, tabs and runs of spaces have pieces of their own; U+2581 would pass for a space.
    """
    for document in documents:
        for segment in re.split(rf"[\n\t\0{_SPACE_SYMBOL}]|  +", document):
            for start in range(0, len(segment), _LONGEST_SEGMENT):
                yield segment[start : start + _LONGEST_SEGMENT]


def _with_plain_spaces(content: bytes) -> bytes:
    """Rewrites a model to hold spaces as spaces and to escape nothing, so that U+2581 stays U+2581.

    The trainer refuses to learn BPE without escaping, but the encoder can do without: it compares
    pieces with the text as it is. As no piece then holds U+2581, that character falls back to its
    three bytes, like any rare one.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
    for piece in model.pieces:
        piece.piece = piece.piece.replace(_SPACE_SYMBOL, " ")
    model.normalizer_spec.escape_whitespaces = False
    return model.SerializeToString(deterministic=True)


def _special_id(given: int | None, own: int, name: str, pieces: int, file: str) -> int:
    setting = f"vocabulary.{name}_id"
    if given is None and own < 0:
        raise ValueError(
            f"Vocabulary {file} names no {name} id; set {setting} to one of its {pieces} ids."
        )
    chosen = own if given is None else given
    if not 0 <= chosen < pieces:
        raise ValueError(
            f"{setting} is {chosen}, but vocabulary {file} has the ids 0 to {pieces - 1}."
        )
    return chosen


def _resolve(path: str) -> str:
    if re.search(r"[./\\]", path):
        return os.path.expanduser(path)
    names = shipped_vocabularies()
    if path not in names:
        near = difflib.get_close_matches(path, names, n=1)
        raise FileNotFoundError(
            f"No vocabulary {path!r} is shipped, only {', '.join(names)}"
            f"{f'; did you mean {near[0]!r}?' if near else '.'} "
            f"For a file of your own give its path, such as './{path}.model'."
        )
    return str(SHIPPED / f"{path}.model")


def _parse(content: bytes, file: str) -> Any:
    """A SentencePieceProcessor of a model's bytes."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError as error:
        what = f"compressed by {by}" if (by := contents.compression(content)) else contents.kind(content)
        if not what and content.lstrip().startswith(b"{"):
            what = "JSON, such as Hugging Face's tokenizer.json"
        raise ValueError(
            f"{file} ({len(content)} bytes) is not a SentencePiece model file{f' but {what}' if what else ''}. "
            f"{_wanted()}"
        ) from error
    return processor


@functools.lru_cache(maxsize=8)
def _processor(file: str, content_hash: str) -> Any:
    """The SentencePieceProcessor of a file that still has the given hash."""
    content = _read(file)
    found = hashlib.sha256(content).hexdigest()
    if found != content_hash:
        raise ValueError(
            f"Vocabulary {file} changed since it was loaded: "
            f"expected the hash {content_hash[:12]}, found {found[:12]}; load it anew."
        )
    return _parse(content, file)


@functools.lru_cache(maxsize=8)
def _inner_processor(file: str, content_hash: str) -> tuple[Any, bool]:
    """A processor that neither adds nor takes away blanks at a text's beginning; and whether the file's own squeezes
    blanks, so that this one only decodes as it should.
    """
    from sentencepiece import sentencepiece_model_pb2

    own = _processor(file, content_hash).serialized_model_proto()
    model = sentencepiece_model_pb2.ModelProto.FromString(own)  # type: ignore[attr-defined]
    squeezes = model.normalizer_spec.remove_extra_whitespaces
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    return _parse(model.SerializeToString(deterministic=True), file), squeezes


@functools.lru_cache(maxsize=8)
def _bytes_of_ids(file: str, content_hash: str) -> tuple[bytes, ...]:
    processor = _processor(file, content_hash)

    def of(token: int) -> bytes:
        if processor.IsControl(token):
            return b""
        if processor.IsUnknown(token):
            return processor.DecodeIds([token]).encode()
        piece = processor.IdToPiece(token)
        if processor.IsByte(token):  # <0x0A>
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_SYMBOL, " ").encode()

    return tuple(of(token) for token in range(processor.GetPieceSize()))


def _read(file: str) -> bytes:
    try:
        contents.require_file(file, "vocabulary file")
        return contents.content(file)
    except (OSError, contents.UnreadableFile) as error:
        raise type(error)(f"{error} {_wanted()}") from None


def _wanted() -> str:
    return f"Give a SentencePiece model file, or a shipped name: {', '.join(shipped_vocabularies())}."


def _write(file: str, content: bytes) -> None:
    _path(file).write_bytes(content)


def _path(file: str) -> Any:
    """A path to read and write; etils is needed for remote files alone."""
    if "://" not in file:
        return pathlib.Path(file)
    from etils import epath

    return epath.Path(file)
