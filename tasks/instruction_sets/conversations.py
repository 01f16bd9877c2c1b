"""Conversations in records, and the part of them to train on.

A record is {"messages": [{"role": "system" | "user" | "assistant", "content": TEXT}, ...]}, as in chat interfaces, or
{"conversations": [{"from": "system" | "human" | "gpt", "value": TEXT}, ...]}, as in ShareGPT. A content may be a list
of parts {"type": "text", "text": TEXT}, which are joined by line breaks. Other fields of a message that are texts, such
as "reasoning_content", are kept for templates that use them; other fields of the record are ignored.

A conversation begins with a user message, optionally after a system message, and has an assistant's answer. Everything
after the last answer is cut off, since it has no loss.
"""

from collections.abc import Mapping
from typing import Any

from tasks.corpora.files import Lost

_ROLES = {"system": "system", "user": "user", "assistant": "assistant",
          "human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_TOOLS = ("tools", "functions", "tool_calls", "function_call", "tool_call_id")

Message = dict[str, str]


def is_conversation(record: Mapping[str, Any]) -> bool:
    """Whether a record is a conversation, valid or not."""
    return "messages" in record or "conversations" in record


def read_conversation(record: Mapping[str, Any]) -> list[Message] | Lost:
    """The messages of a record, each with role, content and other texts; or why it cannot be trained on."""
    given = record["messages"] if "messages" in record else record["conversations"]
    if not isinstance(given, list) or not given or not all(isinstance(each, dict) for each in given):
        return Lost("conversations that are not a list of messages")
    if any(holder.get(field) for holder in (record, *given) for field in _TOOLS):
        return Lost("conversations with tools, which are not supported")
    messages = []
    for each in given:
        message = _message(each)
        if isinstance(message, Lost):
            return message
        messages.append(message)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return Lost("conversations without an answer of the assistant")
    last = len(roles) - roles[::-1].index("assistant")
    messages, roles = messages[:last], roles[:last]
    if "system" in roles[1:]:
        return Lost("conversations with a system message that is not the first")
    if roles[0] == "assistant" or roles[:2] == ["system", "assistant"]:
        return Lost("conversations that begin with the assistant")
    if any(pair == ("assistant", "assistant") for pair in zip(roles, roles[1:], strict=False)):
        return Lost("conversations with two answers in a row")
    if not all(message["content"].strip() for message in messages if message["role"] != "system"):
        return Lost("conversations with an empty message")
    return messages


def _message(given: Mapping[str, Any]) -> Message | Lost:
    role = given.get("role", given.get("from"))
    content = given.get("content", given.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        if role in ("tool", "function", "ipython"):
            return Lost("conversations with tools, which are not supported")
        return Lost(f"conversations with a role other than {', '.join(_ROLES)}")
    if isinstance(content, list):
        texts = [part["text"] for part in content
                 if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)]
        if len(texts) < len(content):
            return Lost("conversations with parts that are not text, such as images")
        content = "\n".join(texts)
    if not isinstance(content, str):
        return Lost("conversations with a content that is not text")
    others = {name: value for name, value in given.items() if isinstance(value, str) and name.isidentifier()
              and name not in ("role", "from", "content", "value")}
    return {"role": _ROLES[role], "content": content, **others}
