"""Records of conversations: what is read, what is passed over and why, and their form without a chat template."""

import json
from collections.abc import Callable

import pytest

from tasks.corpora import specs
from tasks.corpora.files import Lost
from tasks.instruction_sets import instructions
from tasks.instruction_sets.conversations import read_conversation
from tasks.instruction_sets.instructions import Conversation, Pair
from tasks.instruction_sets.prompts import alpaca_prompt, conversation_turns

WHOLE = {"holdout": 0}


def user(content: object, **more: object) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content: object, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


def system(content: object) -> dict:
    return {"role": "system", "content": content}


SHORT = [user("One?"), assistant("1")]


@pytest.mark.parametrize("record, expected", [
    ({"messages": SHORT, "prompt": "One?", "prompt_id": 3}, SHORT),
    ({"messages": [system(""), *SHORT]}, [system(""), *SHORT]),
    ({"messages": [system("Be brief."), *SHORT, user("Two?"), user("And?"), assistant("2")]},
     [system("Be brief."), *SHORT, user("Two?"), user("And?"), assistant("2")]),
    ({"messages": [*SHORT, user("Two?")]}, SHORT),  # nothing is learned from it
    ({"messages": [user([{"type": "text", "text": "One"}, {"type": "text", "text": "more?"}]), assistant("1")]},
     [user("One\nmore?"), assistant("1")]),
    ({"messages": [user("One?", name=None), assistant("1", tool_calls=None, reasoning_content="Hm.")], "tools": []},
     [user("One?"), assistant("1", reasoning_content="Hm.")]),
    ({"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}], "id": "a"}, SHORT),
    ({"conversations": [system("S"), *SHORT]}, [system("S"), *SHORT]),
])
def test_what_a_record_holds(record, expected):
    assert read_conversation(record) == expected


@pytest.mark.parametrize("record, reason", [
    ({"messages": []}, "no list of messages"), ({"messages": "One?"}, "no list of messages"),
    ({"messages": None}, "no list of messages"), ({"messages": ["One?", "1"]}, "no list of messages"),
    ({"messages": [{"role": "user"}, assistant("1")]}, "content that is no text"),
    ({"messages": [{"content": "One?"}, assistant("1")]}, "a role other than system, user, assistant"),
    ({"messages": [{"role": "critic", "content": "x"}, *SHORT]}, "a role other than"),
    ({"messages": [{"role": ["user"], "content": "x"}, *SHORT]}, "a role other than"),
    ({"messages": [*SHORT, {"role": "tool", "content": "x"}, assistant("1")]}, "with tools, which are not read"),
    ({"messages": [user("One?"), assistant(None, tool_calls=[{"id": "1"}])]}, "with tools, which are not read"),
    ({"messages": SHORT, "tools": [{"name": "add"}]}, "with tools, which are not read"),
    ({"messages": [user("One?"), assistant("1"), assistant("2")]}, "two answers in a row"),
    ({"messages": [assistant("1"), user("One?"), assistant("1")]}, "that begin with the assistant"),
    ({"messages": [system("S"), assistant("1")]}, "that begin with the assistant"),
    ({"messages": [user("One?"), user("Two?")]}, "without an answer of the assistant"),
    ({"messages": [*SHORT, system("S"), user("Two?"), assistant("2")]}, "a system message that is not the first"),
    ({"messages": [user("One?"), assistant(" \n")]}, "an empty message"),
    ({"messages": [user(""), assistant("1")]}, "an empty message"),
    ({"messages": [user(3), assistant("1")]}, "a content that is no text"),
    ({"messages": [user({"text": "One?"}), assistant("1")]}, "a content that is no text"),
    ({"messages": [user([{"type": "image_url", "image_url": "x"}]), assistant("1")]}, "parts that are not text"),
    ({"messages": [user(["One?"]), assistant("1")]}, "parts that are not text"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "a role other than"),
])
def test_what_is_passed_over_and_why(record, reason):
    found = read_conversation(record)
    assert isinstance(found, Lost) and reason in found.reason


def test_a_file_may_hold_instructions_and_conversations(write: Callable[..., str], caplog: pytest.LogCaptureFixture):
    records = [{"instruction": "One?", "output": "1"}, {"messages": SHORT}, {"input": "a", "target": "b"},
               {"messages": [user("\ud800"), assistant("1")]}, {"messages": [user("x")]}, {"messages": [user("x")]}]
    path = write("a.jsonl", "\n".join(map(json.dumps, records)))
    found = list(instructions.pairs({"instructions": path, **WHOLE}, "train", "text.mine"))
    assert [type(each) for each in found] == [Pair, Conversation, Pair]
    assert found[1].messages == SHORT and found[1].place == f"{path}, line 2"
    assert (found[1].inputs, found[1].targets) == found[0]  # the same, without a template
    assert "text.mine, read for train: 3 records are instructions, skipped: 2 conversations without an answer of "\
        f"the assistant (first: {path}, line 5), 1 not valid UTF-8 (first: {path}, line 4)." in caplog.text


def test_a_first_prompt_is_in_one_split(write: Callable[..., str]):
    records = [{"messages": [user(f"Question {number}"), assistant("a"), user(f"More {copy}"), assistant("b")]}
               for number in range(60) for copy in range(3)]
    spec = {"instructions": write("a.json", records), "holdout": 0.2}
    found = {split: list(instructions.pairs(spec, split)) for split in specs.SPLITS}
    asked = [{each.messages[0]["content"] for each in pairs} for pairs in found.values()]
    assert sum(map(len, asked)) == len(set.union(*asked)) == 60 and all(map(len, asked))
    assert sum(map(len, found.values())) == 180


def test_a_conversation_without_a_template():
    messages = [*SHORT, user("Two {x}?"), assistant("2\n")]
    opening, section = alpaca_prompt("").split("\n\n### Instruction:\n")
    assert conversation_turns(messages) == [
        alpaca_prompt("One?"), "1", "\n\n### Instruction:\nTwo {x}?\n\n### Response:", "2\n"]
    assert conversation_turns(messages[:3]) == conversation_turns(messages)[:3]  # asked as it is learned
    assert conversation_turns([system("Be brief."), *SHORT]) == [
        "Be brief.\n\n### Instruction:\nOne?\n\n### Response:", "1"]
    assert conversation_turns([system(" "), *SHORT]) == [alpaca_prompt("One?"), "1"]
    assert conversation_turns([user("One?"), user("Two?"), assistant("1")])[0] == (
        f"{opening}\n\n### Instruction:\nOne?\n\n### Instruction:\nTwo?\n\n### Response:")
    assert conversation_turns([user("写诗"), assistant("a"), user("b"), assistant("c")])[::2] == [
        alpaca_prompt("写诗"), "\n\n### 指令：\nb\n\n### 回答："]
    assert conversation_turns([user("a"), assistant("诗"), user("诗"), assistant("c")])[2].endswith("### Response:")
    assert conversation_turns(SHORT, "zh")[0] == alpaca_prompt("One?", language="zh")
