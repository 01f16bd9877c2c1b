"""Inference: prompts to text.

    t5x infer --gin_file=gin/infer.gin --gin.CHECKPOINT_PATH=runs/mixed_pretrain

Prompts are typed, and what is written to each appears as it comes; or they come from a file, are answered in batches,
and appear in the file's order. The randomness of an answer depends on the seed and the number of its prompt alone.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from codellm_jax.model.sampling import Sampling
from codellm_jax.runtime.progress import say
from codellm_jax.runtime.trained import Checkpoint, TrainedModel, trained_model

_INCOMPLETE = "\ufffd"  # what bytes decode to that are no whole character yet


@dataclasses.dataclass(frozen=True)
class Inference:
    """What a gin file says of an inference.

    Attributes:
      checkpoint: who writes.
      sampling: how tokens are drawn.
      seed: of what is drawn.
      template: makes a prompt of an instruction and its input; None where texts are gone on from as they are.
      batch_size: prompts of a file that are answered at a time.
    """

    checkpoint: Checkpoint
    sampling: Sampling = Sampling()
    seed: int = 0
    template: Callable[..., str] | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"infer.batch_size must be at least 1, found {self.batch_size}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"SEED must be a whole number from 0 to {2**32 - 1}, found {self.seed}.")


class Written(NamedTuple):
    """A whole answer; see `model.decoding.Generation` for `reason`."""

    prompt: str
    text: str
    reason: str


def infer(
    inference: Inference, prompts: Iterable[str], write: Callable[[str], None],
    begin: Callable[[int, str], None], report: Callable[[str], None] = say,
) -> Iterator[Written]:
    """Answers prompts in order.

    Args:
      inference: who writes, and how.
      prompts: a sequence is answered in batches; of any other iterable one after the other, as they come.
      write: is given each part of an answer's text as soon as it is known and all before it are out.
      begin: is given the number and the text of a prompt before its answer's first part.
      report: is told what was read.

    Yields:
      Each answer once it is whole.

    Raises:
      ValueError, FileNotFoundError: in one line, for checkpoints and settings that do not fit.
    """
    with trained_model(inference.checkpoint, report) as (model, _):
        batches: Iterable[Sequence[str]] = [prompts] if isinstance(prompts, Sequence) else (
            [prompt] for prompt in prompts)
        for start, batch in enumerate(batches):
            yield from _answers(inference, model, batch, start, write, begin)


def _answers(
    inference: Inference, model: TrainedModel, prompts: Sequence[str], start: int, write: Callable[[str], None],
    begin: Callable[[int, str], None],
) -> Iterator[Written]:
    vocabulary = model.vocabulary
    ids: list[list[int]] = [[] for _ in prompts]
    reasons: list[str | None] = [None] * len(prompts)
    shown, current = "", 0
    # An empty prompt begins a document.
    encoded = [vocabulary.encode(prompt) or [vocabulary.end_of_document_id] for prompt in prompts]
    if prompts:
        begin(start, prompts[0])
    for piece in model.stream(encoded, [()] * len(prompts), inference.sampling, inference.seed,
                              numbers=range(start, start + len(prompts)), batch_size=inference.batch_size):
        ids[piece.row] += piece.ids
        reasons[piece.row] = piece.reason
        while current < len(prompts):
            reason, text = reasons[current], vocabulary.decode(ids[current])
            known = text if reason else text.rstrip(_INCOMPLETE)
            write(known[len(shown) :])
            shown = known
            if not reason:
                break
            yield Written(prompts[current], text, reason)
            shown, current = "", current + 1
            if current < len(prompts):
                begin(start + current, prompts[current])


def read_prompts(path: str, template: Callable[..., str] | None) -> list[str]:
    """The prompts of a file, local or gs://: a line each, or JSON lines where it is named .jsonl.

    A JSON record is {"prompt": ...}, or {"instruction": ..., "input": ...}, which needs the template. Blank lines are
    passed over.

    Raises:
      FileNotFoundError, ValueError: in one line; the file is not there, holds nothing, or a line is neither.
    """
    file = epath.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {path} of prompts.")
    try:
        lines = [(number, line) for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1)
                 if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    if not lines:
        raise ValueError(f"{path} holds no prompt.")
    if not path.endswith(".jsonl"):
        return [in_template(line.removesuffix("\r"), template) for _, line in lines]
    return [_of_record(_json(line), f"{path}, line {number}", template) for number, line in lines]


def in_template(text: str, template: Callable[..., str] | None) -> str:
    """A text as it is, or as an instruction in the template."""
    return template(text) if template else text


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _of_record(record: Any, where: str, template: Callable[..., str] | None) -> str:
    match record:
        case {"prompt": str(prompt)}:
            return in_template(prompt, template)
        case {"instruction": str(instruction), **rest} if template and isinstance(rest.get("input", ""), str):
            return template(instruction, rest.get("input", ""))
        case {"instruction": _}:
            raise ValueError(f"{where} is an instruction: give --instruction, and texts.")
    raise ValueError(f'{where} must be a JSON object such as {{"prompt": "..."}} or {{"instruction": "...", '
                     '"input": "..."}.')
