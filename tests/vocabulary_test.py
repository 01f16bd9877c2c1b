"""The vocabulary loses nothing, is the same in TensorFlow, and says what is wrong with a file."""

import dataclasses
import gzip
import io
import itertools
import os
import pathlib
import pickle
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from codellm_jax import vocabulary
from codellm_jax.tokenizing import training

ROOT = pathlib.Path(__file__).resolve().parents[1]

AWKWARD = [
    "",
    "\u2581",
    "a\u2581b \u2581 c",
    "\0",
    "a\0b\0\0",
    " leading",
    "trailing ",
    "   a  b   ",
    "line\r\nline\rline\n",
    "\n\n\t\t x\t",
    " " * 200,
    "\t" * 40,
    "\u00a0\u3000\u2028\x85\x0b\x0c",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\u4e2d\u6587\uff0c\u4ee3\u7801\u3002",
    "\u0301",
    "e\u0301 \u00e9",
    "\ufeff\ufffd\ud7ff\U0010ffff\u2047\u2585",
    "<|endofdocument|>",
    "<|pad|><|unknown|>",
    "<unk><s></s>",
    "<0x41>",
    "x = 1234567890",
]
TEXTS = st.lists(st.sampled_from(AWKWARD) | st.text(), max_size=6).map("".join)
DOCUMENTS = [
    "Every piece of an English sentence, as a vocabulary learns it from a text: \u2581.\n",
    "def every_piece(sentence: str) -> list[str]:\n    return sentence.split()  # as learned\n",
    "class Vocabulary:\n    pieces = 480\n\n    def learns(self, text):\n        pass\n",
] * 40


@pytest.fixture(scope="module")
def shipped() -> vocabulary.Vocabulary:
    return vocabulary.load_vocabulary("python_8k")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> vocabulary.Vocabulary:
    output = tmp_path_factory.mktemp("vocabulary") / "small.model"
    return vocabulary.train_vocabulary(DOCUMENTS, 480, str(output))


def test_shipped_vocabulary(shipped: vocabulary.Vocabulary) -> None:
    assert (shipped.pieces, shipped.size) == (8192, 8192)
    assert (shipped.pad_id, shipped.end_of_document_id) == (0, 1)
    assert os.path.getsize(shipped.path) < 500_000
    assert len(shipped.content_hash) == 64
    assert shipped == vocabulary.load_vocabulary(shipped.path)


def test_shipped_vocabulary_is_small_on_code_and_prose(shipped: vocabulary.Vocabulary) -> None:
    code = "for index, name in enumerate(names):\n    if name is None:\n        return index\n"
    prose = "Return the first element of the list, or raise an error if there is none."
    assert len(code) / len(shipped.encode(code)) > 2.5
    assert len(prose) / len(shipped.encode(prose)) > 3


@hypothesis.given(TEXTS)
def test_round_trip(shipped: vocabulary.Vocabulary, text: str) -> None:
    ids = shipped.encode(text)
    assert shipped.decode(ids) == text
    assert all(2 < token < shipped.pieces for token in ids)


@hypothesis.given(TEXTS)
def test_round_trip_of_a_trained_one(trained: vocabulary.Vocabulary, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_of_awkward_text(shipped: vocabulary.Vocabulary, text: str) -> None:
    assert shipped.decode(shipped.encode(text)) == text


def test_every_run_of_spaces_is_one_token(shipped: vocabulary.Vocabulary) -> None:
    for length in range(1, training.LONGEST_SPACES + 1):
        assert len(shipped.encode(" " * length)) == 1
        if length > 1:
            newline, spaces, *rest = shipped.encode("\n" + " " * length + "return")
            assert [newline, *rest] == shipped.encode("\nreturn")
            assert [spaces] == shipped.encode(" " * length)
    assert len(shipped.encode(" " * (2 * training.LONGEST_SPACES + 7))) == 3


def test_newlines_and_tabs(shipped: vocabulary.Vocabulary) -> None:
    assert len(shipped.encode("\n")) == 1
    assert len(shipped.encode("\n\n\n")) == 3
    for length in range(1, training.LONGEST_TABS + 1):
        assert len(shipped.encode("\t" * length)) == 1


def test_special_ids_are_no_text(shipped: vocabulary.Vocabulary) -> None:
    ids = [shipped.pad_id, *shipped.encode("a"), shipped.end_of_document_id, shipped.pad_id]
    assert shipped.decode(ids) == "a"


def test_ids_without_a_piece(trained: vocabulary.Vocabulary) -> None:
    padded = vocabulary.load_vocabulary(trained.path, multiple=1000)
    assert (padded.pieces, padded.size) == (480, 1000)
    assert padded.decode([999]) == padded.decode([2])
    for token in (-1, 1000):
        with pytest.raises(ValueError, match=f"Token id {token} is not in vocabulary"):
            padded.decode([token])


@hypothesis.given(TEXTS)
def test_bytes_of_ids_joined_are_the_text(shipped: vocabulary.Vocabulary, text: str) -> None:
    table = shipped.bytes_of_ids()
    assert len(table) == shipped.pieces
    assert b"".join(table[token] for token in shipped.encode(text)).decode() == text
    assert table[shipped.pad_id] == table[shipped.end_of_document_id] == b""


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_bytes_of_ids_of_other_files(tmp_path: pathlib.Path, byte_fallback: bool) -> None:
    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_writer=buffer, vocab_size=330, pad_id=3, minloglevel=2,
        byte_fallback=byte_fallback, hard_vocab_limit=False)
    (tmp_path / "other.model").write_bytes(buffer.getvalue())
    other = vocabulary.load_vocabulary(str(tmp_path / "other.model"))
    table = other.bytes_of_ids()
    for text in ("every piece of a sentence", "unknown: \u4e16\u754c def \u00e9", ""):
        ids = other.encode(text)
        assert b"".join(table[token] for token in ids).decode().lstrip() == other.decode(ids)


@pytest.mark.parametrize("name", ["python_8k", "llama", "t5"])
def test_text_behind_a_context_keeps_its_blanks(name: str, other_vocabularies: dict[str, str]) -> None:
    """Wherever a text's tokens are parted, what the second part adds is the text less what the first part gives."""
    own = vocabulary.load_vocabulary(other_vocabularies.get(name, name))
    for text in ("def f(x):\n    return x", "the row  of 4 tokens\n\n  is read", "one \u4e16\u754c \U0001f389!", " x"):
        ids = own.encode(text)
        whole = own.decode(ids)
        for cut in range(1, len(ids) + 1):
            before = own.decode(ids[:cut]).rstrip("\ufffd")  # without the bytes of a character that goes on
            assert before + own.decode_after(ids[:cut], ids[cut:]) == whole
            # The end of a document, and nothing at all, come before a text's beginning.
            for context in ([], [own.end_of_document_id], [*ids, own.end_of_document_id]):
                assert own.decode_after(context, ids[:cut]) == own.decode(ids[:cut])
    with pytest.raises(ValueError, match=f"Token id {own.size} is not in vocabulary"):
        own.decode_after(own.encode("x"), [own.size])
    if own.pieces < own.size:
        assert "\u2047" in own.decode_after(own.encode("x"), [own.size - 1])


def test_a_program_written_behind_its_head_keeps_its_indentation(other_vocabularies: dict[str, str]) -> None:
    llama = vocabulary.load_vocabulary(other_vocabularies["llama"])
    head, whole = "def f(x):\n", "def f(x):\n    return x"
    context = llama.encode(head)
    written = llama.encode(whole)[len(context) :]
    assert llama.decode(written) == "   return x"  # what SentencePiece alone makes of it
    assert llama.decode_after(context, written) == "    return x"


@pytest.mark.parametrize("name", ["python_8k", "llama"])
@pytest.mark.parametrize("prompt, answer", [
    ("def f(x):\n", "    return x"), ("Answer:", " B"), ("Answer:", "B"), ("Answer: ", "B"),
    ("x\n", "def f():\n  pass"), ("\u4e16", "\u754c\U0001f389"), ("", " x"), ("the row", "")])
def test_an_answer_encoded_behind_its_prompt_comes_back(
    name: str, prompt: str, answer: str, other_vocabularies: dict[str, str]
) -> None:
    own = vocabulary.load_vocabulary(other_vocabularies.get(name, name))
    context = own.encode(prompt)
    ids = own.encode_after(context, answer)
    assert own.decode_after(context, ids) == answer and own.decode([*context, *ids]) == prompt + answer
    if prompt:
        assert own.encode_all([answer, answer], behind=True) == [ids, ids]
    assert own.byte_count(ids) - (name == "llama" and not prompt) == len(answer.encode())


def test_answers_of_files_that_squeeze_blanks_are_parted_from_their_prompts(other_vocabularies: dict[str, str]) -> None:
    t5 = vocabulary.load_vocabulary(other_vocabularies["t5"])
    context = t5.encode("the row is:\n")
    assert t5.encode_after(context, "read") == t5.encode("read")
    assert t5.decode([*context, *t5.encode_after(context, "read")]) == "the row is: read"


def test_bytes_of_a_cut_character_are_counted(shipped: vocabulary.Vocabulary) -> None:
    ids = shipped.encode("a\U0001f389")
    assert [shipped.byte_count(ids[:cut]) for cut in range(len(ids) + 1)] == [0, 1, 2, 3, 4, 5]


CORPUS = ["def f(x):\n    return x + 1\n", "\u6211\u4eec\u8bfb\u4e66\u3002\n", "  blanks  \n\n",
          "party \U0001f389\U0001f469\u200d\U0001f4bb!", "", " x", "\u00e9\u2581\t\r\n"]


@pytest.mark.parametrize("name", ["python_8k", "llama"])
def test_bytes_of_joined_documents_are_those_of_their_texts(name: str, other_vocabularies: dict[str, str]) -> None:
    """As rows have them: each document ended, and tokens counted behind those before them."""
    own = vocabulary.load_vocabulary(other_vocabularies.get(name, name))
    documents = [[*own.begin_ids, *own.encode(text), own.end_of_document_id] for text in CORPUS]
    ids = np.array([own.end_of_document_id, *itertools.chain(*documents)])
    counts = own.bytes_behind(ids[:-1], ids[1:])
    ends = np.cumsum([0, *map(len, documents)])
    for start, end, tokens in zip(ends, ends[1:], documents, strict=False):
        assert counts[start:end].sum() == len(own.decode(tokens).encode())
    assert counts.sum() == sum(len(text.replace("\u2581", " " if name == "llama" else "\u2581").encode())
                               for text in CORPUS)
    assert counts[ids[1:] == own.end_of_document_id].tolist() == [0] * len(CORPUS)


def test_bytes_of_an_answer_behind_its_prompt(other_vocabularies: dict[str, str]) -> None:
    for name in ("python_8k", other_vocabularies["llama"]):
        own = vocabulary.load_vocabulary(name)
        prompt = own.encode_prompt("def f(x):\n")
        for answer in ("    return x", " \u4e66", "\U0001f389"):
            ids = np.array([*prompt, *own.encode_after(prompt, answer)])
            here = slice(len(prompt) - 1, None)
            assert own.bytes_behind(ids[:-1], ids[1:])[here].sum() == len(answer.encode())


def test_bytes_of_what_a_file_loses_are_not_counted(other_vocabularies: dict[str, str]) -> None:
    t5 = vocabulary.load_vocabulary(other_vocabularies["t5"])
    ids = np.array([t5.end_of_document_id, *t5.encode("the row\n  is   read"), t5.end_of_document_id])
    assert t5.bytes_behind(ids[:-1], ids[1:]).sum() == len("the row is read")


def test_bytes_that_are_no_text(shipped: vocabulary.Vocabulary) -> None:
    first, *_ = shipped.encode("\u2581")
    assert shipped.decode([first]) == "\ufffd"


def test_lone_surrogates_are_refused(shipped: vocabulary.Vocabulary) -> None:
    with pytest.raises(UnicodeEncodeError):
        shipped.encode("\ud800")


def test_tensorflow_gives_the_same_ids(shipped: vocabulary.Vocabulary) -> None:
    seqio = pytest.importorskip("seqio")
    source = pathlib.Path(vocabulary.__file__).read_text(encoding="utf-8")
    samples = [*AWKWARD, source, vocabulary.__doc__, "".join(map(chr, range(0x3000)))]
    other = seqio.SentencePieceVocabulary(shipped.path)
    assert (other.vocab_size, other.eos_id, other.pad_id) == (shipped.pieces, 1, shipped.pad_id)
    in_tensorflow = other.tf_tokenizer.tokenize(samples)
    back = other.tf_tokenizer.detokenize(in_tensorflow).numpy()
    for index, sample in enumerate(samples):
        ids = shipped.encode(sample)
        assert in_tensorflow[index].numpy().tolist() == ids
        assert other.encode(sample) == ids
        assert back[index].decode("utf-8") == sample
    assert other.encode_tf(source).numpy().tolist() == shipped.encode(source)


def test_training_is_deterministic(trained: vocabulary.Vocabulary, tmp_path: pathlib.Path) -> None:
    program = (
        "import sys; from codellm_jax import vocabulary; "
        f"vocabulary.train_vocabulary({DOCUMENTS!r}, 480, sys.argv[1])"
    )
    for seed in ("1", "2"):
        output = tmp_path / f"{seed}.model"
        subprocess.run(
            [sys.executable, "-c", program, str(output)],
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
        )
        assert output.read_bytes() == pathlib.Path(trained.path).read_bytes()
        assert str(tmp_path).encode() not in output.read_bytes()


@pytest.mark.parametrize("documents", [[], ["only a little text"]])
def test_training_with_too_little_text(documents: list[str], tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="Cannot train a vocabulary of 8000 ids") as error:
        vocabulary.train_vocabulary(documents, 8000, str(tmp_path / "v.model"))
    assert "\n" not in str(error.value)


def test_training_needs_a_file_name() -> None:
    with pytest.raises(ValueError, match="must end in '.model', found 'mine'"):
        vocabulary.train_vocabulary(DOCUMENTS, 480, "mine")


def test_missing_vocabularies(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'python_8k'"):
        vocabulary.load_vocabulary("python_8")
    with pytest.raises(FileNotFoundError, match="There is no vocabulary file .*absent.model"):
        vocabulary.load_vocabulary(str(tmp_path / "absent.model"))


@pytest.mark.parametrize("content, what", [
    (b"", ""), (b"no model at all" * 9, ""), (bytes(100), ""),
    (gzip.compress(b"x", mtime=0), " but compressed by gzip"),
    (b"PK\x03\x04" + bytes(9), " but a zip archive"),
    (b"version https://git-lfs.github.com/spec/v1\n", " but a Git LFS pointer instead of the file")])
def test_other_files_are_refused(content: bytes, what: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "other.model"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"other.model .* is not a SentencePiece model file{what}.*python_8k") as error:
        vocabulary.load_vocabulary(str(file))
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_told(tmp_path: pathlib.Path) -> None:
    (tmp_path / "v.model").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="v.model is a link to .*gone, which does not exist"):
        vocabulary.load_vocabulary(str(tmp_path / "v.model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer: neither tokenizer.json nor .*Give a Sentence"):
        vocabulary.load_vocabulary(str(tmp_path / "empty"))


def _model_without_special_ids(file: pathlib.Path) -> None:
    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words of a text"] * 9),
        model_writer=buffer,
        vocab_size=20,
        model_type="char",
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    file.write_bytes(buffer.getvalue())


def test_special_ids_of_other_files(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "other.model"
    _model_without_special_ids(file)
    with pytest.raises(ValueError, match="names no end_of_document id; set vocabulary.end_of_document_id"):
        vocabulary.load_vocabulary(str(file), pad_id=0)
    assert vocabulary.load_vocabulary(str(file), end_of_document_id=1).pad_id == 1
    with pytest.raises(ValueError, match="vocabulary.pad_id is 99, but"):
        vocabulary.load_vocabulary(str(file), pad_id=99, end_of_document_id=1)
    with pytest.raises(ValueError, match="multiple must be at least 1, found 0"):
        vocabulary.load_vocabulary(str(file), pad_id=0, end_of_document_id=1, multiple=0)
    chosen = vocabulary.load_vocabulary(str(file), pad_id=0, end_of_document_id=1)
    assert (chosen.pad_id, chosen.end_of_document_id, chosen.size) == (0, 1, 128)


def test_a_file_that_changes_is_noticed(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "changing.model"
    first = vocabulary.train_vocabulary(DOCUMENTS, 480, str(file))
    vocabulary.train_vocabulary(DOCUMENTS, 470, str(file))
    with pytest.raises(ValueError, match="changed since it was loaded"):
        first.encode("text")


def test_a_vocabulary_is_a_plain_value(shipped: vocabulary.Vocabulary) -> None:
    assert pickle.loads(pickle.dumps(shipped)) == shipped
    assert hash(shipped) == hash(dataclasses.replace(shipped))
    with pytest.raises(dataclasses.FrozenInstanceError):
        shipped.pad_id = 3  # type: ignore[misc]


def test_import_is_light() -> None:
    heavy = "{'tensorflow', 'seqio', 'jax', 'gin', 'etils', 'numpy', 'sentencepiece'}"
    program = f"import sys, codellm_jax.vocabulary; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"
