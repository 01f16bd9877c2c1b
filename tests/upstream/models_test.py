"""This package's decoder as a model of upstream T5X: its scores and what it writes are those of this package."""

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from codellm_jax import cli
from codellm_jax.evaluation.decoding import generate
from codellm_jax.evaluation.sampling import Sampling
from codellm_jax.evaluation.scoring import Request, score
from codellm_jax.runtime.checkpoints import record_of
from codellm_jax.upstream.runners import INSTALL

NEEDS_T5X = f"upstream T5X is not installed: {INSTALL}"
PROMPTS = ([5, 6, 7, 8, 9], [300, 20], [11] * 40, [7], [2000, 17, 4, 4])  # of 32 positions the third keeps its end
ANSWERS = ([10, 11, 12], [9], [40, 41, 42, 43], [8, 30], [12, 13, 14, 15, 16])


@pytest.fixture(scope="module")
def made(make_training: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """A model, its parameters as T5X makes them, and its converter."""
    pytest.importorskip("t5x", reason=NEEDS_T5X)
    from codellm_jax.upstream.models import model_of_run
    from tasks.rows import RowConverter, seqio_vocabulary

    training = make_training()
    model = model_of_run(training, seqio_vocabulary(training.vocabulary), RowConverter)
    params = jax.jit(lambda: model.get_initial_variables(jax.random.key(3), {})["params"])()
    # Wider than at the start, so that tokens differ in what they are likely to be followed by.
    return model, jax.tree.map(lambda leaf: 3 * leaf, dict(params)), model.FEATURE_CONVERTER_CLS()


def batch_of(converter: Any) -> dict[str, np.ndarray]:
    import tensorflow as tf

    rows = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        pair = tf.data.Dataset.from_tensors({"inputs": tf.constant(prompt), "targets": tf.constant(answer)})
        rows += converter(pair, {"inputs": 64, "targets": 64}).as_numpy_iterator()
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.slow
def test_scores_are_those_of_this_package(made: Any):
    model, params, converter = made
    found, intermediates = model.score_batch(params, batch_of(converter), return_intermediates=True)
    expected = score(params, model.config, [
        Request(0, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)])
    np.testing.assert_allclose(found, [values.sum() for values in expected], rtol=1e-5)
    [tokens] = intermediates["decoder"]["token_scores"]
    for row, values in zip(np.asarray(tokens), expected, strict=True):
        np.testing.assert_allclose(row[row != 0], values, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_is_written_greedily_is_what_this_package_writes(made: Any):
    model, params, converter = made
    found, _ = model.predict_batch_with_aux(
        params, batch_of(converter), decoder_params={"temperature": 0.0, "topk": 1, "max_decode_steps": 8})
    expected = generate(
        params, model.config, PROMPTS, Sampling(temperature=0.0, max_new_tokens=8), room=8, stop_ids=[1],
        drawable=model._vocabulary.pieces)
    for row, generation in zip(np.asarray(found).tolist(), expected, strict=True):
        assert row[: len(generation.ids)] == generation.ids


@pytest.mark.slow
def test_microbatches_add_up_to_the_loss_of_the_batch(made: Any):
    from t5x.trainer import accumulate_grads_microbatched

    model, params, converter = made
    batch = {name: np.concatenate([rows[:4], rows[:4]]) for name, rows in batch_of(converter).items()}
    counted = batch["decoder_loss_weights"].sum()
    model = copy.copy(model)
    model._loss_normalizing_factor = counted

    def accumulated(params: Any, number: int | None) -> Any:
        state = SimpleNamespace(params=params, flax_mutables={})
        return accumulate_grads_microbatched(model, state, batch, jax.random.key(0), number)[:2]

    (whole, _), (parts, metrics) = (
        jax.jit(functools.partial(accumulated, number=number))(params) for number in (None, 2))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6), whole, parts)
    expected, _ = model.loss_fn(params, batch, None)
    np.testing.assert_allclose(metrics["loss"].total, expected, rtol=1e-5)


@pytest.mark.slow
def test_t5x_s_adafactor_factors_every_axis(made: Any):
    from t5x import adafactor
    from t5x.train_state import FlaxOptimTrainState

    from codellm_jax.upstream.models import logical_factor_rules

    model, _, converter = made
    batch = batch_of(converter)
    state = FlaxOptimTrainState.create(
        adafactor.Adafactor(1e-2, min_dim_size_to_factor=16, logical_factor_rules=logical_factor_rules()),
        jax.jit(lambda: model.get_initial_variables(jax.random.key(3), {}))())
    losses = []
    step = jax.jit(jax.value_and_grad(lambda params: model.loss_fn(params, batch, None)[0]))
    for _ in range(3):
        loss, gradients = step(state.params)
        state = state.apply_gradient(gradients, learning_rate=1e-2)
        losses.append(float(loss))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.slow
def test_t5x_s_own_command_trains_the_same_run(tiny_corpora: Any, tiny_cache: str, tmp_path: Path):
    pytest.importorskip("t5x", reason=NEEDS_T5X)
    sizes = {"layers": 3, "hidden": 32, "heads": 2, "feedforward": 64}
    shared = {"CORPORA": tiny_corpora, "CACHE_DIR": tiny_cache, "TASK_FEATURE_LENGTHS": {"targets": 32},
              "WARMUP_STEPS": 2, "TRAIN_STEPS": 4, "CHECKPOINT_PERIOD": 2, "EVAL_PERIOD": 2}
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device

    def run(module: str, *arguments: str, **settings: Any) -> None:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments,
             *(f"--gin.{name}={value!r}" for name, value in settings.items())],
            cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]

    theirs = shared | {"SOURCES": list(tiny_corpora), "EVAL_STEPS": 1, "MODEL_DIR": str(tmp_path / "t5x")} | {
        f"decoder.DecoderConfig.{name}": size for name, size in sizes.items()}
    for steps in (2, 4):  # to the second step, and on from there
        run("t5x.train", "--gin_file=gin/t5x/mixed_pretrain.gin", **theirs | {"train.total_steps": steps})
    run("codellm_jax.cli", "train", "--gin_file=gin/mixed_pretrain.gin", **shared | {
        "MIXTURE_OR_TASK_NAME": list(tiny_corpora), "MODEL_DIR": str(tmp_path / "own")} | {
        f"model.{name}": size for name, size in sizes.items()})
    assert cli.main(["adopt", str(tmp_path / "t5x"), f"--output={tmp_path / 'adopted'}"]) == 0
    own, adopted = (record_of(str(tmp_path / name), 4) for name in ("own", "adopted"))
    assert own["checksums"] == adopted["checksums"] and own["ledger"] == adopted["ledger"]
