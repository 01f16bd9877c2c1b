"""Loads the benchmarks of an evaluation with one configuration, and judges written answers."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from codellm_jax.contents import word_of
from tasks.benchmarks import matching, metrics, question_files, templates
from tasks.benchmarks.loading import BENCHMARKS, load
from tasks.benchmarks.questions import Loaded, Prompt
from tasks.benchmarks.texts import Texts, read_texts
from tasks.programs import programs, sandbox


class Judged(NamedTuple):
    """The scores of written answers.

    Attributes:
      values: for each metric, a value in 0 ... 1 per question; the score is their mean. The first is the main metric.
      corpus: for each metric that is not a mean, its counts per question [questions, k], and the function that
          computes the score from their sums.
      fixed: scores that cannot be bootstrapped.
      notes: a remark on each answer of each question.
      rule: a sentence on when an answer counts as right; empty if the task's name implies it.
    """

    values: dict[str, list[float]]
    corpus: dict[str, tuple[list[list[int]], Callable[[Any], Any]]]
    fixed: dict[str, float]
    notes: list[list[str]]
    rule: str = ""


@dataclasses.dataclass(frozen=True)
class Benchmarks:
    """The settings of benchmarks in a gin file.

    Attributes:
      data_dir: a folder, local or gs://, that is searched for the benchmarks' files by name; None for this package's
        own items.
      template: how questions are formatted: "released", "paper", "multiple_choice", or {"prompt": ..., "continuation":
        ...} with fields in braces. Or a mapping from tasks to these, {"mbpp": "paper", "default": "multiple_choice"},
        where "default" covers all tasks that are not named, and is "released" if omitted. Users' files are named as in
        TASKS.
      few_shot: number of worked examples before each prompt.
      seed: seed for drawing worked examples.
      specs: users' benchmarks by name, each with its file of questions and options.
      unconfined: whether generated programs run even if the sandbox cannot give its guarantees (see
        `programs.sandbox`).
    """

    data_dir: str | None = None
    template: str | Mapping[str, Any] = "released"
    few_shot: int = 0
    seed: int = 0
    specs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    unconfined: bool = False

    def __post_init__(self) -> None:
        question_files.parsed(self.specs, BENCHMARKS)

    def load(self, task: str) -> Loaded:
        """Loads the questions of a task; see `tasks.benchmarks.loading.load`.

        Raises:
          SandboxError: its answers are programs, which cannot be confined on this host, and `unconfined` is False.
        """
        loaded = load(task, self.data_dir, self._template(task), self.few_shot, self.seed, self.specs)
        [first, *_] = loaded.questions
        if isinstance(first, Prompt) and programs.is_problem(first.extra) and not self.unconfined:
            sandbox.require_guarantees()
        return loaded

    def texts(self, task: str) -> Texts:
        """The texts of a task's questions as in their records; see `tasks.benchmarks.texts.read_texts`."""
        return read_texts(task, self.data_dir, self.specs)

    def accuracy(self, losses: Sequence[Sequence[float]], answers: Sequence[int]) -> metrics.Accuracy:
        """See `tasks.benchmarks.metrics.accuracy`."""
        return metrics.accuracy(losses, answers)

    def settings(self, task: str) -> dict[str, Any]:
        """The settings that affect the questions made from a task's files, as JSON."""
        template = self._template(task)
        return {"template": template if isinstance(template, str) else dict(template), "few_shot": self.few_shot,
                "seed": self.seed}

    def _template(self, task: str) -> str | Mapping[str, str]:
        """The template of a task, which the setting names by its name or its path in TASKS."""
        if not isinstance(self.template, Mapping):
            return self.template
        files = {key: word_of(key) for key in self.template if isinstance(key, str) and question_files.is_file(key)}
        by_name = {files.get(key, key): value for key, value in self.template.items()}
        return templates.of_task(word_of(task), by_name, [*self.specs, *files.values()])

    def judge(self, loaded: Loaded, texts: Sequence[Sequence[str]], tokenize: Callable[[str], list[int]]) -> Judged:
        """Judges written answers: programs by running them and by BLEU, DuReader by exact match and F1, answers to
        users' files by `matching.RULES`.

        Args:
          loaded: the questions.
          texts: one or more answers per question.
          tokenize: encodes with the model's vocabulary, whose tokens the study's BLEU counts.

        Raises:
          SandboxError: programs cannot be confined on this host, and `unconfined` is False.
        """
        # Programs, tokenizers and sacreBLEU need valid UTF-8: lone surrogates become U+FFFD.
        texts = [[text.encode("utf-8", "surrogatepass").decode("utf-8", "replace") for text in answers]
                 for answers in texts]
        first = [answers[0] for answers in texts]
        if match := loaded.questions[0].extra.get("match"):  # type: ignore[union-attr]
            return _matched(loaded, texts, match)
        if loaded.name == "dureader":
            found = metrics.dureader(
                first, [question.references for question in loaded.questions])  # type: ignore[union-attr]
            return Judged({"f1": found.f1s, "exact_match": [float(match) for match in found.exact_matches]}, {}, {},
                          [[""] for _ in texts])
        return self._run(loaded, texts, tokenize)

    def _run(
        self, loaded: Loaded, texts: Sequence[Sequence[str]], tokenize: Callable[[str], list[int]]
    ) -> Judged:
        questions: Any = loaded.questions
        tests = [programs.problem_tests({**question.extra, "code": question.references[0]}) for question in questions]
        outcomes = iter(sandbox.run_programs(
            [test.of(text) for test, answers in zip(tests, texts, strict=True) for text in answers],
            insist=self.unconfined, progress=loaded.name))
        judged = [[next(outcomes) for _ in answers] for answers in texts]
        samples = len(texts[0])
        values = {f"pass@{k}": [metrics.pass_at_k(samples, sum(one.passed for one in each), k) for each in judged]
                  for k in (1, 10, 100) if k <= samples}
        predictions = [tokenize(answers[0]) for answers in texts]
        references = [tokenize(question.references[0]) for question in questions]
        scored = metrics.bleu(predictions, references)
        theirs = metrics.sacrebleu_score(
            [answers[0] for answers in texts], [question.references[0] for question in questions])
        return Judged(
            values, {"bleu": (scored.counts, metrics.bleu_of_counts),
                     "bleu_sacrebleu": (theirs.counts, functools.partial(
                         metrics.bleu_of_counts, smoothing="exponential"))},
            {"bleu_released": metrics.bleu(predictions, references, released=True).score},
            [[f"{one.verdict}: {one.detail}".removesuffix(": ") for one in each] for each in judged])


def _matched(loaded: Loaded, texts: Sequence[Sequence[str]], match: str) -> Judged:
    """Judges answers against references by a rule; a question's value is the share of its answers that are right."""
    right = [[matching.is_right(match, text, question.references) for text in answers]
             for question, answers in zip(loaded.questions, texts, strict=True) if isinstance(question, Prompt)]
    read = [[matching.MATCHES[match](text) for text in answers] for answers in texts]
    notes = [["no number" if one is None else f"read as {one}" for one in each] for each in read]
    return Judged({"exact_match": [sum(each) / len(each) for each in right]}, {}, {}, notes, matching.RULES[match])
