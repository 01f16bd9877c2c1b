"""Contamination: finds benchmark questions in a run's training data.

    t5x contamination --gin_file=gin/mixed_pretrain.gin --gin.DATA_DIR=/data

A question overlaps with a source if any of its n-grams, 13 words by default or 26 characters of Chinese, occurs in the
source's training text (`mixture/ngrams.py` defines words and n-grams, `tasks/benchmarks/texts.py` the parts of a
question). The search covers the cached training rows of whole sources, whatever their share in a run, so that the arms
of a study are compared on the same questions. If a run starts from another, the rows of that run's stages are also
searched. A passage to which a question refers counts like the question itself. An overlap is therefore a reason to
look closer, and at the score without these questions.
"""

import ast
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from codellm_jax.configuration import build, read_configuration
from codellm_jax.evaluation.evaluate import require_names
from codellm_jax.mixture.examples import example_sizes
from codellm_jax.mixture.ledger import stages_of
from codellm_jax.mixture.mixture import Mixture, training_rows
from codellm_jax.mixture.ngrams import Lengths, NGrams, Question, index
from codellm_jax.mixture.overlap import Trained, search
from codellm_jax.results.files import write_whole
from codellm_jax.runtime.compatibility import literal
from codellm_jax.runtime.progress import StatusLine, duration
from codellm_jax.settings import Configuration
from codellm_jax.vocabulary import Vocabulary
from codellm_jax.weights.start import newest_record

CONTAMINATION_VERSION = 2  # raise it whenever the same texts would give other overlaps
SHOWN = 100  # characters of an n-gram


class Texts(Protocol):
    """The source of the texts of questions. `tasks.benchmarks.judging.Benchmarks` is one."""

    def texts(self, task: str) -> Any:
        """A `tasks.benchmarks.texts.Texts`."""
        ...


@dataclasses.dataclass(frozen=True)
class Contamination:
    """The settings of a search for contamination.

    Attributes:
      tasks: names of benchmarks, or files of questions.
      benchmarks: reads their questions.
      ngram: words of an n-gram.
      minimum: words that a shorter part of a question must have to be searched for as a whole.
      characters, minimum_characters: the same for Chinese and other scripts without spaces.
      most: an n-gram that more questions of one task share is part of the task's wording, and does not count.
      processes: the most processes that search at once; None for one per core.
    """

    tasks: Sequence[str]
    benchmarks: Texts
    ngram: int = 13  # these equal the defaults of `mixture/ngrams.py`, as numbers for the reference
    minimum: int = 8
    characters: int = 26
    minimum_characters: int = 16
    most: int = 10
    processes: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str) or not self.tasks:
            raise ValueError(f"TASKS must be a list of benchmarks such as ['logic', 'cosqa'], found {self.tasks!r}.")
        for name, value in (("NGRAM", self.ngram), ("contamination.minimum", self.minimum),
                            ("contamination.characters", self.characters),
                            ("contamination.minimum_characters", self.minimum_characters),
                            ("contamination.most", self.most), ("contamination.processes", self.processes)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}.")


def mixtures_behind(
    configuration: Configuration, report: Callable[[str], None] = print
) -> list[tuple[Mixture, Vocabulary]]:
    """The training data of the run that a configuration starts from, stage by stage, each with its vocabulary.

    It is read from the settings in checkpoints, of which only plain values are used. `report` receives a line for each
    stage that cannot be searched: published weights, and runs whose directories are gone.

    Raises:
      FileNotFoundError, ValueError: in one line; the run has no checkpoint.
    """
    branch, start = (ast.literal_eval(configuration.resolved(f"train.{name}") or "None")
                     for name in ("branch_from", "initial_checkpoint_path"))
    path = branch.rpartition("@")[0] if branch else start
    if not path:
        return []
    found = []
    for stage in [*stages_of(newest_record(path)[1]["ledger"])[:-1], {"model_dir": path}]:
        try:
            record = newest_record(stage["model_dir"])[1]
        except (FileNotFoundError, ValueError) as error:
            report(f"WARNING: not searched, because its stage cannot be read: {error}")
            continue
        if record["ledger"]["stage"] == "imported":
            report(f"Not searched: the training data of {stage['model_dir']} is not known.")
            continue
        plain = {name: value for name in record["settings"] if re.fullmatch(r"(mixture|tasks|vocabulary)\.\w+", name)
                 and (value := literal(record["settings"], name)) is not None}
        of_stage = read_configuration([], [*plain.items(), ("mixture.definitions", "@tasks()")])
        found.append((build(of_stage, "mixture"), build(of_stage, "vocabulary")))
    return found


def measure(
    contamination: Contamination, mixtures: Sequence[tuple[Mixture, Vocabulary]], report: Callable[[str], None] = print,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Searches every source of some mixtures, each once, for the questions of every task.

    Args:
      contamination: the settings.
      mixtures: each with its vocabulary; rows that are not cached yet are cached.
      report: called with a line of progress now and then.
      known: an earlier result; returned without a search if its questions and rows are the same.

    Returns:
      As JSON: {"n": ..., "sources": {SOURCE: ...}, "tasks": {TASK: {"questions": N, "not_measurable": M, "data": the
      hash of its files, "sources": {SOURCE: {"overlapping": K, "ids": [...], "ngrams": {id: words}}}}}}. TASK and ids
      are those of an evaluation's result files. A source that mixtures use with different vocabularies or lengths is
      searched in each form, and a question counts if any form contains it.

    Raises:
      ValueError, FileNotFoundError: in one line, for invalid names, files and settings.
    """
    found_texts = [contamination.benchmarks.texts(task) for task in dict.fromkeys(contamination.tasks)]
    require_names([task.name for task in found_texts])
    loaded = {f"{task.name}_sample" if task.is_sample else task.name: task for task in found_texts}
    sources = list({rows.path: Trained(rows, vocabulary, mixture.stage) for mixture, vocabulary in mixtures
                    for rows in training_rows(mixture, vocabulary, report)}.values())
    asked = {"version": CONTAMINATION_VERSION, "n": contamination.ngram, "minimum": contamination.minimum,
             "characters": contamination.characters, "minimum_characters": contamination.minimum_characters,
             "most": contamination.most, "sources": _described(sources)}
    data = {name: task.sha256 for name, task in loaded.items()}
    if known and asked.items() <= known.items() and data == {
            name: task.get("data") for name, task in known["tasks"].items()}:
        return dict(known)
    questions = [Question(name, own, parts) for name, task in loaded.items() for own, parts in task.parts.items()]
    ngrams = index(questions, Lengths(contamination.ngram, contamination.minimum),
                   Lengths(contamination.characters, contamination.minimum_characters), contamination.most)
    found = _searched(sources, ngrams, contamination.processes or len(os.sched_getaffinity(0)), report)
    tasks: dict[str, Any] = {}
    for name in loaded:
        own = np.array([number for number, question in enumerate(questions) if question.task == name])
        by_source: dict[str, dict[str, str]] = {source.rows.name: {} for source in sources}
        for source, places in zip(sources, found[:, own], strict=True):
            here = np.flatnonzero(places >= 0)
            by_source[source.rows.name] |= zip(
                [questions[own[number]].id for number in here], ngrams.texts(places[here]), strict=True)
        tasks[name] = {
            "questions": len(own), "not_measurable": int((~ngrams.measurable[own]).sum()),
            "common_ngrams": ngrams.boilerplate[name], "data": data[name], "sources": {source: {
                "overlapping": len(matched), "ids": [one for one in loaded[name].parts if one in matched],
                "ngrams": matched} for source, matched in by_source.items()}}
    return asked | {"tasks": tasks}


def measure_into(
    path: str, contamination: Contamination, mixtures: Sequence[tuple[Mixture, Vocabulary]],
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes the result of `measure` to a file, local or gs://; nothing is searched if the file already has it."""
    file = epath.Path(path).expanduser()
    try:
        known = json.loads(file.read_text()) if file.exists() else None
    except (ValueError, RecursionError):
        known = None
    if known is not None and not (isinstance(known, dict) and {"version", "n", "tasks"} <= known.keys()):
        raise ValueError(f"{path} exists and is not a contamination file: choose another name.")
    measured = measure(contamination, mixtures, report, known)
    write_whole(file, json.dumps(measured, indent=2, ensure_ascii=False) + "\n")
    return measured


def _searched(
    sources: Sequence[Trained], ngrams: NGrams, processes: int, report: Callable[[str], None]
) -> np.ndarray:
    """The result of `search`, with a progress line."""
    began, total = time.monotonic(), sum(source.rows.count for source in sources)
    status = StatusLine(0, total, True, unit="row")

    def progress(done: int, total: int) -> None:
        rate = done / (time.monotonic() - began)
        status.show(done, f"searched | {rate:,.0f} rows/s | {duration((total - done) / rate)} left")

    found = search(sources, ngrams, processes, progress)
    status.close()
    tokens, seconds = sum(map(_tokens, sources)), time.monotonic() - began
    report(f"searched {tokens:,} tokens in {duration(seconds)}, {tokens / seconds:,.0f}/s")
    return found


def _described(sources: Sequence[Trained]) -> dict[str, Any]:
    """The searched sources, as JSON."""
    described: dict[str, Any] = {}
    for source in sources:
        rows = source.rows
        one = described.setdefault(rows.name, {"stage": source.stage, "tokens": 0, "rows": []})
        one["tokens"] += _tokens(source)
        one["rows"].append({"content_hash": rows.content_hash, "count": rows.count, "length": rows.length,
                            "vocabulary": source.vocabulary.content_hash})
    return described


def _tokens(source: Trained) -> int:
    """The number of searched tokens."""
    rows = source.rows
    if source.stage == "tuning":
        return int(example_sizes(rows).positions.sum()) + rows.count
    return rows.count * (rows.length + 1)


def table(measured: Mapping[str, Any]) -> str:
    """Lines of text: for each task the overlapping questions and their sources, with an n-gram for each."""
    lines = [f"{'task':<28} {'questions':>10} {'not tested':>10} {'overlap':>9}   of them in"]
    examples = []
    for name, task in measured["tasks"].items():
        found = {source: one for source, one in task["sources"].items() if one["overlapping"]}
        overlapping = len({own for one in found.values() for own in one["ids"]})
        listed = ", ".join(f"{source} {one['overlapping']:,}" for source, one in found.items())
        lines.append(f"{name:<28} {task['questions']:>10,} {task['not_measurable']:>10,} {overlapping:>9,}   "
                     f"{listed}".rstrip())
        for source, one in found.items():
            own = one["ids"][0]
            examples.append(f"{name} {own} in {source}: {one['ngrams'][own][:SHOWN]}")
    sources = [f"{name} {one['tokens']:,}" for name, one in measured["sources"].items()]
    return "\n".join([
        *lines, "", *examples, *([""] if examples else []), f"Searched, in tokens: {', '.join(sources)}.",
        f"Overlap: {measured['n']} consecutive words of a question (Chinese: {measured['characters']} characters), or "
        f"a shorter part of it of at least {measured['minimum']} (Chinese: {measured['minimum_characters']}), occur in "
        "the training data.", "Not tested: too short, or in words shared by many questions."])
