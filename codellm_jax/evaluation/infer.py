"""Inference: prompts to text.

    t5x infer --gin_file=gin/infer.gin --gin.CHECKPOINT_PATH=runs/mixed_pretrain

Prompts are typed, and each answer is streamed; or they come from a file and are answered in batches, in the file's
order. The randomness of an answer depends only on the seed and the number of its prompt.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from etils import epath

from codellm_jax.chat import Message, end_of_turn_ids
from codellm_jax.contents import require_file, whole_text, without_compression
from codellm_jax.evaluation.decoding import prompt_tokens_cut
from codellm_jax.evaluation.prompts import Prompt, as_messages, prompt_of, takes_chat_template
from codellm_jax.evaluation.sampling import Sampling
from codellm_jax.evaluation.trained import Checkpoint, TrainedModel, trained_model
from codellm_jax.runtime.checkpoints import newest_record
from codellm_jax.runtime.progress import StatusLine, say
from codellm_jax.vocabulary import Vocabulary

_INCOMPLETE = "\ufffd"  # the decoded form of bytes that do not complete a character yet


@dataclasses.dataclass(frozen=True)
class Inference:
    """The settings of an inference.

    Attributes:
      checkpoint: the model that writes.
      sampling: how tokens are drawn.
      seed: seed of all draws.
      template: makes a prompt from an instruction and its input, for a model without a chat template; None to continue
        texts unchanged.
      turns: turns messages into prompts and answers, for such a model.
      batch_size: prompts of a file that are answered at once.
    """

    checkpoint: Checkpoint
    sampling: Sampling = Sampling()
    seed: int = 0
    template: Callable[..., str] | None = None
    turns: Callable[..., list[str]] | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"infer.batch_size must be at least 1, found {self.batch_size}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"SEED must be a whole number from 0 to {2**32 - 1}, found {self.seed}.")


Template: TypeAlias = Callable[..., "str | list[Message]"]
Asked: TypeAlias = str | list[Message]  # a text to continue, or messages of which the last is to be answered


class Written(NamedTuple):
    """A whole answer; see `decoding.Generation` for `reason`."""

    prompt: str
    text: str
    reason: str
    prompt_tokens_cut: int


def infer(
    inference: Inference, prompts: Iterable[Asked], write: Callable[[str], None],
    begin: Callable[[int, str], None], report: Callable[[str], None] = say,
) -> Iterator[Written]:
    """Answers prompts in order.

    Args:
      inference: the settings.
      prompts: a sequence is answered in batches, each finished before the next begins; any other iterable is answered
        one prompt at a time.
      write: called with each part of an answer's text, in order, as soon as it is known.
      begin: called with the number and the text of a prompt before the first part of its answer.
      report: called with lines about the checkpoint read.

    Yields:
      Each answer once it is complete.

    Raises:
      ValueError, FileNotFoundError: in one line, for invalid checkpoints and settings.
    """
    with trained_model(inference.checkpoint, report) as (model, record):
        by_template = takes_chat_template(model.vocabulary, record)
        start, size = 0, inference.batch_size
        batches: Iterable[Sequence[Asked]] = (
            (prompts[first : first + size] for first in range(0, len(prompts), size))
            if isinstance(prompts, Sequence) else ([prompt] for prompt in prompts))
        for batch in batches:
            asked = [_prompt(one, inference, model.vocabulary, by_template) for one in batch]
            yield from _answers(inference, model, asked, start, write, begin, by_template)
            start += len(batch)


def _answers(
    inference: Inference, model: TrainedModel, prompts: Sequence[Prompt], start: int, write: Callable[[str], None],
    begin: Callable[[int, str], None], by_template: bool,
) -> Iterator[Written]:
    vocabulary = model.vocabulary
    ids: list[list[int]] = [[] for _ in prompts]
    reasons: list[str | None] = [None] * len(prompts)
    shown, current = "", 0
    encoded = [prompt.ids for prompt in prompts]
    begin(start, prompts[0].text)
    for piece in model.stream(encoded, [()] * len(prompts), inference.sampling, inference.seed,
                              numbers=range(start, start + len(prompts)), batch_size=len(prompts),
                              end_ids=end_of_turn_ids(vocabulary) if by_template else ()):
        ids[piece.row] += piece.ids
        reasons[piece.row] = piece.reason
        while current < len(prompts):
            reason, text = reasons[current], vocabulary.decode_after(encoded[current], ids[current])
            known = text if reason else text.rstrip(_INCOMPLETE)
            write(known[len(shown) :])
            shown = known
            if not reason:
                break
            cut = prompt_tokens_cut(encoded[current], model.config.length, model.room(inference.sampling))
            yield Written(prompts[current].text, text, reason, cut)
            shown, current = "", current + 1
            if current < len(prompts):
                begin(start + current, prompts[current].text)


def _prompt(asked: Asked, inference: Inference, vocabulary: Vocabulary, by_template: bool) -> Prompt:
    if isinstance(asked, str):
        # An empty prompt begins a document.
        return Prompt(asked, vocabulary.encode_prompt(asked) or [vocabulary.end_of_document_id])
    return prompt_of(vocabulary, asked, by_template, inference.turns)


def answer(inference: Inference, prompts_file: str | None, output: str | None) -> None:
    """Runs the command: answers prompts from a file or typed, on the terminal or to a file of JSON lines.

    Raises:
      ValueError, FileNotFoundError: in one line, for invalid files, checkpoints and settings.
    """
    if output and "://" not in output:
        path = pathlib.Path(output).expanduser().absolute()
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{output} cannot be written: its directory does not exist.")
        if prompts_file and path == pathlib.Path(prompts_file).expanduser().absolute():
            raise ValueError(f"--output and --prompts are both {output}.")
    template: Template | None = inference.template
    vocabulary = inference.checkpoint.vocabulary
    if template and vocabulary.chat_template and takes_chat_template(
            vocabulary, newest_record(inference.checkpoint.path)[1]):
        template = as_messages
    prompts: Any = read_prompts(prompts_file, template) if prompts_file else (
        in_template(line, template) for line in typed())

    def write(text: str) -> None:
        if not output:
            print(text, end="", flush=True)

    def begin(number: int, prompt: str) -> None:
        if prompts_file and not output:
            print(f"--- {number + 1}/{len(prompts)}: {prompt}", flush=True)

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    status = StatusLine(0, len(prompts) if prompts_file else 0, active=bool(prompts_file and output), unit="prompt")
    with contextlib.ExitStack() as opened:
        file: Any = None
        for number, written in enumerate(infer(inference, prompts, write, begin, report), 1):
            if output:  # opened only now, so that a mistake does not erase earlier answers
                file = file or opened.enter_context(epath.Path(output).expanduser().open("w"))
                file.write(json.dumps(written._asdict(), ensure_ascii=False) + "\n")
                file.flush()
                status.show(number, "answered")
            else:
                print(flush=True)
            if written.prompt_tokens_cut:
                report(f"prompt {number} is too long: its first {written.prompt_tokens_cut:,} tokens are not read.")
    status.close()


def typed() -> Iterator[str]:
    """Non-blank lines from the terminal or a pipe."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def read_prompts(path: str, template: Template | None) -> list[Asked]:
    """The prompts of a file, local or gs://: one per line, or JSON records in lines or in a list.

    A record is {"prompt": ...}, or {"instruction": ..., "input": ...}, which needs the template, or
    {"messages": [...]}, the last of them a user's. A file is read as records if all of it is, or if its name ends in
    .jsonl or .json. Blank lines are skipped.

    Raises:
      OSError, ValueError: in one line; the file cannot be read, is not text or is empty, or a record has another form.
    """
    file = os.fspath(epath.Path(path).expanduser())
    require_file(file, "file of prompts")
    content = re.sub("\r\n?", "\n", whole_text(file))
    if not content.strip():
        raise ValueError(f"{path} holds no prompt.")
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    whole = _json(content)
    if isinstance(whole, list):
        records = [(f"{path}, record {number}", record) for number, record in enumerate(whole, 1)]
    else:
        is_one = isinstance(whole, dict) and len(lines) > 1
        records = [(path, whole)] if is_one else [(where, _json(line)) for where, line in lines]
    if (re.search(r"\.jsonl?$", without_compression(path), re.IGNORECASE)
            or all(isinstance(record, dict) and {"prompt", "instruction", "messages"} & record.keys()
                   for _, record in records)):
        return [_of_record(record, where, template) for where, record in records]
    return [in_template(line, template) for _, line in lines]


def in_template(text: str, template: Template | None) -> Asked:
    """A text unchanged, or as an instruction in the template."""
    return template(text) if template else text


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _of_record(record: Any, where: str, template: Template | None) -> Asked:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half a surrogate pair, which is not valid text.") from None
    match record:
        case {"prompt": str(prompt)}:
            return in_template(prompt, template)
        case {"instruction": str(instruction), **rest} if template and isinstance(rest.get("input", ""), str):
            return template(instruction, rest.get("input", ""))
        case {"instruction": _}:
            raise ValueError(f"{where} is an instruction: add --instruction, and give texts.")
        case {"messages": [*messages]}:
            return _messages(messages, where)
    raise ValueError(f'{where} must be a JSON object such as {{"prompt": "..."}}, {{"instruction": "...", '
                     '"input": "..."} or {"messages": [{"role": "user", "content": "..."}]}.')


def _messages(messages: Sequence[Any], where: str) -> list[Message]:
    for message in messages:
        match message:
            case {"role": "system" | "user" | "assistant", "content": str()}:
                continue
        raise ValueError(f"{where} has a message that is not of the form {{'role': 'system', 'user' or 'assistant', "
                         f"'content': TEXT}}: {json.dumps(message, ensure_ascii=False)[:80]}")
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{where}: the last message must be a user's, to be answered.")
    return [{name: text for name, text in message.items() if isinstance(text, str) and name.isidentifier()}
            for message in messages]
