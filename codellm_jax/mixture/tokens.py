"""A SeqIO task as tokens: its examples, tokenized with the run's vocabulary instead of the task's own.

The texts of corpora (`tasks.pretraining.CorpusSource`) are read and encoded without TensorFlow, which yields the same
tokens as SeqIO in a fraction of the time; any other task goes through SeqIO and all of its preprocessors.

SeqIO and TensorFlow are imported only when a task is opened.
"""

import contextlib
import dataclasses
import difflib
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from codellm_jax import chat
from codellm_jax.mixture.roundtrip import SAMPLED, Sample
from codellm_jax.vocabulary import Vocabulary, load_vocabulary

SPLITS = ("train", "validation", "test")
CHARACTERS_AT_ONCE = 1 << 20


class Definitions(Protocol):
    """The origin of task names. `tasks.Definitions` is one."""

    @property
    def corpora(self) -> Mapping[str, Mapping[str, Any]]:
        """Specs of corpora by task name; `rate` in one is its weight within its pool."""
        ...

    def is_instructions(self, name: str) -> bool | None:
        """Whether a task is a corpus of instructions; None if its specs do not say."""
        ...

    def loss(self, name: str) -> str | None:
        """The part of instructions that the loss counts in pre-training, "all" or "answers", if a spec sets it."""
        ...

    def describe(self, name: str) -> Mapping[str, Any]:
        """The identity of a task's content, as JSON, determined without reading it.

        For a corpus of files it has "train_files" and, if separate, "validation_files": [[path, bytes], ...] in reading
        order. For files that `t5x prepare` wrote it has "prepared": for each of their folders the hashes of its steps
        and inputs, "steps_sha256" and "inputs_sha256", and the paths of these inputs.
        """
        ...

    def register(self) -> None:
        """Makes the tasks known to SeqIO."""
        ...


class Example(NamedTuple):
    """The tokens of a document (`targets` alone) or of an instruction example; int arrays.

    The targets end with the end-of-document token unless they are empty. Non-empty documents, and inputs, begin with
    the vocabulary's `begin_ids`. The targets of a conversation begin with its first answer, and include the chat
    template's text after answers; tokens outside of answers are complements, ~id.
    """

    inputs: np.ndarray
    targets: np.ndarray
    text_bytes: int  # of the tokenized text, in UTF-8; 0 if unknown
    is_conversation: bool = False


NOTHING = np.zeros(0, np.int32)


def open_task(task: str, definitions: Definitions, stage: str) -> Any:
    """The SeqIO task of this name.

    Raises:
      ValueError: the task is unknown, or consists of documents and the stage is tuning.
    """
    with quiet_tensorflow():
        import seqio

        definitions.register()
    require_registered(task)
    opened = seqio.TaskRegistry.get(task)
    if stage == "tuning" and "inputs" not in opened.output_features:
        raise ValueError(f"{task} is a task of documents, without inputs to answer: train on it with "
                         "gin/mixed_pretrain.gin, or name instruction tasks in MIXTURE_OR_TASK_NAME (in a study "
                         "tuning/MIXTURE_OR_TASK_NAME).")
    return opened


def is_divisible(task: Any, split: str) -> bool:
    """Whether the tokens of a split are the concatenation of those of its files."""
    return _is_plain(task) and task.source.is_divisible(split)


def find_borders(task: Any) -> Sequence[float] | None:
    """The borders of the hash that divides documents into splits, for `examples` of some files; None without a hash.

    Raises:
      ValueError: the source cannot be read; the message is its reader's line.
    """
    return task.source.find_borders() if _is_plain(task) else None


def examples(
    task: Any, split: str, vocabulary: Vocabulary, files: Sequence[str] | None = None, threads: int = 1,
    borders: Sequence[float] | None = None, sample: Sample | None = None,
) -> Iterator[Example]:
    """The examples of a split in the order of the task's source.

    Args:
      task: a SeqIO task.
      files: the files of a divisible split to read, else None.
      threads: number of threads that tokenize.
      borders: the result of `find_borders`, if known.
      sample: from `sample_of`; receives the texts that are read.

    Raises:
      ValueError: the source cannot be read; the message is its reader's line.
    """
    with quiet_tensorflow():
        if _is_plain(task) and task.source.vocabulary is not None:
            _require_same(task, vocabulary)
            for ids, text in task.source.tokens(split, files, borders):
                joined = np.concatenate([vocabulary.begin_ids, ids, [vocabulary.end_of_document_id]])
                yield Example(NOTHING, joined.astype(np.int32), len(text.encode()))
            return
        if _is_plain(task):
            texts = task.source.texts(split, files, borders)
            texts = texts if sample is None else _sampled(texts, sample)
            passed_over: dict[str, tuple[int, str]] = {}  # by reason, the count and the place of the first
            for some in _batches(texts):
                encoded = _instructions(some, vocabulary, threads, passed_over) if "inputs" in some[0] else \
                    _documents(some, vocabulary, threads)
                yield from encoded
            if passed_over:
                logging.warning("%s, read for %s: conversations skipped: %s.", task.name, split, passed_over)
            return
        begin = np.array(vocabulary.begin_ids, np.int32)
        own = _for_seqio(vocabulary)
        for features in task_tokens(task, split, own):
            targets = features["targets"]
            if len(targets) and targets[-1] == own.eos_id:
                targets = targets[:-1]
            inputs = features.get("inputs")
            if inputs is not None:
                inputs = np.append(begin, inputs)
            elif len(targets):
                targets = np.append(begin, targets)
            if len(targets):
                targets = np.append(targets, vocabulary.end_of_document_id)
            yield Example(NOTHING if inputs is None else inputs, targets, text_bytes=0)


def _require_same(task: Any, vocabulary: Vocabulary) -> None:
    """Raises ValueError unless a task's tokens were made with the run's vocabulary."""
    made_with = load_vocabulary(task.source.vocabulary)
    if made_with.content_hash != vocabulary.content_hash:
        raise ValueError(f"{task.name}: its tokens were made with {task.source.vocabulary!r} (hash "
                         f"{made_with.content_hash[:12]}), but the run has {vocabulary.path} (hash "
                         f"{vocabulary.content_hash[:12]}): set VOCABULARY to the former, or provide the corpus as "
                         "text.")


def _for_seqio(vocabulary: Vocabulary) -> Any:
    """A vocabulary as a SeqIO vocabulary."""
    import seqio

    if vocabulary.is_sentence_pieces:
        return seqio.SentencePieceVocabulary(vocabulary.file, extra_ids=0)
    import tensorflow as tf

    def encoded(text: bytes) -> np.ndarray:
        return np.array(vocabulary.encode(text.decode("utf-8", "replace")), np.int32)

    class OfSeqio(seqio.PassThroughVocabulary):
        """Encodes the preprocessors' output in Python; SeqIO does not decode."""

        def _encode_tf(self, text: Any) -> Any:
            return tf.ensure_shape(tf.numpy_function(encoded, [text], tf.int32), [None])

    return OfSeqio(vocabulary.size, vocabulary.end_of_document_id)


def sample_of(task: Any, split: str) -> Sample:
    """A sample for `examples` to fill; for a task that SeqIO tokenizes, already filled with its first texts."""
    sample = Sample()
    if _is_plain(task):
        return sample
    with quiet_tensorflow(), warnings_of(task.name):  # discards the warning that reading ended early
        import seqio

        as_bytes = seqio.ByteVocabulary()
        for features in itertools.islice(task_tokens(task, split, as_bytes), SAMPLED):
            sample.add(as_bytes.decode(features[name].tolist()) for name in ("inputs", "targets") if name in features)
    return sample


def _sampled(texts: Iterable[Mapping[str, Any]], sample: Sample) -> Iterator[Mapping[str, Any]]:
    for text in texts:
        sample.add(text[name] for name in ("inputs", "targets") if name in text)
        yield text


def _is_plain(task: Any) -> bool:
    """Whether a task only tokenizes texts, which its source reads without TensorFlow."""
    import seqio

    ends = {name: feature.add_eos for name, feature in task.output_features.items()}
    return (hasattr(task.source, "texts") and ends in ({"targets": True}, {"inputs": False, "targets": True})
            and list(task.preprocessors) == [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos])


def _documents(some: Sequence[Mapping[str, Any]], vocabulary: Vocabulary, threads: int) -> Iterator[Example]:
    for text, ids in zip(some, vocabulary.encode_all([text["targets"] for text in some], threads), strict=True):
        if ids:
            ids = [*vocabulary.begin_ids, *ids, vocabulary.end_of_document_id]
        yield Example(NOTHING, np.array(ids, np.int32), _bytes(text))


def _instructions(
    some: Sequence[Mapping[str, Any]], vocabulary: Vocabulary, threads: int, passed_over: dict[str, tuple[int, str]]
) -> Iterator[Example]:
    """Examples of prompts and answers, and of conversations; counts those that the chat template rejects."""
    has_template = vocabulary.chat_template is not None
    encoded = iter(chat.turns_tokens(vocabulary, [
        text.get("turns", [text["inputs"], text["targets"]]) for text in some
        if not (has_template and "messages" in text)], threads))
    for text in some:
        if "messages" not in text:
            inputs, targets = next(encoded)
            yield Example(np.array(inputs, np.int32), np.array(targets, np.int32), _bytes(text))
            continue
        try:
            found = chat.conversation_tokens(vocabulary, text["messages"]) if has_template else \
                [chat.joined(next(encoded))]
        except chat.Refused as error:
            count, first = passed_over.get(str(error), (0, text["place"]))
            passed_over[str(error)] = count + 1, first
            continue
        for number, (ids, counted) in enumerate(found):
            first_answer = counted.index(True) if True in counted else len(ids)
            tokens = np.where(counted, ids, np.invert(ids)).astype(np.int32)
            yield Example(np.array(ids[:first_answer], np.int32), tokens[first_answer:],
                          _bytes(text) if number == 0 else 0, is_conversation=True)


def _batches(texts: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Texts in batches of about a megabyte, in order."""
    some: list[Mapping[str, Any]] = []
    characters = 0
    for text in texts:
        some.append(text)
        characters += sum(len(text[name]) for name in ("inputs", "targets") if name in text)
        if characters >= CHARACTERS_AT_ONCE:
            yield some
            some, characters = [], 0
    if some:
        yield some


def _bytes(text: Mapping[str, Any]) -> int:
    return sum(len(text[name].encode()) for name in ("inputs", "targets") if name in text)


def task_tokens(task: Any, split: str, vocabulary: Any) -> Iterator[dict[str, np.ndarray]]:
    """The features of a SeqIO task's examples, tokenized with a SeqIO vocabulary instead of the task's own."""
    swapped = task.replace(output_features={
        name: dataclasses.replace(feature, vocabulary=vocabulary) for name, feature in task.output_features.items()})
    import tensorflow as tf

    try:
        for example in swapped.get_dataset(sequence_length=None, split=split, shuffle=False).as_numpy_iterator():
            yield {name: example[name] for name in ("inputs", "targets") if name in task.output_features}
    except tf.errors.OpError as error:
        # TensorFlow wraps a reader's error in a page of text; only the reader's line helps.
        own = re.findall(r"^.*?\b(?:\w+Error): (.+)$", error.message, flags=re.MULTILINE)
        raise ValueError(own[-1] if own else f"{task.name}: {error.message.splitlines()[0]}") from error


class Note(NamedTuple):
    """A reader's warning: `template` % `values`. Values are texts, numbers, and dicts from a reason to the number of
    records and the place of the first, which is not printed if the reason names its file.
    """

    template: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        told = tuple(", ".join(f"{count} {reason}" + f" (first: {place})" * (
                                   bool(place) and not reason.endswith(f" {os.path.basename(place)}"))
                               for reason, (count, place) in sorted(value.items()))
                     if isinstance(value, dict) else value for value in self.values)
        return self.template % told if told else self.template


def added(notes: Iterable[Note]) -> list[Note]:
    """Merges the notes of a split's parts: the numbers of equal warnings are added, and warnings with an empty count
    are dropped.
    """
    def sum_of(values: tuple[Any, ...]) -> Any:
        if isinstance(values[0], dict):
            whole: dict[str, tuple[int, str]] = {}
            for reason, (count, place) in (item for value in values for item in value.items()):
                before, first = whole.get(reason, (0, place))
                whole[reason] = before + count, first
            return whole
        return values[0] if isinstance(values[0], str) else sum(values)

    alike: dict[tuple[Any, ...], list[Note]] = {}
    for note in notes:
        texts = (value if isinstance(value, str) else None for value in note.values)
        alike.setdefault((note.template, *texts), []).append(note)
    whole = [Note(parts[0].template, tuple(map(sum_of, zip(*(note.values for note in parts), strict=True))))
             for parts in alike.values()]
    return [note for note in whole if {} not in note.values]


@contextlib.contextmanager
def warnings_of(task: str) -> Iterator[list[Note]]:
    """Collects a task's warnings, the log messages that begin with its name, and keeps them out of the log."""
    notes: list[Note] = []
    root = logging.getLogger()
    level = root.level  # in a Beam worker it may be above WARNING

    def is_of_another(record: logging.LogRecord) -> bool:
        of_task = record.getMessage().startswith((f"{task},", f"{task}:"))
        if of_task:
            values = record.args if isinstance(record.args, tuple) else ()
            note = Note(str(record.msg), tuple(
                dict(value) if isinstance(value, dict) else value if isinstance(value, int) else str(value)
                for value in values))
            if note not in notes:
                notes.append(note)
        return not of_task and record.levelno >= level

    root.setLevel(min(level, logging.WARNING))
    root.addFilter(is_of_another)
    try:
        yield notes
    finally:
        root.removeFilter(is_of_another)
        root.setLevel(level)


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Keeps TensorFlow off accelerators, and its C++ log off the terminal; Python's stderr still shows."""
    with quiet_stderr():
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        yield


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hides what libraries and child processes write to file descriptor 2; Python's stderr still shows."""
    if getattr(sys.stderr, "name", None) == "<stderr>" and sys.stderr.fileno() == 2:
        # A second descriptor for Python's stderr, never restored: logging handlers created inside keep it, and
        # existing ones are switched to it.
        before: Any = sys.stderr
        sys.stderr = type(before)(
            os.fdopen(os.dup(2), "wb"), encoding=before.encoding, errors=before.errors, line_buffering=True)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(sys.stderr)
    saved = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def require_registered(name: str) -> None:
    """Raises ValueError with the nearest names if SeqIO has neither a task nor a mixture of this name."""
    import seqio

    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)[:8]
        raise ValueError(
            f"No SeqIO task or mixture is named {name!r}; nearest: {', '.join(near)}. "
            "Modules that register others, such as tasks.tuning, are listed in TASK_MODULES.")
