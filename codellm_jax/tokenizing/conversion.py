"""Tokenizers for Hugging Face's libraries: converts our SentencePiece files to tokenizer.json, and copies others.

SentencePiece merges the neighbours whose piece has the highest score, leftmost first; `tokenizers` merges by the order
of a list of pairs. The list therefore contains, by falling score, every pair that makes a piece. Among pairs that make
the same piece, such as "ab" + "a" and "a" + "ba", the one that would be leftmost if both overlap comes first.

Files that cannot be converted exactly are copied unchanged: Unigram, whose scores are summed in another precision;
normalization by a table of characters; user-defined symbols together with escaped spaces.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from codellm_jax.tokenizing import files
from codellm_jax.tokenizing.backend import is_json, read_backend
from codellm_jax.tokenizing.published import published
from codellm_jax.tokenizing.sentence_pieces import SPACE_SYMBOL, SentencePieces

COPIED = (*files.CONFIGURATIONS[:2], files.CHAT_TEMPLATE, "added_tokens.json")


class Described(Protocol):
    """The part of `vocabulary.Vocabulary` that is needed here."""

    @property
    def path(self) -> str: ...

    @property
    def file(self) -> str: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def end_of_document_id(self) -> int: ...

    @property
    def begin_ids(self) -> tuple[int, ...]: ...

    @property
    def special_tokens(self) -> tuple[tuple[str, int], ...]: ...

    @property
    def chat_template(self) -> str | None: ...

    @property
    def text_form(self) -> str: ...


class Inexact(ValueError):
    """No tokenizer.json represents this tokenizer exactly; the message says why."""


def write_tokenizer(vocabulary: Described, folder: str) -> str | None:
    """Writes a vocabulary's files to an existing folder, local or gs://.

    A tokenizer.json and its companion files are copied. A SentencePiece file becomes a tokenizer.json if that gives the
    same ids for any text, and is otherwise written as tokenizer.model.

    Returns:
      In the last case, a line that says so.
    """
    content = files.read(vocabulary.file)
    told = None
    if is_json(content):
        files.write(folder, files.TOKENIZER, content)
        beside = files.folder_of(vocabulary.path)
        for name in COPIED if beside else ():
            if (copied := files.read_if_there(beside, name)) is not None:
                files.write(folder, name, copied)
    else:
        try:
            files.write(folder, files.TOKENIZER, tokenizer_json(vocabulary).encode())
        except Inexact as error:
            files.write(folder, files.SENTENCE_PIECES[0], content)
            told = (f"{vocabulary.file}: {error}, so no tokenizer.json would give the same ids; the SentencePiece file "
                    f"is in {folder} as {files.SENTENCE_PIECES[0]}.")
    # A copied configuration may contain less than the run's gin files.
    if _ids_in(folder) != (vocabulary.begin_ids, vocabulary.end_of_document_id, vocabulary.pad_id):
        config = files.configurations(folder).get("tokenizer_config.json", {}) | tokenizer_config(vocabulary)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        files.write(folder, "tokenizer_config.json", text.encode())
    return told


def _ids_in(folder: str) -> tuple[tuple[int, ...], int | None, int | None]:
    file = files.tokenizer_file(folder)
    found = files.configurations(folder)
    if "tokenizer_config.json" not in found:
        return (), None, None
    of_files = published(read_backend(files.read(file), file), found, None, file)
    return of_files.begin_ids, of_files.end_id, of_files.pad_id


def tokenizer_config(vocabulary: Described) -> dict[str, Any]:
    """The content of tokenizer_config.json for AutoTokenizer.

    Special tokens are only parsed for a chat template; without one, their names in texts are plain text, as they are
    here.
    """
    content = files.read(vocabulary.file)
    backend = read_backend(content, vocabulary.file)
    names = {token: name for name, token in vocabulary.special_tokens}

    def name_of(token: int) -> str:
        return names.get(token) or backend.name_of(token)

    begin = [name_of(token) for token in vocabulary.begin_ids[:1]]
    return {
        **({"bos_token": begin[0]} if begin else {}),
        "eos_token": name_of(vocabulary.end_of_document_id),
        "pad_token": name_of(vocabulary.pad_id),
        "add_bos_token": bool(begin),
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # older versions add token_type_ids
        "split_special_tokens": vocabulary.chat_template is None,
        **({"chat_template": vocabulary.chat_template} if vocabulary.chat_template is not None else {}),
        "tokenizer_class": "GPTPanguTokenizer" if vocabulary.text_form == "pangu" else "PreTrainedTokenizerFast",
    }


def tokenizer_json(vocabulary: Described) -> str:
    """The content of a tokenizer.json that gives the same ids as a vocabulary for any text.

    Special tokens are pieces that no text produces. They are not listed as added tokens, since texts would produce
    those.

    Raises:
      Inexact: there is no such file.
    """
    content = files.read(vocabulary.file)
    if vocabulary.text_form != "plain":
        raise Inexact("its texts go through jieba")
    if is_json(content):
        return content.decode()
    own = SentencePieces(content, vocabulary.file)
    model = own.model()
    if reason := _inexact(model):
        raise Inexact(reason)
    escaped, prefix = model.normalizer_spec.escape_whitespaces, model.normalizer_spec.add_dummy_prefix
    ids = {piece.piece: token for token, piece in enumerate(model.pieces)}
    unknown = next(piece.piece for piece in model.pieces if piece.type == piece.UNKNOWN)
    before: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE_SYMBOL}] * prefix + [
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL}] * escaped
    after: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "}] * escaped + [
        {"type": "ByteFallback"}, {"type": "Fuse"}] + [
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": token, "content": piece.piece, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False}
            for token, piece in enumerate(model.pieces) if piece.type == piece.USER_DEFINED],
        "normalizer": {"type": "Sequence", "normalizers": before} if before else None,
        "pre_tokenizer": None,
        "post_processor": _template(own, vocabulary.begin_ids),
        "decoder": {"type": "Sequence", "decoders": after},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False, "vocab": ids, "merges": list(_merges(model))},
    }, ensure_ascii=False)


def _inexact(model: Any) -> str | None:
    """The reason why no tokenizer.json gives the same ids as a model for any text; None if there is one."""
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    own = any(piece.type == piece.USER_DEFINED for piece in model.pieces)
    made = [score for piece, score in normal.items() if len(piece) > 1]
    spec = model.normalizer_spec
    reasons = {
        "it is not BPE": model.trainer_spec.model_type != model.trainer_spec.BPE,
        "it normalizes characters": bool(spec.precompiled_charsmap),
        "it merges blanks": spec.remove_extra_whitespaces,
        "it puts spaces after words": model.trainer_spec.treat_whitespace_as_suffix,
        "it has user-defined symbols besides escaped spaces": own and spec.escape_whitespaces,
        "it puts a plain space before texts": spec.add_dummy_prefix and not spec.escape_whitespaces,
        "it has unused pieces": any(piece.type == piece.UNUSED for piece in model.pieces),
        "two of its pieces have the same score": len(set(made)) < len(made),
        "it has pieces of invalid characters": not {character for piece in normal for character in piece}
        <= normal.keys(),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _merges(model: Any) -> Iterator[tuple[str, str]]:
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    for piece in sorted(normal, key=lambda piece: -normal[piece]):
        # If piece[k:] is a prefix of the piece, the piece may overlap itself by that; the split there is leftmost.
        splits = sorted(range(1, len(piece)), key=lambda k: (not piece.startswith(piece[k:]), -k))
        for k in splits:
            if piece[:k] in normal and piece[k:] in normal:
                yield piece[:k], piece[k:]


def _template(own: SentencePieces, begin_ids: tuple[int, ...]) -> Mapping[str, Any] | None:
    """The template that puts the begin token before texts in the library; None without one."""
    names = {own.name_of(token): token for token in begin_ids}
    begin = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    return {
        "type": "TemplateProcessing",
        "single": [*begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in names.items()},
    } if names else None
