"""The savings of packing in tuning: rows and seconds for the same examples, compared with SeqIO's own packing, in one
run.

    python -m benchmarks.packing

  unpacked  a row for each example, as in the study's released system
  packed    the examples of each step in as few rows as first-fit decreasing finds, the same number in every step
  seqio     seqio.trim_and_pack_dataset on the same examples in the same order
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import optax

from codellm_jax.mixture.batches import rows_of_packed_steps
from codellm_jax.mixture.examples import sizes_drawn
from codellm_jax.mixture.mixture import Mixture
from codellm_jax.model.decoder import DecoderConfig
from codellm_jax.runtime.optimization import adamw
from codellm_jax.runtime.partitioning import MeshShape
from codellm_jax.runtime.state import initial_state
from codellm_jax.training.plan import Training, make_plan
from codellm_jax.training.train import batch_of_step, train_step
from codellm_jax.vocabulary import load_vocabulary
from tasks import Definitions


def training(length: int, batch_size: int, packing: bool, cache: str) -> Training:
    return Training(
        model_dir=cache, vocabulary=load_vocabulary(), optimizer=adamw, learning_rate=optax.constant_schedule(1e-4),
        mixture=Mixture("python_instructions", Definitions(("tasks.tuning",)), {"targets": length}, 0.375,
                        cache_dir=cache, stage="tuning", packing=packing),
        model=functools.partial(DecoderConfig, layers=4, hidden=256, heads=4, feedforward=1024),
        mesh=MeshShape(), batch_size=batch_size, train_steps=12_000 // batch_size, eval_period=1, checkpoint_period=1)


def step(settings: Training) -> Callable[[int], None]:
    """The whole train step on the batches of a run."""
    plan = make_plan(settings, report=lambda line: None)
    step_fn = jax.jit(functools.partial(train_step, model=plan.model, optimizer=plan.optimizer, sources=2),
                      donate_argnums=0)
    state = initial_state(plan.model, plan.optimizer, plan.state, seed=0)

    def run(number: int) -> None:
        nonlocal state
        batch, _ = batch_of_step(settings, plan, number)
        state, metrics = step_fn(state, batch)
        metrics.loss.block_until_ready()

    run(0)
    return run


def filled_by_seqio(lengths: np.ndarray, length: int) -> float:
    """The fraction of rows that SeqIO's packer fills with examples of these lengths, in this order."""
    import seqio
    import tensorflow as tf

    examples = tf.data.Dataset.from_tensor_slices(lengths).map(lambda n: {"targets": tf.ones([n], tf.int32)})
    rows = list(seqio.trim_and_pack_dataset(examples, {"targets": length}).as_numpy_iterator())
    return lengths.sum() / len(rows) / length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        print("part of the rows that examples fill")
        for length in (256, 1024):
            for batch_size in (16, 64, 256):
                plan = make_plan(training(length, batch_size, False, cache), report=lambda line: None)
                order, examples, steps = plan.mixture.order, plan.mixture.training, plan.last_step
                most, filled = rows_of_packed_steps(order, examples, batch_size, steps)
                packed, alone = (filled / rows / steps / length for rows in (most, batch_size))
                print(f"  {batch_size:>4} examples a step, length {length:>4}: packed {packed:.2f} in {most} rows, "
                      f"unpacked {alone:.2f}")
            draw = order.draw(np.arange(batch_size * steps))
            lengths = sizes_drawn(examples, draw.source, draw.row).positions
            print(f"  seqio, length {length}: {filled_by_seqio(lengths, length):.2f}")
        runs = {packing: step(training(256, 64, packing, cache)) for packing in (True, False)}
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(1, flags.rounds + 1):
            for packing, run in runs.items():
                began = time.perf_counter()
                run(number)
                seconds[packing].append(time.perf_counter() - began)
        ratios = [alone / packed for packed, alone in zip(seconds[True], seconds[False], strict=True)]
        print(f"a step on 64 examples of length 256: unpacked takes {statistics.median(ratios):.2f} times packed's "
              f"{statistics.median(seconds[True]):.2f} s ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
