"""Evaluation: scores a checkpoint on benchmarks, with the levels needed to interpret a score.

The answer to a question is the candidate whose continuation is likeliest under the model, given its prompt. Prompt and
continuation are tokenized separately, as inputs and targets are in tuning, and joined; the latter as text that follows
other text (`Vocabulary.encode_after`). Scores of a continuation:

  per_token   the mean log-likelihood of its tokens: lowest perplexity wins (the default)
  sum         their sum
  per_byte    their sum divided by the continuation's UTF-8 bytes
  released    as in the study's released code: without the first token, unless it is the only one, and with one padding
              token after the last, if the model has room for it with every candidate

All four are recorded for every candidate; one of them decides. If k candidates tie, the question counts 1 / k if the
right one is among them, and a task with ties in most questions is not measured. `cuts` shortens questions that are
longer than the model. Results are in RUN/results:

  TASK.json   value, n, interval, chance, majority, ties, settings, checkpoint, fingerprint of the data; with an
              accuracy, the "measures" of `results.measures`
  TASK.jsonl  a line for each question: every candidate's log-likelihood, tokens and bytes; prediction and answer

An interrupted evaluation continues after the questions that it has written. A task that fails does not affect the
others.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from etils import epath

from codellm_jax.evaluation.cuts import Fitted, fitted
from codellm_jax.evaluation.held import alone_at, name_of_files
from codellm_jax.evaluation.sampling import PAPER_SAMPLING, Sampling
from codellm_jax.evaluation.scoring import Request, fault
from codellm_jax.evaluation.trained import Checkpoint, TrainedModel, trained_model
from codellm_jax.mixture.ledger import arm
from codellm_jax.results.answers import is_measured, summaries
from codellm_jax.results.files import as_lines, encoded, lines_written, named, write_result, write_whole
from codellm_jax.results.levels import AccuracySummary, accuracy_summary, score_summary
from codellm_jax.results.measures import score
from codellm_jax.results.tables import HEADINGS, raw_choice, raw_text, table_rows, told_from_chance
from codellm_jax.runtime.checkpoints import resolved
from codellm_jax.runtime.distributed import agreed, require_agreement, wait_for_all
from codellm_jax.runtime.progress import StatusLine, duration, say
from codellm_jax.runtime.provenance import evaluation_hash, software, training_hash
from codellm_jax.weights.start import results_folder

SCORINGS = ("per_token", "sum", "per_byte", "released")
RESULTS_VERSION = 3  # raise it whenever the content of lines changes: lines of other versions are not continued
QUESTIONS_AT_ONCE = 64  # scored between two writes of results
TEXTS_AT_ONCE = 32  # the same for written answers
RAW_OUTPUTS = 3  # shown if a score is 0 or no better than chance, as after a mistake in a template


class Benchmarks(Protocol):
    """The source of questions. `tasks.benchmarks.judging.Benchmarks` is one."""

    def load(self, task: str) -> Any:
        """A `tasks.benchmarks.questions.Loaded`."""
        ...

    def judge(self, loaded: Any, texts: Sequence[Sequence[str]], tokenize: Callable[[str], list[int]]) -> Any:
        """A `tasks.benchmarks.judging.Judged` of the answers written to each question."""
        ...

    def accuracy(self, losses: Sequence[Sequence[float]], answers: Sequence[int]) -> Any:
        """A `tasks.benchmarks.metrics.Accuracy`."""
        ...

    def settings(self, task: str) -> Mapping[str, Any]:
        """The settings that determine a task's questions, as JSON."""
        ...


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The settings of an evaluation.

    Attributes:
      tasks: names of benchmarks, or files of questions.
      benchmarks: reads their questions.
      questions: the most questions of each task, drawn by a hash of the seed and their ids; None for all.
      scoring: how candidates are compared: "per_token", "sum", "per_byte" or "released" (the study's code).
      sampling: how answers are written.
      samples: answers to each question that is answered by writing; pass@k needs k or more.
      seed: seed of all draws.
      batch_tokens: tokens scored at once, over all devices.
    """

    tasks: Sequence[str]
    benchmarks: Benchmarks
    questions: int | None = None
    scoring: str = "per_token"
    sampling: Sampling = PAPER_SAMPLING
    samples: int = 1
    seed: int = 0
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"SCORING must be one of {', '.join(SCORINGS)}, found {self.scoring!r}.")
        if isinstance(self.tasks, str):
            raise ValueError(f"TASKS must be a list of benchmarks such as ['logic', 'cosqa'], found {self.tasks!r}.")
        for name, value in (("SAMPLES", self.samples), ("QUESTIONS, or EVAL_QUESTIONS,", self.questions),
                            ("evaluation.batch_tokens", self.batch_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"SEED must be a whole number from 0 to {2**32 - 1}, found {self.seed}.")

    def load(self) -> list[Any]:
        """The questions of each task, a `tasks.benchmarks.questions.Loaded` each; any mistake is raised here."""
        loaded = [self._drawn(self.benchmarks.load(task)) for task in dict.fromkeys(self.tasks)]
        require_names([one.name for one in loaded])
        return loaded

    def _drawn(self, loaded: Any) -> Any:
        if self.questions is None or len(loaded.questions) <= self.questions:
            return loaded
        by_hash = sorted(loaded.questions, key=lambda question: hashlib.sha256(
            f"{self.seed}\0{question.id}".encode()).digest())
        drawn = {question.id for question in by_hash[: self.questions]}
        return dataclasses.replace(
            loaded, questions=tuple(question for question in loaded.questions if question.id in drawn))


def require_names(names: Sequence[str]) -> None:
    """Raises ValueError if two tasks have the same name, as files of questions in different folders may have."""
    if twice := [name for number, name in enumerate(names) if name.casefold() in map(str.casefold, names[:number])]:
        raise ValueError(f"TASKS names two files of one name, {twice[0]!r}: give one of them another name "
                         "by BENCHMARKS = {'mine': {'file': ...}}, and 'mine' in TASKS.")


@dataclasses.dataclass(frozen=True)
class CheckpointEvaluation:
    """The settings of the evaluation of a checkpoint.

    Attributes:
      checkpoint: the evaluated model.
      evaluation: the questions, and how they are scored.
      results_dir: the folder of the results; None for RUN/results, or for published weights runs/NAME/results.
    """

    checkpoint: Checkpoint
    evaluation: Evaluation
    results_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.evaluation.tasks:
            raise ValueError("TASKS is empty: list benchmarks such as ['logic', 'cosqa'].")


def evaluate(
    run: CheckpointEvaluation, report: Callable[[str], None] = say,
    settings: Callable[[], Mapping[str, str]] = dict, asked: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Evaluates a checkpoint on every task; returns the contents of RUN/results/TASK.json, in the order of the tasks.

    Args:
      run: the settings.
      report: called with a few lines for each task.
      settings: called when everything is built; the operative settings, name -> value.
      asked: the settings of gin files and flags, name -> value, for the results' provenance.

    Raises:
      ValueError, FileNotFoundError: in one line, for invalid names, files and settings, before any question is asked;
        and for tasks that failed, after all others were evaluated.
    """
    loaded, folder = run.evaluation.load(), run.results_dir or results_folder(run.checkpoint.path)
    with trained_model(run.checkpoint, report) as (model, record), alone_at(loaded, folder):
        checkpoint = {"run": resolved(run.checkpoint.path), "step": record["step"], "arm": arm(record["ledger"]),
                      "digest": record["digest"]}
        report(HEADINGS)
        provenance = {
            "config_hash": evaluation_hash(settings()), "training_config_hash": training_hash(record["settings"]),
            "asked": dict(asked or {}), "seed": run.evaluation.seed} | software()
        results, failures = ask(run.evaluation, loaded, model, checkpoint, folder, report, provenance=provenance)
        if agreed(len(failures)):  # the first process's count, if several evaluate
            raise ValueError(f"{len(failures)} of {len(loaded)} tasks failed: {'; '.join(map(str, failures))}"
                             if failures else "a task failed on the first process.") from (
                                 ExceptionGroup("tasks", failures) if failures else None)
        return results


class TaskFailed(Exception):
    """One of several tasks failed, in one line; the cause has the details."""


class Unjudged(Exception):
    """Written answers could not be judged; only the first process judges."""


def ask(
    evaluation: Evaluation, loaded: Sequence[Any], model: TrainedModel, checkpoint: Mapping[str, Any], folder: str,
    report: Callable[[str], None], progress: bool = True, provenance: Mapping[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], list[TaskFailed]]:
    """Asks a model the questions of each task and writes its results; call under its mesh and axis rules.

    Every process computes; only the first one writes, judges and returns results, the others return none. A task that
    fails does not affect the others: it is reported, and returned beside the results.

    Args:
      evaluation: the settings.
      loaded: the questions, from `evaluation.load`.
      model: the evaluated model.
      checkpoint: its identity, as JSON; lines of an earlier evaluation are continued only if it is the same.
      folder: where results are written.
      report: called with a few lines for each task.
      progress: whether to show a task's progress.
      provenance: facts for TASK.json on configuration, code and packages.
    """
    directory = epath.Path(folder).expanduser()
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    results, failures = [], list[TaskFailed]()
    for questions in loaded:
        one = ask_choices if hasattr(questions.questions[0], "candidates") else ask_texts
        try:
            if result := one(evaluation, questions, model, checkpoint, directory, report, progress, provenance or {}):
                results.append(result)
        except Exception as error:
            # Processes compute together: if one fails in a computation, the others would wait for it forever.
            if jax.process_count() > 1 and not isinstance(error, Unjudged):
                raise
            why = " ".join(str(error).split())
            if not isinstance(error, ValueError | OSError | Unjudged):
                why = f"{type(error).__name__}: {why}"
            failures.append(TaskFailed(f"{questions.name}: {why}"))
            failures[-1].__cause__ = error
            report(f"{questions.name:<28} failed: {why}")
        wait_for_all("results")  # judging programs takes minutes, longer than a collective or JAX's exit waits
    return results, failures


def ask_choices(
    evaluation: Evaluation, loaded: Any, model: TrainedModel, checkpoint: Mapping[str, Any], folder: epath.Path,
    report: Callable[[str], None], progress: bool, provenance: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Evaluates a task of questions with candidates, from the first without a line on; writes its two files."""
    settings = _settings(evaluation, loaded, model) | {"scoring": evaluation.scoring}
    answered = _answered(loaded, settings, checkpoint, folder, QUESTIONS_AT_ONCE,
                         lambda questions: _scored(questions, evaluation, model), progress)
    if answered is None:
        return None
    lines = answered.lines
    losses = {scoring: [[-score(candidate, scoring) for candidate in line["candidates"]] for line in lines]
              for scoring in SCORINGS}
    answers = [line["answer"] for line in lines]
    outcomes = {scoring: evaluation.benchmarks.accuracy(losses[scoring], answers) for scoring in SCORINGS}
    chosen = outcomes[evaluation.scoring]
    for line, positions, credit in zip(lines, chosen.chosen, chosen.credits, strict=True):
        tied = positions if len(positions) > 1 else []
        line |= {"prediction": None if tied else positions[0], "tied": tied, "correct": credit}
    candidates = [candidate for line in lines for candidate in line["candidates"]]
    summary = accuracy_summary(chosen.credits, [len(line["candidates"]) for line in lines], answers)
    result = answered.header | {
        "task": loaded.name, "sample": loaded.is_sample, "metric": "accuracy", "value": summary.accuracy,
        "measured": is_measured(lines), **_levels(summary), "ties": chosen.ties,
        "ties_of_all": sum(len(line["tied"]) == len(line["candidates"]) for line in lines),
        "accuracy_by_scoring": {scoring: outcome.accuracy for scoring, outcome in outcomes.items()},
        "measures": summaries(lines, evaluation.scoring),
        "prompts_cut": sum(candidate["prompt_tokens_cut"] > 0 for candidate in candidates),
        "continuations_cut": sum(candidate["continuation_tokens_cut"] > 0 for candidate in candidates),
        **_data(loaded), "questions_per_second": answered.rate, "provenance": dict(provenance),
    }
    if not summary.accuracy or not result["measured"] or not told_from_chance(result):
        result["raw_outputs"] = [raw_choice(list(_texts_scored(question, model)), line, evaluation.scoring)
                                 for question, line in zip(loaded.questions[:RAW_OUTPUTS], lines, strict=False)]
    write_result(folder, answered.name, answered.header, answered.lines, result)
    report(table_rows(result))
    return result


def ask_texts(
    evaluation: Evaluation, loaded: Any, model: TrainedModel, checkpoint: Mapping[str, Any], folder: epath.Path,
    report: Callable[[str], None], progress: bool, provenance: Mapping[str, Any],
) -> dict[str, Any] | None:
    """The same for a task of questions that are answered by writing."""
    vocabulary, samples = model.vocabulary, evaluation.samples

    def written(questions: Sequence[Any]) -> Iterator[dict[str, Any]]:
        stop = tuple(questions[0].extra.get("stop", ()))
        prompts = [vocabulary.encode_prompt(question.prompt) for question in questions for _ in range(samples)]
        numbers = [_number(loaded.name, question.id, sample) for question in questions for sample in range(samples)]
        answers = iter(model.write(
            prompts, [stop] * len(prompts), evaluation.sampling, evaluation.seed, numbers=numbers))
        for number, question in enumerate(questions):
            each = [next(answers) for _ in range(samples)]
            texts = [vocabulary.decode_after(prompts[number * samples], answer.ids) for answer in each]
            for word in stop:
                texts = [text.split(word)[0] for text in texts]
            yield {"id": question.id, "texts": texts, "reasons": [answer.reason for answer in each],
                   "prompt_tokens_cut": each[0].prompt_tokens_cut}

    settings = _settings(evaluation, loaded, model) | {
        "sampling": dataclasses.asdict(evaluation.sampling), "samples": samples, "sampling_seed": evaluation.seed}
    answered = _answered(loaded, settings, checkpoint, folder, max(1, TEXTS_AT_ONCE // samples), written, progress)
    if answered is None:
        return None
    lines = answered.lines
    try:
        judged = evaluation.benchmarks.judge(loaded, [line["texts"] for line in lines], vocabulary.encode)
    except Exception as error:
        raise Unjudged(f"the answers are written to {folder / answered.name}.jsonl and could not be judged "
                       f"({type(error).__name__}: {error}); the same command judges them again.") from error
    scores = {metric: score_summary(values) for metric, values in judged.values.items()}
    scores |= {metric: score_summary(counts, from_sums) for metric, (counts, from_sums) in judged.corpus.items()}
    main = next(iter(judged.values))
    for number, line in enumerate(lines):
        line |= {metric: values[number] for metric, values in judged.values.items()} | {"notes": judged.notes[number]}
        # The counts from which a corpus score is computed, so that it can be recomputed for any subset of questions.
        line |= {f"{metric}_counts": list(counts[number]) for metric, (counts, _) in judged.corpus.items()}
    result = answered.header | {
        "task": loaded.name, "sample": loaded.is_sample, "metric": main, "n": len(lines), **scores[main],
        "scores": scores | {metric: {"value": value} for metric, value in judged.fixed.items()},
        **({"rule": judged.rule} if judged.rule else {}),
        "prompts_cut": sum(line["prompt_tokens_cut"] > 0 for line in lines),
        **_data(loaded), "questions_per_second": answered.rate, "provenance": dict(provenance),
    }
    if not result["value"]:
        result["raw_outputs"] = [raw_text(line) for line in lines[:RAW_OUTPUTS]]
    write_result(folder, answered.name, answered.header, answered.lines, result)
    report(table_rows(result))
    return result


def _number(task: str, question: str, sample: int) -> int:
    """The request number of an answer's draws, in [0, 2^32), independent of the question's position."""
    return int.from_bytes(hashlib.sha256(f"{task}\0{question}\0{sample}".encode()).digest()[:4], "big")


def _settings(evaluation: Evaluation, loaded: Any, model: TrainedModel) -> dict[str, Any]:
    vocabulary, config = model.vocabulary, model.config
    return {"version": RESULTS_VERSION, "vocabulary": vocabulary.content_hash,
            "end_of_document_id": vocabulary.end_of_document_id, "pad_id": vocabulary.pad_id,
            **({"begin_ids": vocabulary.begin_ids} if vocabulary.begin_ids else {}),
            "dtype": config.dtype, "activation": config.activation, "length": config.length,
            **evaluation.benchmarks.settings(loaded.name), "data": loaded.sha256,
            "questions": hashlib.sha256(encoded(json.dumps(loaded.questions, ensure_ascii=False))).hexdigest()}


def _data(loaded: Any) -> dict[str, Any]:
    return {"read": loaded.read, "skipped": dict(loaded.skipped), "files": list(loaded.files)}


class _Answered(NamedTuple):
    """All lines of a task, and the speed of answering."""

    name: str  # of the files
    header: dict[str, Any]
    lines: list[dict[str, Any]]
    rate: float | None  # new questions per second; None if none was new


def _answered(
    loaded: Any, settings: Mapping[str, Any], checkpoint: Mapping[str, Any], folder: epath.Path, at_once: int,
    answer: Callable[[Sequence[Any]], Iterator[dict[str, Any]]], progress: bool,
) -> _Answered | None:
    """Answers the questions that have no line yet, and writes each line at once; returns None except on the first
    process, which alone reads and writes.
    """
    name = name_of_files(loaded)
    header = {"settings": json.loads(json.dumps(settings)), "checkpoint": dict(checkpoint)}
    require_agreement(f"{name} to ask, in questions, settings or checkpoint,", json.dumps(header))
    path, first, total = folder / f"{name}.jsonl", jax.process_index() == 0, len(loaded.questions)
    lines = lines_written(path, header) if first else []
    before, began = agreed(len(lines)), time.monotonic()
    status = StatusLine(before, total, active=first and progress, unit="question")
    if first:
        if not before:
            (folder / f"{name}.json").unlink(missing_ok=True)  # from other settings, whose lines are replaced now
        write_whole(path, as_lines([header, *lines]))  # atomically, before lines are appended
    with path.open("ab") if first else contextlib.nullcontext() as file:
        for start in range(before, total, at_once):
            for line in answer(loaded.questions[start : start + at_once]):
                lines.append(line)
                if file is not None:
                    with named(path, len(text := encoded(as_lines([line])))):
                        file.write(text)
                        file.flush()
            done = min(start + at_once, total)
            rate = (done - before) / (time.monotonic() - began)
            status.show(done, f"{name} | {rate:,.1f} questions/s | {duration((total - done) / rate)} left")
    status.close()
    new = total - before
    return _Answered(name, header, lines, new / (time.monotonic() - began) if new else None) if first else None


def _scored(questions: Sequence[Any], evaluation: Evaluation, model: TrainedModel) -> Iterator[dict[str, Any]]:
    """The line of each question, without prediction."""
    vocabulary, length = model.vocabulary, model.config.length
    kept = [_fitted(question, model) for question in questions]
    requests = []
    for group, (question, candidates) in enumerate(zip(questions, kept, strict=True)):
        # Only for "released", and only if no candidate would lose a token.
        pad = [vocabulary.pad_id] * all(
            len(candidate.prompt) + len(candidate.continuation) <= length for candidate in candidates)
        for number, candidate in enumerate(candidates):
            if wrong := fault(Request(group, candidate.prompt, candidate.continuation), length, vocabulary.size):
                raise ValueError(f"Question {question.id}, candidate {number}: {wrong}.")
            requests.append(Request(group, candidate.prompt, [*candidate.continuation, *pad]))
    values = iter(model.score(requests, evaluation.batch_tokens))
    for question, candidates in zip(questions, kept, strict=True):
        # Candidates with the same tokens share their numbers, even if their texts have different bytes.
        numbers: dict[tuple[tuple[int, ...], ...], dict[str, Any]] = {}
        lines = []
        for candidate, whole in zip(candidates, question.candidates, strict=True):
            log_likelihoods = next(values).log_likelihoods
            tokens = len(candidate.continuation)
            released = log_likelihoods[1:] if len(log_likelihoods) > 1 else log_likelihoods
            cut = candidate.continuation_tokens_cut  # the cut may be within a character
            size = vocabulary.byte_count(candidate.continuation) if cut else len(whole.continuation.encode())
            lines.append(numbers.setdefault((tuple(candidate.prompt), tuple(candidate.continuation)), {
                "log_likelihood": float(log_likelihoods[:tokens].sum()), "tokens": tokens,
                "bytes": max(1, size),  # a token alone may have no bytes
                "released": float(released.sum()), "released_tokens": len(released)}) | {
                "prompt_tokens_cut": candidate.prompt_tokens_cut, "continuation_tokens_cut": cut})
        [answer] = question.answer
        yield {"id": question.id, "candidates": lines, "answer": answer}


def _fitted(question: Any, model: TrainedModel) -> list[Fitted]:
    """A question's candidates as tokens, cut if they are longer than the model."""
    candidates = []
    for candidate in question.candidates:
        prompt = model.vocabulary.encode_prompt(candidate.prompt)
        candidates.append((prompt, model.vocabulary.encode_after(prompt, candidate.continuation)))
    return fitted(candidates, model.config.length)


def _texts_scored(question: Any, model: TrainedModel) -> Iterator[tuple[str, str]]:
    """The scored texts of each candidate: its prompt and its continuation as the model sees them."""
    for candidate in _fitted(question, model):
        yield (model.vocabulary.decode(candidate.prompt),
               model.vocabulary.decode_after(candidate.prompt, candidate.continuation))


def _levels(summary: AccuracySummary) -> dict[str, Any]:
    return {
        "n": summary.n, "interval": list(summary.interval), "chance": summary.chance,
        "chance_p_value": summary.chance_p_value, "majority": summary.majority,
        "majority_answer": summary.majority_answer, "majority_p_value": summary.majority_p_value,
        "smallest_detectable_difference": {
            "from_chance": summary.detectable_from_chance, "between_runs": summary.detectable_between},
    }
