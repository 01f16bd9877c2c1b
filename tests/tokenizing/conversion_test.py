"""What is written for Hugging Face's libraries gives the same ids for any text, there and read back here."""

import json
import pathlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from codellm_jax.tokenizing.conversion import Inexact, tokenizer_config, tokenizer_json, write_tokenizer
from codellm_jax.vocabulary import Vocabulary, load_vocabulary, train_vocabulary

CHINESE = "\u4e16\u754c\u4ee3\u7801\u8bed\u8a00\u6a21\u578b\uff0c\u3002\u662f\u7684\u4e00\u4e0d\u4e86\u4eba"
ODD = ["\u2581", "\0", " ", "  ", "\t", "\n", "\r\n", "\u3000", "\u00a0", "\u200d", "\u2028", "\x85", "\ufeff",
       "\ufffd", "<|endofdocument|>", "<|pad|>", "<|unknown|>", "<0x41>", "</s>", "\U0001f389",
       "\U0001f469\u200d\U0001f467", "e\u0301", "\u00e9", "=", "==", "---", "###", "((", "0123456789", "\U0010ffff"]


def any_texts(count: int, seed: int) -> list[str]:
    """Code, Chinese, emoji, blanks, long runs, and what pieces of repeated beginnings could stumble over."""
    dice = random.Random(seed)
    code = "".join(file.read_text() for file in sorted(pathlib.Path(__file__).parent.parent.glob("*.py")))

    def one() -> str:
        kind = dice.randrange(5)
        if kind == 0:
            start = dice.randrange(len(code) - 300)
            return code[start : start + dice.randrange(300)]
        if kind == 1:
            return "".join(dice.choice(CHINESE) for _ in range(dice.randrange(60)))
        if kind == 2:
            return "".join(dice.choice(ODD) * dice.choice([1, 1, 1, 2, 3, 7, 70]) for _ in range(dice.randrange(10)))
        if kind == 3:
            few = [dice.choice(["a", "b", "ab", "aba", "=", "-", "(", " ", "in", "re"]) for _ in range(3)]
            return "".join(dice.choice(few) for _ in range(dice.randrange(50)))
        start = dice.randrange(len(code) - 40)
        return "".join(dice.choice([code[start : start + dice.randrange(40)], dice.choice(ODD), dice.choice(CHINESE),
                                    chr(dice.choice([*range(0x3000), *range(0x1f300, 0x1f700)]))])
                       for _ in range(dice.randrange(8)))

    return [one() for _ in range(count)]


@pytest.fixture(scope="module", params=["python_8k", "repetitive", "chinese"])
def vocabulary(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A shipped one; one whose pieces overlap themselves in many ways; one of several Chinese characters a piece."""
    if request.param == "python_8k":
        return load_vocabulary()
    dice = random.Random(2)
    parts = ["a", "b", "ab", "aba", "==", "=", "-", "((", " ", "abab"] if request.param == "repetitive" else [
        *CHINESE, "\u4ee3\u7801", "\u8bed\u8a00 "]
    documents = ["".join(dice.choice(parts) for _ in range(60)) for _ in range(300)]
    return train_vocabulary(documents, 500, str(tmp_path_factory.mktemp("own") / "own.model"))


def test_ids_are_the_same_for_any_text(vocabulary: Vocabulary) -> None:
    library = tokenizers.Tokenizer.from_str(tokenizer_json(vocabulary))
    texts = any_texts(10_000, seed=1)
    encoded = vocabulary.encode_all(texts)
    assert [one.ids for one in library.encode_batch_fast(texts)] == encoded
    assert library.decode_batch(encoded, skip_special_tokens=False) == texts
    assert library.decode_batch(encoded, skip_special_tokens=True) == texts


def test_a_file_of_llamas_ways_without_symbols_of_its_own(tmp_path: Path) -> None:
    import sentencepiece

    with (tmp_path / "llama.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(any_texts(400, seed=2) + ["def f(x): return x"] * 9), model_writer=file,
            model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            vocab_size=700, hard_vocab_limit=False, character_coverage=0.99, minloglevel=2)
    own = load_vocabulary(str(tmp_path / "llama.model"), begin_id=1)
    library = tokenizers.Tokenizer.from_str(tokenizer_json(own))
    for text in any_texts(3000, seed=3):
        ids = own.encode(text)
        assert library.encode(text, add_special_tokens=False).ids == ids
        assert library.encode(text).ids == own.encode_prompt(text)
        assert library.decode(ids) == own.decode(ids)


@pytest.mark.parametrize("name, reason", [
    ("llama", "it has user-defined symbols besides escaped spaces"), ("t5", "it is not BPE")])
def test_what_cannot_be_said_exactly_is_written_as_it_is(
    name: str, reason: str, other_vocabularies: dict[str, str], tmp_path: Path
) -> None:
    own = load_vocabulary(other_vocabularies[name], begin_id=1)
    with pytest.raises(Inexact, match=reason):
        tokenizer_json(own)
    told = write_tokenizer(own, str(tmp_path))
    assert told and reason in told and "tokenizer.model" in told and "\n" not in told
    assert_the_same(load_vocabulary(str(tmp_path)), own)


def assert_the_same(back: Vocabulary, own: Vocabulary) -> None:
    assert (back.begin_ids, back.end_of_document_id, back.pad_id, back.pieces, back.text_form, back.chat_template) == (
        own.begin_ids, own.end_of_document_id, own.pad_id, own.pieces, own.text_form, own.chat_template)
    texts = any_texts(300, seed=4)
    assert back.encode_all(texts) == own.encode_all(texts)


def test_what_was_written_is_read_back(vocabulary: Vocabulary, tmp_path: Path) -> None:
    assert write_tokenizer(vocabulary, str(tmp_path)) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    back = load_vocabulary(str(tmp_path))
    assert_the_same(back, vocabulary)
    assert back.encode_with_special("x<|endofdocument|>") == [*vocabulary.encode("x"), vocabulary.end_of_document_id]
    assert back.decode([back.end_of_document_id, *back.encode("x"), back.pad_id]) == "x"


def test_a_published_tokenizer_is_copied(
    facts: dict[str, Any], write: Callable[..., str], tmp_path: Path
) -> None:
    config = {"eos_token": "<|im_start|>", "pad_token": "<|endoftext|>", "chat_template": "{{ messages }}", "own": 1}
    own = load_vocabulary(write(facts["byte_level"], tokenizer_config=config))
    (tmp_path / "out").mkdir()
    assert write_tokenizer(own, str(tmp_path / "out")) is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (Path(own.path) / name).read_bytes()
    assert_the_same(load_vocabulary(str(tmp_path / "out")), own)
    # What a run's gin files say otherwise is written into the configuration, which keeps what else it says.
    other = load_vocabulary(own.path, end_of_document_id=0, begin_id=1)
    write_tokenizer(other, str(tmp_path / "out"))
    assert_the_same(load_vocabulary(str(tmp_path / "out")), other)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (written["own"], written["chat_template"], written["split_special_tokens"]) == (1, "{{ messages }}", False)


def test_pangus_form_is_written_too(tmp_path: Path, other_vocabularies: dict[str, str]) -> None:
    pytest.importorskip("jieba")
    own = load_vocabulary(other_vocabularies["t5"], text_form="pangu")
    told = write_tokenizer(own, str(tmp_path))
    assert told and "its texts go through jieba" in told
    assert load_vocabulary(str(tmp_path)).text_form == "pangu"


def test_a_configuration_names_the_tokens() -> None:
    found = tokenizer_config(load_vocabulary(begin_id=7))
    assert (found["eos_token"], found["pad_token"], found["add_bos_token"]) == ("<|endofdocument|>", "<|pad|>", True)
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast" and found["clean_up_tokenization_spaces"] is False
    assert "bos_token" not in tokenizer_config(load_vocabulary())


@pytest.mark.parametrize("name", ["shipped", "beginning", "byte_fallback"])
def test_transformers_gives_the_same_ids(
    name: str, tmp_path: Path, beginning_tokenizer: str, facts: dict[str, Any], write: Callable[..., str]
) -> None:
    transformers = pytest.importorskip("transformers")
    own = load_vocabulary({"shipped": "python_8k", "beginning": beginning_tokenizer}.get(name) or write(facts[name]))
    (tmp_path / "out").mkdir()
    assert write_tokenizer(own, str(tmp_path / "out")) is None
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.eos_token_id, theirs.pad_token_id) == (own.end_of_document_id, own.pad_id)
    texts = any_texts(10_000, seed=5)
    encoded = own.encode_all(texts)
    assert theirs(texts, add_special_tokens=False)["input_ids"] == encoded
    assert theirs(texts)["input_ids"] == [[*own.begin_ids, *ids] for ids in encoded]
    for text, ids in zip(texts, encoded, strict=True):
        assert theirs.decode(ids) == own.decode(ids)
        assert name == "byte_fallback" or own.decode(ids) == text
    assert theirs.decode([own.end_of_document_id, *own.encode("x")], skip_special_tokens=True) == "x"
