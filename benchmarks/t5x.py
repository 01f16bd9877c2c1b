"""Upstream T5X's trainer compared with this package's own, on this package's decoder and on T5X's own of the same size.

    PYTHONPATH=T5X python -m benchmarks.t5x     T5X: its source, since its examples are not installed with it

The GPT of `benchmarks.step`: 4 layers x 256, 4 heads, feed-forward 1024, vocabulary 8192, 8 x 256 tokens, float32,
AdamW. T5X's decoder has relative positions, no biases, and a tied head.

  own               the step of `t5x train`
  trainer           the step of `t5x train --runner=t5x`: T5X's Trainer on the same decoder and batches
  decoder           T5X's Trainer on T5X's decoder-only network, one batch reused

All run in one process and take turns, each first in one of three turns; the figure is the median step, the ratio is
taken within a turn, and the spread is that of the turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from benchmarks.step import BATCH, FEEDFORWARD, HEADS, HIDDEN, LAYERS, LENGTH, VOCABULARY
from codellm_jax.mixture.mixture import Mixture
from codellm_jax.model.decoder import DecoderConfig
from codellm_jax.runtime.optimization import adamw, warmup_cosine
from codellm_jax.runtime.partitioning import MeshShape
from codellm_jax.runtime.process import keep_freed_memory
from codellm_jax.runtime.state import initial_state
from codellm_jax.training.plan import Training, make_plan
from codellm_jax.training.train import OWN, Runner, batch_of_step
from codellm_jax.upstream.runners import require_t5x, runner
from codellm_jax.vocabulary import load_vocabulary
from tasks import Definitions


def run(training: Training, plan: Any, whose: Runner) -> Callable[[], None]:
    """A step of a run by one of the two trainers, fed with its batches."""
    step_fn = whose.make_step(training, plan)
    with jax.set_mesh(plan.mesh), nn.logical_axis_rules(training.mesh.all_rules()):
        state = initial_state(plan.model, plan.optimizer, plan.state, training.seed)
    number = 0

    def step() -> None:
        nonlocal state, number
        with jax.set_mesh(plan.mesh), nn.logical_axis_rules(training.mesh.all_rules()):
            batch, _ = batch_of_step(training, plan, number)
            state, metrics = step_fn(state, batch)
        number += 1
        jax.device_get(metrics)

    return step


def their_decoder() -> Callable[[], None]:
    """A step of T5X's Trainer on its own decoder."""
    from t5x import models, optimizers, partitioning, trainer, utils
    from t5x.examples.decoder_only import network

    config = network.TransformerConfig(
        vocab_size=VOCABULARY, emb_dim=HIDDEN, num_heads=HEADS, num_layers=LAYERS, head_dim=HIDDEN // HEADS,
        mlp_dim=FEEDFORWARD, mlp_activations=("gelu",), dropout_rate=0.0, logits_via_embedding=True)
    schedule = warmup_cosine(1e-3, 1e-5, 30, 10**6)
    model = models.DecoderOnlyModel(
        module=network.DecoderWrapper(config),
        vocabulary=None, optimizer_def=optimizers.OptaxWrapper(adamw(schedule)))
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, (BATCH, LENGTH + 1), np.int32)
    batch = {"decoder_input_tokens": tokens[:, :-1], "decoder_target_tokens": tokens[:, 1:],
             "decoder_loss_weights": np.ones((BATCH, LENGTH), np.float32)}
    made = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def, init_fn=model.get_initial_variables,
        input_shapes={name: value.shape for name, value in batch.items()},
        input_types={name: value.dtype for name, value in batch.items()}, partitioner=partitioner)
    rng = jax.random.PRNGKey(0)
    theirs = trainer.Trainer(
        model=model, train_state=made.from_scratch(rng), partitioner=partitioner, eval_names=(), summary_dir=None,
        train_state_axes=made.train_state_axes, rng=rng, learning_rate_fn=schedule, num_microbatches=None)

    def step() -> None:
        theirs.train(iter([batch]), 1).result()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    flags = parser.parse_args()
    require_t5x("benchmarks.t5x needs upstream T5X")
    keep_freed_memory()  # as `t5x train` does
    with tempfile.TemporaryDirectory() as directory:
        training = Training(
            model_dir=directory, vocabulary=load_vocabulary(), batch_size=BATCH, train_steps=10**6, eval_period=100,
            mixture=Mixture("python_text_code", Definitions(), {"targets": LENGTH}, 1 / 3),
            model=lambda **sizes: DecoderConfig(layers=LAYERS, hidden=HIDDEN, heads=HEADS, feedforward=FEEDFORWARD,
                                                query_layer=False, remat="none", scan_unroll=LAYERS, **sizes),
            optimizer=adamw, learning_rate=warmup_cosine(1e-3, 1e-5, 30, 10**6), mesh=MeshShape(data=1),
            checkpoint_period=100)
        plan = make_plan(training, lambda line: None)
        contenders = {"own": run(training, plan, OWN), "trainer": run(training, plan, runner("t5x")),
                      "decoder": their_decoder()}
        for step in contenders.values():
            for _ in range(3):
                step()
        medians: dict[str, list[float]] = {name: [] for name in contenders}
        names = list(contenders)
        for turn in range(flags.turns):
            for name in names[turn % len(names):] + names[: turn % len(names)]:  # rotates the order
                seconds = []
                for _ in range(flags.steps):
                    began = time.perf_counter()
                    contenders[name]()
                    seconds.append(time.perf_counter() - began)
                medians[name].append(statistics.median(seconds))
            print("  ".join(f"{name} {seconds[-1]:.3f} s" for name, seconds in medians.items()), flush=True)
    print(f"\n{'':<10}{'median step':>12}{'time / own':>12}{'spread':>16}")
    for name, seconds in medians.items():
        ratios = [one / own for one, own in zip(seconds, medians["own"], strict=True)]
        print(f"{name:<10}{statistics.median(seconds):>10.3f} s{statistics.median(ratios):>12.3f}"
              f"{min(ratios):>9.3f}-{max(ratios):.3f}")


if __name__ == "__main__":
    main()
