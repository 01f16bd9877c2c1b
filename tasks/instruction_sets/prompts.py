"""How an instruction becomes what a model reads: the prompt of Stanford Alpaca, and its like in Chinese."""

import re

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
        language = "zh" if _CHINESE.search(instruction + given) else "en"
    return _PROMPTS[language, bool(given)].format(instruction=instruction, input=given)
