"""Small tokenizer.json files of each kind, trained with the library `tokenizers`."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

DICE = random.Random(5)
WORDS = ("the a row of tokens is read by its number and never lost def return self x y + = ( ) : <s> </s> "
         "<|endoftext|> h\u00e9llo \u4e16\u754c \u4ee3\u7801").split()
LEARNED = [" ".join(DICE.choice(WORDS) for _ in range(12)) + "\n    return x\n" for _ in range(400)]


def _byte_level() -> Any:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(LEARNED, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    made.add_tokens([tokenizers.AddedToken("  ", normalized=True), tokenizers.AddedToken("<think>")])
    return json.loads(made.to_str())


def _byte_fallback() -> Any:
    """Like Llama's: a space before each text, spaces as U+2581, rare characters as bytes, and <s> before each text."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator([word for text in LEARNED for word in text.split()], trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    facts = json.loads(made.to_str())
    facts["added_tokens"] = [token for token in facts["added_tokens"] if token["content"] in special]
    return facts


def _unigram() -> Any:
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(LEARNED, trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    return json.loads(made.to_str())


@pytest.fixture(scope="session")
def facts() -> dict[str, dict[str, Any]]:
    """The JSON of a tokenizer.json of each kind."""
    return {"byte_level": _byte_level(), "byte_fallback": _byte_fallback(), "unigram": _unigram()}


@pytest.fixture(scope="session")
def learned() -> list[str]:
    """The texts on which they are trained."""
    return LEARNED


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes JSON files into a folder and returns its path; tokenizer.json comes first, others by name."""
    def writing(tokenizer: Any, **others: Any) -> str:
        folder = tmp_path / "published"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        for name, content in others.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return str(folder)

    return writing
