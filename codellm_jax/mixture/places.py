"""The location of a task's cached rows, and the key that identifies them."""

import contextlib
import hashlib
import json
from typing import Any, NamedTuple

from etils import epath

from codellm_jax.chat import CHAT_VERSION
from codellm_jax.mixture.examples import DOCUMENTS_VERSION, EXAMPLES_VERSION
from codellm_jax.mixture.tokens import Definitions, open_task
from codellm_jax.vocabulary import Vocabulary

ROWS_VERSION = 2  # raise it whenever the same task would give other rows, or other notes


class Place(NamedTuple):
    """The location of a task's cached rows, whether or not they exist yet."""

    directory: epath.Path
    key: dict[str, Any]
    loss: str | None = None  # for instructions in pre-training, the tokens the loss counts: "all" or "answers"

    def is_whole(self) -> bool:
        return (self.directory / "cache.json").exists()

    @property
    def is_remote(self) -> bool:
        return "://" in str(self.directory)


def cache_place(
    task: str, definitions: Definitions, vocabulary: Vocabulary, length: int, cache_dir: str, stage: str
) -> Place:
    """The place of a task's rows; arguments as for `rows.cached_rows`.

    Raises:
      ValueError: the task is unknown, or its option "loss" does not fit.
    """
    key: dict[str, Any] = {
        "version": ROWS_VERSION, "task": task, "definition": definitions.describe(task), "length": length,
        "vocabulary": vocabulary.content_hash, "end_of_document_id": vocabulary.end_of_document_id,
    }
    if vocabulary.begin_ids:
        key["begin_ids"] = vocabulary.begin_ids
    template: dict[str, Any] = {} if vocabulary.chat_template is None else {
        "chat": [CHAT_VERSION, vocabulary.chat_template, vocabulary.template_tokens]}

    def place(more: dict[str, Any], loss: str | None = None) -> Place:
        digest = hashlib.sha256(json.dumps(key | more, sort_keys=True).encode()).hexdigest()[:16]
        return Place(epath.Path(cache_dir).expanduser() / "rows" / task / digest, key | more, loss)

    asked = definitions.loss(task)
    if stage == "tuning":
        if asked == "all":
            raise ValueError(f"{task}: 'loss': 'all' is for pre-training; in tuning the loss counts only answers.")
        return place({"examples": EXAMPLES_VERSION} | template)
    loss = asked or "all"
    of_documents, of_instructions = place({}), place({"instructions": [DOCUMENTS_VERSION, loss]} | template, loss)
    is_instructions = definitions.is_instructions(task)
    if is_instructions is None:  # known from a cache, or else from SeqIO's task, which is opened then anyway
        is_instructions = not of_documents.is_whole() and (
            of_instructions.is_whole() or "inputs" in open_task(task, definitions, stage).output_features)
    if asked and not is_instructions:
        raise ValueError(f"{task}: 'loss' is an option of instructions, but these are documents: remove it.")
    return of_instructions if is_instructions else of_documents


def move_aside(directory: epath.Path) -> str:
    """Renames a cache on disk to a free name beside it; returns the new path."""
    number = 1
    while (aside := directory.with_name(f"{directory.name}.set_aside.{number}")).exists():
        number += 1
    with contextlib.suppress(FileNotFoundError):  # another process was here first
        directory.rename(aside)
    return str(aside)


def storage_error(error: Exception, directory: epath.Path) -> OSError | None:
    """For an error from a full or inaccessible disk, one that names the disk and the remedy; else None."""
    file = getattr(error, "filename", None)
    if isinstance(file, str) and not file.startswith(str(directory.parent)) and not str(directory).startswith(file):
        return None  # an input file
    if isinstance(error, OSError) and error.errno or "No space left on device" in str(error):
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "No space left on device"
        return OSError(f"Rows cannot be cached in {directory.parent}: {reason}. Fix this or set CACHE_DIR.")
    return None
