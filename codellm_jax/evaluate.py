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
from codellm_jax.model.decoding import Generation, generate
from codellm_jax.model.sampling import PAPER_SAMPLING, Sampling
from codellm_jax.model.scoring import Request, fault, prompt_tokens_cut, score
from codellm_jax.results.levels import AccuracySummary, accuracy_summary, detectable_by_error
from codellm_jax.results.statistics import Bootstrap, Interval, bootstrap, wilson_interval
from codellm_jax.runtime.checkpoints import newest_record, restore_parameters
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh
from codellm_jax.runtime.progress import StatusLine, duration
from codellm_jax.runtime.state import abstract_state
from codellm_jax.train import require_same_vocabulary, resolved
from codellm_jax.vocabulary import Vocabulary

SCORINGS = ("per_token", "sum", "per_byte", "released")
RESULTS_VERSION = 1  # raise it whenever lines hold other things: those of an earlier one are not gone on from
QUESTIONS_AT_ONCE = 64  # scored between two writes of results
TEXTS_AT_ONCE = 32  # likewise written


class Benchmarks(Protocol):
    """Where questions come from. `tasks.judging.Benchmarks` is one."""

    def load(self, task: str) -> Any:
        """A `tasks.benchmarks.questions.Loaded`."""
        ...

    def judge(self, loaded: Any, texts: Sequence[Sequence[str]], tokenize: Callable[[str], list[int]]) -> Any:
        """A `tasks.judging.Judged` of what was written for each question."""
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
      sampling: how answers are written.
      samples: answers to each question that is answered by writing; pass@k needs k or more.
      seed: of what is sampled.
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
    sampling: Sampling = PAPER_SAMPLING
    samples: int = 1
    seed: int = 0
    batch_tokens: int = 8192
    results_dir: str | None = None

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"SCORING must be one of {', '.join(SCORINGS)}, found {self.scoring!r}.")
        if isinstance(self.tasks, str) or not self.tasks:
            raise ValueError(f"TASKS must be a list of benchmarks such as ['logic', 'cosqa'], found {self.tasks!r}.")
        for name, value in (("SAMPLES", self.samples), ("evaluate.batch_tokens", self.batch_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"SEED must be a whole number from 0 to {2**32 - 1}, found {self.seed}.")


def evaluate(evaluation: Evaluation, report: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Evaluates a checkpoint on every task; returns what RUN/results/TASK.json holds, in the order of the tasks.

    Raises:
      ValueError, FileNotFoundError: in one line, for names, files and settings that do not fit.
    """
    loaded = {task: evaluation.benchmarks.load(task) for task in dict.fromkeys(evaluation.tasks)}  # all mistakes first
    path, vocabulary = evaluation.checkpoint_path, evaluation.vocabulary
    require_same_vocabulary(newest_record(path)[1], vocabulary.content_hash, path)
    mesh = make_mesh(evaluation.mesh)
    model = Decoder(evaluation.model(vocabulary_size=vocabulary.size, length=evaluation.lengths["targets"]))
    abstract = abstract_state(model, optax.identity(), mesh, evaluation.mesh)
    folder = epath.Path(evaluation.results_dir or f"{path}/results").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    with jax.set_mesh(mesh), nn.logical_axis_rules(evaluation.mesh.all_rules()):
        params, record = restore_parameters(path, abstract.params, report=report)
        checkpoint = {"run": resolved(path), "step": record["step"], "arm": arm(record["ledger"])}

        def score_requests(requests: Sequence[Request]) -> list[Any]:
            return score(params, model.config, requests, batch_tokens=evaluation.batch_tokens,
                         sharding=batch_sharding(mesh))

        def write(prompts: Sequence[Sequence[int]], numbers: Sequence[int], stop: Sequence[str]) -> list[Generation]:
            return generate(
                params, model.config, prompts, evaluation.sampling, evaluation.seed, numbers=numbers,
                stop_ids={vocabulary.end_of_document_id}, drawable=vocabulary.pieces, sharding=batch_sharding(mesh),
                stopped=lambda row, ids: any(word in vocabulary.decode(ids) for word in stop))

        report(HEADINGS)
        for questions in loaded.values():
            if hasattr(questions.questions[0], "candidates"):
                results.append(evaluate_choices(evaluation, questions, checkpoint, folder, score_requests, report))
            else:
                results.append(evaluate_texts(evaluation, questions, checkpoint, folder, write, report))
    return results


def evaluate_choices(
    evaluation: Evaluation, loaded: Any, checkpoint: Mapping[str, Any], folder: epath.Path,
    score_requests: Callable[[Sequence[Request]], list[Any]], report: Callable[[str], None],
) -> dict[str, Any]:
    """One task of questions with candidates, from the first question that has no line yet; writes its two files."""
    settings = _settings(evaluation, loaded) | {"scoring": evaluation.scoring}
    name, header, lines, seconds, new = _answered(
        evaluation, loaded, settings, checkpoint, folder, QUESTIONS_AT_ONCE,
        lambda questions, start: _scored(questions, evaluation, score_requests))
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
        "questions_per_second": new / seconds if new else None,
    }
    _write_results(folder, name, header, lines, result)
    report(_row(result))
    return result


def evaluate_texts(
    evaluation: Evaluation, loaded: Any, checkpoint: Mapping[str, Any], folder: epath.Path,
    write: Callable[[Sequence[Sequence[int]], Sequence[int], Sequence[str]], list[Generation]],
    report: Callable[[str], None],
) -> dict[str, Any]:
    """One task of questions that are answered by writing, likewise."""
    vocabulary, samples = evaluation.vocabulary, evaluation.samples

    def written(questions: Sequence[Any], start: int) -> Iterator[dict[str, Any]]:
        stop = tuple(questions[0].extra.get("stop", ()))
        prompts = [vocabulary.encode(question.prompt) for question in questions for _ in range(samples)]
        answers = iter(write(prompts, range(start * samples, start * samples + len(prompts)), stop))
        for question in questions:
            each = [next(answers) for _ in range(samples)]
            texts = [vocabulary.decode(answer.ids) for answer in each]
            for word in stop:
                texts = [text.split(word)[0] for text in texts]
            yield {"id": question.id, "texts": texts, "reasons": [answer.reason for answer in each],
                   "prompt_tokens_cut": each[0].prompt_tokens_cut}

    settings = _settings(evaluation, loaded) | {
        "sampling": dataclasses.asdict(evaluation.sampling), "samples": samples, "sampling_seed": evaluation.seed}
    name, header, lines, seconds, new = _answered(
        evaluation, loaded, settings, checkpoint, folder, max(1, TEXTS_AT_ONCE // samples), written)
    judged = evaluation.benchmarks.judge(loaded, [line["texts"] for line in lines], vocabulary.encode)
    scores = {metric: _score_of_means(values) for metric, values in judged.values.items()}
    scores |= {metric: _score(bootstrap(counts, from_sums)) for metric, (counts, from_sums) in judged.corpus.items()}
    main = next(iter(judged.values))
    for number, line in enumerate(lines):
        line |= {metric: values[number] for metric, values in judged.values.items()} | {"notes": judged.notes[number]}
    result = header | {
        "task": loaded.name, "sample": loaded.is_sample, "metric": main, "n": len(lines), **scores[main],
        "scores": scores | {metric: {"value": value} for metric, value in judged.fixed.items()},
        "prompts_cut": sum(line["prompt_tokens_cut"] > 0 for line in lines),
        "read": loaded.read, "skipped": dict(loaded.skipped), "files": list(loaded.files),
        "questions_per_second": new / seconds if new else None,
    }
    _write_results(folder, name, header, lines, result)
    report(_rows_of_texts(result))
    if not result["value"]:
        for line in lines[:3]:
            report(f"  {line['id']}: {line['texts'][0][:100]!r} {line['notes'][0]}".rstrip())
    return result


def _score(found: Bootstrap, interval: Interval | None = None) -> dict[str, Any]:
    # Where every question adds the same a bootstrap would be certain, which is no interval.
    interval = interval or (found.interval if found.standard_error else None)
    return {"value": found.estimate, "interval": interval and list(interval), "smallest_detectable_difference": {
        "between_runs": detectable_by_error(2**0.5 * found.standard_error) if found.standard_error else None}}


def _score_of_means(values: Sequence[float]) -> dict[str, Any]:
    shares = set(values) <= {0.0, 1.0}
    return _score(bootstrap(values), wilson_interval(int(sum(values)), len(values)) if shares else None)


def _settings(evaluation: Evaluation, loaded: Any) -> dict[str, Any]:
    return {"version": RESULTS_VERSION, "vocabulary": evaluation.vocabulary.content_hash,
            **evaluation.benchmarks.settings(), "data": loaded.sha256, "questions": _fingerprint(loaded.questions)}


def _answered(
    evaluation: Evaluation, loaded: Any, settings: Mapping[str, Any], checkpoint: Mapping[str, Any],
    folder: epath.Path, at_once: int, answer: Callable[[Sequence[Any], int], Iterator[dict[str, Any]]],
) -> tuple[str, dict[str, Any], list[dict[str, Any]], float, int]:
    """Answers the questions that have no line yet, and writes a line for each as it comes.

    Returns:
      The name of the files, their header, the lines of all questions, the seconds it took, and how many were new.
    """
    name = f"{loaded.name}_sample" if loaded.is_sample else loaded.name
    header = {"settings": json.loads(json.dumps(settings)), "checkpoint": dict(checkpoint)}
    lines = _lines_written(folder / f"{name}.jsonl", header)
    total, before, began = len(loaded.questions), len(lines), time.monotonic()
    status = StatusLine(before, total, active=jax.process_index() == 0, unit="question")
    _write(folder / f"{name}.jsonl", _as_lines([header, *lines]))  # whole, before anything is added to it
    with (folder / f"{name}.jsonl").open("a") as file:
        for start in range(before, total, at_once):
            for line in answer(loaded.questions[start : start + at_once], start):
                lines.append(line)
                file.write(_as_lines([line]))
            file.flush()
            rate = (len(lines) - before) / (time.monotonic() - began)
            status.show(len(lines), f"{name} | {rate:,.1f} questions/s | {duration((total - len(lines)) / rate)} left")
    status.close()
    return name, header, lines, time.monotonic() - began, total - before


def _as_lines(values: Sequence[Any]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _write_results(
    folder: epath.Path, name: str, header: Mapping[str, Any], lines: Sequence[Any], result: Mapping[str, Any]
) -> None:
    _write(folder / f"{name}.jsonl", _as_lines([header, *lines]))
    _write(folder / f"{name}.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")


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


def _rows_of_texts(result: Mapping[str, Any]) -> str:
    """Lines of the table: one for each metric, in per cent; BLEU is one already."""
    rows = []
    for metric, score_ in result["scores"].items():
        scale = 1 if metric.startswith("bleu") else 100
        name = f"{result['task']}{' (sample)' if result['sample'] else ''} {metric}"
        between = " - ".join(f"{scale * bound:.1f}" for bound in score_.get("interval") or ()) or "-"
        rows.append(f"{name:<28} {result['n']:>6,} {scale * score_['value']:>9.2f} {between:>15} {'-':>7} {'-':>9}")
    return "\n".join(rows)


HEADINGS = f"{'task':<28} {'n':>6} {'score':>9} {'95% interval':>15} {'chance':>7} {'majority':>9}"


def _row(result: Mapping[str, Any]) -> str:
    """A line of the table on the terminal, in per cent."""
    low, high = result["interval"]
    name = result["task"] + (" (sample)" if result["sample"] else "")
    note = "" if result["chance_p_value"] < 0.05 else "  not told from chance"
    return (f"{name:<28} {result['n']:>6,} {100 * result['value']:>9.2f} {f'{100 * low:.1f} - {100 * high:.1f}':>15} "
            f"{100 * result['chance']:>7.1f} {100 * result['majority']:>9.1f}{note}")
