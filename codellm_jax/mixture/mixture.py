"""The mixture a run trains on: from the names in a gin file to an order and the rows that it draws."""

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from etils import epath

from codellm_jax.mixture.examples import Sizes, sizes_drawn
from codellm_jax.mixture.order import Branch, Draw, Order, Source
from codellm_jax.mixture.rows import STAGES, Rows, cached_rows, unit_of
from codellm_jax.mixture.schedules import constant, phases
from codellm_jax.mixture.tokens import Definitions, quiet_tensorflow, require_registered, task_tokens
from codellm_jax.vocabulary import Vocabulary

FEWEST_HELD_OUT = 20  # documents or examples of a pool; with fewer, their loss does not represent the pool


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The data settings of a gin file.

    Attributes:
      name: a SeqIO mixture or task, or a list of them. Its tasks are named text.NAME or code.NAME.
      definitions: the modules and corpora that those names come from.
      lengths: {"targets": the length of a row in tokens}, SeqIO's sequence lengths.
      code_rate: share of code among the tokens (in tuning: among the examples), 0 to 1.
      mix_phases: replaces code_rate where the share changes while training: phases such as '5:3' (text:code), ramps
        such as '5:5 to 7:3', or tables of sources and weights; see `schedules.phases`.
      max_epochs: the run stops before any source begins an epoch more than this; None repeats without limit.
      cache_dir: the folder where tokenized rows are cached, local or gs://.
      stage: "pretraining", on documents, and instruction examples among them, joined and cut into rows; or "tuning",
        on instruction examples.
      packing: in tuning, whether the examples of a step share rows; the same examples either way.
    """

    name: str | Sequence[str]
    definitions: Definitions
    lengths: Mapping[str, int]
    code_rate: float | None = None
    mix_phases: Any = None  # checked by `phases`
    max_epochs: int | None = None
    cache_dir: str = "~/.cache/codellm_jax"
    stage: str = "pretraining"
    packing: bool = True

    def __post_init__(self) -> None:
        if "targets" not in self.lengths or self.lengths["targets"] < 1:
            raise ValueError(f"TASK_FEATURE_LENGTHS must give a length for 'targets', found {dict(self.lengths)}.")
        if self.stage == "tuning" and set(self.lengths) != {"targets"}:
            raise ValueError("TASK_FEATURE_LENGTHS has one length in tuning, of prompt and answer together: "
                             f"{{'targets': {self.lengths['targets']}}}; found {dict(self.lengths)}.")
        if set(self.lengths) != {"targets"}:
            raise ValueError("TASK_FEATURE_LENGTHS has one length in pre-training, that of a row of documents and "
                             f"instructions: {{'targets': {self.lengths['targets']}}}; found "
                             f"{dict(self.lengths)}.")
        if not self.name:
            raise ValueError("MIXTURE_OR_TASK_NAME is empty: name a SeqIO mixture or tasks.")
        if self.max_epochs is not None and self.max_epochs < 1:
            raise ValueError(f"MAX_EPOCHS must be at least 1 (or None for no limit), found {self.max_epochs}.")
        if "\\" in self.cache_dir:
            raise ValueError(f"CACHE_DIR {self.cache_dir} holds a backslash, which the library that stores rows reads "
                             "as a slash: use another name.")
        if self.stage not in STAGES:
            raise ValueError(f"mixture.stage must be one of {', '.join(STAGES)}, found {self.stage!r}.")
        if self.code_rate is not None:
            constant(self.code_rate)
        elif self.mix_phases is None:
            raise ValueError(
                "Neither CODE_RATE nor MIX_PHASES is set: give the share of code, such as CODE_RATE = 0.5.")

    @property
    def length(self) -> int:
        """Inputs of a row, in tokens."""
        return self.lengths["targets"]


@dataclasses.dataclass(frozen=True)
class OpenMixture:
    """The order of a run and the rows that it draws; lists are parallel to `order.sources`."""

    order: Order
    training: list[Rows]
    validation: list[Rows | None]
    stage: str
    warnings: tuple[str, ...] = ()  # for pools with too little held-out data
    prepared: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # by source, of folders of `t5x prepare`

    def sizes(self, draw: Draw) -> Sizes:
        """The number of columns that each drawn row or example takes, and of its tokens that the loss counts."""
        if self.stage == "tuning":
            return sizes_drawn(self.training, draw.source, draw.row)
        full = np.full(draw.source.shape, self.training[0].length, np.int64)
        counted = full.copy()
        for index, rows in enumerate(self.training):
            if rows.loss == "answers" and (here := draw.source == index).any():
                counted[here] = np.count_nonzero(rows.read(draw.row[here])[:, 1:] >= 0, axis=1)
        return Sizes(full, counted)


def open_mixture(
    mixture: Mixture, vocabulary: Vocabulary, seed: int, total_rows: int, batch_size: int = 1,
    report: Callable[[str], None] = print, branch: Branch | None = None,
) -> OpenMixture:
    """Resolves names, caches rows that are not cached yet, and makes the order of `total_rows` rows or examples,
    including a trunk's, of which each step takes `batch_size`.

    Within a pool, a source's share of the tokens is its rate in the SeqIO mixture or the `rate` of its corpus. If no
    source of the pool has one, it is proportional to its size, so all of them finish their epochs together.

    Raises:
      ValueError: unknown names, a pool without a source, a corpus smaller than one row, rates for some only.
    """
    # First, because it is quick and may fail.
    schedule = constant(mixture.code_rate or 0.0) if mixture.mix_phases is None else phases(
        mixture.mix_phases, total_rows, batch_size)
    rates = rates_of(mixture)
    splits = _cached(mixture, rates, vocabulary, report)
    sources = []
    for (name, rate), rows in zip(rates.items(), splits, strict=True):
        rated = [other for other in rates if other.split(".")[0] == name.split(".")[0]]
        without = [other for other in rated if rates[other] is None]
        if without and len(without) < len(rated):
            raise ValueError("Either all sources of a pool have a rate or none; without one: "
                             f"{', '.join(without)}.")
        weight = Fraction(rows["train"].count if rate is None else rate).limit_denominator(1_000_000)
        sources.append(Source(name, rows["train"].count, weight, rows["train"].content_hash))
    validation = [rows.get("validation") for rows in splits]
    return OpenMixture(
        order=Order(seed, schedule, tuple(sources), branch),
        training=[rows["train"] for rows in splits],
        validation=[rows if rows and rows.count else None for rows in validation],
        stage=mixture.stage,
        warnings=tuple(held_out_warnings(dict(zip(rates, validation, strict=True)), mixture.stage)),
        prepared={name: found for name in rates if (found := mixture.definitions.describe(name).get("prepared"))},
    )


def held_out_warnings(validation: Mapping[str, Rows | None], stage: str) -> Iterator[str]:
    """A line for each pool with too little held-out data to measure its loss.

    Args:
      validation: the rows of each source's validation split, None if it has none; a split may be empty.
      stage: "pretraining", or "tuning", where rows are the examples.
    """
    for pool in dict.fromkeys(name.split(".")[0] for name in validation):
        counts = {}
        for name, rows in validation.items():
            if name.split(".")[0] == pool:
                count = rows.count if rows else 0
                counts[name] = count if stage == "tuning" or not rows else rows.documents, count
        documents, count = map(sum, zip(*counts.values(), strict=True))
        if documents >= FEWEST_HELD_OUT and count > 1:
            continue
        listed = ", ".join(f"{name} {own:,}" + f" in {in_rows:,} row(s)" * (stage == "pretraining" and own > 0)
                           for name, (own, in_rows) in counts.items())
        yield (f"{pool}: held-out {unit_of(stage)}: {documents:,} ({listed}), " + (
            "too few to measure its loss" if count else "so its loss on held-out rows is not measured")
            + f". Give a corpus of {pool} a larger 'holdout', or separate files as 'validation', in CORPORA.")


def training_rows(mixture: Mixture, vocabulary: Vocabulary, report: Callable[[str], None] = print) -> list[Rows]:
    """The training rows of each source of a mixture, in the order of `open_mixture`; caches those not cached yet.

    Sources without any share of the run are included. Errors are those of `open_mixture`.
    """
    return [splits["train"] for splits in _cached(mixture, rates_of(mixture), vocabulary, report)]


def rates_of(mixture: Mixture) -> dict[str, float | None]:
    """The tasks of a mixture with their rates, None where there is none. Raises ValueError for an unknown name."""
    names = [mixture.name] if isinstance(mixture.name, str) else list(mixture.name)
    rates: dict[str, float | None] = {}
    for name in names:
        for task, rate in _tasks_of(name, mixture.definitions, mixture.cache_dir).items():
            rates[task] = rates.get(task) if rate is None else rate
    # By pool and name, so that the order of names in a list does not change the order of rows.
    return {name: rates[name] for name in sorted(rates, key=lambda name: (name.startswith("code."), name))}


def _cached(
    mixture: Mixture, tasks: Iterable[str], vocabulary: Vocabulary, report: Callable[[str], None]
) -> list[dict[str, Rows]]:
    for task in tasks:  # reports a missing file before spending minutes on reading others
        mixture.definitions.describe(task)
    return [cached_rows(task, mixture.definitions, vocabulary, mixture.length, mixture.cache_dir, report,
                        mixture.stage) for task in tasks]


def _remembered(content: bytes) -> dict[str, float | None] | None:
    """Tasks and their rates as `_tasks_of` wrote them; None for anything else."""
    try:
        tasks = json.loads(content)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(tasks, dict) and all(rate is None or type(rate) is float for rate in tasks.values())
    return tasks if sound else None


def _tasks_of(name: str, definitions: Definitions, cache_dir: str) -> dict[str, float | None]:
    """The tasks of a SeqIO task or mixture with their rates (None for a task named without a rate).

    Remembered in the cache under the definition's description, so that a second run need not import SeqIO.
    """
    if name in definitions.corpora:
        return {name: definitions.corpora[name].get("rate")}
    key = hashlib.sha256(json.dumps([name, definitions.describe(name)], sort_keys=True).encode()).hexdigest()[:16]
    remembered = epath.Path(cache_dir).expanduser() / "mixtures" / f"{name}-{key}.json"
    if remembered.exists() and (found := _remembered(remembered.read_bytes())):
        return found
    with quiet_tensorflow():
        import seqio

        definitions.register()
    require_registered(name)
    if name in seqio.TaskRegistry.names():
        tasks: dict[str, float | None] = {name: None}
    else:
        found = seqio.MixtureRegistry.get(name)
        if getattr(found._sample_fn, "__module__", "") == "tasks.scheduling":
            raise ValueError(f"{name} changes its mix itself, which only SeqIO's own readers support: name its tasks "
                             f"({', '.join(task.name for task in found.tasks)}) and set MIX_PHASES.")
        tasks = {task.name: float(found.get_rate(task)) for task in found.tasks}
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"CACHE_DIR {cache_dir} cannot be created: {error.strerror}. Choose another.") from error
    building = remembered.with_name(f".{remembered.name}.{uuid.uuid4().hex}")
    building.write_text(json.dumps(tasks))
    building.replace(remembered)  # atomic, even if a process is killed or reads meanwhile
    return tasks


def vocabulary_documents(mixture: Mixture) -> Iterator[str]:
    """The training text of a vocabulary for a mixture: its training documents, as much text as code.

    Documents of the larger pool are taken in the order of a hash until their characters equal the smaller pool's.
    """
    pools: dict[str, list[str]] = {}
    names = [mixture.name] if isinstance(mixture.name, str) else list(mixture.name)
    for task in {task: None for name in names for task in _tasks_of(name, mixture.definitions, mixture.cache_dir)}:
        with quiet_tensorflow():
            import seqio

            mixture.definitions.register()
            as_bytes = seqio.ByteVocabulary()
            for features in task_tokens(seqio.TaskRegistry.get(task), "train", as_bytes):
                pools.setdefault(task.split(".")[0], []).append(
                    "".join(as_bytes.decode(ids.tolist()) for ids in features.values()))
    room = min(sum(map(len, documents)) for documents in pools.values())
    for pool in sorted(pools, reverse=True):
        used = 0
        for document in sorted(pools[pool], key=lambda text: hashlib.sha256(text.encode()).digest()):
            if used < room:
                yield document
            used += len(document)
