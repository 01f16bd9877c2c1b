"""Evaluation: a checkpoint on benchmarks, with what a score must be read against.

A question is answered by the candidate whose continuation the model finds likeliest, given its prompt. Prompt and
continuation are tokenized each by itself, as tuning's inputs and targets are, and joined; the latter as text that
stands behind other text (`Vocabulary.encode_after`). What is scored, and how:

  per_token   the mean log-likelihood of the continuation's tokens: lowest perplexity wins (the default)
  sum         their sum
  per_byte    their sum over the bytes of the continuation's UTF-8
  released    as the study's released code: without the first token, where it is not the only one, and with one padding
              token after the last, where the model has room for it with every candidate

All four are written down for every candidate; one of them decides. Where k candidates tie, the question counts 1 / k if
the right one is among them, and a task of which most questions are ties is not measured. `cuts` says what is scored of
a question that is longer than the model. Results lie in RUN/results:

  TASK.json   value, n, interval, chance, majority, ties, settings, checkpoint, fingerprint of the data; beside an
              accuracy, the "measures" of `results.measures`
  TASK.jsonl  a line for each question: every candidate's log-likelihood, tokens and bytes; prediction and answer

An evaluation that was interrupted goes on after the questions it has written. A task that fails leaves the others as
they are.
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
RESULTS_VERSION = 3  # raise it whenever lines hold other things: those of an earlier one are not gone on from
QUESTIONS_AT_ONCE = 64  # scored between two writes of results
TEXTS_AT_ONCE = 32  # likewise written
RAW_OUTPUTS = 3  # shown where a score is 0 or no better than chance: a slip in a template looks like that


class Benchmarks(Protocol):
    """Where questions come from. `tasks.benchmarks.judging.Benchmarks` is one."""

    def load(self, task: str) -> Any:
        """A `tasks.benchmarks.questions.Loaded`."""
        ...

    def judge(self, loaded: Any, texts: Sequence[Sequence[str]], tokenize: Callable[[str], list[int]]) -> Any:
        """A `tasks.benchmarks.judging.Judged` of what was written for each question."""
        ...

    def accuracy(self, losses: Sequence[Sequence[float]], answers: Sequence[int]) -> Any:
        """A `tasks.benchmarks.metrics.Accuracy`."""
        ...

    def settings(self, task: str) -> Mapping[str, Any]:
        """What of a task's questions is a choice, as JSON."""
        ...


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is asked, and how the answers are taken.

    Attributes:
      tasks: names of benchmarks, or files of questions.
      benchmarks: reads their questions.
      questions: at most so many questions of each task, drawn by a hash of the seed and their ids; None for all.
      scoring: how candidates are compared: "per_token", "sum", "per_byte" or "released" (the study's code).
      sampling: how answers are written.
      samples: answers to each question that is answered by writing; pass@k needs k or more.
      seed: seed of what is drawn.
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
        """The questions of each task, a `tasks.benchmarks.questions.Loaded` each; all mistakes come out here."""
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
    """Raises ValueError where two tasks have one name, as two files of questions in different folders may have."""
    if twice := [name for number, name in enumerate(names) if name.casefold() in map(str.casefold, names[:number])]:
        raise ValueError(f"TASKS names two files of one name, {twice[0]!r}: give one of them another name "
                         "by BENCHMARKS = {'mine': {'file': ...}}, and 'mine' in TASKS.")


@dataclasses.dataclass(frozen=True)
class CheckpointEvaluation:
    """What a gin file says of the evaluation of a checkpoint.

    Attributes:
      checkpoint: the model that is asked.
      evaluation: the questions that it is asked, and how its answers are taken.
      results_dir: the folder of the results; None for RUN/results, or of published weights runs/NAME/results.
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
    """Evaluates a checkpoint on every task; returns what RUN/results/TASK.json holds, in the order of the tasks.

    Args:
      run: what the gin file says.
      report: is told a few lines for each task.
      settings: called when everything is built; the operative settings, name -> value.
      asked: what gin files and flags say, likewise, for the results' provenance.

    Raises:
      ValueError, FileNotFoundError: in one line, for names, files and settings that do not fit, before anything is
        asked; and for tasks that failed, after all others were evaluated.
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
        if agreed(len(failures)):  # of the first process, where several evaluate
            raise ValueError(f"{len(failures)} of {len(loaded)} tasks failed: {'; '.join(map(str, failures))}"
                             if failures else "a task failed on the first process.") from (
                                 ExceptionGroup("tasks", failures) if failures else None)
        return results


class TaskFailed(Exception):
    """One task of several that was not evaluated, in a line; its cause says more."""


class Unjudged(Exception):
    """What was written could not be judged, which the first process alone does."""


def ask(
    evaluation: Evaluation, loaded: Sequence[Any], model: TrainedModel, checkpoint: Mapping[str, Any], folder: str,
    report: Callable[[str], None], progress: bool = True, provenance: Mapping[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], list[TaskFailed]]:
    """Asks a model the questions of each task and writes its results; call under its mesh and axis rules.

    Every process computes; the first one alone writes, judges and returns results, the others return none. A task that
    fails leaves the others as they are: it is reported, and returned beside the results.

    Args:
      evaluation: what is asked.
      loaded: what `evaluation.load` gave.
      model: who is asked.
      checkpoint: what it is, as JSON; lines of an earlier evaluation of the very same are gone on from.
      folder: where results are written.
      report: is told a few lines for each task.
      progress: whether to show how far a task has come.
      provenance: what TASK.json says of configuration, code and packages.
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
            # Several processes compute together: one that failed while they do cannot let the others wait for it.
            if jax.process_count() > 1 and not isinstance(error, Unjudged):
                raise
            why = " ".join(str(error).split())
            if not isinstance(error, ValueError | OSError | Unjudged):
                why = f"{type(error).__name__}: {why}"
            failures.append(TaskFailed(f"{questions.name}: {why}"))
            failures[-1].__cause__ = error
            report(f"{questions.name:<28} failed: {why}")
        wait_for_all("results")  # programs are judged for minutes, longer than a collective waits, or JAX at the end
    return results, failures


def ask_choices(
    evaluation: Evaluation, loaded: Any, model: TrainedModel, checkpoint: Mapping[str, Any], folder: epath.Path,
    report: Callable[[str], None], progress: bool, provenance: Mapping[str, Any],
) -> dict[str, Any] | None:
    """One task of questions with candidates, from the first question that has no line yet; writes its two files."""
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
    """One task of questions that are answered by writing, likewise."""
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
        # What a score that is no mean is summed from, so that it can be computed again of any of the questions.
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
    """What an answer's draws depend on beside the seed, in [0, 2^32): the same wherever the question stands."""
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
    """All lines of a task, and how they came."""

    name: str  # of the files
    header: dict[str, Any]
    lines: list[dict[str, Any]]
    rate: float | None  # questions a second, of those that were new; None if none was


def _answered(
    loaded: Any, settings: Mapping[str, Any], checkpoint: Mapping[str, Any], folder: epath.Path, at_once: int,
    answer: Callable[[Sequence[Any]], Iterator[dict[str, Any]]], progress: bool,
) -> _Answered | None:
    """Answers the questions that have no line yet, and writes a line for each as it comes; None but on the first
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
            (folder / f"{name}.json").unlink(missing_ok=True)  # of other settings, whose lines go now
        write_whole(path, as_lines([header, *lines]))  # whole, before anything is added to it
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
        # For "released" alone, and where it costs no candidate a token.
        pad = [vocabulary.pad_id] * all(
            len(candidate.prompt) + len(candidate.continuation) <= length for candidate in candidates)
        for number, candidate in enumerate(candidates):
            if wrong := fault(Request(group, candidate.prompt, candidate.continuation), length, vocabulary.size):
                raise ValueError(f"Question {question.id}, candidate {number}: {wrong}.")
            requests.append(Request(group, candidate.prompt, [*candidate.continuation, *pad]))
    values = iter(model.score(requests, evaluation.batch_tokens))
    for question, candidates in zip(questions, kept, strict=True):
        # Candidates that are the same tokens are one, whatever the bytes of a text that the vocabulary takes for them.
        numbers: dict[tuple[tuple[int, ...], ...], dict[str, Any]] = {}
        lines = []
        for candidate, whole in zip(candidates, question.candidates, strict=True):
            log_likelihoods = next(values).log_likelihoods
            tokens = len(candidate.continuation)
            released = log_likelihoods[1:] if len(log_likelihoods) > 1 else log_likelihoods
            cut = candidate.continuation_tokens_cut  # perhaps within a character
            size = vocabulary.byte_count(candidate.continuation) if cut else len(whole.continuation.encode())
            lines.append(numbers.setdefault((tuple(candidate.prompt), tuple(candidate.continuation)), {
                "log_likelihood": float(log_likelihoods[:tokens].sum()), "tokens": tokens,
                "bytes": max(1, size),  # a token may stand for nothing by itself
                "released": float(released.sum()), "released_tokens": len(released)}) | {
                "prompt_tokens_cut": candidate.prompt_tokens_cut, "continuation_tokens_cut": cut})
        [answer] = question.answer
        yield {"id": question.id, "candidates": lines, "answer": answer}


def _fitted(question: Any, model: TrainedModel) -> list[Fitted]:
    """A question's candidates as tokens, cut where they are longer than the model."""
    candidates = []
    for candidate in question.candidates:
        prompt = model.vocabulary.encode_prompt(candidate.prompt)
        candidates.append((prompt, model.vocabulary.encode_after(prompt, candidate.continuation)))
    return fitted(candidates, model.config.length)


def _texts_scored(question: Any, model: TrainedModel) -> Iterator[tuple[str, str]]:
    """What was scored of each candidate: the texts of its prompt and its continuation as the model saw them."""
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
