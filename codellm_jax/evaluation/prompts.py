"""What is asked of a tuned model, in the form that it was tuned with.

That is the vocabulary's chat template, where it has one and the model was not tuned here on instruction records alone;
else the prompts of `tasks.instruction_sets.prompts`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from codellm_jax import chat
from codellm_jax.chat import Message
from codellm_jax.vocabulary import Vocabulary


def takes_chat_template(vocabulary: Vocabulary, record: Mapping[str, Any]) -> bool:
    """Whether the chat template is the form of a model whose checkpoint has this record."""
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
    """What asks for the answer to messages.

    Args:
      by_template: whether `takes_chat_template`.
      turns: makes prompts and answers of messages where that is not so.

    Raises:
      ValueError: in one line; the template does not take them.
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
