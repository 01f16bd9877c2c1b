"""PanGu's form of texts: by hand, and back."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from codellm_jax.vocabulary import load_vocabulary

TEXTS = ["\u6211\u4eec\u7231\u81ea\u7136\u8bed\u8a00\u5904\u7406\u3002", "a row\nof  tokens",
         "x = [1, 2]\n\n  return x", "", " ", "\u4e2d\u6587 and English\n"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    import sentencepiece

    jieba = pytest.importorskip("jieba")
    written = [" ".join(word.translate(str.maketrans(" \n", "\u2582\u2583")) for word in jieba.cut(text))
               for text in TEXTS if text.strip()]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(written * 30), model_writer=buffer, vocab_size=120, hard_vocab_limit=False,
        model_type="unigram", character_coverage=1.0, normalization_rule_name="identity", pad_id=3, minloglevel=2)
    path = tmp_path_factory.mktemp("pangu") / "pangu.model"
    path.write_bytes(buffer.getvalue())
    return str(path)


def test_texts_go_through_jieba(file: str) -> None:
    import sentencepiece

    alone = sentencepiece.SentencePieceProcessor(model_file=file)
    own = load_vocabulary(file, text_form="pangu")
    by_hand = "\u6211\u4eec \u7231 \u81ea\u7136\u8bed\u8a00 \u5904\u7406 \u3002"
    assert own.encode(TEXTS[0]) == alone.encode(by_hand)
    assert own.encode("a row\nof") == alone.encode("a \u2582 row \u2583 of")


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back(file: str, text: str) -> None:
    own = load_vocabulary(file, text_form="pangu")
    ids = own.encode(text)
    assert own.decode(ids) == text
    assert b"".join(own.bytes_of_ids()[token] for token in ids).decode() == text
    joined = np.array([own.end_of_document_id, *ids])
    assert own.bytes_behind(joined[:-1], joined[1:]).sum() == len(text.encode())
    context = own.encode("a row\n")
    assert own.decode_after(context, own.encode_after(context, text)) == text
    for cut in range(len(ids)):
        assert own.decode(ids[:cut]) + own.decode_after(ids[:cut], ids[cut:]) == text


def test_the_form_is_part_of_the_vocabulary(file: str, tmp_path: Path) -> None:
    plain, own = load_vocabulary(file), load_vocabulary(file, text_form="pangu")
    assert plain.content_hash != own.content_hash and plain != own
    assert plain.text_form == "plain" and plain.encode("a row") != own.encode("a row")
    # A folder of PanGu's ports says so by itself.
    (tmp_path / "vocab.model").write_bytes(Path(file).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPTPanguTokenizer"}')
    assert load_vocabulary(str(tmp_path)).content_hash == own.content_hash
    with pytest.raises(ValueError, match="vocabulary.text_form must be one of plain, pangu, found 'jieba'"):
        load_vocabulary(file, text_form="jieba")


def test_jieba_is_named_where_it_is_missing(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ValueError, match="text_form = 'pangu' needs jieba: pip install '.\\[pangu\\]'") as error:
        load_vocabulary(file, text_form="pangu")
    assert "\n" not in str(error.value)
