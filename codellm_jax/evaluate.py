"""Evaluation: a checkpoint on benchmarks, with what a score must be read against.

A question is answered by the candidate whose continuation the model finds likeliest, given its prompt. Prompt and
continuation are tokenized each by itself, as tuning's inputs and targets are, and joined. What is scored, and how:

  per_token   the mean log-likelihood of the continuation's tokens: lowest perplexity wins (the default)
  sum         their sum
  per_byte    their sum over the bytes of the continuation's UTF-8
  released    as the study's released code: without the first token, and with one padding token after the last

All four are written down for every candidate; one of them decides. Results lie in RUN/results:

  TASK.json   value, n, interval, chance, majority, settings, checkpoint, fingerprint of the data
  TASK.jsonl  a line for each question: every candidate's log-likelihood, tokens and bytes; prediction and answer

An evaluation that was interrupted goes on after the questions it has written.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import optax
from etils import epath
from flax import linen as nn

from codellm_jax.mixture.ledger import arm
from codellm_jax.model.decoder import Decoder, DecoderConfig
from codellm_jax.model.scoring import Request, fault, prompt_tokens_cut, score
from codellm_jax.results.levels import AccuracySummary, accuracy_summary
from codellm_jax.runtime.checkpoints import newest_record, restore_parameters
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh
from codellm_jax.runtime.progress import StatusLine, duration
from codellm_jax.runtime.state import abstract_state
from codellm_jax.train import require_same_vocabulary
from codellm_jax.vocabulary import Vocabulary

SCORINGS = ("per_token", "sum", "per_byte", "released")
QUESTIONS_AT_ONCE = 64  # scored between two writes of results


class Benchmarks(Protocol):
    """Where questions come from. `tasks.judging.Benchmarks` is one."""

    def load(self, task: str) -> Any:
        """A `tasks.benchmarks.questions.Loaded`, whose questions have candidates."""
        ...

    def accuracy(self, losses: Sequence[Sequence[float]], answers: Sequence[int]) -> Any:
        """A `tasks.metrics.Accuracy`."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """What of the questions is a choice, as JSON."""
        ...


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a gin file says of an evaluation.

    Attributes:
      checkpoint_path: a run directory; its newest checkpoint is evaluated.
      tasks: names of benchmarks.
      benchmarks: reads them.
      vocabulary, model, lengths, mesh: as in training, of the run by default.
      scoring: which of SCORINGS decides.
      batch_tokens: tokens scored at once, over all devices.
      results_dir: by default RUN/results.
    """

    checkpoint_path: str
    tasks: Sequence[str]
    benchmarks: Benchmarks
    vocabulary: Vocabulary
    model: Callable[..., DecoderConfig]
    lengths: Mapping[str, int]
    mesh: MeshShape
    scoring: str = "per_token"
    batch_tokens: int = 8192
    results_dir: str | None = None

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"SCORING must be one of {', '.join(SCORINGS)}, found {self.scoring!r}.")
        if isinstance(self.tasks, str) or not self.tasks:
            raise ValueError(f"TASKS must be a list of benchmarks such as ['logic', 'cosqa'], found {self.tasks!r}.")
        if self.batch_tokens < 1:
            raise ValueError(f"evaluate.batch_tokens must be at least 1, found {self.batch_tokens}.")


def evaluate(evaluation: Evaluation, report: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Evaluates a checkpoint on every task; returns what RUN/results/TASK.json holds, in the order of the tasks.

    Raises:
      ValueError, FileNotFoundError: in one line, for names, files and settings that do not fit.
    """
    loaded = {task: evaluation.benchmarks.load(task) for task in dict.fromkeys(evaluation.tasks)}  # all mistakes first
    for task, questions in loaded.items():
        if not hasattr(questions.questions[0], "candidates"):
            raise ValueError(f"{task} is answered by writing, which is not evaluated yet: leave it out of TASKS.")
    path, vocabulary = evaluation.checkpoint_path, evaluation.vocabulary
    step, record = newest_record(path)
    require_same_vocabulary(record, vocabulary.content_hash, path)
    mesh = make_mesh(evaluation.mesh)
    model = Decoder(evaluation.model(vocabulary_size=vocabulary.size, length=evaluation.lengths["targets"]))
    abstract = abstract_state(model, optax.identity(), mesh, evaluation.mesh)
    checkpoint = {"run": str(epath.Path(path).expanduser().resolve()), "step": step, "arm": arm(record["ledger"])}
    folder = epath.Path(evaluation.results_dir or f"{path}/results").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    with jax.set_mesh(mesh), nn.logical_axis_rules(evaluation.mesh.all_rules()):
        params, _ = restore_parameters(path, abstract.params, report=report)

        def score_requests(requests: Sequence[Request]) -> list[Any]:
            return score(params, model.config, requests, batch_tokens=evaluation.batch_tokens,
                         sharding=batch_sharding(mesh))

        report(HEADINGS)
        for questions in loaded.values():
            results.append(evaluate_choices(evaluation, questions, checkpoint, folder, score_requests, report))
    return results


def evaluate_choices(
    evaluation: Evaluation, loaded: Any, checkpoint: Mapping[str, Any], folder: epath.Path,
    score_requests: Callable[[Sequence[Request]], list[Any]], report: Callable[[str], None],
) -> dict[str, Any]:
    """One task of questions with candidates, from the first question that has no line yet; writes its two files."""
    name = f"{loaded.name}_sample" if loaded.is_sample else loaded.name
    settings = {
        "scoring": evaluation.scoring, "vocabulary": evaluation.vocabulary.content_hash,
        **evaluation.benchmarks.settings(), "data": loaded.sha256, "questions": _fingerprint(loaded.questions),
    }
    header = {"settings": settings, "checkpoint": dict(checkpoint)}
    lines = _lines_written(folder / f"{name}.jsonl", header)
    began, before = time.monotonic(), len(lines)
    status = StatusLine(before, len(loaded.questions), active=jax.process_index() == 0, unit="question")
    with (folder / f"{name}.jsonl").open("w") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [header, *lines]))
        for start in range(before, len(loaded.questions), QUESTIONS_AT_ONCE):
            questions = loaded.questions[start : start + QUESTIONS_AT_ONCE]
            for line in _scored(questions, evaluation, score_requests):
                lines.append(line)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            rate = (len(lines) - before) / (time.monotonic() - began)
            status.show(len(lines), f"{name} | {rate:,.1f} questions/s | "
                                    f"{duration((len(loaded.questions) - len(lines)) / rate)} left")
    status.close()
    seconds = time.monotonic() - began
    losses = {scoring: [[_loss(candidate, scoring) for candidate in line["candidates"]] for line in lines]
              for scoring in SCORINGS}
    answers = [line["answer"] for line in lines]
    outcomes = {scoring: evaluation.benchmarks.accuracy(losses[scoring], answers) for scoring in SCORINGS}
    chosen = outcomes[evaluation.scoring]
    for line, prediction, correct in zip(lines, chosen.predictions, chosen.correct, strict=True):
        line |= {"prediction": prediction, "correct": bool(correct)}
    candidates = [candidate for line in lines for candidate in line["candidates"]]
    summary = accuracy_summary(chosen.correct, [len(line["candidates"]) for line in lines], answers)
    result = header | {
        "task": loaded.name, "sample": loaded.is_sample, "metric": "accuracy", "value": summary.accuracy,
        **_levels(summary), "ties": chosen.ties,
        "accuracy_by_scoring": {scoring: outcome.accuracy for scoring, outcome in outcomes.items()},
        "prompts_cut": sum(candidate["prompt_tokens_cut"] > 0 for candidate in candidates),
        "continuations_cut": sum(candidate["continuation_tokens_cut"] > 0 for candidate in candidates),
        "read": loaded.read, "skipped": dict(loaded.skipped), "files": list(loaded.files),
        "questions_per_second": (len(lines) - before) / seconds if len(lines) > before else None,
    }
    _write(folder / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [header, *lines]))
    _write(folder / f"{name}.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    report(_row(result))
    return result


def _scored(
    questions: Sequence[Any], evaluation: Evaluation, score_requests: Callable[[Sequence[Request]], list[Any]]
) -> Iterator[dict[str, Any]]:
    """The line of each question, without prediction."""
    vocabulary, length = evaluation.vocabulary, evaluation.lengths["targets"]
    requests, beyond = [], []
    for group, question in enumerate(questions):
        for number, candidate in enumerate(question.candidates):
            whole = vocabulary.encode(candidate.continuation)
            # Of one longer than the model the beginning is scored, which is counted: no question is lost for it.
            request = Request(group, vocabulary.encode(candidate.prompt), whole[:length])
            beyond.append(len(whole) - len(request.continuation))
            if wrong := fault(request, length, vocabulary.size):
                raise ValueError(f"Question {question.id}, candidate {number}: {wrong}.")
            # For "released" alone, and where it costs the prompt no token.
            if len(request.prompt) + len(request.continuation) <= length:
                request = request._replace(continuation=[*request.continuation, vocabulary.pad_id])
            requests.append(request)
    values = iter(zip(requests, score_requests(requests), beyond, strict=True))
    for question in questions:
        candidates = []
        for _ in question.candidates:
            request, log_likelihoods, left = next(values)
            tokens = len(request.continuation) - (request.continuation[-1] == vocabulary.pad_id)
            scored = vocabulary.decode(request.continuation[:tokens])
            candidates.append({
                "log_likelihood": float(log_likelihoods[:tokens].sum()), "tokens": tokens,
                "bytes": len(scored.encode()), "released": float(log_likelihoods[1:].sum()),
                "prompt_tokens_cut": prompt_tokens_cut(request, length), "continuation_tokens_cut": left})
        [answer] = question.answer
        yield {"id": question.id, "candidates": candidates, "answer": answer}


def _loss(candidate: Mapping[str, Any], scoring: str) -> float:
    """What is lowest for the candidate that is chosen."""
    if scoring == "released":
        return -candidate["released"] / candidate["tokens"]
    divisor = {"per_token": candidate["tokens"], "per_byte": candidate["bytes"], "sum": 1}[scoring]
    return -candidate["log_likelihood"] / divisor


def _levels(summary: AccuracySummary) -> dict[str, Any]:
    return {
        "n": summary.n, "interval": list(summary.interval), "chance": summary.chance,
        "chance_p_value": summary.chance_p_value, "majority": summary.majority,
        "majority_answer": summary.majority_answer, "majority_p_value": summary.majority_p_value,
        "smallest_detectable_difference": {
            "from_chance": summary.detectable_from_chance, "between_runs": summary.detectable_between},
    }


def _lines_written(path: epath.Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of an evaluation of the same settings and checkpoint, as far as it came."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # a kill cut it short
    return lines[1:] if lines and lines[0] == header else []


def _fingerprint(questions: Sequence[Any]) -> str:
    """Of the texts that are scored, and so of data, template and examples together."""
    return hashlib.sha256(json.dumps(questions, ensure_ascii=False).encode()).hexdigest()


def _write(path: epath.Path, text: str) -> None:
    """Whole or not at all."""
    building = path.with_name(f".{path.name}.building")
    building.write_text(text)
    building.replace(path)


HEADINGS = f"{'task':<24} {'n':>6} {'accuracy':>9} {'95% interval':>15} {'chance':>7} {'majority':>9}"


def _row(result: Mapping[str, Any]) -> str:
    """A line of the table on the terminal, in per cent."""
    low, high = result["interval"]
    name = result["task"] + (" (sample)" if result["sample"] else "")
    note = "" if result["chance_p_value"] < 0.05 else "  not told from chance"
    return (f"{name:<24} {result['n']:>6,} {100 * result['value']:>9.2f} {f'{100 * low:.1f} - {100 * high:.1f}':>15} "
            f"{100 * result['chance']:>7.1f} {100 * result['majority']:>9.1f}{note}")
