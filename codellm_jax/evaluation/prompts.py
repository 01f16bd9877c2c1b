"""Prompts for a tuned model, in the format of its tuning.

This is the vocabulary's chat template, if it has one and the model was not tuned here only on instruction records; else
the prompts of `tasks.instruction_sets.prompts`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from codellm_jax import chat
from codellm_jax.chat import Message
from codellm_jax.vocabulary import Vocabulary


def takes_chat_template(vocabulary: Vocabulary, record: Mapping[str, Any]) -> bool:
    """Whether a model whose checkpoint has this record expects the chat template."""
    if vocabulary.chat_template is None:
        return False
    ledger = record["ledger"]
    return ledger["stage"] != "tuning" or ledger.get("conversations", False)


def as_messages(instruction: str, given: str = "") -> list[Message]:
    """An instruction and its input as a user's message."""
    return [{"role": "user", "content": f"{instruction}\n\n{given}" if given.strip() else instruction}]


class Prompt(NamedTuple):
    text: str
    ids: list[int]


def prompt_of(
    vocabulary: Vocabulary, messages: Sequence[Message], by_template: bool, turns: Callable[..., list[str]] | None
) -> Prompt:
    """The prompt for the answer to messages.

    Args:
      by_template: the result of `takes_chat_template`.
      turns: turns messages into prompts and answers; used without the template.

    Raises:
      ValueError: in one line; the template rejects them.
    """
    if by_template:
        try:
            return Prompt(chat.prompt_text(vocabulary, messages), chat.prompt_tokens(vocabulary, messages))
        except chat.Refused as error:
            raise ValueError(f"Messages {error}. The first is {messages[0]['content'][:60]!r}.") from error
    if turns is None:
        raise ValueError("infer.turns is None, and the model has no chat template: messages cannot be answered.")
    texts = turns(messages)
    [ids] = chat.turns_tokens(vocabulary, [texts])
    return Prompt("".join(texts), chat.joined(ids).ids)
