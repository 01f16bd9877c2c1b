"""Formats an instruction with the prompt of Stanford Alpaca, or its equivalent in Chinese.

A conversation has the same form. Each user message is an instruction, each assistant message its response, and a
system message replaces Alpaca's opening sentences:

    {system's message}

    ### Instruction:
    {first message of the user}

    ### Response:{answer}<end of document>

    ### Instruction:
    {second message of the user}

    ### Response:{answer}<end of document>

A single question with its answer, without a system message, thus equals a record {instruction, output}.
"""

import itertools
import re
from collections.abc import Mapping, Sequence

_PROMPTS = {
    ("en", True): (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    ("en", False): (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
    ("zh", True): (
        "下面是一条描述任务的指令，以及提供更多背景的输入。请写出恰当完成该要求的回答。\n\n"
        "### 指令：\n{instruction}\n\n### 输入：\n{input}\n\n### 回答："
    ),
    ("zh", False): (
        "下面是一条描述任务的指令。请写出恰当完成该要求的回答。\n\n"
        "### 指令：\n{instruction}\n\n### 回答："
    ),
}
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
# Placeholders for an empty input in Alpaca and its translations.
_NO_INPUT = re.compile(r"""[\s<>"'`]*(no\s?input|无输入|没有输入|无需输入)[\s<>"'`.。]*""", re.IGNORECASE)


def alpaca_prompt(instruction: str, given: str = "", language: str | None = None) -> str:
    """The prompt for the response to an instruction.

    Args:
      instruction: the instruction.
      given: the input; if blank, or a placeholder such as "<noinput>", its section is left out.
      language: "en" or "zh"; by default Chinese if instruction or input hold a Chinese character.

    Returns:
      A text that ends right before the response.
    """
    if not given.strip() or _NO_INPUT.fullmatch(given.replace("&lt;", "<").replace("&gt;", ">")):
        given = ""
    if language is None:
        language = _language(instruction + given)
    return _PROMPTS[language, bool(given)].format(instruction=instruction, input=given)


def conversation_turns(messages: Sequence[Mapping[str, str]], language: str | None = None) -> list[str]:
    """The prompts and answers of a conversation in turn, in the form described above.

    Args:
      messages: each with role ("system", only at the beginning, "user" or "assistant") and content.
      language: the language of the words between messages; by default that of the messages before the first answer, as
        in `alpaca_prompt`.

    Returns:
      A prompt, its answer, the next prompt and so on, without the end of document after each answer. The last is a
      prompt if the last message is a user's.
    """
    if language is None:
        first = itertools.takewhile(lambda message: message["role"] != "assistant", messages)
        language = _language("".join(message["content"] for message in first))
    opening, section, response = _PROMPTS[language, False].split("\n\n")
    turns: list[str] = []
    waiting = [opening]  # parts of the next prompt
    for message in messages:
        match message["role"]:
            case "system" if message["content"].strip():
                waiting = [message["content"]]
            case "user":
                waiting.append(section.format(instruction=message["content"]))
            case "assistant":
                turns += ["\n\n".join([*waiting, response]), message["content"]]
                waiting = [""]
    return turns if messages[-1]["role"] == "assistant" else [*turns, "\n\n".join([*waiting, response])]


def _language(text: str) -> str:
    return "zh" if _CHINESE.search(text) else "en"
