"""`t5x infer`: typed and from files, as it comes and whole, in the template of instructions, and after slips."""

import bz2
import contextlib
import dataclasses
import gzip
import io
import json
from types import SimpleNamespace

import pytest

from codellm_jax import cli
from codellm_jax.configuration import build, read_configuration
from codellm_jax.evaluation.decoding import Piece
from codellm_jax.evaluation.infer import Inference, infer, read_prompts
from codellm_jax.evaluation.trained import TrainedModel, trained_model
from codellm_jax.runtime.partitioning import make_mesh
from codellm_jax.vocabulary import load_vocabulary
from tasks.instruction_sets.prompts import alpaca_prompt

PROMPTS = ["def add(a, b):\n    return", "the row", "世界 order", "value = value * 3"]


@pytest.fixture(scope="module")
def flags(pretrained):
    return ["infer", "--gin_file=gin/infer.gin", f"--gin.CHECKPOINT_PATH={pretrained / 'CODE'}",
            "--gin.sampling.max_new_tokens=12"]


@pytest.fixture(scope="module")
def inference(flags) -> Inference:
    overrides = [(flag[6:].split("=")[0], flag.split("=", 1)[1]) for flag in flags[2:]]
    return build(read_configuration(["gin/infer.gin"], overrides), "infer")


@pytest.fixture(scope="module")
def alone(inference) -> list[str]:
    """Each prompt's answer, generated at once by itself."""
    with trained_model(inference.checkpoint) as (model, _):
        return [model.vocabulary.decode(model.write(
            [model.vocabulary.encode(prompt)], [()], inference.sampling, inference.seed, numbers=[number])[0].ids)
            for number, prompt in enumerate(PROMPTS)]


def write_records(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_parts_make_up_the_whole_in_the_order_of_prompts(inference, alone):
    heard: list[tuple[int, list[str]]] = []
    answers = list(infer(inference, PROMPTS, lambda text: heard[-1][1].append(text),
                         lambda number, prompt: heard.append((number, [])), report=lambda line: None))
    assert [answer.prompt for answer in answers] == PROMPTS
    assert [answer.text for answer in answers] == ["".join(parts) for _, parts in heard] == alone
    assert [number for number, _ in heard] == list(range(len(PROMPTS)))
    assert all(answer.reason in ("end", "length") for answer in answers)
    one_by_one = list(infer(inference, iter(PROMPTS), lambda text: None, lambda number, prompt: None))
    assert one_by_one == answers


def test_a_part_holds_whole_characters_only(inference, monkeypatch):
    """Bytes of a character come one by one: none is shown before the character is whole."""
    from codellm_jax.evaluation import trained

    vocabulary = inference.checkpoint.vocabulary
    ids = vocabulary.encode("a鑫b")
    assert len(ids) >= 5  # three of them for the character
    pieces = [Piece(0, [token], "end" if number == len(ids) - 1 else None) for number, token in enumerate(ids)]
    monkeypatch.setattr(trained, "stream", lambda *rest, **options: iter(pieces))
    parts: list[str] = []
    [answer] = infer(inference, ["x"], parts.append, lambda number, prompt: None)
    assert answer.text == "a鑫b" and [part for part in parts if part] == ["a", "鑫", "b"]


def test_prompts_begin_where_the_vocabulary_says_so(inference, beginning_tokenizer, monkeypatch):
    from codellm_jax.evaluation import infer as module

    asked: list[list[int]] = []

    class Model:
        vocabulary, config = load_vocabulary(beginning_tokenizer), SimpleNamespace(length=32)

        def stream(self, prompts, *rest, **options):
            asked.extend(prompts)
            return iter([Piece(row, [], "end") for row in range(len(prompts))])

        def room(self, sampling):
            return 8

    monkeypatch.setattr(module, "trained_model", lambda *rest: contextlib.nullcontext((Model(), {})))
    list(infer(inference, ["the row", ""], lambda text: None, lambda number, prompt: None))
    assert asked == [[0, *load_vocabulary().encode("the row")], [0]]


def test_answers_are_out_before_later_prompts_are_read(inference):
    """Four batches of one: each answer is whole before the next begins."""
    seen: list[str] = []
    one_by_one = dataclasses.replace(inference, batch_size=1)
    answers = infer(one_by_one, PROMPTS, lambda text: None, lambda number, prompt: seen.append(prompt))
    for number, answer in enumerate(answers, 1):
        assert seen == PROMPTS[:number] and answer.prompt == PROMPTS[number - 1]


def test_a_prompt_too_long_is_told(flags, inference, tmp_path, capsys):
    prompt = "the row " * 100
    path = write_records(tmp_path / "prompts.jsonl", [{"prompt": "the row"}, {"prompt": prompt}])
    assert cli.main([*flags, f"--prompts={path}", f"--output={tmp_path}/out.jsonl"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    cut = len(inference.checkpoint.vocabulary.encode(prompt)) - (32 + 1 - 12)  # 32 positions, 12 new tokens
    assert [line["prompt_tokens_cut"] for line in lines] == [0, cut]
    assert f"prompt 2 is too long: its first {cut} tokens are not read" in capsys.readouterr().err


def test_nothing_is_overwritten_before_there_is_something_to_write(flags, tmp_path, capsys):
    path = write_records(tmp_path / "prompts.jsonl", [{"prompt": "the row"}])
    assert cli.main([*flags, f"--prompts={path}", f"--output={path}"]) == 1
    assert "--output and --prompts are both" in capsys.readouterr().err
    assert json.loads((tmp_path / "prompts.jsonl").read_text()) == {"prompt": "the row"}
    (tmp_path / "out.jsonl").write_text("kept")
    assert cli.main([*flags, f"--prompts={path}", f"--output={tmp_path}/out.jsonl", "--gin.CHECKPOINT_PATH=none"]) == 1
    assert (tmp_path / "out.jsonl").read_text() == "kept"
    assert cli.main([*flags, f"--output={tmp_path}/none/out.jsonl"]) == 1
    assert "cannot be written: its directory does not exist" in capsys.readouterr().err


def test_typed_prompts(flags, inference, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("the row\n\n \nthe row\n"))
    assert cli.main(flags) == 0
    out, err = capsys.readouterr()
    whole = infer(inference, ["the row"] * 2, lambda text: None, lambda number, prompt: None)
    assert out == "".join(f"{answer.text}\n" for answer in whole) and "Parameters from step 4" in err


def test_prompts_of_a_file(flags, alone, tmp_path, capsys):
    path = write_records(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    assert cli.main([*flags, f"--prompts={path}"]) == 0
    out = capsys.readouterr().out
    assert out == "".join(f"--- {number}/4: {prompt}\n{text}\n"
                          for number, (prompt, text) in enumerate(zip(PROMPTS, alone, strict=True), 1))
    assert cli.main([*flags, f"--prompts={path}", f"--output={tmp_path}/out.jsonl"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["text"]) for line in lines] == list(zip(PROMPTS, alone, strict=True))
    assert {line["reason"] for line in lines} <= {"end", "length"}
    assert "prompt 4/4 answered" in capsys.readouterr().out


def test_instructions_go_through_the_template_of_tuning(flags, tmp_path):
    records = [{"instruction": "Add.", "input": "1 and 2"}, {"instruction": "写诗"}, {"prompt": "Say it."}]
    path = write_records(tmp_path / "prompts.jsonl", records)
    assert cli.main([*flags, f"--prompts={path}", "--instruction", f"--output={tmp_path}/out.jsonl"]) == 0
    found = [json.loads(line)["prompt"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found == [alpaca_prompt("Add.", "1 and 2"), alpaca_prompt("写诗"), alpaca_prompt("Say it.")]
    assert found[1].startswith("下面是一条")


def test_lines_of_a_text_file_are_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\r\n\n  two\nthree")
    assert read_prompts(str(tmp_path / "prompts.txt"), None) == ["one", "  two", "three"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress])
@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"prompt": "写"}\r\n{"prompt": "{"}\r\n'), ("a.txt", '{"prompt": "写"}\n\n{"prompt": "{"}'),
    ("a.json", '[{"prompt": "写"},\n {"prompt": "{"}]'), ("a.JSONL.gz", '[{"prompt": "写"}, {"prompt": "{"}]'),
    ("prompts", "写\r\n{\r\n")])
def test_what_a_file_of_prompts_is_its_content_says(tmp_path, encoding, compress, name, content):
    (tmp_path / name).write_bytes(compress(content.encode(encoding)))
    assert read_prompts(str(tmp_path / name), None) == ["写", "{"]


def test_one_record_of_several_lines(tmp_path):
    (tmp_path / "a.json").write_text('{\n "prompt": "x"\n}\n')
    assert read_prompts(str(tmp_path / "a.json"), None) == ["x"]
    (tmp_path / "a.py").write_text('{\n "prompts": "x"\n}\n')  # a text that is JSON, and no record
    assert read_prompts(str(tmp_path / "a.py"), None) == ["{", ' "prompts": "x"', "}"]


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"prompt": "x"}\n{"prompt": 3}\n', "a.jsonl, line 2 must be a JSON object"),
    ("a.jsonl", b'{"prompt": "x"', "a.jsonl, line 1 must be a JSON object"),
    ("a.jsonl", b'{"instruction": "x"}', "a.jsonl, line 1 is an instruction: add --instruction"),
    ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\\ud800"}', "a.jsonl, line 2 holds half a surrogate pair"),
    ("a.json", b'[{"prompt": "x"}, {"prompt": 3}]', "a.json, record 2 must be a JSON object"),
    ("a.json", b"write a poem", "a.json, line 1 must be a JSON object"),
    ("a.txt", b" \n\n", "a.txt holds no prompt"), ("a.txt", b"\xff\xfe", "a.txt holds no prompt"),
    ("a.txt", "one\n\u00fcber".encode("latin-1"), "a.txt is not UTF-8 text: line 2 holds the byte 0xfc"),
    ("a.txt", "one two".encode("utf-16-le"), "a.txt is UTF-16 without a byte order mark"),
    ("a.txt", b"PAR1" + bytes(99), "a.txt is a Parquet file"),
    ("a.txt", gzip.compress(b"one", mtime=0)[:-9], "a.txt is damaged: the compressed file is truncated"),
    (None, b"", "There is no file of prompts nowhere.txt")])
def test_slips_get_one_line(flags, tmp_path, capsys, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    assert cli.main([*flags, f"--prompts={tmp_path / name if name else 'nowhere.txt'}"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines


def test_what_is_written_keeps_its_first_blanks(inference, monkeypatch, other_vocabularies):
    """A vocabulary that puts a space before a text takes none away from what follows a prompt."""
    vocabulary = load_vocabulary(other_vocabularies["llama"])
    prompt, whole = "def f(x):\n", "def f(x):\n    return value"
    ids = vocabulary.encode(whole)[len(vocabulary.encode(prompt)) :]
    pieces = [Piece(0, [token], "end" if number == len(ids) - 1 else None) for number, token in enumerate(ids)]

    model = SimpleNamespace(vocabulary=vocabulary, config=SimpleNamespace(length=64), room=lambda sampling: 8,
                            stream=lambda *rest, **options: iter(pieces))
    monkeypatch.setattr("codellm_jax.evaluation.infer.trained_model",
                        lambda *rest: contextlib.nullcontext((model, {})))
    parts: list[str] = []
    [answer] = infer(inference, [prompt], parts.append, lambda number, prompt: None)
    assert answer.text == "".join(parts) == "    return value"


@pytest.mark.parametrize("word, stops", [("\n    x", True), ("    x", True), ("     x", False)])
def test_stop_words_are_looked_for_in_what_follows_the_prompt(inference, other_vocabularies, word, stops):
    vocabulary = load_vocabulary(other_vocabularies["llama"])
    context = vocabulary.encode("value\n" if word[0] == " " else "value")
    text = vocabulary.encode("value\n    x")[len(context) :]
    model = TrainedModel(None, SimpleNamespace(length=64), vocabulary, make_mesh(inference.checkpoint.mesh))
    assert model._options([context], [[word]], inference.sampling)["stopped"](0, text) == stops
