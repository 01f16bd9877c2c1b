"""The ids of a published tokenizer that begin and end a document, and its chat template, from the files beside it.

Files that name a token come first (tokenizer_config.json, special_tokens_map.json), then those that give its id
(config.json, generation_config.json), then the tokenizer's own file.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from codellm_jax.tokenizing.backend import Backend

NAMING = ("tokenizer_config.json", "special_tokens_map.json")
NUMBERING = ("generation_config.json", "config.json")
# Tokenizers of these classes begin texts with bos_token unless a file says otherwise.
_BEGINS = ("Llama", "Gemma")


@dataclasses.dataclass(frozen=True)
class Published:
    """The facts about a tokenizer in its folder.

    Attributes:
      begin_ids: the ids that each text begins with; empty without any.
      end_id, pad_id: None if no file names one.
      chat_template: jinja; None without one.
      template_tokens: the tokens that a chat template may use by name, such as ("bos_token", "<s>").
      special: names of tokens that begin, end or pad, although the tokenizer's file does not mark them as special.
      text_form: "pangu" or "plain".
    """

    begin_ids: tuple[int, ...]
    end_id: int | None
    pad_id: int | None
    chat_template: str | None
    template_tokens: tuple[tuple[str, str], ...]
    special: tuple[str, ...]
    text_form: str


def published(
    backend: Backend, files: Mapping[str, Mapping[str, Any]], template_file: str | None, where: str
) -> Published:
    """Reads the files beside a tokenizer.

    Args:
      backend: the tokenizer.
      files: JSON objects by file name, those of NAMING and NUMBERING that exist.
      template_file: the content of chat_template.jinja.
      where: the tokenizer's address, for messages.

    Raises:
      ValueError: a file names a token that the tokenizer does not have.
    """
    config = files.get("tokenizer_config.json", {})
    named = {kind: _named(backend, files, kind, where) for kind in ("bos", "eos", "pad")}
    special = tuple(sorted({name for name, _ in filter(None, named.values()) if name not in backend.special_tokens}))
    ids = {kind: one[1] if one else _numbered(files, kind, backend.pieces) for kind, one in named.items()}
    adds = config.get("add_bos_token")
    if adds is None and not backend.begin_ids:  # a tokenizer.json contains this itself
        adds = str(config.get("tokenizer_class", "")).startswith(_BEGINS) and not where.endswith(".json")
    begin = backend.begin_ids if adds is None else (ids["bos"],) if adds and ids["bos"] is not None else ()
    return Published(
        begin_ids=begin,
        end_id=backend.end_id if ids["eos"] is None else ids["eos"],
        pad_id=backend.pad_id if ids["pad"] is None else ids["pad"],
        chat_template=_template(config.get("chat_template")) if template_file is None else template_file,
        template_tokens=_template_tokens(files),
        special=special,
        text_form="pangu" if config.get("tokenizer_class") == "GPTPanguTokenizer" else "plain",
    )


def _named(
    backend: Backend, files: Mapping[str, Mapping[str, Any]], kind: str, where: str
) -> tuple[str, int] | None:
    """The name and id of a special token, if a file names it."""
    for file in NAMING:
        value = files.get(file, {}).get(f"{kind}_token")
        name = value.get("content") if isinstance(value, dict) else value
        if not isinstance(name, str) or not name:
            continue
        token = backend.id_of(name)
        if token is None:
            raise ValueError(f"{file} names the {kind}_token {name!r}, which {where} does not have: they do not belong "
                             "together; correct the file.")
        return name, token
    return None


def _template_tokens(files: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Every token that a file names, as transformers passes them to chat templates."""
    found: dict[str, str] = {}
    for file in NAMING:
        for kind, value in files.get(file, {}).items():
            name = value.get("content") if isinstance(value, dict) else value
            if kind.endswith("_token") and isinstance(name, str):
                found.setdefault(kind, name)
    return tuple(sorted(found.items()))


def _numbered(files: Mapping[str, Mapping[str, Any]], kind: str, pieces: int) -> int | None:
    """The id in a model's configuration, if the tokenizer has it; the first of several."""
    for file in NUMBERING:
        value = files.get(file, {}).get(f"{kind}_token_id")
        for token in value if isinstance(value, list) else [value]:
            if type(token) is int and 0 <= token < pieces:
                return token
    return None


def _template(value: Any) -> str | None:
    """A chat template; of several named ones, the one named "default"."""
    if isinstance(value, list):
        value = next((one.get("template") for one in value if isinstance(one, dict) and one.get("name") == "default"),
                     None)
    return value if isinstance(value, str) else None
