"""SeqIO tasks of pre-training: whole documents, tokenized, each ended by the end-of-document token.

`text.python` and `code.python` read the standard library of every Python; the mixture `python_text_code`
mixes them like the paper's 100 GB of text and 50 GB of code. `add_corpus` makes the same
kind of task from a user's corpus.

Documents are never cut here: read with `sequence_length=None` they are whole, and the training code
joins them and cuts rows. Upstream T5X reads the same tasks with a length, to which SeqIO trims. Its
mixture rates then count documents, not tokens; `tasks.rows` gives it the rows of a run instead.

The vocabulary in the task's `output_features` tokenizes, so that
`task.replace(output_features=...)` selects another one.
"""

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from codellm_jax import vocabulary
from tasks.corpora import sources, specs, token_arrays
from tasks.scheduling import add_scheduled_mixture

DEFAULT_VOCABULARY = vocabulary.load_vocabulary("python_8k")

# The tasks that `add_corpus` registered, by name, to distinguish them from modules' tasks.
_added: dict[str, Mapping[str, Any]] = {}


def output_features(path: str = DEFAULT_VOCABULARY.path) -> dict[str, seqio.Feature]:
    """The features of a pre-training task, tokenized by a SentencePiece model file."""
    return {"targets": seqio.Feature(seqio.SentencePieceVocabulary(path), add_eos=True)}


def add_corpus(
    name: str, spec: Mapping[str, Any], task_of: Callable[[str, Mapping[str, Any]], seqio.Task] | None = None
) -> None:
    """Registers a corpus as the SeqIO task `name`.

    The same spec again changes nothing (an alias follows its task); another one replaces the task.

    Args:
      name: the task's name, such as "text.books".
      spec: as `corpora.sources` describes it. The kind "task" gives an existing task, with its own
        preprocessors and features, another name.
      task_of: makes the task of any other kind; by default a task of documents.

    Raises:
      ValueError: the spec is malformed, the name is a task or mixture of another origin, or an
        alias names no task with a feature "targets".
    """
    specs.validate(spec, name)
    taken = set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names())
    if name in _added:
        if _added[name] == spec and "task" not in spec:
            return
    elif name in taken:
        raise ValueError(f"{name} is already another task; give the corpus another name.")
    task = _alias(name, spec["task"]) if "task" in spec else (task_of or _task)(name, spec)
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add_provider(name, task)
    _added[name] = dict(spec)


def _alias(name: str, target: str) -> seqio.Task:
    tasks = sorted(set(seqio.TaskRegistry.names()) - {name})
    if target not in tasks:
        near = difflib.get_close_matches(target, tasks, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "is its module in tasks.modules?"
        raise ValueError(f"{name}: no SeqIO task is named {target!r}; {hint}")
    task = seqio.TaskRegistry.get(target)
    if "targets" not in task.output_features:
        raise ValueError(
            f"{name}: the task {target!r} has no feature 'targets', only "
            f"{', '.join(task.output_features)}; rename one in its preprocessors."
        )
    return task.replace(name=name)


class CorpusSource(seqio.FunctionDataSource):
    """The texts of a corpus as a SeqIO source, in the readers' order, which SeqIO shuffles afterwards.

    Args:
      texts: called with spec, split, name, the files to read, None for all, and borders; gives texts by feature, and
        for a conversation also its messages and turns.
      find_borders: called with spec and name; gives the borders of splits as JSON, if a hash divides the corpus.
      features: the names of those features.

    Attributes:
      vocabulary: for a corpus of tokens, the name of the vocabulary with which they were made; else None.
    """

    def __init__(
        self, texts: Callable[..., Iterator[dict[str, Any]]], features: Iterable[str], spec: Mapping[str, Any],
        name: str, find_borders: Callable[..., specs.Borders | None],
    ) -> None:
        self.vocabulary: str | None = spec.get("vocabulary")
        self._texts, self._features, self._spec, self._name = texts, tuple(features), dict(spec), name
        self._find_borders = find_borders
        super().__init__(self._dataset, splits=specs.splits(spec))

    def texts(
        self, split: str, files: Sequence[str] | None = None, borders: Sequence[float] | None = None
    ) -> Iterator[dict[str, Any]]:
        """The texts of a split, or of some of its files if it is divisible, without TensorFlow.

        Args:
          borders: the result of `find_borders`, if known; else documents are read for it.
        """
        return self._texts(self._spec, split, self._name, files, borders and specs.Borders(*borders))

    def tokens(
        self, split: str, files: Sequence[str] | None = None, borders: Sequence[float] | None = None
    ) -> Iterator[token_arrays.Document]:
        """The documents of a split of a corpus of tokens; arguments as for `texts`."""
        return token_arrays.documents(self._spec, split, self._name, _known(str(self.vocabulary)), files,
                                      specs.Borders(*borders) if borders else None)

    def find_borders(self) -> specs.Borders | None:
        """The borders that divide the whole corpus into splits, for reading file by file; None if not by hash."""
        return self._find_borders(self._spec, self._name)

    def is_divisible(self, split: str) -> bool:
        """Whether the texts of a split's files, read one by one, are those of the split."""
        return specs.is_divisible(self._spec, split)

    def _dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed
        # Calls the reader once outside of TensorFlow, so that its errors keep their type and one line.
        self.texts(split)
        return tf.data.Dataset.from_generator(
            lambda: ({feature: texts[feature] for feature in self._features} for texts in self.texts(split)),
            output_signature={feature: tf.TensorSpec((), tf.string) for feature in self._features})


def make_task(
    name: str, spec: Mapping[str, Any], texts: Callable[..., Iterator[dict[str, Any]]],
    features: dict[str, seqio.Feature], find_borders: Callable[..., specs.Borders | None],
) -> seqio.Task:
    """A task of texts, tokenized and, if a feature requires it, ended by the end token.

    Args:
      texts, find_borders: as `CorpusSource` calls them.
      features: by name, as in the texts.
    """
    return seqio.Task(
        name=name,
        source=CorpusSource(texts, features, spec, name, find_borders),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features=features,
        metric_fns=[],
    )


def _task(name: str, spec: Mapping[str, Any]) -> seqio.Task:
    if specs.kind_of(spec) in specs.TOKEN_KINDS:
        return make_task(name, spec, _texts_of_tokens, output_features(), _borders_of_tokens)
    return make_task(name, spec, _texts, output_features(), sources.find_borders)


def _texts_of_tokens(
    spec: Mapping[str, Any], split: str, name: str, files: Sequence[str] | None, borders: specs.Borders | None
) -> Iterator[dict[str, str]]:
    """Like `_texts`: for plain SeqIO, which tokenizes them again."""
    found = token_arrays.documents(spec, split, name, _known(spec["vocabulary"]), files, borders)
    return ({"targets": document.text} for document in found)


def _borders_of_tokens(spec: Mapping[str, Any], name: str) -> specs.Borders | None:
    return token_arrays.find_borders(spec, name, _known(spec["vocabulary"]))


@functools.cache
def _known(path: str) -> token_arrays.Known:
    """The facts needed about the vocabulary with which tokens were made."""
    of = vocabulary.load_vocabulary(path)
    bytes_of_ids = of.bytes_of_ids()
    table = np.frombuffer(b"".join(bytes_of_ids), np.uint8)
    counts = np.array([len(piece) for piece in bytes_of_ids])
    starts, every = np.cumsum(counts) - counts, np.arange(of.pieces)
    # A tokenizer may put a blank before a text, which then belongs to its first id.
    before = counts - of.bytes_behind(np.full(of.pieces, of.end_of_document_id), every)

    def text(ids: np.ndarray) -> bytes:
        counted = counts[ids]
        ends = np.cumsum(counted)
        joined = table[np.arange(ends[-1]) + np.repeat(starts[ids] - ends + counted, counted)].tobytes()
        return joined[before[ids[0]] :]

    return token_arrays.Known(path, of.pieces, of.end_of_document_id, of.begin_ids, text, of.encode)


def _texts(
    spec: Mapping[str, Any], split: str, name: str, files: Sequence[str] | None, borders: specs.Borders | None
) -> Iterator[dict[str, str]]:
    documents = sources.documents(spec, split, name, files, borders)
    return ({"targets": text} for text in documents)


def full_rows(dataset: tf.data.Dataset, length: int) -> tf.data.Dataset:
    """Joins the targets of a tokenized dataset and cuts them into examples of `length` tokens; drops the rest."""
    return dataset.map(lambda example: {"targets": example["targets"]}).unbatch().batch(length, drop_remainder=True)


for _kind in ("text", "code"):
    seqio.TaskRegistry.add_provider(f"{_kind}.python", _task(f"{_kind}.python", {"python": _kind}))

seqio.MixtureRegistry.add("python_text_code", [("text.python", 2), ("code.python", 1)])

# For plain SeqIO, whose rates count examples: the same corpora as full rows, so that rates count tokens, with the mixes
# of gin/mixed_pretrain_increase.gin and gin/mixed_pretrain_decrease.gin. Not for runs of upstream T5X: it rebuilds its
# dataset at each start, which would restart the mix, and positions do not separate the documents of these rows.
# `tasks.rows` solves both.
ROW_LENGTH, ROWS_OF_RUN = 256, 400 * 8
for _kind in ("text", "code"):
    _rows = _task(f"{_kind}.python_rows", {"python": _kind})
    seqio.TaskRegistry.add_provider(_rows.name, _rows.replace(
        preprocessors=[*_rows.preprocessors, functools.partial(full_rows, length=ROW_LENGTH)]))

_INCREASE = ("11:4", "11:4", "29:16", "5:4")
for _change, _phases in (("increase", _INCREASE), ("decrease", _INCREASE[::-1])):
    add_scheduled_mixture(f"python_rows_{_change}", ["text.python_rows", "code.python_rows"],
                          mix_phases=_phases, examples=ROWS_OF_RUN)
