"""How an instruction becomes what a model reads: the prompt of Stanford Alpaca, and its like in Chinese.

A conversation has the same form. Each message of a user is an instruction of its own, each message of the assistant
its response, and a system's message stands in the place of the sentences that Alpaca begins with:

    {system's message}

    ### Instruction:
    {first message of the user}

    ### Response:{answer}<end of document>

    ### Instruction:
    {second message of the user}

    ### Response:{answer}<end of document>

So a question and its answer, without a system's message, are what a record {instruction, output} is.
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
# What stands in the place of an empty input in Alpaca and its translations.
_NO_INPUT = re.compile(r"""[\s<>"'`]*(no\s?input|无输入|没有输入|无需输入)[\s<>"'`.。]*""", re.IGNORECASE)


def alpaca_prompt(instruction: str, given: str = "", language: str | None = None) -> str:
    """The prompt that asks for the response to an instruction.

    Args:
      instruction: what to do.
      given: what to do it to; blank, or a word for nothing such as "<noinput>", leaves the section out.
      language: "en" or "zh"; by default Chinese where instruction or input hold a Chinese character.

    Returns:
      A text that ends where the response begins.
    """
    if not given.strip() or _NO_INPUT.fullmatch(given.replace("&lt;", "<").replace("&gt;", ">")):
        given = ""
    if language is None:
        language = _language(instruction + given)
    return _PROMPTS[language, bool(given)].format(instruction=instruction, input=given)


def conversation_turns(messages: Sequence[Mapping[str, str]], language: str | None = None) -> list[str]:
    """What a model reads and what it writes by turns, of a conversation in the form that the module describes.

    Args:
      messages: each with role ("system", at the beginning alone, "user" or "assistant") and content.
      language: of the words that stand between messages; by default that of the messages before the first answer, as
        `alpaca_prompt` finds it.

    Returns:
      A prompt, its answer, the next prompt and so on. The last is a prompt where a user has the last word. The end of
      document behind each answer is not among them.
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
