"""The texts of a benchmark's questions as in their records, without the words of any template.

`evaluation.contamination` searches training data for them: the question, its context, the right answer, and in
chain-of-thought tasks the scored reasoning. Left out are wrong choices, which are not evidence; answers that are the
same few words in all questions, such as "correct"; and ScienceQA's lectures, which belong to no single question.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tasks.benchmarks.loading import NO_SPECS, read_items
from tasks.benchmarks.locating import content_hash, is_sample

_CHOICES = ("question", "choice")
_SENTENCES = ("sentence1", "sentence2")
PARTS: dict[str, tuple[str, ...]] = {
    "logic": _CHOICES,
    "jecqa": _CHOICES,
    "jecqa_exact_set": _CHOICES,
    "scienceqa": _CHOICES,
    "scienceqa_text_only": _CHOICES,
    "scienceqa_all": _CHOICES,
    "scienceqa_cot": (*_CHOICES, "solution"),
    "ekar": _CHOICES,
    "ekar_cot": (*_CHOICES, "query_explanation", "explanation"),
    "cosqa": ("doc", "code"),
    "mbpp": ("text", "code"),
    "mbpp_three_shot": ("text", "code"),
    "humaneval": ("prompt", "code"),
    "c3": ("context", *_CHOICES),
    "ocnli": _SENTENCES,
    "cmnli": _SENTENCES,
    "dureader": ("context", "question", "answer"),
}
# For users' files; an item has some of them.
OF_FILES = ("passage", "prompt", "question", "choice", "answer", "code")


class Texts(NamedTuple):
    """The questions of a task.

    Attributes:
      name: the task's name.
      is_sample: whether they are the package's own items.
      sha256: hash of their files.
      parts: the texts of each question by its id, with those of the right answer last.
    """

    name: str
    is_sample: bool
    sha256: str
    parts: dict[str, tuple[str, ...]]


def read_texts(task: str, data_dir: str | None, specs: Mapping[str, Mapping[str, Any]] = NO_SPECS) -> Texts:
    """Reads the texts of a task's questions; ids, arguments and errors are those of `load`."""
    items, name, files = read_items(task, data_dir, specs)
    parts = {}
    for item in items:
        right = item.candidates[item.answer[0]]
        parts[item.id] = tuple(right[field] for field in PARTS.get(name, OF_FILES) if right.get(field))
    return Texts(name, name in PARTS and data_dir is None or is_sample(files), content_hash(files), parts)
