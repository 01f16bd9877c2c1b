"""The rows of a run as SeqIO tasks are its batches, from any step and over any shards."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

seqio = pytest.importorskip("seqio")

import tensorflow as tf  # noqa: E402

from codellm_jax.evaluation.cuts import fitted  # noqa: E402
from codellm_jax.mixture.batches import Batch, example_batch, global_batch, held_out_batches  # noqa: E402
from codellm_jax.mixture.mixture import open_mixture  # noqa: E402
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh  # noqa: E402
from tasks.rows import RowConverter, held_out_rows, newest_step, ordered_rows, seqio_vocabulary  # noqa: E402

FIELDS = {"inputs": "input_tokens", "targets": "target_tokens", "positions": "positions", "segment_ids": "segment_ids",
          "weights": "loss_weights"}
STEPS, BATCH = 12, 8


@pytest.fixture(params=["pretraining", "tuning", pytest.param("answers", marks=pytest.mark.slow)])
def training(request: pytest.FixtureRequest, make_training: Callable[..., Any],
             tiny_instructions: dict[str, dict[str, Any]]) -> Any:
    """A run of documents; one of tuning; and one of documents in which instructions stand, whose answers count."""
    if request.param == "answers":
        made = make_training()
        corpora = {name: spec | {"loss": "answers"} for name, spec in tiny_instructions.items()}
        return dataclasses.replace(made, mixture=dataclasses.replace(
            made.mixture, name=list(corpora), definitions=dataclasses.replace(
                made.mixture.definitions, corpora=corpora)))
    return make_training(stage=request.param, packing=False)


def registered(training: Any, start_step: int = 0, register: Any = ordered_rows, **options: Any) -> str:
    if register is ordered_rows:
        options["start_step"] = start_step
    return register(training.mixture, training.vocabulary, STEPS, BATCH, training.seed, **options)


def converter(training: Any) -> RowConverter:
    return RowConverter(training.mixture.length, training.vocabulary.end_of_document_id)


def read(name: str, training: Any, batch_size: int, batches: int, split: str = "train", **options: Any) -> list[Any]:
    dataset = seqio.get_dataset(
        name, training.mixture.lengths, converter(training), split, num_epochs=None, batch_size=batch_size,
        trim_output_features=False, **options)
    return list(dataset.take(batches).as_numpy_iterator())


def expected(training: Any, step: int) -> Batch:
    opened = open_mixture(training.mixture, training.vocabulary, training.seed, STEPS * BATCH, BATCH, lambda line: None)
    sharding = batch_sharding(make_mesh(MeshShape(), jax.devices()[:1]))
    if training.mixture.stage == "tuning":
        return example_batch(step, BATCH, opened.order, opened.training, BATCH, False, sharding)[0]
    return global_batch(step, BATCH, opened.order, opened.training, training.vocabulary.end_of_document_id, sharding)[0]


def assert_same(found: dict[str, np.ndarray], batch: Batch) -> None:
    assert found.keys() == {f"decoder_{name}" for name in FIELDS.values()}
    for field, name in FIELDS.items():
        wanted = np.asarray(getattr(batch, field))
        assert found[f"decoder_{name}"].dtype == wanted.dtype
        np.testing.assert_array_equal(found[f"decoder_{name}"], wanted, err_msg=field)


def test_examples_are_the_batches_of_the_run_from_a_middle_step(training: Any):
    found = read(registered(training, start_step=5), training, BATCH, 3)
    for step, batch in enumerate(found, 5):
        assert_same(batch, expected(training, step))


def test_two_shards_put_together_are_the_batch(training: Any):
    name = registered(training, start_step=2)
    shards = [read(name, training, BATCH // 2, 2, shard_info=seqio.ShardInfo(index, 2)) for index in range(2)]
    for step, parts in enumerate(zip(*shards, strict=True), 2):
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        assert_same(joined, expected(training, step))


def test_held_out_rows_are_those_of_the_run(training: Any):
    name = registered(training, register=held_out_rows, rows=4)
    opened = open_mixture(training.mixture, training.vocabulary, 0, STEPS * BATCH, BATCH, lambda line: None)
    sharding = batch_sharding(make_mesh(MeshShape(), jax.devices()[:1]))
    for rows in opened.validation:
        task = f"{name}.{rows.name}"
        assert task in [task.name for task in seqio.MixtureRegistry.get(name).tasks]
        count = min(4, rows.count)
        [batch] = held_out_batches(rows, count, count, 0, training.vocabulary.end_of_document_id, sharding,
                                   training.mixture.stage)
        assert_same(read(task, training, count, 1, "validation")[0], batch)


def test_what_would_lose_the_order_is_refused(make_training: Callable[..., Any]):
    training = make_training()
    name = registered(training)
    with pytest.raises(ValueError, match="SHUFFLE_TRAIN_EXAMPLES = False"):
        read(name, training, BATCH, 1, shuffle=True)
    with pytest.raises(ValueError, match="BATCH_SIZE = 8 cannot be divided into 3 shards"):
        read(name, training, BATCH, 1, shard_info=seqio.ShardInfo(0, 3))
    with pytest.raises(ValueError, match="pack = False"):
        RowConverter(32, 1, pack=True)
    with pytest.raises(ValueError, match="trim_output_features = False"):
        seqio.get_dataset(name, training.mixture.lengths, converter(training))
    with pytest.raises(ValueError, match="start_step must be at least 0"):
        registered(training, start_step=-1)


@pytest.mark.parametrize("sizes", [(3, 4), (9, 4), (20, 5), (1, 12), (7, 1), (0, 4), (0, 15), (5, 0)], ids=str)
def test_a_pair_is_cut_as_evaluation_cuts_a_question(sizes: tuple[int, int]):
    length = 8
    prompt, answer = np.arange(2, 2 + sizes[0]), np.arange(50, 50 + sizes[1])
    kept = fitted([(prompt.tolist(), answer.tolist())], length)[0] if sizes[0] and sizes[1] else None
    dataset = tf.data.Dataset.from_tensors({
        "inputs": tf.constant(prompt, tf.int32), "targets": tf.constant(answer, tf.int32)})
    [row] = RowConverter(length, 1)(dataset, {"inputs": 99, "targets": 99}).as_numpy_iterator()
    tokens = [*kept.prompt, *kept.continuation] if kept else [*prompt, *answer][: length + 1]
    used = len(tokens) - 1
    padding = [0] * (length - used)
    assert row["decoder_input_tokens"].tolist() == [*tokens[:-1], *padding]
    assert row["decoder_target_tokens"].tolist() == [*tokens[1:], *padding]
    assert row["decoder_positions"].tolist() == [*range(used), *padding]
    assert row["decoder_segment_ids"].tolist() == [*([1] * used), *padding]
    assert row["decoder_loss_weights"].tolist() == [*[float(token >= 50) for token in tokens[1:]], *padding]


def test_the_newest_step_is_that_of_a_whole_checkpoint(tmp_path: Path):
    assert newest_step(str(tmp_path / "nothing")) == 0
    for name in ("checkpoint_9", "checkpoint_40", "checkpoint_100.orbax-checkpoint-tmp-5", "checkpoint", "50"):
        (tmp_path / name).mkdir()
    assert newest_step(str(tmp_path)) == 40


def test_seqio_has_the_ids_of_any_vocabulary(make_training: Callable[..., Any], beginning_tokenizer: str):
    from codellm_jax.vocabulary import load_vocabulary

    own = seqio_vocabulary(make_training().vocabulary)
    assert own.encode("a b") == make_training().vocabulary.encode("a b")
    other = load_vocabulary(beginning_tokenizer)
    assert seqio_vocabulary(other) == seqio.PassThroughVocabulary(other.size, other.end_of_document_id)
