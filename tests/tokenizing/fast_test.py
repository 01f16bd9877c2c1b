"""tokenizer.json gives the library's ids, text for special tokens' names, and every text back."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from codellm_jax.vocabulary import Vocabulary, load_vocabulary

KINDS = ("byte_level", "byte_fallback", "unigram")
ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
# What a text may hold that some tokenizer stumbles over.
AWKWARD = [
    "", "a", " x", "  x  y ", "def f(x):\n\treturn x\r\n", "\u2581", "a\u2581b", "\0", "\u4e16\u754c\U0001f389 \u00e9",
    "e\u0301", "<|endoftext|>", "a</s>b<s>", "<unk><pad>", "<0x41>", "x" * 300, " " * 70, "\ufffd\u2028\u3000",
]


def loaded(write: Callable[..., str], facts: Any, **settings: Any) -> tuple[Vocabulary, Any]:
    """The vocabulary of a tokenizer.json, and the library's own tokenizer with special tokens as text."""
    folder = write(facts)
    library = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    library.encode_special_tokens = True
    return load_vocabulary(folder, **settings), library


def read_back(kind: str, text: str) -> str:
    """What a text is once it was encoded and decoded: Llama's ways take U+2581 for a space."""
    return text.replace("\u2581", " ") if kind == "byte_fallback" else text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_librarys_own(kind: str, facts: Any, write: Callable[..., str], learned: list[str]) -> None:
    own, library = loaded(write, facts[kind])
    special = [name for name, _ in own.special_tokens]
    texts = [text for text in (*learned, *AWKWARD) if not any(name in text for name in special)]
    assert len(texts) > 50
    expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert own.encode_all(texts) == expected and own.encode_all(texts, threads=3) == expected
    assert [own.encode(text) for text in texts] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_special_tokens_are_text(kind: str, facts: Any, write: Callable[..., str], learned: list[str]) -> None:
    own, library = loaded(write, facts[kind])
    special = dict(own.special_tokens)
    for text in (*learned, *AWKWARD, *special, *(f"x {name}{name} y" for name in special)):
        unknown = {special.get("<unk>")} if kind == "unigram" else set()
        assert not (set(own.encode(text)) & set(special.values())) - unknown
        if kind != "unigram":
            assert own.decode(own.encode(text)) == read_back(kind, text)
    if kind == "unigram":  # of which the library alone makes the token, as it is a piece
        assert special["</s>"] in library.encode("x</s>", add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_parsed_where_they_are_asked_for(
    kind: str, facts: Any, write: Callable[..., str]
) -> None:
    own, library = loaded(write, facts[kind])
    library.encode_special_tokens = False
    for name, token in own.special_tokens:
        text = f"{name}the row{name}\n"
        ids = own.encode_with_special(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert ids.count(token) == 2


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_bytes_of_ids_joined_are_the_text(kind: str, facts: Any, write: Callable[..., str], learned: list[str]) -> None:
    own, _ = loaded(write, facts[kind])
    table = own.bytes_of_ids()
    assert len(table) == own.pieces
    for text in (*AWKWARD, *learned[:20]):
        joined = b"".join(table[token] for token in own.encode(text)).decode()
        assert joined == " " * (kind == "byte_fallback" and bool(text)) + read_back(kind, text)
        assert own.byte_count(own.encode(text)) == len(joined.encode())
    assert all(table[token] == b"" for name, token in own.special_tokens if name != "<unk>")


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_documents_are_those_of_the_decoded_text(
    kind: str, facts: Any, write: Callable[..., str], learned: list[str]
) -> None:
    own, _ = loaded(write, facts[kind])
    for text in (*AWKWARD, *learned[:20]):
        encoded = own.encode(text)
        ids = np.array([own.end_of_document_id, *own.begin_ids, *encoded, own.end_of_document_id])
        counts = own.bytes_behind(ids[:-1], ids[1:])
        if own.end_of_document_id not in encoded:  # in "unigram" it is a piece as others are
            assert counts.sum() == len(own.decode(encoded).encode()) and counts[-1] == 0
        if kind == "byte_level":
            assert counts.sum() == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_behind_its_prompt_comes_back(kind: str, facts: Any, write: Callable[..., str]) -> None:
    own, _ = loaded(write, facts[kind])
    for prompt, answer in (("def f(x):\n", "    return x"), ("the row:", " x"), ("the row:", "x"), ("the ", "x"),
                           ("\u4e16", "\u754c"), ("x", "\U0001f389!"), ("", " x y"), ("the row", "")):
        if kind == "unigram" and ("\n" in prompt or "\U0001f389" in answer):
            continue  # which it does not know
        context = own.encode_prompt(prompt)
        ids = own.encode_after(context, answer)
        # A text that begins with a space and one that does not are the same to Metaspace, at a text's beginning alone.
        expected = answer.removeprefix(" ") if kind == "unigram" and not prompt else answer
        assert own.decode_after(context, ids) == expected
        assert own.decode([*context, *ids]) == prompt + expected
        if prompt:
            assert own.encode_all([answer, answer], threads=2, behind=True) == [ids, ids]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_parted_anywhere_is_the_text(kind: str, facts: Any, write: Callable[..., str]) -> None:
    own, _ = loaded(write, facts[kind])
    for text in ("the row  of x\u4e16\u754c", "def self ( x ) :"):
        ids = own.encode(text)
        whole = own.decode(ids)
        for cut in range(1, len(ids) + 1):
            before = own.decode(ids[:cut]).rstrip("\ufffd")
            assert before + own.decode_after(ids[:cut], ids[cut:]) == whole
            for context in ([], [own.end_of_document_id], [*ids, own.end_of_document_id], list(own.begin_ids)):
                assert own.decode_after(context, ids[:cut]) == own.decode(ids[:cut])


def test_ids_that_stand_for_nothing(facts: Any, write: Callable[..., str]) -> None:
    own, _ = loaded(write, facts["byte_level"], multiple=1000)
    pieces = len(facts["byte_level"]["model"]["vocab"]) + 2
    assert (own.pieces, own.size) == (pieces, 1000)
    assert own.decode([999]) == "\ufffd"
    with pytest.raises(ValueError, match="Token id 1000 is not in vocabulary"):
        own.decode([1000])
    assert load_vocabulary(own.path, size=pieces).size == pieces
    with pytest.raises(ValueError, match=f"vocabulary.size is {pieces - 1}, fewer rows than .* has ids, {pieces}"):
        load_vocabulary(own.path, size=pieces - 1)


def test_what_a_file_would_do_to_texts_is_left_out(facts: Any, write: Callable[..., str], learned: list[str]) -> None:
    plain = loaded(write, facts["byte_level"])[0].encode(learned[0])
    changed = facts["byte_level"] | {
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<|endoftext|>"},
        "model": facts["byte_level"]["model"] | {"dropout": 0.5}}
    assert loaded(write, changed)[0].encode(learned[0]) == plain


def test_merges_make_no_special_tokens(facts: Any, write: Callable[..., str]) -> None:
    pieces = ["<", "s", ">", "<s", "<s>", "a"]
    model = facts["byte_level"]["model"] | {"vocab": {piece: token for token, piece in enumerate(pieces)},
                                            "merges": [["<", "s"], ["<s", ">"]]}
    added = [token | {"id": 4, "content": "<s>"} for token in facts["byte_level"]["added_tokens"][:1]]
    own, library = loaded(write, facts["byte_level"] | {"model": model, "added_tokens": added, "pre_tokenizer": None},
                          end_of_document_id=4)
    assert library.encode("a<s>a").ids == [5, 4, 5]
    assert own.encode("a<s>a") == [5, 3, 2, 5] and own.encode_with_special("a<s>a") == [5, 4, 5]


def test_words_that_are_whole_tokens_are_no_special_ones(facts: Any, write: Callable[..., str]) -> None:
    model = facts["byte_fallback"]["model"] | {"ignore_merges": True}
    own, _ = loaded(write, facts["byte_fallback"] | {"model": model, "normalizer": None})
    for text in ("</s>", "<s>"):
        assert own.decode(own.encode(text)) == text and own.end_of_document_id not in own.encode(text)


def test_of_files_that_squeeze_blanks_answers_are_parted_from_prompts(
    facts: Any, write: Callable[..., str]
) -> None:
    squeezing = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, facts["unigram"]["pre_tokenizer"]]}
    own, _ = loaded(write, facts["unigram"] | {"pre_tokenizer": squeezing})
    context = own.encode("the row")
    assert own.decode([*context, *own.encode_after(context, "read")]) == "the row read"


def test_lone_surrogates_are_refused(facts: Any, write: Callable[..., str]) -> None:
    own, _ = loaded(write, facts["byte_level"])
    with pytest.raises(UnicodeEncodeError):
        own.encode_all(["x", "\ud800"])


@pytest.mark.parametrize("change, told", [
    ({"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100}}, "is a word tokenizer .WordPiece.*BPE and Unigram are supported"),
    ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "is a word tokenizer .WordLevel."),
    ({"model": None}, "is JSON but not a tokenizer.json: it has no 'model'"),
    ({"added_tokens": ["<s>"]}, "is not a tokenizer.json: its 'added_tokens' are not a list"),
    ({"pre_tokenizer": {"type": "OfTomorrow"}}, "is not a tokenizer.json that tokenizers .* can read"),
    ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "has the decoder WordPiece"),
])
def test_other_files_are_refused(change: dict[str, Any], told: str, facts: Any, write: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=f"tokenizer.json .*{told}.*python_8k|tokenizer.json {told}") as error:
        load_vocabulary(write(facts["byte_level"] | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ['{"model": ', '{"model"' + "[" * 100_000, "{}"])
def test_broken_json_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json is (not JSON|JSON but not a tokenizer)") as error:
        load_vocabulary(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_refused(facts: Any, write: Callable[..., str]) -> None:
    folder = write(facts["byte_level"])
    file = Path(folder) / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is not JSON .* and thus no tokenizer.json"):
        load_vocabulary(folder)


def test_a_forked_process_encodes_and_nothing_is_told(
    facts: Any, write: Callable[..., str], learned: list[str]
) -> None:
    """The library's own threads would be lost there, and its warning on stderr."""
    program = (f"import os, json; from codellm_jax.vocabulary import load_vocabulary\n"
               f"own = load_vocabulary({write(facts['byte_level'])!r}); texts = {learned!r}\n"
               "before = own.encode_all(texts, threads=2)\n"
               "child = os.fork()\n"
               "same = own.encode_all(texts, threads=2) == before\n"
               "if not child: os._exit(0 if same else 1)\n"
               "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True,
                          cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("0 True", "")


@pytest.mark.parametrize("name", ["gptneox", "starcoder"])
def test_real_tokenizers_on_real_texts(name: str) -> None:
    file = SHARED / "tokenizers" / f"{name}_tokenizer.json"
    if not file.exists():
        pytest.skip("needs the shared data")
    texts = _real_texts(3000)
    own, library = load_vocabulary(str(file)), tokenizers.Tokenizer.from_file(str(file))
    library.encode_special_tokens = True
    encoded = own.encode_all(texts, threads=2)
    table = own.bytes_of_ids()
    composed = name == "gptneox"  # which puts accents and letters together
    lost = 0
    for text, ids in zip(texts, encoded, strict=True):
        assert ids == library.encode(text, add_special_tokens=False).ids
        whole = b"".join(table[token] for token in ids).decode()
        assert own.decode(ids) == whole == library.decode(ids, skip_special_tokens=False)
        joined = np.array([own.end_of_document_id, *ids, own.end_of_document_id])
        assert own.bytes_behind(joined[:-1], joined[1:]).sum() == len(whole.encode())
        lost += whole != text
        cut = len(ids) // 2
        assert own.decode(ids[:cut]).rstrip("\ufffd") + own.decode_after(ids[:cut], ids[cut:]) == whole
        after = own.encode_after(ids[:cut], text)
        assert own.decode_after(ids[:cut], after) == whole or b"".join(table[t] for t in ids[:cut]).decode(
            "utf-8", "replace").endswith("\ufffd")
    assert lost <= (0.01 * len(texts) if composed else 0)


def _real_texts(count: int) -> list[str]:
    """Chinese headlines, questions and programs, and the library's own source, of all of which some are long."""
    texts: list[str] = []
    for path in sorted((SHARED / "benchmarks").rglob("*.json*"))[:12]:
        if path.suffix in (".json", ".jsonl"):
            texts += [line[:2000] for line in path.read_text(errors="ignore").splitlines()[:400]]
    for path in sorted((SHARED / "corpora").rglob("*.tsv")):
        texts += path.read_text(errors="ignore").splitlines()[:1000]
    texts += [path.read_text() for path in sorted(Path(json.__file__).parent.parent.glob("*.py"))[:60]]
    return texts[:count] if len(texts) >= count else texts
