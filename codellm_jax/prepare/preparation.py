"""The settings of a preparation in a gin file; imports none of the libraries that the work needs."""

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from codellm_jax.vocabulary import Vocabulary

FORMATS = {"parquet": "pyarrow", "array_record": "array_record", "tfrecord": "google_crc32c"}  # and their libraries


class Inputs(Protocol):
    """Reads the corpora. `tasks.corpora.inputs.Inputs` is one."""

    @property
    def corpora(self) -> Mapping[str, Mapping[str, Any]]:
        """Specs of the corpora by name."""
        ...

    def files(self, name: str) -> list[tuple[str, int, int]] | None:
        """The `state` of each file of a corpus; None if the corpus is read as a whole."""
        ...

    def state(self, file: str) -> tuple[str, int, int]:
        """A file's path, size in bytes, and modification time in nanoseconds."""
        ...

    def pieces(self, name: str, file: str, at_most: int) -> list[tuple[int, int]] | None:
        """The pieces of about `at_most` bytes in which a file can be read; None if it is read as a whole."""
        ...

    def rows(self, name: str, file: str, piece: tuple[int, int]) -> int:
        """The number of lines or rows of a piece of a file."""
        ...

    def documents(
        self, name: str, files: Sequence[str] | None, piece: tuple[int, int] | None = None, rows_before: int = 0
    ) -> Iterator[Any]:
        """A `tasks.corpora.inputs.Input` for each record of some files of a corpus, of a piece of a file, or of all."""
        ...


class Benchmarks(Protocol):
    """The source of the texts of questions. `tasks.benchmarks.judging.Benchmarks` is one."""

    def texts(self, task: str) -> Any:
        """A `tasks.benchmarks.texts.Texts`."""
        ...


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The settings of a preparation.

    Attributes:
      inputs: the corpora.
      steps: names of steps, or mappings of a name and options, in the order in which they are applied.
      output: a folder that does not exist yet, local or gs://.
      benchmarks: reads the questions that the step "decontaminate" searches for.
      tasks: the benchmarks whose questions the step "decontaminate" searches for.
      vocabulary: counts documents and budgets in its tokens; None for no count.
      format: of the output's documents, one of `FORMATS`; the latter two are a dataset of TensorFlow Datasets.
      part_bytes: files of one corpus are joined into parts of about this size, and larger files of JSON lines and
        Parquet are divided; workers take one part at a time. None for 64 MiB, or beyond 1 TiB of files as much as
        gives 16,384 parts.
    """

    inputs: Inputs
    steps: Sequence[Any]
    output: str
    benchmarks: Benchmarks | None = None
    tasks: Sequence[str] = ()
    vocabulary: Vocabulary | None = None
    format: str = "parquet"
    part_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.output.strip():
            raise ValueError("OUTPUT must name a folder.")
        if self.format not in FORMATS:
            raise ValueError(f"FORMAT must be one of {', '.join(FORMATS)}, found {self.format!r}.")
        if self.part_bytes is not None and self.part_bytes < 1:
            raise ValueError(f"prepare.part_bytes must be at least 1, found {self.part_bytes}.")

    def run(self, workers: int | None, runner: str, options: Sequence[str]) -> None:
        """Prepares the documents; arguments and errors as for `prepare.prepare.prepare`.

        Raises:
          ValueError: a library that only preparations need is missing.
        """
        needed = dict.fromkeys(["pyarrow", "xxhash", FORMATS[self.format]])
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            raise ValueError(f"t5x prepare needs {' and '.join(missing)}: pip install '.[prepare]'.")
        from codellm_jax.prepare.prepare import prepare

        prepare(self, workers, runner, options, lambda line: print(line, flush=True))
