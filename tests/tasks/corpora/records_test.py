"""Instructions as files hold them: prompts, both forms of records, and what is saved of broken files."""

import gzip
import json
import logging
import pathlib
import re
from collections.abc import Callable

import pytest

from tasks.corpora import files
from tasks.corpora.records import json_records
from tasks.instruction_sets import instructions
from tasks.instruction_sets.instructions import Pair
from tasks.instruction_sets.prompts import alpaca_prompt

WHOLE = {"holdout": 0}

ENGLISH = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Name a colour.

### Response:"""
ENGLISH_WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further \
context. Write a response that appropriately completes the request.

### Instruction:
Add {them}.

### Input:
1, 2

### Response:"""
CHINESE = """下面是一条描述任务的指令。请写出恰当完成该要求的回答。

### 指令：
说一种颜色。

### 回答："""
CHINESE_WITH_INPUT = """下面是一条描述任务的指令，以及提供更多背景的输入。请写出恰当完成该要求的回答。

### 指令：
Translate.

### 输入：
红

### 回答："""


def _record(number: int) -> dict[str, str]:
    return {"instruction": f"Question {number}", "input": "", "output": f"answer {number}"}


def _targets(spec: dict, split: str = "train", name: str = "text.mine") -> list[str]:
    return [pair.targets for pair in instructions.pairs(spec, split, name)]


def test_prompts() -> None:
    assert alpaca_prompt("Name a colour.") == ENGLISH
    assert alpaca_prompt("Add {them}.", "1, 2") == ENGLISH_WITH_INPUT
    assert alpaca_prompt("说一种颜色。", "", "zh") == CHINESE
    assert alpaca_prompt("Translate.", "红") == CHINESE_WITH_INPUT
    assert alpaca_prompt("Translate.", "红", "en").startswith("Below")
    assert alpaca_prompt("Name a colour.", "", "zh").startswith("下面")


@pytest.mark.parametrize("given", [" \n", "<noinput>", "No input.", '"<no input>"', "无输入", "&lt;无输入&gt;"])
def test_words_for_no_input(given: str) -> None:
    assert alpaca_prompt("Name a colour.", given, "en") == ENGLISH


def test_no_input_within_an_input_stays() -> None:
    assert "### Input:\nno input given" in alpaca_prompt("Say why.", "no input given")


def test_both_forms(write: Callable[..., str]) -> None:
    records = [
        {"instruction": "Name a colour.", "input": "", "output": "red", "response": "ignored"},
        {"instruction": "Add {them}.", "input": "1, 2", "output": "3\n"},
        {"instruction": "说一种颜色。", "output": "红"},
        {"input": "是或否？\n答案：", "target": "否", "type": "nli", "answer_choices": ["是", "否"]},
        {"instruction": "Name a colour.", "input": None, "output": "blue"},
    ]
    expected = [
        Pair(ENGLISH, "red"), Pair(ENGLISH_WITH_INPUT, "3\n"), Pair(CHINESE, "红"), Pair("是或否？\n答案：", "否"),
        Pair(ENGLISH, "blue"),
    ]
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    for name, content in (
        ("list.json", records),
        ("indented.txt", "\ufeff" + json.dumps(records, indent=4)),
        ("lines.json", lines),
        ("objects.json", "\n".join(json.dumps(record, indent=1) for record in records)),
        ("list.json.gz", gzip.compress(json.dumps(records).encode())),
        ("lines.jsonl.gz", gzip.compress(lines.encode())),
    ):
        spec = {"instructions": write(name, content), **WHOLE}
        assert list(instructions.pairs(spec, "train")) == expected, name


def test_zstd(write: Callable[..., str]) -> None:
    zstandard = pytest.importorskip("zstandard")
    content = zstandard.compress(json.dumps([_record(1), _record(2)]).encode())
    assert _targets({"instructions": write("a.json.zst", content), **WHOLE}) == ["answer 1", "answer 2"]


def test_one_language_for_all(write: Callable[..., str]) -> None:
    spec = {"instructions": write("a.json", [_record(1)]), "language": "zh", **WHOLE}
    [pair] = instructions.pairs(spec, "train")
    assert pair.inputs == CHINESE.replace("说一种颜色。", "Question 1")


def test_what_is_lost_is_told(
    write: Callable[..., str], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps(record) for record in (
        _record(1),
        _record(2) | {"output": " "},
        _record(3) | {"instruction": ""},
        _record(4) | {"output": ["a", "b"]},
        _record(5) | {"input": 5},
        {"instruction": "no output"},
        {"input": "no target"},
        {"instruction": "ambiguous", "input": "x", "target": "y"},
        {"input": "", "target": "x"},
        [1, 2],
        _record(6) | {"output": "\ud800"},
    )]
    lines += ['{"instruction": "breaks off', "", '{"instruction": "\\x", "output": "no such escape"}']
    content = "\n".join(lines).encode() + b'\n{"instruction": "\xff", "output": "no UTF-8"}\n'
    with caplog.at_level(logging.WARNING):
        assert _targets({"instructions": write("a.jsonl", content), **WHOLE}) == ["answer 1"]
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("text.mine, read for train: 1 records are instructions, skipped: ")
    for loss, first in (
        ("2 broken JSON", 12), ("3 empty", 2), ("1 not a JSON object", 10), ("2 not valid UTF-8", 11),
        ("2 with a value that is no text", 4), ("3 without instruction and output, input and target, or messages", 6),
    ):
        assert f"{loss} (first: {tmp_path}/a.jsonl, line {first})" in line


def test_nothing_left(write: Callable[..., str]) -> None:
    path = write("a.json", [{"question": "x"}] * 3)
    with pytest.raises(ValueError, match="^text.mine: no instruction is usable in .*3 without instruction") as error:
        _targets({"instructions": path})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="b.json' .1 empty file .first: .*b.json"):
        _targets({"instructions": write("b.json", "")})
    with pytest.raises(ValueError, match="there are no records"):
        _targets({"instructions": write("b.json", "[]")})
    with pytest.raises(FileNotFoundError, match=r"^text.mine: no file matches 'nowhere\*.json'"):
        _targets({"instructions": "nowhere*.json"})


GOOD = [json.dumps(_record(number), indent=1) for number in range(4)]


@pytest.mark.parametrize(
    ("content", "kept", "broken"),
    [
        ("[" + ",\n".join(GOOD) + ",]", [0, 1, 2, 3], 0),  # A comma too many, as in one of the Chinese files.
        ("[" + ",\n".join(GOOD), [0, 1, 2, 3], 0),
        ("[" + "\n".join(GOOD) + "]", [0, 1, 2, 3], 0),
        ("[" + ",".join(GOOD) + "] rest", [0, 1, 2, 3], 1),
        ("[" + ",".join(GOOD)[:-9], [0, 1, 2], 1),
        ("[" + ",".join([GOOD[0], GOOD[1].replace('"Question', '"a "quoted" Question'), *GOOD[2:]]), [0, 2, 3], 1),
        ("[" + ",".join([GOOD[0], GOOD[1][:-3], GOOD[2][5:], GOOD[3]]) + "]", [0, 3], 1),
        ("[" + ",".join([GOOD[0][1:], GOOD[1], "nothing", GOOD[2].replace(":", "=", 1), GOOD[3]]) + "]", [1, 3], 2),
        ("[" + ",".join([GOOD[0].replace("answer", 'if (a) {\\"b\\": [{').replace('"output"', "output"), *GOOD[1:]]),
         [1, 2, 3], 1),
    ],
)
def test_broken_lists_are_salvaged(
    write: Callable[..., str], caplog: pytest.LogCaptureFixture, content: str, kept: list[int], broken: int
) -> None:
    found = _targets({"instructions": write("a.json", content), **WHOLE})
    assert found == [f"answer {number}" for number in kept]
    assert re.findall(r"(\d+) broken JSON", caplog.text) == ([str(broken)] if broken else [])


def test_line_breaks_within_strings_are_mended(write: Callable[..., str]) -> None:
    content = "[" + GOOD[0].replace("answer 0", "two\nlines") + "]"
    assert _targets({"instructions": write("a.json", content), **WHOLE}) == ["two\nlines"]


@pytest.mark.parametrize("join", ["\n", ",\n"])
def test_compressed_files_that_break_off(
    write: Callable[..., str], caplog: pytest.LogCaptureFixture, join: str
) -> None:
    import random

    dice = random.Random(3)
    records = [_record(number) | {"output": dice.randbytes(400).hex()} for number in range(3000)]
    text = join.join(map(json.dumps, records))
    content = gzip.compress((f"[{text}]" if "," in join else text).encode())
    found = _targets({"instructions": write("a.json.gz", content[: len(content) // 2]), **WHOLE})
    assert 1000 < len(found) < 1600 and found == [record["output"] for record in records[: len(found)]]
    assert "1 broken rest of a.json.gz" in caplog.text


def test_other_items_of_a_list(write: Callable[..., str]) -> None:
    found = list(json_records(write("a.json", [1, "x", None, [_record(0)], _record(1)])))
    assert found == [files.Lost("not a JSON object")] * 4 + [_record(1)]
