"""`t5x train --runner=t5x`: runs the steps with upstream T5X's Trainer.

T5X's Trainer computes gradients (in microbatches if there are several), applies the optimizer, and lays everything out
on the mesh. Batches, records, checkpoints, held-out losses and resumes are those of any run, so either runner can
continue the other's run. Without microbatches the losses are bit-identical. With several, T5X takes adjacent rows where
this package takes every k-th, which rounds differently and draws other dropout.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from jax.sharding import Mesh, NamedSharding
from t5x import optimizers, partitioning
from t5x.train_state import FlaxOptimTrainState
from t5x.trainer import Trainer

from codellm_jax.mixture.batches import Batch
from codellm_jax.model.decoder import Decoder
from codellm_jax.runtime.meter import Metrics
from codellm_jax.runtime.state import TrainState
from codellm_jax.training.plan import Plan, Training
from codellm_jax.training.train import batch_loss, by_source


def trainer_step(training: Training, plan: Plan) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A step of the run by T5X's Trainer; same arguments and results as `train.own_step`, and it donates the state."""
    sources = len(plan.mixture.order.sources)
    optimizer = optimizers.OptaxWrapper(plan.optimizer)

    def theirs(state: TrainState) -> Any:
        of_optimizer = optimizers.OptimizerState(state.step, state.opt_state)
        return FlaxOptimTrainState(optimizers.Optimizer(optimizer, of_optimizer, state.params))

    _, dropout_rng = jax.random.split(jax.random.key(training.seed))  # as in `state.initial_state`
    partitioner = _OnMesh(plan.mesh, training.mesh.all_rules())
    trainer = Trainer(
        model=_Loss(plan.model, sources), train_state=None, partitioner=partitioner, eval_names=(), summary_dir=None,
        train_state_axes=jax.tree.map(lambda leaf: leaf.sharding.spec, theirs(plan.state)), rng=dropout_rng,
        learning_rate_fn=training.learning_rate, num_microbatches=training.microbatches,
        weight_metrics_computer=_GradientNorm())
    trainer.close()  # its writers; metrics are read and recorded like those of any run
    features = jax.jit(lambda batch: batch._asdict() | {"tokens": _tokens_of_batch(batch, sources)},
                       out_shardings=NamedSharding(plan.mesh, partitioner.data_partition_spec))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        changed, found = trainer._partitioned_train_step(theirs(state), features(batch))
        of_optimizer = changed._optimizer.state
        metrics = Metrics(*(found[name].value for name in Metrics._fields))
        return TrainState(of_optimizer.step, changed.params, of_optimizer.param_states, state.rng), metrics

    return step


def _tokens_of_batch(batch: Batch, sources: int) -> jax.Array:
    """The number of tokens that count in the whole batch, repeated for each row, float32 [batch, 1]: T5X divides rows
    among microbatches and sums their gradients, and offers no other way to divide by the total.
    """
    tokens = jnp.maximum(jnp.sum(by_source(batch.weights, batch.sources, sources)), 1)
    return jnp.full((len(batch.weights), 1), tokens)


class _Loss(NamedTuple):
    """The model interface that T5X's Trainer requires."""

    decoder: Decoder
    sources: int

    def loss_fn(self, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        part = Batch(**{name: batch[name] for name in Batch._fields})
        loss, source_losses = batch_loss(
            params, part, rng, model=self.decoder, sources=self.sources, tokens=batch["tokens"][0, 0])
        return loss, {"loss": _Sum(loss), "source_losses": _Sum(source_losses),
                      "source_tokens": _Sum(by_source(part.weights, part.sources, self.sources))}


@flax.struct.dataclass
class _Sum(clu_metrics.Metric):
    """Summed over microbatches."""

    value: jax.Array

    def merge(self, other: "_Sum") -> "_Sum":
        return _Sum(self.value + other.value)


class _GradientNorm:
    """Replaces T5X's WeightMetricsComputer, which computes more than is recorded here."""

    def compute_metrics(self, gradients: Any, old: Any, new: Any) -> dict[str, Any]:
        return {"grad_norm": _Sum(optax.tree.norm(gradients))}


class _OnMesh(partitioning.PjitPartitioner):
    """T5X's partitioner on a mesh of this package, which has the additional axis `fsdp`."""

    def __init__(self, mesh: Mesh, rules: Any) -> None:
        self.mesh = mesh  # replaces the mesh that T5X would make at the first use
        super().__init__(num_partitions=1, logical_axis_rules=[("batch", ("data", "fsdp")), *rules])
