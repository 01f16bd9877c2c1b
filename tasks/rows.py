"""The rows of a run as SeqIO tasks, for upstream T5X and plain SeqIO, and a feature converter for them.

    name = ordered_rows(mixture, vocabulary, train_steps=400, batch_size=8, seed=0, start_step=40)
    dataset = seqio.get_dataset(name, lengths, RowConverter(mixture.length, end), trim_output_features=False)

Example i of its split "train" is row (in tuning: example) i of the run's order, counted from the first row of
`start_step`, so no data state needs saving: a run that resumes after step 40 requests the rows from step 40 on. The
order continues after the run's last step and never ends. It is already mixed, and must not be shuffled or packed.

With several shards, each has a block of every batch: joined in order they are the batch.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from etils import epath

from codellm_jax.mixture.batches import batch_of_rows, read_drawn
from codellm_jax.mixture.examples import WIDTH_BESIDE_TOKENS, arrays_of_examples
from codellm_jax.mixture.mixture import Mixture, OpenMixture, open_mixture
from codellm_jax.mixture.rows import Rows
from codellm_jax.vocabulary import Vocabulary

HELD_OUT = "held_out"
NO_END = 2**62


def ordered_rows(
    mixture: Mixture, vocabulary: Vocabulary, train_steps: int, batch_size: int, seed: int = 0, start_step: int = 0,
    name: str = "ordered_rows",
) -> str:
    """Registers the rows of a run as the SeqIO task `name`, replacing an earlier one, and returns the name.

    Args:
      mixture, vocabulary, train_steps, batch_size, seed: of the run; rows are cached unless they are already.
      start_step: number of completed steps.

    Raises:
      ValueError: as for `open_mixture`, or there is no such step.
    """
    if start_step < 0 or batch_size < 1:
        raise ValueError(f"start_step must be at least 0 and batch_size at least 1, found {start_step}, {batch_size}.")
    opened = open_mixture(mixture, vocabulary, seed, train_steps * batch_size, batch_size)
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name, _OrderSource(opened, batch_size, start_step), preprocessors=[], shuffle_buffer_size=None,
        output_features=_features(mixture.stage, vocabulary), metric_fns=[])
    return name


def held_out_rows(
    mixture: Mixture, vocabulary: Vocabulary, train_steps: int, batch_size: int, seed: int = 0, rows: int = 64,
) -> str:
    """Registers the first `rows` held-out rows of each source as tasks held_out.SOURCE, and returns the name of the
    SeqIO mixture of them. Their split is "validation". Arguments and errors are those of `ordered_rows`.
    """
    opened = open_mixture(mixture, vocabulary, seed, train_steps * batch_size, batch_size)
    names = []
    for held_out in opened.validation:
        if held_out is None:
            continue
        name = f"{HELD_OUT}.{held_out.name}"
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name, _HeldOutSource(held_out, mixture.stage, rows), preprocessors=[], shuffle_buffer_size=None,
            output_features=_features(mixture.stage, vocabulary), metric_fns=[])
        names.append(name)
    if not names:
        raise ValueError("No source of the mixture has a held-out row: give a corpus a larger 'holdout' in CORPORA.")
    seqio.MixtureRegistry.remove(HELD_OUT)
    seqio.MixtureRegistry.add(HELD_OUT, names, default_rate=1)
    return HELD_OUT


def newest_step(model_dir: str) -> int:
    """The step of the newest checkpoint_STEP in a model directory of T5X; 0 if there is none."""
    directory = epath.Path(model_dir).expanduser()
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return max((int(found[1]) for name in names if (found := re.fullmatch(r"checkpoint_(\d+)", name))), default=0)


def seqio_vocabulary(vocabulary: Vocabulary) -> seqio.Vocabulary:
    """A vocabulary for SeqIO: its SentencePiece file; for other tokenizers, which SeqIO does not read, only the
    ids.
    """
    if vocabulary.is_sentence_pieces:
        return seqio.SentencePieceVocabulary(vocabulary.file)
    return seqio.PassThroughVocabulary(vocabulary.size, vocabulary.end_of_document_id)


def _features(stage: str, vocabulary: Vocabulary) -> dict[str, seqio.Feature]:
    feature = seqio.Feature(seqio_vocabulary(vocabulary), add_eos=False)
    return dict.fromkeys(("targets",) if stage == "pretraining" else ("inputs", "targets"), feature)


class _RowSource(seqio.DataSource):
    """Rows of one split, read a batch at a time."""

    def __init__(self, split: str, stage: str, length: int) -> None:
        super().__init__(splits=(split,), caching_permitted=False)
        self._stage, self._length = stage, length

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> list[str]:
        return [split]

    def _examples(self, batches: tf.data.Dataset, read: Any) -> tf.data.Dataset:
        """The examples of batches, given their numbers and a deterministic reader of one as int32 [rows, width]."""
        width = self._length + 1 + (WIDTH_BESIDE_TOKENS if self._stage == "tuning" else 0)

        def rows(batch: tf.Tensor) -> tf.Tensor:
            return tf.ensure_shape(tf.numpy_function(read, [batch], tf.int32, stateful=False), [None, width])

        def example(row: tf.Tensor) -> dict[str, tf.Tensor]:
            if self._stage == "pretraining":
                return {"targets": row}
            prompt, whole = row[-2], row[-1]
            return {"inputs": row[:prompt], "targets": row[prompt:whole]}

        # Parallel reading is unordered by default, but the order matters here.
        return batches.map(rows, num_parallel_calls=4, deterministic=True).unbatch().map(example)


class _OrderSource(_RowSource):
    def __init__(self, opened: OpenMixture, batch_size: int, start_step: int) -> None:
        super().__init__("train", opened.stage, opened.training[0].length)
        self._opened, self._batch_size, self._start_step = opened, batch_size, start_step

    def get_dataset(
        self, split: str = "train", shuffle: bool = True, seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None, **unused: Any,
    ) -> tf.data.Dataset:
        if shuffle:
            raise ValueError("The rows of a run are in its order, which shuffling would destroy: set "
                             "SHUFFLE_TRAIN_EXAMPLES = False, or shuffle=False.")
        index, shards = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
        size = self._batch_size
        if size % shards:
            raise ValueError(f"BATCH_SIZE = {size} cannot be divided into {shards} shards.")
        block = np.arange(index * size // shards, (index + 1) * size // shards)

        def read(step: np.int64) -> np.ndarray:
            draw = self._opened.order.draw(step * size + block)
            width = self._length + 1 + (WIDTH_BESIDE_TOKENS if self._stage == "tuning" else 0)
            return read_drawn(self._opened.training, draw.source, draw.row, width)

        return self._examples(tf.data.Dataset.range(self._start_step, NO_END // size), read)


class _HeldOutSource(_RowSource):
    def __init__(self, rows: Rows, stage: str, limit: int) -> None:
        super().__init__("validation", stage, rows.length)
        self._rows, self._count = rows, min(limit, rows.count)

    def get_dataset(
        self, split: str = "validation", shuffle: bool = False, seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None, **unused: Any,
    ) -> tf.data.Dataset:
        index, shards = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
        numbers = tf.data.Dataset.range(index, self._count, shards)
        return self._examples(numbers, lambda number: self._rows.read(np.array([number])))


class RowConverter(seqio.FeatureConverter):
    """Turns each example into the arrays of one row, [length] each, for the decoder of this package.

      decoder_input_tokens, decoder_target_tokens   a token and the next one: nothing is put before a row
      decoder_positions, decoder_segment_ids        restart after each end of a document; 0 is padding
      decoder_loss_weights                          1 if the loss counts the target

    An example with a feature `inputs` is a prompt and an answer in one row; the loss counts the answer. An example
    that is too long loses the beginning of its prompt, as in evaluation; one token of the prompt always stays, and an
    answer too long by itself loses its end. An example of `targets` alone is a row of length + 1
    tokens; SeqIO must not trim it.

    Args:
      length: inputs of a row.
      end_of_document_id: the id that ends a document.
    """

    TASK_FEATURES = {name: seqio.FeatureConverter.FeatureSpec(dtype=tf.int32) for name in ("inputs", "targets")}
    MODEL_FEATURES = {
        f"decoder_{name}": seqio.FeatureConverter.FeatureSpec(
            dtype=tf.float32 if name == "loss_weights" else tf.int32)
        for name in ("input_tokens", "target_tokens", "positions", "segment_ids", "loss_weights")}
    PACKING_FEATURE_DTYPES: Mapping[str, Any] = {}

    def __init__(
        self, length: int, end_of_document_id: int, pack: bool = False, use_custom_packing_ops: bool = False
    ) -> None:
        if pack:
            raise ValueError("Rows are full already, or hold one example each: set pack = False of the DatasetConfig.")
        super().__init__(pack=False, use_custom_packing_ops=use_custom_packing_ops)
        self._length, self._end = length, end_of_document_id

    def __call__(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        # SeqIO's own check requires one set of features, and lengths of prompt and answer separately.
        return self._convert_features(ds, task_feature_lengths)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        return dict.fromkeys(self.MODEL_FEATURES, self._length)

    def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        of_pairs = "inputs" in ds.element_spec
        if not of_pairs and ds.element_spec["targets"].shape[0] != self._length + 1:
            found = ds.element_spec["targets"].shape[0]
            raise ValueError(
                f"A row of {self._length} inputs has {self._length + 1} tokens, found " + (
                    f"{found}: set trim_output_features = False of the DatasetConfig." if found == self._length else
                    f"{found or 'documents of any length'}: use the task that rows.ordered_rows registers."))
        dtypes = [spec.dtype for spec in self.MODEL_FEATURES.values()]

        def convert(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            arrays = tf.numpy_function(self._pair, [example["inputs"], example["targets"]], dtypes, stateful=False) \
                if of_pairs else tf.numpy_function(self._row, [example["targets"]], dtypes, stateful=False)
            return {name: tf.ensure_shape(array, [self._length])
                    for name, array in zip(self.MODEL_FEATURES, arrays, strict=True)}

        return ds.map(convert, num_parallel_calls=4, deterministic=True)

    def _row(self, row: np.ndarray) -> list[np.ndarray]:
        batch = batch_of_rows(row[None], np.zeros(1, np.int64), self._end)
        return [field[0] for field in batch[:5]]

    def _pair(self, prompt: np.ndarray, answer: np.ndarray) -> list[np.ndarray]:
        room = self._length + 1
        answer = answer[: max(1, room - min(1, len(prompt)))]
        prompt = prompt[max(0, len(prompt) + len(answer) - room):]
        count = len(prompt) + len(answer)
        if not count:
            raise ValueError("An example has neither a prompt nor an answer.")
        row = np.concatenate([prompt, answer, np.zeros(room - count), [len(prompt), count]]).astype(np.int32)
        first = np.zeros(1, np.int64)
        arrays = arrays_of_examples(row[None], first, first, first, (1, self._length))
        return [arrays[name][0] for name in ("inputs", "targets", "positions", "segment_ids", "weights")]
