"""The locations of a tokenizer's files: a file, a folder, or a name on Hugging Face's hub."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from codellm_jax import contents, hub
from codellm_jax.tokenizing import foreign

TOKENIZER = "tokenizer.json"
SENTENCE_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.model")
# The files beside a tokenizer that define its special ids.
CONFIGURATIONS = ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json")
CHAT_TEMPLATE = "chat_template.jinja"
# All of these together, for the hub.
PATTERNS = (TOKENIZER, "*.model", *CONFIGURATIONS, "chat_template*", "added_tokens.json")


def resolve(path: str) -> str:
    """An existing file or folder, local or gs://, for a path or a name hf://ORG/NAME[@REVISION].

    Raises:
      OSError, ValueError: with a one-line message; the hub cannot provide it.
    """
    if not hub.is_hub_name(path):
        return os.path.expanduser(path)
    folder, _ = hub.snapshot(path, PATTERNS)
    return str(folder)


def is_folder(path: str) -> bool:
    return _path(path).is_dir() if "://" in path else os.path.isdir(path)


def tokenizer_file(path: str) -> str:
    """The tokenizer's file in a file or folder: tokenizer.json, else a SentencePiece file.

    Raises:
      FileNotFoundError: a folder has none.
      UnreadableFile: the file is not a file of the folder.
      ValueError: a folder has several SentencePiece files with non-standard names.
    """
    if not is_folder(path):
        return path
    names = {file.name for file in _path(path).iterdir()}
    others = sorted(name for name in names if name.endswith(".model"))
    found = [name for name in (TOKENIZER, *SENTENCE_PIECES) if name in names][:1] or others
    if not found:
        raise FileNotFoundError(f"{path} holds no tokenizer: neither {TOKENIZER} nor a SentencePiece file (*.model).")
    if len(found) > 1:
        raise ValueError(f"{path} holds several SentencePiece files, {', '.join(found[:9])}: name one of them.")
    file = os.path.join(path, found[0])
    foreign.require_own(file)
    return file


def read(file: str) -> bytes:
    """The bytes of a tokenizer's file; raises OSError and UnreadableFile with a one-line message."""
    contents.require_file(file, "vocabulary file")
    if (size := contents.size(file)) > foreign.LARGEST_TOKENIZER:
        raise contents.UnreadableFile(f"{file} has {size:,} bytes, too large for a tokenizer: at most "
                                      f"{foreign.LARGEST_TOKENIZER:,} are read.")
    return contents.content(file)


def read_beside(folder: str, name: str) -> bytes:
    """The bytes of a file in a folder; raises OSError and UnreadableFile with a one-line message."""
    foreign.require_own(os.path.join(folder, name))
    return read(os.path.join(folder, name))


def read_if_there(folder: str | None, name: str) -> bytes | None:
    """The bytes of a file in a folder; None if it does not exist."""
    return read_beside(folder, name) if folder is not None and _exists(os.path.join(folder, name)) else None


def names_in(folder: str) -> list[str]:
    """The names of the files of a tokenizer in a folder, sorted."""
    return sorted({file.name for pattern in PATTERNS for file in _path(folder).glob(pattern)})


def write(folder: str, name: str, content: bytes) -> None:
    """Writes a file in a folder."""
    _path(folder).joinpath(name).write_bytes(content)


def configurations(path: str) -> dict[str, dict[str, Any]]:
    """The existing JSON files beside a folder's tokenizer or a file named tokenizer.json, by name.

    Raises:
      ValueError: a file is not a JSON object.
    """
    folder = folder_of(path)
    return {} if folder is None else {name: foreign.json_object(os.path.join(folder, name)) for name in CONFIGURATIONS
                                      if _exists(os.path.join(folder, name))}


def chat_template_file(path: str) -> str | None:
    """The text of the Jinja file beside a tokenizer, if there is one."""
    folder = folder_of(path)
    file = None if folder is None else os.path.join(folder, CHAT_TEMPLATE)
    return foreign.text(file) if file and _exists(file) else None


def folder_of(path: str) -> str | None:
    """The folder with the configuration of a tokenizer; None for a file with another name than tokenizer.json."""
    if is_folder(path):
        return path
    return os.path.dirname(path) or "." if os.path.basename(path) == TOKENIZER else None


def content_hash(content: bytes, special: Sequence[str], text_form: str) -> str:
    """SHA-256 of everything that ids depend on, in hexadecimal; of the file's bytes alone if nothing else affects them.

    Args:
      content: all bytes of the file.
      special: names of tokens that are special although the file does not say so.
      text_form: "plain", or another form with the version of the library that makes it.
    """
    beside: dict[str, Any] = {"special": sorted(special)} if special else {}
    beside |= {"text_form": text_form} if text_form != "plain" else {}
    return hashlib.sha256(content + (json.dumps(beside, sort_keys=True).encode() if beside else b"")).hexdigest()


def _exists(file: str) -> bool:
    return _path(file).exists() if "://" in file else os.path.exists(file)


def _path(path: str) -> Any:
    from etils import epath

    return epath.Path(path)
