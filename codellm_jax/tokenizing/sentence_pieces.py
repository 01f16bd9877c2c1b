"""SentencePiece model files."""

import functools
from collections.abc import Sequence
from typing import Any

from codellm_jax import contents
from codellm_jax.tokenizing.backend import encoded_with_special

SPACE_SYMBOL = "\u2581"  # SentencePiece's symbol for a space


class SentencePieces:
    """A `Backend` for a SentencePiece model file."""

    begin_ids: tuple[int, ...] = ()  # such files cannot specify a begin token

    def __init__(self, content: bytes, file: str, special: Sequence[str] = ()) -> None:
        self._file = file
        self._own = _parse(content, file)
        named = {name: token for name in special if (token := self.id_of(name)) is not None}
        self.named_special = tuple(name for name, token in named.items()
                                   if not self._own.IsControl(token) and not self._own.IsUnknown(token))
        if self.named_special:
            model = self.model()  # a model in which texts do not produce these pieces
            for name in self.named_special:
                model.pieces[named[name]].type = model.pieces[named[name]].CONTROL
            self._own = _parse(model.SerializeToString(deterministic=True), file)
        self.pieces: int = self._own.GetPieceSize()
        self.end_id = _or_none(self._own.eos_id())
        self.pad_id = _or_none(self._own.pad_id())
        self.special_tokens: dict[str, int] = {
            self._own.IdToPiece(token): token for token in range(self.pieces) if self._own.IsControl(token)}

    def id_of(self, token: str) -> int | None:
        found = self._own.PieceToId(token)
        return found if self._own.IdToPiece(found) == token else None

    def name_of(self, token: int) -> str:
        return self._own.IdToPiece(token)

    def is_special(self, token: int) -> bool:
        return self._own.IsControl(token)

    def encode(self, texts: Sequence[str], threads: int = 1, behind: bool = False) -> list[list[int]]:
        encoded = [text.encode("utf-8") for text in texts]
        processor = self._own
        if behind:
            inner, squeezes = self._inner
            processor = processor if squeezes else inner
        if len(encoded) == 1:  # a batch starts threads
            return [processor.EncodeAsIds(encoded[0])]
        return processor.encode(encoded, out_type=int, num_threads=threads)

    def encode_with_special(self, text: str) -> list[int]:
        return encoded_with_special(self, text)

    def decode(self, ids: Sequence[int], begins: bool = True) -> str:
        processor = self._own if begins else self._inner[0]
        return processor.DecodeIds([token if token < self.pieces else processor.unk_id() for token in ids])

    def bytes_of_ids(self) -> tuple[bytes, ...]:
        return tuple(map(self._bytes_of, range(self.pieces)))

    def _bytes_of(self, token: int) -> bytes:
        if self._own.IsControl(token):
            return b""
        if self._own.IsUnknown(token):
            return self._own.DecodeIds([token]).encode()
        piece = self._own.IdToPiece(token)
        if self._own.IsByte(token):  # <0x0A>
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_SYMBOL, " ").encode()

    @functools.cached_property
    def _inner(self) -> tuple[Any, bool]:
        """A processor that neither adds nor removes blanks at the start of a text; and whether the file's own processor
        collapses blanks, in which case this one is only used to decode.
        """
        model = self.model()
        squeezes = model.normalizer_spec.remove_extra_whitespaces
        model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
        return _parse(model.SerializeToString(deterministic=True), self._file), squeezes

    def model(self) -> Any:
        """The file's content as a ModelProto."""
        from sentencepiece import sentencepiece_model_pb2

        content = self._own.serialized_model_proto()
        return sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]


def _or_none(token: int) -> int | None:
    return token if token >= 0 else None


def _parse(content: bytes, file: str) -> Any:
    """A SentencePieceProcessor from a model's bytes."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError as error:
        what = f"compressed by {by}" if (by := contents.compression(content)) else contents.kind(content)
        raise ValueError(f"{file} ({len(content)} bytes) is not a SentencePiece model file"
                         f"{f' but {what}' if what else ''}.") from error
    return processor
