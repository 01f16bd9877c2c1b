"""Benchmarks as an evaluation asks for them: read with one choice of files and templates, and judged."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tasks import metrics
from tasks.benchmarks.loading import load
from tasks.benchmarks.questions import Loaded


@dataclasses.dataclass(frozen=True)
class Benchmarks:
    """What a gin file says of the benchmarks.

    Attributes:
      data_dir: a folder below which their files are found by name, local or gs://; None for the items of our own.
      template: "released", "paper", "multiple_choice", or {"prompt": ..., "continuation": ...} with fields in braces.
      few_shot: worked examples before each prompt.
      seed: of the choice of worked examples.
    """

    data_dir: str | None = None
    template: str | Mapping[str, str] = "released"
    few_shot: int = 0
    seed: int = 0

    def load(self, task: str) -> Loaded:
        """The questions of a task; see `tasks.benchmarks.loading.load`."""
        return load(task, self.data_dir, self.template, self.few_shot, self.seed)

    def accuracy(self, losses: Sequence[Sequence[float]], answers: Sequence[int]) -> metrics.Accuracy:
        """See `tasks.metrics.accuracy`."""
        return metrics.accuracy(losses, answers)

    def settings(self) -> dict[str, Any]:
        """The choices that make other questions of the same files, as JSON."""
        template = self.template if isinstance(self.template, str) else dict(self.template)
        return {"template": template, "few_shot": self.few_shot, "seed": self.seed}
