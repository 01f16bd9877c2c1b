"""Trains lossless vocabularies: `decode(encode(text)) == text` for every text that UTF-8 can represent.

SentencePiece alone cannot guarantee that, because it writes a space as U+2581 and reads U+2581 back as a space; the
trained file is therefore rewritten to contain plain spaces and no escaping (see `_with_plain_spaces`).
"""

import io
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from codellm_jax.tokenizing.sentence_pieces import SPACE_SYMBOL

# A run of spaces up to this length is one token; a longer one takes a token for each 64 spaces and
# one for the rest.
LONGEST_SPACES = 64
LONGEST_TABS = 16

PAD_PIECE = "<|pad|>"
END_OF_DOCUMENT_PIECE = "<|endofdocument|>"
UNKNOWN_PIECE = "<|unknown|>"

# SentencePiece packs positions within a segment into 16 bits.
_LONGEST_SEGMENT = 2000


def train(documents: Iterable[str], size: int, output: str) -> None:
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
            required_chars=SPACE_SYMBOL + "".join(map(chr, range(ord("!"), ord("~") + 1))),
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
            f"add text or choose another size (SentencePiece says: {reason})."
        ) from error
    _write(output, _with_plain_spaces(buffer.getvalue()))


def _segments(documents: Iterable[str]) -> Iterator[str]:
    """Cuts documents where the encoder cuts them, so that no unusable pieces are learned.

    Newlines, tabs and runs of spaces have their own pieces; U+2581 would be mistaken for a space.
    """
    for document in documents:
        for segment in re.split(rf"[\n\t\0{SPACE_SYMBOL}]|  +", document):
            for start in range(0, len(segment), _LONGEST_SEGMENT):
                yield segment[start : start + _LONGEST_SEGMENT]


def _with_plain_spaces(content: bytes) -> bytes:
    """Rewrites a model to contain plain spaces without escaping, so that U+2581 stays U+2581.

    The trainer cannot learn BPE without escaping, but the encoder does not need it: it compares pieces with the text as
    it is. Since no piece then contains U+2581, that character falls back to its three bytes, like any rare one.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
    for piece in model.pieces:
        piece.piece = piece.piece.replace(SPACE_SYMBOL, " ")
    model.normalizer_spec.escape_whitespaces = False
    return model.SerializeToString(deterministic=True)


def _write(file: str, content: bytes) -> None:
    _path(file).write_bytes(content)


def _path(file: str) -> Any:
    """A path to read and write; only remote files need etils."""
    if "://" not in file:
        return pathlib.Path(file)
    from etils import epath

    return epath.Path(file)
