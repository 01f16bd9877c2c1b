"""Loads benchmarks: `load("logic", data_dir)` returns the questions, and how many records are read or skipped and why.

DESCRIPTIONS lists the tasks. A task may also be the path of a user's file, or a name of BENCHMARKS; see
`question_files`.

Importing this module imports neither TensorFlow nor SeqIO.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from codellm_jax.contents import absolute
from tasks.benchmarks import (
    c3,
    cosqa,
    dureader,
    ekar,
    humaneval,
    jecqa,
    logic,
    mbpp,
    nli,
    question_files,
    question_records,
    scienceqa,
    templates,
)
from tasks.benchmarks.locating import SAMPLES, Form, content_hash, is_sample, locate
from tasks.benchmarks.question_files import QuestionFile
from tasks.benchmarks.questions import BAD_TEXT, Item, Loaded, Prompt, Question, is_valid_text
from tasks.benchmarks.templates import OF_FILES, RELEASED, Template
from tasks.corpora.files import Counts, Lost, in_name_of

Reader = Callable[[Sequence[str]], Iterator[Item | Lost]]


class Benchmark(NamedTuple):
    """The sources of a task's questions and worked examples.

    Attributes:
      forms: the names of its files, in order of preference.
      read: reads items from them.
      shot_forms: the names of the files of its worked examples; empty if it has none.
      read_shots: reads items from those.
      own_shots: the number of fixed worked examples that are part of the task.
    """

    forms: tuple[Form, ...]
    read: Reader
    shot_forms: tuple[Form, ...] = ()
    read_shots: Reader | None = None
    own_shots: int = 0


def _benchmark(forms: tuple[Form, ...], shot_forms: tuple[Form, ...], read: Reader) -> Benchmark:
    """A benchmark whose worked examples are in files of the same format."""
    return Benchmark(forms, read, shot_forms, read)


def _scienceqa(selection: str) -> Benchmark:
    read = functools.partial(scienceqa.read, selection=selection)
    return Benchmark(scienceqa.FORMS, read, scienceqa.FORMS, functools.partial(read, split="train"))


BENCHMARKS: dict[str, Benchmark] = {
    "logic": _benchmark(logic.FORMS, logic.SHOT_FORMS, logic.read),
    "jecqa": _benchmark(jecqa.FORMS, jecqa.SHOT_FORMS, jecqa.read),
    "jecqa_exact_set": _benchmark(jecqa.FORMS, jecqa.SHOT_FORMS, functools.partial(jecqa.read, exact_set=True)),
    "scienceqa": _scienceqa(scienceqa.EXPLAINED),
    "scienceqa_text_only": _scienceqa(scienceqa.TEXT_ONLY),
    "scienceqa_all": _scienceqa(scienceqa.ALL),
    "scienceqa_cot": _scienceqa(scienceqa.EXPLAINED),
    "ekar": _benchmark(ekar.FORMS, ekar.SHOT_FORMS, ekar.read),
    "ekar_cot": _benchmark(ekar.FORMS, ekar.SHOT_FORMS, functools.partial(ekar.read, explained=True)),
    "cosqa": _benchmark(cosqa.FORMS, cosqa.SHOT_FORMS, cosqa.read),
    "mbpp": Benchmark(mbpp.SANITIZED_FORMS, mbpp.read, mbpp.FULL_FORMS, mbpp.read_train),
    "mbpp_three_shot": Benchmark(
        mbpp.FULL_FORMS, mbpp.read_test, mbpp.FULL_FORMS, mbpp.read_shown, own_shots=len(mbpp.SHOWN)),
    "humaneval": Benchmark(humaneval.FORMS, humaneval.read),
    "c3": _benchmark(c3.FORMS, c3.SHOT_FORMS, c3.read),
    "ocnli": _benchmark(nli.OCNLI_FORMS, nli.OCNLI_SHOT_FORMS, nli.read),
    "cmnli": _benchmark(nli.CMNLI_FORMS, nli.CMNLI_SHOT_FORMS, nli.read),
    "dureader": _benchmark(dureader.FORMS, dureader.SHOT_FORMS, dureader.read),
}


# One line about each task.
DESCRIPTIONS: dict[str, str] = {
    "logic": "C-Eval's logic questions, validation split.",
    "jecqa": "JEC-QA, the questions with one right answer.",
    "jecqa_exact_set": "JEC-QA, all questions; every set of choices is a candidate.",
    "scienceqa": "ScienceQA, test questions that have a lecture and a solution, as the study's released code.",
    "scienceqa_text_only": "ScienceQA, test questions that have no image, without lectures.",
    "scienceqa_all": "ScienceQA, all test questions, with the lecture where there is one.",
    "scienceqa_cot": "As scienceqa, with the solution given as a chain of thought.",
    "ekar": "E-KAR, Chinese test split.",
    "ekar_cot": "E-KAR, Chinese test split, with explanations given.",
    "cosqa": "CosQA, development split.",
    "mbpp": "MBPP, sanitized set, zero-shot; the model writes programs, which are run.",
    "mbpp_three_shot": "MBPP, problems 11 to 510 with their tests, after three solved ones.",
    "humaneval": "HumanEval, zero-shot; the model writes programs, which are run.",
    "c3": "C3, development split.",
    "ocnli": "OCNLI, development split.",
    "cmnli": "CMNLI, development split.",
    "dureader": "DuReader-robust, development split; the model writes answers.",
}


# The start of the next worked example, after the separator: it ends a model's answer.
NEXT_EXAMPLE = {"mbpp": "Write ", "dureader": ""}
# Tasks answered by a program, and all answered by writing, whose questions are `Prompt`s.
PROGRAMS = frozenset({"mbpp", "mbpp_three_shot", "humaneval"})
GENERATED = PROGRAMS | {"dureader"}
NO_SPECS: Mapping[str, Mapping[str, Any]] = {}


class _Source(NamedTuple):
    """The records of a task's questions and of its worked examples.

    Attributes:
      name: the task's name.
      templates: its named templates.
      items, skipped, files: the questions, the counts of skipped records, and the files.
      shots, shots_skipped, shot_files: the same for the worked examples; empty if none are requested.
      own_shots: as in `Benchmark`.
      next_example: as in NEXT_EXAMPLE; None if it does not end an answer.
    """

    name: str
    templates: Mapping[str, Template]
    items: list[Item]
    skipped: Counts
    files: list[str]
    shots: list[Item]
    shots_skipped: Counts
    shot_files: list[str]
    own_shots: int = 0
    next_example: str | None = None


def load(
    task: str,
    data_dir: str | None,
    template: str | Mapping[str, str] = RELEASED,
    few_shot: int = 0,
    seed: int = 0,
    specs: Mapping[str, Mapping[str, Any]] = NO_SPECS,
) -> Loaded:
    """Loads a benchmark.

    Args:
      task: one of `BENCHMARKS` or of `specs`, or the path of a file.
      data_dir: a folder, local or gs://, that is searched for its files by name; None for this package's few sample
        items. Users' files are found by their paths.
      template: a name, see `tasks.benchmarks.templates`, or {"prompt": "...{field}...", "continuation": "..."}.
      few_shot: number of worked examples before each prompt. They come from the training split (C-Eval's development
        split; for a user's file, its file of worked examples or the file itself), are drawn by a stable hash of the
        seed and the question's id, and are never the question itself.
      seed: seed of that draw.
      specs: users' benchmarks, as `question_files` describes them.

    Raises:
      ValueError: one line; there is no such task or template, a template names an unknown field, a file lacks data
        that the task needs or exists twice, the files hold no usable question, there are too few worked examples, or a
        user's file has any error.
      OSError: one line; the folder or the files do not exist, or cannot be read.
    """
    own = _own_file(task, specs)
    source = _source_of_file(own, few_shot) if own else _source(task, data_dir, few_shot)
    name, items = source.name, source.items
    form = templates.resolve(name, template, source.templates)
    contexts = _contexts(name, form, items, source.shots, few_shot or source.own_shots, seed, bool(source.own_shots))
    # All `Question` or all `Prompt`: a reader makes items of one kind.
    if few_shot and source.next_example is not None and (stop := form.separator + source.next_example):
        items = [item._replace(extra={**item.extra, "stop": (stop,)}) for item in items]
    made: tuple[Any, ...] = tuple(
        _question(name, form, item, context) for item, context in zip(items, contexts, strict=True))
    files = list(dict.fromkeys([*source.files, *source.shot_files]))
    return Loaded(
        name=name, questions=made, sha256=content_hash(files), read=len(items) + source.skipped.total(),
        skipped=dict(source.skipped), is_sample=not own and data_dir is None or is_sample(files), files=tuple(files),
        worked_examples=len(source.shots), worked_examples_skipped=dict(source.shots_skipped),
    )


def read_items(
    task: str, data_dir: str | None, specs: Mapping[str, Mapping[str, Any]] = NO_SPECS
) -> tuple[list[Item], str, list[str]]:
    """The items from which `load` makes a task's questions, in order and with ids; the task's name; and the files.

    Arguments and errors are those of `load`.
    """
    own = _own_file(task, specs)
    source = _source_of_file(own, 0) if own else _source(task, data_dir, 0)
    return source.items, source.name, source.files


def _own_file(task: str, specs: Mapping[str, Mapping[str, Any]]) -> QuestionFile | None:
    """The user's file of a task; None for one of BENCHMARKS."""
    files = question_files.parsed(specs, BENCHMARKS)
    own = question_files.find(task, files, BENCHMARKS) if isinstance(task, str) else None
    if own is None and task not in BENCHMARKS:
        known = [*BENCHMARKS, *files]
        hint = templates.nearest(task, known) if isinstance(task, str) else ""
        raise ValueError(f"There is no benchmark {task!r}, only {', '.join(known)}, or a file such as "
                         f"'questions.jsonl'.{hint}")
    return own


def _source_of_file(own: QuestionFile, few_shot: int) -> _Source:
    _require_few_shot(own.name, few_shot)
    questions = question_records.read(own, own.file)
    shots = questions
    if few_shot and own.worked_examples is not None:
        shots = question_records.read(own, own.worked_examples, like=questions)
    shot_file = absolute(own.worked_examples or own.file)
    return _Source(
        own.name, OF_FILES[questions.answers], questions.items, Counts(), [absolute(own.file)],
        shots.items if few_shot else [], Counts(), [shot_file] if few_shot else [])


def _source(task: str, data_dir: str | None, few_shot: int) -> _Source:
    benchmark = BENCHMARKS[task]
    _check_few_shot(task, benchmark, few_shot)
    folder = SAMPLES if data_dir is None else data_dir
    files = locate(task, benchmark.forms, folder)
    items, skipped = _read(task, benchmark.read, files, "questions")
    shot_files: list[str] = []
    shots: list[Item] = []
    shots_skipped = Counts()
    if few_shot or benchmark.own_shots:
        assert benchmark.read_shots is not None
        shot_files = locate(task, benchmark.shot_forms, folder, "for worked examples; set few_shot to 0")
        if shot_files == files and benchmark.read_shots == benchmark.read:
            raise ValueError(f"{task}: {', '.join(files)} holds the questions, and there is no other file for worked "
                             "examples; set few_shot to 0.")
        shots, shots_skipped = _read(task, benchmark.read_shots, shot_files, "worked examples")
    if benchmark.own_shots and len(shots) != benchmark.own_shots:
        raise ValueError(f"{task}: {', '.join(shot_files)} holds {len(shots)} of the {benchmark.own_shots} problems "
                         f"that its prompt shows ({shots_skipped}).")
    return _Source(task, templates.TEMPLATES[task], items, skipped, files, shots, shots_skipped, shot_files,
                   benchmark.own_shots, NEXT_EXAMPLE.get(task))


def _require_few_shot(task: str, few_shot: int) -> None:
    if not isinstance(few_shot, int) or isinstance(few_shot, bool) or few_shot < 0:
        raise ValueError(f"{task}: few_shot must be a whole number, 0 or more; found {few_shot!r}.")


def _check_few_shot(task: str, benchmark: Benchmark, few_shot: int) -> None:
    _require_few_shot(task, few_shot)
    if few_shot and benchmark.own_shots:
        raise ValueError(f"{task}: its prompt shows {benchmark.own_shots} solved problems of its own; set few_shot to "
                         "0, or evaluate mbpp.")
    if few_shot and benchmark.read_shots is None:
        raise ValueError(f"{task} has no worked examples; set few_shot to 0.")


def _read(task: str, read: Reader, files: Sequence[str], what: str) -> tuple[list[Item], Counts]:
    """The items of files, with unique ids, and the number of skipped records by reason."""
    items: dict[str, Item] = {}
    skipped = Counts()
    with in_name_of(task):
        for item in read(files):
            if isinstance(item, Lost):
                skipped[item.reason] += 1
            elif not is_valid_text(item):
                skipped[BAD_TEXT] += 1
            else:
                # A question with a repeated id still counts, so it is kept under a new id.
                own = next(own for own in _names(item.id) if own not in items)
                items[own] = item._replace(id=own)
    if not items:
        raise ValueError(f"{task}: no {what} are left of {', '.join(files)} ({skipped}).")
    return list(items.values()), skipped


def _names(own: str) -> Iterator[str]:
    yield own
    yield from (f"{own} ({number})" for number in itertools.count(2))


def _contexts(
    task: str, template: Template, items: Sequence[Item], shots: Sequence[Item], wanted: int, seed: int, fixed: bool
) -> Iterable[str]:
    """The worked examples before the prompt of each item."""
    if not wanted:
        return [""] * len(items)
    shown = functools.cache(lambda place: templates.worked_example(task, template, shots[place]))
    if fixed:
        return ["".join(map(shown, range(len(shots))))] * len(items)
    return ["".join(map(shown, _drawn(task, item, shots, wanted, seed))) for item in items]


def _drawn(task: str, item: Item, shots: Sequence[Item], wanted: int, seed: int) -> list[int]:
    """Positions of worked examples: distinct, and never those of an item with the same candidates."""
    key = f"{seed}\0{item.id}".encode()
    drawn: list[int] = []
    moved: dict[int, int] = {}  # A sparse Fisher-Yates shuffle: positions that hold another entry after earlier draws.
    for number in range(len(shots)):
        if len(drawn) == wanted:
            break
        last = len(shots) - 1 - number
        at = int.from_bytes(hashlib.sha256(key + f"\0{number}".encode()).digest()[:8], "big") % (last + 1)
        place = moved.get(at, at)
        moved[at] = moved.get(last, last)
        if shots[place].candidates != item.candidates:
            drawn.append(place)
    if len(drawn) < wanted:
        raise ValueError(f"{task}: few_shot asks for {wanted} worked examples for question {item.id}, but there are "
                         f"only {len(drawn)}.")
    return drawn


def _question(task: str, template: Template, item: Item, context: str) -> Question | Prompt:
    rendered = [templates.render(task, template, fields) for fields in item.candidates]
    if item.references:
        return Prompt(item.id, context + rendered[0].prompt, item.references, item.extra)
    if not all(candidate.continuation for candidate in rendered):
        raise ValueError(f"{task}: the template leaves nothing to score for question {item.id}.")
    candidates = tuple(candidate._replace(prompt=context + candidate.prompt) for candidate in rendered)
    return Question(item.id, candidates, item.answer)
