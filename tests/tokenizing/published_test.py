"""Which ids begin, end and pad: from a folder's configuration, in the order of what says it, or from gin."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codellm_jax import hub
from codellm_jax.vocabulary import load_vocabulary

Write = Callable[..., str]


def ids(folder: str, **settings: Any) -> tuple[tuple[int, ...], int, int]:
    found = load_vocabulary(folder, **settings)
    return found.begin_ids, found.end_of_document_id, found.pad_id


def named(facts: dict[str, Any], *names: str) -> list[int]:
    of_added = {token["content"]: token["id"] for token in facts["added_tokens"]}
    return [of_added[name] for name in names]


def test_names_come_before_numbers(facts: dict[str, Any], write: Write) -> None:
    end, start, think = named(facts["byte_level"], "<|endoftext|>", "<|im_start|>", "<think>")
    config = {"eos_token_id": [think, end], "bos_token_id": end, "pad_token_id": 10**6}
    assert ids(write(facts["byte_level"])) == ((), end, end)  # of two special ones the one of that name
    assert ids(write(facts["byte_level"], config=config)) == ((), think, think)
    assert ids(write(facts["byte_level"], generation_config={"eos_token_id": start})) == ((), start, start)
    special = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "pad_token": "<think>"}
    assert ids(write(facts["byte_level"], special_tokens_map=special)) == ((), end, think)
    named_by = {"eos_token": "<|im_start|>", "bos_token": "<|endoftext|>", "pad_token": None}
    assert ids(write(facts["byte_level"], tokenizer_config=named_by)) == ((), start, think)
    assert ids(write(facts["byte_level"]), begin_id=5, end_of_document_id=6, pad_id=7) == ((5,), 6, 7)


def test_what_texts_begin_with(facts: dict[str, Any], write: Write) -> None:
    begin, end = named(facts["byte_fallback"], "<s>", "</s>")
    assert ids(write(facts["byte_fallback"])) == ((begin,), end, end)  # by the post-processor
    assert ids(write(facts["byte_fallback"]), begin_id=-1) == ((), end, end)
    told = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    assert ids(write(facts["byte_fallback"], tokenizer_config=told)) == ((), end, end)
    without = facts["byte_fallback"] | {"post_processor": None}
    assert ids(write(without, tokenizer_config=told | {"add_bos_token": True})) == ((begin,), end, end)
    assert ids(write(without, tokenizer_config={"bos_token": "<s>", "tokenizer_class": "LlamaTokenizer"})) == (
        (), end, end)
    assert load_vocabulary(write(facts["byte_fallback"])).encode_prompt("x")[0] == begin


def test_the_hash_is_of_what_changes_ids(facts: dict[str, Any], write: Write) -> None:
    folder = write(facts["byte_level"], tokenizer_config={"eos_token": "<|im_start|>"})
    plain = load_vocabulary(folder)
    assert plain.content_hash == hashlib.sha256(Path(plain.file).read_bytes()).hexdigest()
    assert load_vocabulary(plain.file).end_of_document_id == plain.end_of_document_id
    # A token that the file itself takes for text is one no more.
    other = load_vocabulary(write(facts["byte_level"], tokenizer_config={"eos_token": "<think>"}))
    assert other.content_hash != plain.content_hash
    assert other.end_of_document_id in plain.encode("a<think>")
    assert other.end_of_document_id not in other.encode("a<think>")
    assert other.decode(other.encode("<think>")) == "<think>"
    assert other.encode_with_special("a<think>") == plain.encode("a<think>")


def test_a_file_of_another_name_has_no_configuration(facts: dict[str, Any], write: Write) -> None:
    folder = Path(write(facts["byte_level"], tokenizer_config={"eos_token": "<|im_start|>"}))
    shutil.copy(folder / "tokenizer.json", folder / "mine.json")
    [end] = named(facts["byte_level"], "<|endoftext|>")
    assert load_vocabulary(str(folder / "mine.json")).end_of_document_id == end


@pytest.mark.parametrize("config, told", [
    ({"eos_token": "<none>"}, "tokenizer_config.json names the eos_token '<none>', which .*tokenizer.json does not"),
    ([1], "tokenizer_config.json holds no JSON object"),
])
def test_configurations_that_do_not_fit(config: Any, told: str, facts: dict[str, Any], write: Write) -> None:
    with pytest.raises(ValueError, match=told) as error:
        load_vocabulary(write(facts["byte_level"], tokenizer_config=config))
    assert "\n" not in str(error.value)


def test_ids_that_do_not_fit(facts: dict[str, Any], write: Write) -> None:
    folder = write(facts["byte_level"] | {"added_tokens": []})
    with pytest.raises(ValueError, match="names no end_of_document id; set vocabulary.end_of_document_id"):
        load_vocabulary(write(facts["byte_level"] | {"added_tokens": [], "model": facts["byte_level"]["model"] | {
            "vocab": {name.replace("<|endoftext|>", "<|other|>"): token
                      for name, token in facts["byte_level"]["model"]["vocab"].items()}}}))
    for setting in ("begin_id", "end_of_document_id", "pad_id"):
        with pytest.raises(ValueError, match=f"vocabulary.{setting} is 99999, but vocabulary"):
            load_vocabulary(folder, **{"end_of_document_id": 1, setting: 99999})


def test_chat_templates(facts: dict[str, Any], write: Write) -> None:
    one = "{{ messages }}"
    assert load_vocabulary(write(facts["byte_level"])).chat_template is None
    folder = write(facts["byte_level"], tokenizer_config={"chat_template": one})
    assert load_vocabulary(folder).chat_template == one
    write(facts["byte_level"], tokenizer_config={"chat_template": [
        {"name": "tool_use", "template": "other"}, {"name": "default", "template": one}]})
    assert load_vocabulary(folder).chat_template == one
    (Path(folder) / "chat_template.jinja").write_text("{% of a file %}")
    assert load_vocabulary(folder).chat_template == "{% of a file %}"


def test_folders_of_sentence_pieces(tmp_path: Path, other_vocabularies: dict[str, str]) -> None:
    bare = load_vocabulary(other_vocabularies["llama"])
    shutil.copy(other_vocabularies["llama"], tmp_path / "mine.model")
    plain = load_vocabulary(str(tmp_path))
    assert (plain.encode("a row"), plain.begin_ids, plain.content_hash) == (bare.encode("a row"), (), bare.content_hash)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}))
    begun = load_vocabulary(str(tmp_path))
    assert begun.begin_ids == (1,) and begun.encode_prompt("a row") == [1, *bare.encode("a row")]
    assert begun.encode_with_special("a row</s><s> x") == [*bare.encode("a row"), 2, 1, *bare.encode_after([9], " x")]
    shutil.copy(other_vocabularies["t5"], tmp_path / "other.model")
    with pytest.raises(ValueError, match="holds several SentencePiece files, mine.model, other.model"):
        load_vocabulary(str(tmp_path))
    shutil.copy(other_vocabularies["t5"], tmp_path / "spiece.model")
    assert load_vocabulary(str(tmp_path)).file.endswith("spiece.model")


def test_names_on_a_hub(facts: dict[str, Any], write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(facts["byte_fallback"])
    asked = []

    def snapshot(name: str, patterns: Any) -> tuple[Path, str]:
        asked.append((name, tuple(patterns)))
        return Path(folder), "0" * 40

    monkeypatch.setattr(hub, "snapshot", snapshot)
    assert load_vocabulary("hf://org/name@main") == load_vocabulary(folder)
    [(name, patterns)] = asked
    assert name == "hf://org/name@main" and {"tokenizer.json", "*.model", "config.json"} <= set(patterns)
    assert not any("safetensors" in pattern or pattern == "*" for pattern in patterns)
