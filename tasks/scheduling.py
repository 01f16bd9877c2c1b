"""Mixes that change during training, for plain SeqIO and thus for upstream T5X.

`add_scheduled_mixture` registers a SeqIO mixture that draws its tasks in the order in which
codellm_jax draws its sources: shares of text and code that are constant, step, slope or come from
tables (`MIX_PHASES`, see `codellm_jax.mixture.schedules.phases`), within half an example of the
requested share at every position, instead of SeqIO's random draws at constant rates.

It mixes examples, not tokens: a share of examples is a share of tokens only if all examples are
equally long. (codellm_jax itself mixes full rows.) Which task comes next depends on
the position alone, never on SeqIO's seed; which of its examples comes next is decided by SeqIO's
shuffling and repeating. With several hosts each mixes its own shard, from position 0: give the
examples of one host then.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from codellm_jax.mixture.order import Order, Source
from codellm_jax.mixture.schedules import LARGEST_DENOMINATOR, constant, phases

CHUNK = 4096  # positions computed at once

SampleFn = Callable[
    [Sequence[tf.data.Dataset], Sequence[float], int | None], tf.data.Dataset
]


def sample_fn(order: Order) -> SampleFn:
    """What `seqio.Mixture(sample_fn=...)` takes, drawing datasets in the order of `order`.

    Args:
      order: its sources are the mixture's tasks sorted by name, as `seqio.Mixture.tasks` are. Their
        numbers of rows do not matter.

    Returns:
      A function of datasets, rates and a seed. Rates and seed are used only if datasets are missing
      because a task has no such split: the remaining ones cannot be identified and are sampled by
      their rates, as in SeqIO. The mix ends when the next dataset has ended, as in SeqIO; with
      num_epochs=None it never ends. Its iterators can be saved and restored.
    """

    def draw(chunk: np.int64) -> np.ndarray:
        return order.locate(np.arange(CHUNK) + chunk * CHUNK)[0]

    def choices(chunk: tf.Tensor) -> tf.Tensor:
        # Stateless: the source at a position never changes, so iterators can be saved.
        drawn = tf.numpy_function(draw, [chunk], tf.int64, stateful=False)
        return tf.ensure_shape(drawn, [CHUNK])

    def sample(
        datasets: Sequence[tf.data.Dataset], rates: Sequence[float], seed: int | None
    ) -> tf.data.Dataset:
        if len(datasets) != len(order.sources):
            return tf.data.Dataset.sample_from_datasets(
                datasets, rates if any(rates) else None, seed=seed, stop_on_empty_dataset=True
            )
        choice = tf.data.Dataset.range(2**62 // CHUNK).map(choices).unbatch()
        return tf.data.Dataset.choose_from_datasets(
            datasets, choice, stop_on_empty_dataset=True
        )

    return sample


def add_scheduled_mixture(
    name: str,
    tasks: Sequence[str | tuple[str, float]],
    *,
    code_rate: float | None = None,
    mix_phases: Sequence[Any] | Mapping[Any, Any] | None = None,
    examples: int | None = None,
    batch_size: int = 1,
) -> seqio.Mixture:
    """Registers and returns the SeqIO mixture `name`, drawn in an exact order.

    Its tasks' rates in SeqIO are their shares of the examples over the whole run.

    Args:
      tasks: registered tasks named text.NAME or code.NAME, the pool before the dot, or pairs of
        such a name and its rate relative to the other tasks of its pool (without, they are equal).
      code_rate: the share of code, 0 to 1, throughout.
      mix_phases: or phases of training, as MIX_PHASES.
      examples: with `mix_phases`, the examples of the whole run (for one host: the run's divided by
        the hosts), which decide where its phases begin. The final share of the last phase holds beyond.
      batch_size: examples of a training step (of one host), where phases start at steps.

    Raises:
      ValueError: both or neither of `code_rate` and `mix_phases`, malformed phases, a name that is
        not a task or given twice, rates for some tasks of a pool only, a pool without a task.
    """
    if (code_rate is None) == (mix_phases is None):
        raise ValueError(
            f"{name}: give code_rate or mix_phases, found code_rate={code_rate!r} and "
            f"mix_phases={mix_phases!r}."
        )
    if mix_phases is None:
        schedule, length = constant(code_rate or 0.0), 1
    elif examples is None or examples < 1:
        raise ValueError(
            f"{name}: mix_phases needs the examples of the whole run, found examples={examples!r}."
        )
    else:
        schedule, length = phases(mix_phases, examples, batch_size), examples
    order = Order(0, schedule, _sources(name, tasks))
    rates = [
        (source.name, float(asked / length))
        for source, asked in zip(order.sources, order.asked(length), strict=True)
    ]
    return seqio.MixtureRegistry.add(name, rates, sample_fn=sample_fn(order))


def _sources(mixture: str, tasks: Sequence[str | tuple[str, float]]) -> tuple[Source, ...]:
    """The tasks as sources, sorted by name as SeqIO sorts them."""
    rates: dict[str, float | None] = {}
    for task in tasks:
        name, rate = (task, None) if isinstance(task, str) else task
        if name in rates:
            raise ValueError(f"{mixture}: the task {name} is given twice.")
        if name not in seqio.TaskRegistry.names():
            what = "a mixture: name its tasks" if name in seqio.MixtureRegistry.names() else "no task"
            raise ValueError(f"{mixture}: {name!r} is {what}.")
        if rate is not None and not 0 < rate < float("inf"):
            raise ValueError(f"{mixture}: the rate of {name} must be above 0, found {rate!r}.")
        rates[name] = rate
    for pool in sorted({name.split(".")[0] for name in rates}):
        without = [name for name in rates if name.split(".")[0] == pool and rates[name] is None]
        if without and any(rates[name] is not None for name in rates if name.startswith(f"{pool}.")):
            raise ValueError(
                f"{mixture}: either all {pool} tasks have a rate or none; without one: "
                f"{', '.join(without)}."
            )
    return tuple(
        Source(name, 1, Fraction(rates[name] or 1).limit_denominator(LARGEST_DENOMINATOR))
        for name in sorted(rates)
    )
