"""The metrics of each step: read one step late, checked, summed, recorded and shown.

A record covers all steps since the previous one: its losses are means over their tokens, its shares are over everything
drawn in them. Values of only the last step are in last_step/loss and so on.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from codellm_jax.mixture.order import POOLS, Order
from codellm_jax.runtime.distributed import gathered
from codellm_jax.runtime.progress import Records, StatusLine, duration

Array: TypeAlias = Any  # jax.Array from the step, np.ndarray once fetched


class NotFinite(FloatingPointError):
    """A loss or gradient is not finite. `parameters_after` is the step whose parameters gave it: checkpoints of this
    step and later ones are not trusted, and each earlier one gave a finite loss.
    """

    def __init__(self, text: str, parameters_after: int) -> None:
        super().__init__(text)
        self.parameters_after = parameters_after


class Metrics(NamedTuple):
    """Float32 scalars of one step; `source_*` are [sources]."""

    loss: Array  # mean over the tokens that count, in nats
    grad_norm: Array
    source_losses: Array  # sums, not means
    source_tokens: Array


class Interval(NamedTuple):
    """Sums over the steps since the last record: float64, in step order."""

    steps: int
    loss: float  # times tokens: the loss of a step is summed more exactly than those of its sources
    grad_norm: float
    source_losses: list[float]  # of each source
    source_tokens: list[float]

    @classmethod
    def of(cls, saved: Mapping[str, Any] | None, sources: int) -> "Interval":
        """The checkpoint's sums over earlier steps that are not recorded yet; empty if it has none."""
        return cls(**saved) if saved else cls(0, 0.0, 0.0, [0.0] * sources, [0.0] * sources)

    def add(self, values: Metrics) -> "Interval":
        def sums(before: list[float], more: Array) -> list[float]:
            return [one + float(other) for one, other in zip(before, more, strict=True)]

        tokens = float(np.sum(values.source_tokens, dtype=np.float64))
        return Interval(self.steps + 1, self.loss + float(values.loss) * tokens,
                        self.grad_norm + float(values.grad_norm),
                        sums(self.source_losses, values.source_losses), sums(self.source_tokens, values.source_tokens))


class Meter:
    """Keeps one step in flight: the metrics of step k are read once step k + 1 is dispatched.

    Args:
      order: the order of rows or examples; batch_size: how many of them a step has.
      stage: in "tuning" the share of each source among the examples is recorded too.
      first, last: completed steps before, and at the end.
      log_period: steps between two records.
      learning_rate: step -> learning rate.
      utilization: tokens per second -> model FLOPs utilization, with full and with causal attention; None if unknown.
      interval: the checkpoint's sums over earlier steps that are not recorded yet.
    """

    def __init__(
        self, order: Order, batch_size: int, stage: str, first: int, last: int, log_period: int,
        learning_rate: Callable[[int], Any], utilization: Callable[[float], tuple[float | None, float | None]],
        records: Records, status: StatusLine, interval: Mapping[str, Any] | None = None,
    ) -> None:
        self._order, self._batch_size, self._stage = order, batch_size, stage
        self._first, self._last, self._log_period = first, last, log_period
        self._learning_rate, self._utilization = learning_rate, utilization
        self._records, self._status = records, status
        self._pending: tuple[int, Metrics, int, int] | None = None
        self._interval = Interval.of(interval, len(order.sources))
        self._began = time.monotonic()
        self.restart()

    @property
    def interval(self) -> dict[str, Any]:
        """The sums over settled steps that are not recorded yet, for a checkpoint."""
        return self._interval._asdict()

    def restart(self) -> None:
        """Starts a new timing interval: earlier time (evaluation, saving) does not count towards steps."""
        self._positions, self._waited, self._blocked, self._since = 0, 0.0, 0.0, time.monotonic()

    @jax.profiler.annotate_function
    def next_batch(self, batches: Iterator[Any]) -> Any:
        """The next batch; its time counts as waiting for data."""
        began = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - began
        return batch

    def add(self, step: int, metrics: Metrics, positions: int, tokens: int) -> None:
        """Adds the metrics of a dispatched step, and settles those of the previous step.

        `positions` is the step's number of input tokens, with prompts but without padding, for its speed; `tokens` is
        the number that the loss has counted since the run began.

        A step that is recorded is settled at once: every measured interval ends with the devices idle, so that its
        rate is exact, at the price of one gap in `log_period` steps.
        """
        self.settle()
        self._pending = (step, metrics, positions, tokens)
        if step % self._log_period == 0:
            self.settle()

    @jax.profiler.annotate_function
    def settle(self) -> None:
        """Waits for the pending step's metrics, and records them if due.

        Raises:
          NotFinite: its loss or gradient is not finite.
        """
        if self._pending is None:
            return
        (step, metrics, positions, tokens), self._pending = self._pending, None
        began = time.monotonic()
        values = Metrics(*map(np.asarray, jax.device_get(metrics)))
        self._blocked += time.monotonic() - began
        self._positions += positions
        if not (math.isfinite(values.loss) and math.isfinite(values.grad_norm)):
            raise NotFinite(f"The loss became {float(values.loss)} and its gradient's norm "
                            f"{float(values.grad_norm)} at step {step}.", step - 1)
        self._interval = self._interval.add(values)
        if step % self._log_period == 0 or step == self._last:
            self._record(step, values, tokens)
            self._interval = Interval.of(None, len(self._order.sources))
            self.restart()

    @jax.profiler.annotate_function
    def _record(self, step: int, values: Metrics, trained_tokens: int) -> None:
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate = self._positions / seconds
        full, causal = self._utilization(rate)
        names = [source.name for source in self._order.sources]
        interval = self._interval
        losses = loss_by_source(interval.source_losses, interval.source_tokens, names)
        counted = sum(interval.source_tokens)
        loss = interval.loss / counted if counted else math.nan  # only prompts
        rows = step * self._batch_size
        drawn = self._order.counts(rows)
        last_step = {"loss": float(values.loss), "grad_norm": float(values.grad_norm)} | loss_by_source(
            values.source_losses, values.source_tokens, names) | self._shares(step, 1, values.source_tokens, names)
        self._records.write(step, "train", self._straggler(seconds) | {
            "loss": loss, "tokens": trained_tokens,
            "tokens_per_second": rate, "learning_rate": float(self._learning_rate(step - 1)),
            "grad_norm": interval.grad_norm / interval.steps, "data_wait_fraction": self._waited / seconds,
            "model_flops_utilization": full, "model_flops_utilization_causal": causal,
        } | losses | self._shares(step, interval.steps, interval.source_tokens, names)
            | {f"last_step/{name}": value for name, value in last_step.items()})
        own, code = rows - self._order.begin, sum_by_source(drawn, names)["code"]
        asked = float(self._order.schedule.asked(rows) - self._order.schedule.asked(self._order.begin))
        left = (time.monotonic() - self._began) / (step - self._first) * (self._last - step)
        pools = ", ".join(f"{pool} {losses[f'loss/{pool}']:.3f}" for pool in POOLS if f"loss/{pool}" in losses)
        self._status.show(step, " | ".join(filter(None, [
            f"loss {loss:.4f} ({pools})",
            f"code {code / own:.3f} of {asked / own:.3f}",
            f"{rate:,.0f} tokens/s", f"MFU {full:.1%}" if full else "", f"{duration(left)} left"])))

    def _shares(self, step: int, steps: int, tokens: Sequence[float], names: Sequence[str]) -> dict[str, float]:
        """The share of each pool and source in the tokens counted in the last `steps` steps, and in tuning also
        in the examples drawn.
        """
        total = float(sum(tokens)) or 1.0
        shares = {f"token_fraction/{group}": count / total for group, count in sum_by_source(tokens, names).items()}
        if self._stage == "tuning":
            drawn = self._order.counts(step * self._batch_size) - self._order.counts((step - steps) * self._batch_size)
            shares |= {f"example_fraction/{group}": count / (steps * self._batch_size)
                       for group, count in sum_by_source(drawn, names).items()}
        return shares

    def _straggler(self, seconds: float) -> dict[str, float | None]:
        """The process that delayed the others most, by its input or other host work, and its fraction of busy time.

        A slow chip cannot be identified: all processes wait for it within the step.
        """
        if jax.process_count() == 1:
            return {}
        busy = gathered(np.array([1 - self._blocked / seconds]))[:, 0]
        return {"busiest_process": float(busy.argmax()), "busiest_process_fraction": float(busy.max()),
                "busy_fraction_median": float(np.median(busy))}


def sum_by_source(values: Array, names: Sequence[str]) -> dict[str, float]:
    """Sums over each pool and each source: {"text": 10.0, "code": 5.0, "text.python": 10.0, ...}."""
    pools = {pool: sum(float(value) for value, name in zip(values, names, strict=True) if name.split(".")[0] == pool)
             for pool in POOLS}
    return pools | {name: float(value) for value, name in zip(values, names, strict=True)}


def loss_by_source(losses: Array, tokens: Array, names: Sequence[str]) -> dict[str, float]:
    """Mean loss of each pool and source with tokens: {"loss/text": 4.1, "loss/text.python": 4.1, ...}."""
    return _means_by_source("loss", losses, tokens, names)


def bits_per_byte_by_source(losses: Array, sizes: Array, names: Sequence[str]) -> dict[str, float]:
    """Loss of each pool and source with bytes, in bits per byte of its text: {"bits_per_byte/text": 1.9, ...}.

    Unlike a loss per token, it is comparable between vocabularies. `losses` are sums in nats, `sizes` bytes.
    """
    return _means_by_source("bits_per_byte", np.asarray(losses) / np.log(2), sizes, names)


def _means_by_source(measure: str, sums: Array, counts: Array, names: Sequence[str]) -> dict[str, float]:
    by_group = sum_by_source(counts, names)
    return {f"{measure}/{group}": total / by_group[group] for group, total in sum_by_source(sums, names).items()
            if by_group[group] > 0}
