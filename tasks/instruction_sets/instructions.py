"""Sources of instructions: users' files, benchmarks' training sets, and the standard library of every Python.

Specs, as in `corpora.sources`, of these kinds:

  {"instructions": PATTERN, "language": "en", "sample": 200000}    JSON list or JSON lines; "where" selects records,
                                           see `corpora.fields`
  {"cosqa": PATTERN}                       CosQA's training set: does this code answer this query?
  {"mbpp": PATTERN}                        MBPP's problems, mbpp.jsonl: write the program
  {"python_instructions": "text"}          made from the running Python's standard library; or "code"
  {"official": "text.pclue", "data_dir": FOLDER}    found by its official file name, see `corpora.official`

A record of "instructions" is {instruction, input, output}, formatted with Alpaca's prompt, in Chinese or English by
`language`, else by the record's own characters; or {input, target}, used unchanged; or a conversation, {messages} or
{conversations} (see `conversations`), formatted by the vocabulary's chat template, or by `prompts` if there is none.
A file may mix these. Other keys are ignored, and `input` may be empty or missing. `sample` keeps this many records of
the training split, chosen by a stable hash.

`validation`, `holdout` and `rate` are those of `corpora.sources`: a stable hash of the prompt (of a conversation's
first prompt) assigns one percent of the records to "validation" and one percent to "test", at least one prompt each.
MBPP has its official splits instead: "train" is 601 to 974, "validation" 511 to 600. The problems of the sanitized
set, which are used for evaluation, are left out of both; `keep_sanitized` keeps them.

In tuning each instruction is an example, and the loss counts only its answers. In pre-training each is a document of
prompt, answer and end token. A `rate` counts all its tokens, and so does the loss, as usual when instructions are
mixed into pre-training; with "loss": "answers" the loss counts only the answers. The kind "task" also has this option:
{"task": "code.python_instructions", "loss": "answers"}.

Nothing is lost silently: unreadable records are counted and reported in one warning per reading, with the place of the
first of each kind. A file that is not JSON is refused. Importing this module imports neither TensorFlow nor SeqIO.
"""

import hashlib
import heapq
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from codellm_jax.contents import size
from tasks.corpora import official, sources
from tasks.corpora.fields import unlike
from tasks.corpora.files import Lost, PassedOver, in_name_of, require_readable
from tasks.corpora.mbpp import official_split, sanitized_ids
from tasks.corpora.records import NOT_UTF8, Record, placed_records, require_json
from tasks.corpora.specs import (
    DEFAULT_HOLDOUT,
    INSTRUCTION_KINDS,
    OF_USE,
    Borders,
    borders_of,
    form_of,
    holdout_of,
    kind_of,
    position,
    split_of,
    splits,
    validate,
)
from tasks.instruction_sets.conversations import Message, is_conversation, read_conversation
from tasks.instruction_sets.prompts import alpaca_prompt, conversation_turns
from tasks.instruction_sets.python_instructions import python_instructions

# Part of every cache key; increase it whenever the same files, or the same Python, give different pairs.
INSTRUCTIONS_VERSION = 2
# The same for the kind "instructions"; conversations are read since 3.
RECORDS_VERSION = 3

COSQA_INSTRUCTION = "Decide whether the Python code answers the query. Reply with one word, correct or wrong."
COSQA_ANSWERS = {0: "wrong", 1: "correct"}


class Pair(NamedTuple):
    """A prompt and its answer."""

    inputs: str
    targets: str

    @property
    def texts(self) -> Iterable[str]:
        """All texts that are trained on."""
        return self

    @property
    def asked(self) -> str:
        """The first prompt, whose hash decides the split."""
        return self.inputs


class Conversation(NamedTuple):
    """A conversation: its messages for a chat template, and its turns for vocabularies without one."""

    messages: list[Message]  # each with role and content; the last is the assistant's
    turns: list[str]  # prompt, answer, prompt, answer ...; see `prompts`
    place: str  # the record's place, for messages

    @property
    def inputs(self) -> str:
        """The prompt of the last answer."""
        return "".join(self.turns[:-1])

    @property
    def targets(self) -> str:
        return self.turns[-1]

    @property
    def texts(self) -> Iterable[str]:
        return (text for message in self.messages for text in message.values())

    @property
    def asked(self) -> str:
        return self.turns[0]


# ---- Reading -----------------------------------------------------------------------------------


def pairs(
    spec: Mapping[str, Any], split: str, name: str = "corpus", only_files: Sequence[str] | None = None,
    borders: Borders | None = None,
) -> Iterator[Pair | Conversation]:
    """Reads a corpus of instructions, in the order of its sorted files.

    Args:
      spec: a spec of one of the kinds described above.
      split: one of `specs.splits(spec)`.
      name: the corpus's name in messages.
      only_files: as in `sources.documents`; not with `sample`, which chooses from all records.
      borders: the result of `find_borders`, if known; else the first records are read for it.

    Raises:
      ValueError: the spec is malformed or of another kind, has no such split, a file is not JSON, or they hold no pair
        at all.
      OSError: a pattern matches no file, an official file is missing, or a file cannot be read.
    """
    validate(spec, name)
    kind = kind_of(spec)
    if kind not in INSTRUCTION_KINDS:
        raise ValueError(f"{name}: {kind!r} does not hold instructions; those kinds are "
                         f"{', '.join(INSTRUCTION_KINDS)}.")
    if split not in splits(spec):
        raise ValueError(f"{name}: there is no split {split!r}, only {', '.join(splits(spec))}.")
    if kind == "python_instructions":
        return (
            Pair(alpaca_prompt(made.instruction, made.given, "en"), made.output)
            for made in python_instructions(spec[kind])
            if made.split == split
        )
    if only_files is not None:
        return _usable(form_of(spec), split, name, only_files, borders or find_borders(spec, name), whole=False)
    if kind == "official":
        spec = official.resolve(spec, name)
    found = _usable(spec, split, name, sources.files(spec, split, name), borders or find_borders(spec, name))
    return _sampled(found, spec["sample"], name) if "sample" in spec and split == "train" else found


def find_borders(spec: Mapping[str, Any], name: str = "corpus") -> Borders | None:
    """The borders that divide the corpus of a valid spec of instructions into splits by prompt; None if not by hash.

    Reads as many records as needed, by default 2,000. Errors are those of `pairs`.
    """
    holdout = holdout_of(spec)
    if not holdout:
        return None
    if kind_of(spec) == "official":
        spec = official.resolve(spec, name)
    found = _pairs(spec, "train", sources.files(spec, "train", name), name, PassedOver())
    return borders_of((position(pair.asked.encode()) for pair in found if pair), holdout)


def _usable(
    spec: Mapping[str, Any], split: str, name: str, files: Sequence[str], borders: Borders | None, whole: bool = True
) -> Iterator[Pair | Conversation]:
    """Yields the pairs of the split; no prompt is in two splits. At the end reports other records, with places."""
    lost = PassedOver()
    kept = elsewhere = 0
    try:
        for pair in _pairs(spec, split, files, name, lost):
            if pair is None:
                elsewhere += 1
            else:
                kept += 1
                if borders is None or split_of(pair.asked.encode(), borders) == split:
                    yield pair
    finally:
        if lost or not whole:  # also for a part without losses, so that parts add up to the whole
            logging.warning(
                "%s, read for %s: %d records are instructions, skipped: %s.", name, split, kept, lost
            )
    if whole and not kept and not elsewhere:
        raise ValueError(f"{name}: no instruction is usable in {', '.join(map(repr, files[:3]))}"
                         f"{f' and {len(files) - 3} more' if len(files) > 3 else ''} ({lost}).")


def _records(files: Sequence[str], name: str) -> Iterator[tuple[str, Record]]:
    with in_name_of(name):
        require_readable(files, require_json)
        for file in files:
            yield from placed_records(file)


def _pairs(
    spec: Mapping[str, Any], split: str, files: Sequence[str], name: str, lost: PassedOver
) -> Iterator[Pair | Conversation | None]:
    """Yields the pair of each record, or None if its official split is another; counts lost records, with places."""
    recast = _RECAST[kind_of(spec)]
    for place, record in _records(files, name):
        pair = record if isinstance(record, Lost) else unlike(record, spec.get("where", {})) or recast(
            record, spec, split)
        if isinstance(pair, Conversation):
            pair = pair._replace(place=place)
        if isinstance(pair, Lost):
            lost.add(pair.reason, place)
        elif pair is not None and not _is_valid_text(pair):
            lost.add(NOT_UTF8, place)
        else:
            yield pair


def _sampled(found: Iterator[Pair | Conversation], wanted: int, name: str) -> Iterator[Pair | Conversation]:
    """Yields `wanted` of the found pairs, in order; the selection does not depend on the order of files."""

    def place(item: tuple[int, Pair | Conversation]) -> tuple[bytes, int]:
        number, pair = item
        # Other hash bytes than for the split, and a salt, so that the two are independent.
        return hashlib.sha256(f"sample\0{pair.inputs}\0{pair.targets}".encode()).digest(), number

    chosen = heapq.nsmallest(wanted, enumerate(found), key=place)
    if len(chosen) < wanted:
        logging.warning("%s: 'sample' asks for %d instructions, but there are only %d.", name, wanted, len(chosen))
    for _, pair in sorted(chosen):
        yield pair


def _is_valid_text(pair: Pair | Conversation) -> bool:
    try:
        "".join(pair.texts).encode()
    except UnicodeEncodeError:  # Lone surrogates, from escapes.
        return False
    return True


# ---- Converting --------------------------------------------------------------------------------


def _instruction(record: Mapping[str, Any], spec: Mapping[str, Any], split: str) -> Pair | Conversation | Lost | None:
    """Converts {instruction, input, output}, {input, target} (unchanged), or a conversation."""
    values: tuple[Any, ...]
    if {"instruction", "output"} <= record.keys():
        given = record.get("input")
        values = (record["instruction"], record["output"], "" if given is None else given)
    elif {"input", "target"} <= record.keys() and "instruction" not in record:
        values = (record["input"], record["target"])
    elif is_conversation(record):
        messages = read_conversation(record)
        if isinstance(messages, Lost):
            return messages
        return Conversation(messages, conversation_turns(messages, spec.get("language")), place="")
    else:
        return Lost("without instruction and output, input and target, or messages")
    if not all(isinstance(value, str) for value in values):
        return Lost("with a value that is not text")
    if not all(value.strip() for value in values[:2]):
        return Lost("empty")
    if len(values) == 2:
        return Pair(*values)
    return Pair(alpaca_prompt(values[0], values[2], spec.get("language")), values[1])


def _cosqa(record: Mapping[str, Any], spec: Mapping[str, Any], split: str) -> Pair | Lost | None:
    """Converts a query, code, and the label whether the code answers the query."""
    label = record.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or label not in COSQA_ANSWERS:
        return Lost("without label 0 or 1")
    query, code = record.get("doc"), record.get("code")
    if not isinstance(query, str) or not isinstance(code, str):
        return Lost("without doc and code")
    if not query.strip() or not code.strip():
        return Lost("empty")
    given = f"Query: {query.strip()}\nCode:\n{_with_newlines(code).strip()}"
    return Pair(alpaca_prompt(COSQA_INSTRUCTION, given, "en"), COSQA_ANSWERS[label])


def _mbpp(record: Mapping[str, Any], spec: Mapping[str, Any], split: str) -> Pair | Lost | None:
    """Converts a problem and its program; None if its official split is another."""
    number, problem, program = (record.get(key) for key in ("task_id", "text", "code"))
    if not isinstance(number, int) or isinstance(number, bool):
        return Lost("without task_id")
    if not isinstance(problem, str) or not isinstance(program, str):
        return Lost("without text and code")
    if not problem.strip() or not program.strip():
        return Lost("empty")
    if official_split(number) != split:
        return None
    if number in sanitized_ids() and not spec.get("keep_sanitized"):
        return Lost("that are in sanitized MBPP, used for evaluation ('keep_sanitized': True keeps them)")
    return Pair(alpaca_prompt(problem.strip(), "", "en"), _with_newlines(program).rstrip())


def _with_newlines(code: str) -> str:
    return re.sub("\r\n?", "\n", code)


_RECAST = {"instructions": _instruction, "cosqa": _cosqa, "mbpp": _mbpp}


# ---- Describing --------------------------------------------------------------------------------


def describe(spec: Mapping[str, Any], name: str = "corpus") -> dict[str, Any]:
    """Identifies a corpus's content without reading it; JSON-able, for cache keys.

    Files are identified by path and size, as in `sources.describe`; an official corpus by its files.

    Raises:
      ValueError: the spec is malformed, a pattern names folders, or an official file exists twice.
      OSError: a pattern matches no file, an official file is missing, or a link is broken.
    """
    validate(spec, name)
    if kind_of(spec) == "official":
        spec = official.resolve(spec, name)
    kind = kind_of(spec)
    options = {key: value for key, value in sorted(spec.items()) if key not in OF_USE}
    if kind == "mbpp":
        options.setdefault("keep_sanitized", False)
    elif kind != "python_instructions":
        options.setdefault("holdout", 0 if "validation" in spec else DEFAULT_HOLDOUT)
    description = {
        "kind": kind,
        "options": json.loads(json.dumps(options, sort_keys=True)),
        "reader": RECORDS_VERSION if kind == "instructions" else INSTRUCTIONS_VERSION,
    }
    if kind == "python_instructions":
        return description | {"python": sys.version, "prefix": sys.base_prefix}
    for split in ("train", "validation") if "validation" in spec else ("train",):
        description[f"{split}_files"] = [[file, size(file)] for file in sources.files(spec, split, name)]
    return description
