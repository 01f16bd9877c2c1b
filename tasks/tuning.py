"""SeqIO tasks of tuning: a prompt as `inputs`, its answer as `targets`, ended by the end token.

`text.python_instructions` and `code.python_instructions` are made from the standard library of every Python; the
mixture `python_instructions` joins them 5:3, as the study's uniform mix does. `add_corpus` makes the same kind of task
from a user's or an official corpus, and `add_official_mixture` joins the official ones.

A conversation is one example: its last answer is the `targets`, and everything before it, in the
form of `instruction_sets.prompts`, the `inputs`. SeqIO and upstream T5X thus learn only the last answer. `t5x`
also reads the conversation's messages, and learns each answer, in the form of the vocabulary's chat template.

Nothing is cut here: read with `sequence_length=None` examples are whole. The vocabulary in the task's `output_features`
tokenizes, so that `task.replace(output_features=...)` selects another one.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import seqio

from tasks import pretraining
from tasks.corpora.official import MIXTURE, MIXTURE_RATES
from tasks.corpora.specs import Borders
from tasks.instruction_sets import instructions
from tasks.scheduling import add_scheduled_mixture


def output_features(path: str = pretraining.DEFAULT_VOCABULARY.path) -> dict[str, seqio.Feature]:
    """The features of an instruction task, tokenized by a SentencePiece model file."""
    vocabulary = seqio.SentencePieceVocabulary(path)
    return {
        "inputs": seqio.Feature(vocabulary, add_eos=False),
        "targets": seqio.Feature(vocabulary, add_eos=True),
    }


def add_corpus(name: str, spec: Mapping[str, Any]) -> None:
    """Registers a corpus of instructions as the SeqIO task `name`.

    The same spec again changes nothing; another one replaces the task.

    Args:
      name: the task's name, such as "text.alpaca".
      spec: of one of the kinds that `instruction_sets.instructions` describes.

    Raises:
      ValueError: the spec is malformed, or the name is a task or mixture of another origin.
    """
    pretraining.add_corpus(name, spec, task_of=_task)


def add_official_mixture() -> None:
    """Registers the mixture of the official corpora, which must be registered already; repeating is harmless.

    Raises:
      ValueError: the mixture's name is a task or mixture of another origin.
    """
    if MIXTURE in seqio.TaskRegistry.names():
        raise ValueError(f"{MIXTURE} is already another task; give that another name.")
    # Rebuilt each time: a mixture keeps its tasks, and one may have been replaced.
    if MIXTURE in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove(MIXTURE)
    seqio.MixtureRegistry.add(MIXTURE, list(MIXTURE_RATES.items()))


def _task(name: str, spec: Mapping[str, Any]) -> seqio.Task:
    return pretraining.make_task(name, spec, _texts, output_features(), instructions.find_borders)


def _texts(
    spec: Mapping[str, Any], split: str, name: str, files: Sequence[str] | None, borders: Borders | None
) -> Iterator[dict[str, Any]]:
    pairs = instructions.pairs(spec, split, name, files, borders)
    return ({"inputs": pair.inputs, "targets": pair.targets} | (
        pair._asdict() if isinstance(pair, instructions.Conversation) else {}) for pair in pairs)


for _kind in ("text", "code"):
    seqio.TaskRegistry.add_provider(
        f"{_kind}.python_instructions",
        _task(f"{_kind}.python_instructions", {"python_instructions": _kind}),
    )

seqio.MixtureRegistry.add("python_instructions", [("text.python_instructions", 5), ("code.python_instructions", 3)])

# For plain SeqIO and upstream T5X: the mixes of gin/tune_increase.gin and gin/tune_decrease.gin.
EXAMPLES_OF_RUN = 200 * 16
_INCREASE = ("7:3", "7:3", "6:4", "5:5")
for _change, _phases in (("increase", _INCREASE), ("decrease", _INCREASE[::-1])):
    add_scheduled_mixture(
        f"python_instructions_{_change}", ["text.python_instructions", "code.python_instructions"],
        mix_phases=_phases, examples=EXAMPLES_OF_RUN)
