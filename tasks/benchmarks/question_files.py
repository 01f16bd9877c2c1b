"""Benchmarks from users' files: JSON lines, a JSON list, CSV or Parquet, with a question in each record.

    TASKS = ['questions.jsonl', 'physics']
    BENCHMARKS = {'physics': {'file': 'data/physics.jsonl.gz', 'fields': {'question': 'stem', 'answer': 'key'}}}

TASKS names a file, or an entry of BENCHMARKS. An entry has these options:

  file             the path, local or gs://; JSON and CSV may be compressed. CSV and TSV are recognised by their names
  answers          how questions are answered; by default found from the records
                     'choices'    one of the `choices` is right, and they are scored
                     'number'     the model writes a number (`matching.RULES`); the default if all answers are numbers,
                                  alone or after GSM8K's "####"
                     'text'       the model writes a text (`matching.RULES`)
                     'programs'   the model writes a Python program, which must pass `tests`, as in MBPP
                     'functions'  the same, for records in HumanEval's own form, with an `entry_point`
  fields           the file's names for this package's fields (below). A dot leads into an object, and into each item of
                   a list: {'choices': 'question.choices.text'}. Any other key becomes a field of templates:
                   {'subject': 'topic'}. Choices and tests may be in several fields, the last of which may be
                   empty: {'choices': ['A', 'B', 'C', 'D']}
  answer_is        how the right choice is named: 'index' (from 0), 'ordinal' (from 1), 'letter' (one of `labels`,
                   else A, B, C ...) or 'text'; by default the reading that fits all records. An answer that may name
                   two choices is refused
  worked_examples  a file of the same format for FEW_SHOT; by default they are drawn from the other questions
  stop             texts that end a written answer; by default a line end for 'text', "\\nQuestion:" for 'number',
                   [DONE] for 'programs', and the stop sequences of HumanEval for 'functions'

Fields of questions with choices: question, choices (a list, or an object with a letter for each), answer, and
optionally passage, labels and id. Of questions with a written answer: question, answer (a reference, or a list of
them), and optionally passage and id. Of programs: question, tests (asserts: a text, or a list), code (a program that
passes them), and optionally setup and id. Templates name these fields, {passage_line} (the passage and a line end, or
nothing), and for choices {choice}, {letter} and {options}.

A file with any error is refused as a whole, with one line that names the record.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from codellm_jax.contents import RECORDS, absolute, without_compression, word_of
from tasks.benchmarks.templates import CHOICES, FUNCTIONS, NUMBER, OF_FILES, PROGRAMS, TEXT, nearest

INDEX, ORDINAL, LETTER = "index", "ordinal", "letter"
READINGS = (INDEX, ORDINAL, LETTER, TEXT)
# The fields of each kind of answer.
FIELDS: dict[str, tuple[str, ...]] = {
    CHOICES: ("id", "question", "passage", "choices", "labels", "answer"),
    TEXT: ("id", "question", "passage", "answer"),
    NUMBER: ("id", "question", "passage", "answer"),
    PROGRAMS: ("id", "question", "tests", "setup", "code"),
    FUNCTIONS: (),
}
SEVERAL = ("choices", "labels", "tests")  # fields that may hold several values
OUR_FIELDS = frozenset(field for fields in FIELDS.values() for field in fields)
_MADE = {"passage_line", "choice", "letter", "options"}  # derived from the fields above


@dataclasses.dataclass(frozen=True)
class QuestionFile:
    """An entry of BENCHMARKS, or a file that TASKS names. Raises ValueError, one line, if an option is malformed."""

    name: str
    file: str
    answers: str | None = None
    fields: Mapping[str, str | Sequence[str]] = dataclasses.field(default_factory=dict)
    answer_is: str | None = None
    worked_examples: str | None = None
    stop: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for option in ("file", "worked_examples"):
            path = getattr(self, option)
            if not (isinstance(path, str) and path.strip()) and not (option == "worked_examples" and path is None):
                raise ValueError(f"{self.name}: {option} must be the path of a file, found {path!r}.")
            if path and "://" in path and not path.startswith("gs://"):
                raise ValueError(f"{self.name}: {option} must be a local path or an address of gs://, found {path!r}.")
        for option, values in (("answers", tuple(OF_FILES)), ("answer_is", READINGS)):
            if (value := getattr(self, option)) is not None and value not in values:
                raise ValueError(f"{self.name}: {option} must be one of {', '.join(values)}, found {value!r}."
                                 f"{nearest(str(value), values)}")
        if not isinstance(self.fields, Mapping) or not all(
                isinstance(name, str) and name.isidentifier() and (
                    _are_names(path) if name in SEVERAL and isinstance(path, list | tuple) else _are_names([path]))
                for name, path in self.fields.items()):
            raise ValueError(f"{self.name}: fields must map this package's names to those of the file, such as "
                             f"{{'question': 'stem', 'choices': ['A', 'B']}}, found {self.fields!r}.")
        if made := sorted(_MADE & self.fields.keys()):
            raise ValueError(f"{self.name}: fields cannot set {made[0]!r}, which is made from other fields.")
        if self.stop is not None and (not isinstance(self.stop, list | tuple) or not all(
                isinstance(text, str) and text for text in self.stop)):
            raise ValueError(f"{self.name}: stop must be a list of texts such as ['\\n'], found {self.stop!r}.")

    def setting(self, option: str) -> str:
        """How to set an option, for messages."""
        if self == QuestionFile(self.name, self.file):
            return f"BENCHMARKS = {{{self.name!r}: {{'file': {self.file!r}, {option}}}}}"
        return f"{option} in BENCHMARKS for {self.name!r}"

    def require_fields_of(self, answers: str) -> None:
        """Raises ValueError if `fields` names a field of this package that questions of this kind do not have."""
        for field in self.fields:
            if answers == FUNCTIONS or field in OUR_FIELDS and field not in FIELDS[answers]:
                known = ", ".join(FIELDS[answers]) or "those of HumanEval, under their own names"
                raise ValueError(f"{self.name}: fields names {field!r}, but the fields of {answers} are {known}.")


def is_file(task: str) -> bool:
    """Whether a name of TASKS is the path of a file."""
    return "/" in task or bool(re.search(RECORDS, without_compression(task), re.IGNORECASE))


def _are_names(names: Sequence[Any]) -> bool:
    return bool(names) and all(isinstance(name, str) and name for name in names)


def parsed(specs: Mapping[str, Mapping[str, Any]], taken: Collection[str]) -> dict[str, QuestionFile]:
    """The entries of BENCHMARKS, by name.

    Args:
      specs: BENCHMARKS as described above.
      taken: names of other tasks.

    Raises:
      ValueError: one line; a name or an option is malformed, or a name is taken.
    """
    if not isinstance(specs, Mapping):
        raise ValueError("BENCHMARKS must map names to options such as {'file': 'questions.jsonl'}, found "
                         f"{specs!r}.")
    options = [field.name for field in dataclasses.fields(QuestionFile) if field.name != "name"]
    found = {}
    for name, spec in specs.items():
        if not isinstance(name, str) or not name or word_of(name) != name:
            raise ValueError("BENCHMARKS: a name is a word of letters and digits, with single '_' between; found "
                             f"{name!r}.")
        if _is_taken(name, taken):
            raise ValueError(f"BENCHMARKS: {name!r} is a benchmark of this package; choose another name.")
        if not isinstance(spec, Mapping) or "file" not in spec:
            raise ValueError(f"{name}: BENCHMARKS must give at least a file, such as {{'file': 'questions.jsonl'}}; "
                             f"found {spec!r}.")
        for option in spec:
            if option not in options:
                raise ValueError(f"{name}: BENCHMARKS has no option {option!r}, only {', '.join(options)}."
                                 f"{nearest(str(option), options)}")
        found[name] = QuestionFile(name, **spec)
    return found


def find(task: str, files: Mapping[str, QuestionFile], taken: Collection[str]) -> QuestionFile | None:
    """The file of a task; None if the task is neither an entry of BENCHMARKS nor a file.

    Args:
      task: a name in TASKS.
      files: the result of `parsed`.
      taken: names of other tasks.

    Raises:
      ValueError: one line; results of the file would be stored under the name of another task.
    """
    if task in files or not is_file(task):
        return files.get(task)
    name = word_of(task)
    if name in files and absolute(files[name].file) == absolute(task):
        return files[name]
    if not name or name in files or _is_taken(name, taken):
        whose = f"{name!r}, the name of another benchmark" if name else "no name"
        raise ValueError(f"The results of {task!r} would be stored under {whose}; set TASKS = ['mine'] and "
                         f"BENCHMARKS = {{'mine': {{'file': {task!r}}}}}.")
    return QuestionFile(name, task)


def _is_taken(name: str, taken: Collection[str]) -> bool:
    """Whether a task has this name; some file systems ignore case, and NAME_sample holds results on sample items."""
    return name.casefold().removesuffix("_sample") in {other.casefold() for other in taken}
