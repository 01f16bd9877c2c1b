"""tokenizer.json, the format of Hugging Face's `tokenizers`: byte-level BPE, BPE with byte fallback, Unigram.

The library encodes; its own threads are not used, so that we choose their number and processes may fork. Features of a
file beyond encoding are ignored: truncation, padding, dropout, and the tokens added by a post-processor. Special tokens
in texts are plain text, even if the model itself could produce them (a piece "</s>" of Unigram).
"""

import concurrent.futures
import functools
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

UNKNOWN = "\ufffd"  # the text of ids without a token
# The names of the token that ends a document, for a file without a configuration.
END_TOKENS = ("<|endofdocument|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
MOST_PIECES = 1 << 24  # the largest known have 2 ** 18
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_CHARACTERS_A_CALL = 1 << 16
# The parts of a decoder that restore spaces and bytes rewritten by a normalizer or pre-tokenizer.
_OF_SPACES = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}


class FastTokenizer:
    """A `Backend` from a tokenizer.json."""

    pad_id: int | None = None  # such files name none

    def __init__(self, content: bytes, file: str, special: Sequence[str] = ()) -> None:
        self._file = file
        facts = _facts(content, file)
        added = facts["added_tokens"]
        own = {token["content"] for token in added if token.get("special")}
        self._facts = facts | {
            "truncation": None, "padding": None, "model": facts["model"] | {"dropout": None},
            "added_tokens": [token | {"special": token["content"] in own.union(special)} for token in added]}
        whole = _tokenizer(self._facts, file)
        self._facts |= {part: _as_read(whole, part) for part in PARTS}
        self._ids: dict[str, int] = whole.get_vocab(with_added_tokens=True)
        self.pieces = 1 + max(self._ids.values(), default=-1)
        if self.pieces > MOST_PIECES:
            raise ValueError(f"{file} has the id {self.pieces - 1:,}; at most {MOST_PIECES:,} ids are supported.")
        self.begin_ids = self._begin_ids()
        self.named_special = tuple(name for name in special if name in self._ids and name not in own)
        self.special_tokens: dict[str, int] = {
            name: token for name, token in sorted(self._ids.items(), key=lambda item: item[1])
            if name in own or name in self.named_special}
        self._special_ids = frozenset(self.special_tokens.values())
        self._text_of = _text_rule(self._facts, file)
        plain = _without(self._facts, self.special_tokens)
        self._plain = whole if plain is self._facts else _tokenizer(plain, file)
        self._plain.encode_special_tokens = True
        behind = _without_prefix(plain)
        self._puts_space = behind != plain
        self._behind = self._plain
        if self._puts_space:
            self._behind = _tokenizer(behind, file)
            self._behind.encode_special_tokens = True
            [ids] = _encoded(self._behind, ["x  x"])
            if b"  " not in b"".join(self._bytes[token] for token in ids):  # it collapses blanks, as T5 does
                self._behind = self._plain

    def _begin_ids(self) -> tuple[int, ...]:
        """The ids that the post-processor's template puts before a text."""
        found = next((tuple(_begin_of(step)) for step in _steps(self._facts["post_processor"], "processors")
                      if step["type"] == "TemplateProcessing"), ())
        if any(token >= self.pieces for token in found):
            raise ValueError(f"{self._file} begins texts with the ids {list(found[:9])}, but has {self.pieces} ids.")
        return found

    @property
    def end_id(self) -> int | None:
        return next((self._ids[name] for name in END_TOKENS if name in self._ids), None)

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    def name_of(self, token: int) -> str:
        return next(name for name, other in self._ids.items() if other == token)

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def encode(self, texts: Sequence[str], threads: int = 1, behind: bool = False) -> list[list[int]]:
        tokenizer = self._behind if behind else self._plain
        some = list(_some(texts))
        if threads < 2 or len(some) < 2:
            return [ids for part in some for ids in _encoded(tokenizer, part)]
        with concurrent.futures.ThreadPoolExecutor(min(threads, len(some))) as pool:
            return [ids for part in pool.map(lambda part: _encoded(tokenizer, part), some) for ids in part]

    def encode_with_special(self, text: str) -> list[int]:
        return _encoded(self._with_special, [text])[0]

    def decode(self, ids: Sequence[int], begins: bool = True) -> str:
        text = b"".join(self._bytes[token] if token < self.pieces else UNKNOWN.encode() for token in ids).decode(
            "utf-8", "replace")
        return text.removeprefix(" ") if begins and self._puts_space else text

    def bytes_of_ids(self) -> tuple[bytes, ...]:
        return self._bytes

    @functools.cached_property
    def _with_special(self) -> Any:
        tokenizer = _tokenizer(self._facts, self._file)
        tokenizer.add_special_tokens(list(self.named_special))
        return tokenizer

    @functools.cached_property
    def _bytes(self) -> tuple[bytes, ...]:
        found = [UNKNOWN.encode()] * self.pieces
        unknown = {_unknown_id(self._facts["model"], self._ids)} - {self.end_id}  # one token may be both
        for name, token in self._ids.items():
            if token not in unknown:
                found[token] = b"" if token in self._special_ids else self._text_of(name)
        return tuple(found)


def _facts(content: bytes, file: str) -> dict[str, Any]:
    """The JSON of a supported tokenizer.json, with 'type' and 'added_tokens'; raises ValueError for others."""
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}) and thus no tokenizer.json; download it again.") from None
    model = facts.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise ValueError(f"{file} is JSON but not a tokenizer.json: it has no 'model' with a 'vocab'.")
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram" if isinstance(model["vocab"], list) else
                                 "WordPiece or WordLevel")
    if kind not in ("BPE", "Unigram"):
        raise ValueError(f"{file} is a word tokenizer ({kind}), whose tokens do not restore the text; only BPE "
                         "and Unigram are supported.")
    added = facts.get("added_tokens") or []
    if not isinstance(added, list) or not all(
            isinstance(token, dict) and isinstance(token.get("content"), str) for token in added):
        raise ValueError(f"{file} is not a tokenizer.json: its 'added_tokens' are not a list of tokens with 'content'.")
    if affix := next((model[name] for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)),
                     None):
        raise ValueError(f"{file} marks word parts with {affix!r}, which does not restore the text; only BPE of bytes "
                         "or with byte fallback is supported.")
    return facts | {"model": model | {"type": kind}, "added_tokens": added}


def _tokenizer(facts: dict[str, Any], file: str) -> Any:
    # The library would start as many threads as there are processors, and a forked process would lose them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(facts))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise ValueError(f"{file} is not a tokenizer.json that tokenizers {tokenizers.__version__} can read: "
                         f"{' '.join(str(error).split())[:200]}") from None


def _as_read(tokenizer: Any, part: str) -> dict[str, Any] | None:
    """A part of a tokenizer as the library writes it, in which nothing is missing or of another type."""
    found = getattr(tokenizer, part)
    read: dict[str, Any] | None = found and json.loads(found.__getstate__())
    return read


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        for text in texts:
            text.encode()  # raises if one contains lone surrogates
        raise ValueError(f"A tokenizer.json fails on a text: {' '.join(str(error).split())[:200]}") from error


def _some(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in lists of about 64 KiB, in order."""
    some: list[str] = []
    characters = 0
    for text in texts:
        some.append(text)
        characters += len(text)
        if characters >= _CHARACTERS_A_CALL:
            yield some
            some, characters = [], 0
    if some:
        yield some


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer, post-processor or decoder, in order."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[key] for step in _steps(inner, key)]
    return [part]


def _begin_of(template: dict[str, Any]) -> Iterator[int]:
    for item in template["single"]:
        if "SpecialToken" not in item:
            return
        yield from template["special_tokens"][item["SpecialToken"]["id"]]["ids"]


def _unknown_id(model: dict[str, Any], ids: dict[str, int]) -> int | None:
    return model.get("unk_id") if model["type"] == "Unigram" else ids.get(model.get("unk_token") or "")


# ---- Bytes of the pieces -----------------------------------------------------------------------


def _text_rule(facts: dict[str, Any], file: str) -> Callable[[str], bytes]:
    """The function from a token's name to its bytes."""
    steps = _steps(facts.get("decoder"), "decoders")
    kinds = {step["type"] for step in steps}
    before = [*_steps(facts.get("pre_tokenizer"), "pretokenizers")]
    if "ByteLevel" in kinds or not kinds and any(step["type"] == "ByteLevel" for step in before):
        return _of_alphabet
    if kinds - _OF_SPACES:
        raise ValueError(f"{file} has the decoder {', '.join(sorted(kinds - _OF_SPACES))}, which is not supported; "
                         "ByteLevel, Metaspace and ByteFallback are.")
    replaced = [(step["pattern"].get("String", ""), step["content"]) for step in steps if step["type"] == "Replace"]
    replaced += [(step["replacement"], " ") for step in steps or before if step["type"] == "Metaspace"]
    with_bytes = "ByteFallback" in kinds or facts["model"].get("byte_fallback")

    def of_spaces(name: str) -> bytes:
        if with_bytes and re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
            return bytes([int(name[3:5], 16)])
        for old, new in replaced:
            name = name.replace(old, new) if old else name
        return name.encode()

    return of_spaces


@functools.cache
def _alphabet() -> dict[str, int]:
    """The byte for each character of a byte-level piece: printable Latin-1 characters represent themselves, the others
    are represented by the characters from U+0100 on, in order.
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(others)}


def _of_alphabet(name: str) -> bytes:
    alphabet = _alphabet()
    try:
        return bytes(alphabet[character] for character in name)
    except KeyError:  # an added token, which is literal text
        return name.encode()


# ---- Tokenizers with one feature removed --------------------------------------------------------


def _without(facts: dict[str, Any], special: Collection[str]) -> dict[str, Any]:
    """The same tokenizer, with a model that cannot produce special tokens; unchanged if it cannot anyway."""
    model = facts["model"]
    if model["type"] == "Unigram":
        given = {piece for piece, _ in model["vocab"] if piece in special}
        changed: dict[str, Any] = {
            "vocab": [["" if piece in given else piece, score] for piece, score in model["vocab"]]}
    else:
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
        made = {left + right for left, right in merges}
        given = {name for name in special if name in model["vocab"] and (
            model.get("ignore_merges") or name in made or len(name) == 1)}
        # No text is likely to contain a whole word with this ending.
        names = {name: f"{name}\0special\0" for name in given}
        changed = {
            "vocab": {names.get(piece, piece): token for piece, token in model["vocab"].items()},
            "merges": [[left, right] for left, right in merges if not given & {left, right, left + right}],
            "unk_token": names.get(model.get("unk_token"), model.get("unk_token"))}
    if not given:
        return facts
    return facts | {"model": model | changed,
                    "added_tokens": [token for token in facts["added_tokens"] if token["content"] not in given]}


def _without_prefix(facts: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, without the space that it puts before a text."""
    def stripped(part: Any, key: str) -> Any:
        if part is None or part["type"] == "Prepend":
            return None
        if part["type"] == "Sequence":
            return part | {key: [inner for step in part[key] if (inner := stripped(step, key)) is not None]}
        if part["type"] == "Metaspace" and (
                part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True)):
            return part | {"prepend_scheme": "never", "add_prefix_space": False}
        return part | {"add_prefix_space": False} if part["type"] == "ByteLevel" else part

    return facts | {name: stripped(facts[name], key) for name, key in (
        ("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")) if facts.get(name)}
