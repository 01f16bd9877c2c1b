"""This package's decoder as a model of upstream T5X, for T5X's own commands.

    python -m t5x.train --gin_file=gin/t5x/mixed_pretrain.gin --gin.MODEL_DIR="'runs/t5x'"

Batches are those of `tasks.rows.RowConverter`: inputs and the following tokens, without a token before each row.
"""

import functools
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import linen as nn
from flax import traverse_util
from flax.core import freeze
from flax.linen.partitioning import AxisMetadata
from t5x import adafactor, decoding, metrics, models, optimizers

from codellm_jax.model.decoder import Decoder, DecoderConfig, init_cache, output_head
from codellm_jax.model.losses import chunk_of, cross_entropy
from codellm_jax.runtime.partitioning import AXIS_RULES
from codellm_jax.training.plan import Training
from codellm_jax.vocabulary import Vocabulary


def logical_axis_rules(fsdp: bool = True) -> list[tuple[str, str | None]]:
    """AXIS_RULES for T5X's mesh of `data` and `model`; parameters are also split over `data`, or replicated there."""
    onto: dict[Any, str | None] = {None: None, "model": "model", "fsdp": "data" if fsdp else None,
                                   "data": None if fsdp else "data", ("data", "fsdp"): "data"}
    return [("batch", "data"), *((name, onto[axes]) for name, axes in AXIS_RULES)]


def logical_factor_rules() -> Any:
    """The rules by which T5X's Adafactor factors (`adafactor.Adafactor.logical_factor_rules`); its own lack some axes.
    """
    column = adafactor.FactorDim.COLUMN
    return freeze({**adafactor.standard_logical_factor_rules(), "position": column, "kv_heads": column})


def model_of_run(
    training: Training, seqio_vocabulary: Any, feature_converter_cls: Callable[..., Any], optimizer_def: Any = None,
    loss_normalizing_factor: float | None = None,
) -> "DecoderModel":
    """The decoder of a run, with the run's optimizer, or with `optimizer_def`, one of T5X's, instead."""
    return DecoderModel(
        training.model, training.mixture.length, training.vocabulary, seqio_vocabulary, feature_converter_cls,
        optimizer_def or optimizers.OptaxWrapper(training.optimizer(training.learning_rate)),
        loss_normalizing_factor=loss_normalizing_factor)


class DecoderModel(models.BaseTransformerModel):
    """The decoder. Its loss is the mean over the tokens of a batch that count.

    Args:
      config: makes the decoder's configuration when called with `vocabulary_size` and `length`.
      length: the number of inputs in a row.
      vocabulary: its vocabulary.
      seqio_vocabulary: the same vocabulary for SeqIO, `rows.seqio_vocabulary`.
      feature_converter_cls: `rows.RowConverter`.
      optimizer_def: one of T5X's; None if nothing is trained.
      decode_fn: the sampling function; `decoding.beam_search` does not work, as it needs another form of cache.
      loss_normalizing_factor: the divisor of the sum of losses, instead of the number of tokens that count. T5X adds up
        the gradients of microbatches, so with several of them the mean would give each the full weight: then set it to
        batch size times length.
    """

    def __init__(
        self, config: Callable[..., DecoderConfig], length: int, vocabulary: Vocabulary, seqio_vocabulary: Any,
        feature_converter_cls: Callable[..., Any], optimizer_def: Any = None,
        decode_fn: Any = decoding.temperature_sample, loss_normalizing_factor: float | None = None,
    ) -> None:
        self.config = config(vocabulary_size=vocabulary.size, length=length)
        super().__init__(Decoder(self.config), seqio_vocabulary, seqio_vocabulary, optimizer_def, decode_fn,
                         loss_normalizing_factor=loss_normalizing_factor)
        self.FEATURE_CONVERTER_CLS = functools.partial(feature_converter_cls, length, vocabulary.end_of_document_id)
        self._vocabulary = vocabulary

    def get_initial_variables(
        self, rng: jax.Array, input_shapes: Mapping[str, Any], input_types: Mapping[str, Any] | None = None
    ) -> Any:
        """The initial parameters, those of `t5x train` with the same seed, and the names of their axes."""
        tokens = jnp.zeros((1, min(8, self.config.length)), jnp.int32)
        boxed = self.module.init(rng, tokens, tokens, tokens)["params"]
        axes = jax.tree.map(lambda box: AxisMetadata(box.names), boxed,
                            is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
        named = {(*path[:-1], f"{path[-1]}_axes"): axis for path, axis in traverse_util.flatten_dict(axes).items()}
        return freeze({"params": nn.unbox(boxed), "params_axes": traverse_util.unflatten_dict(named)})

    def _losses(
        self, params: Any, batch: Mapping[str, Any], dropout_rng: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The weighted sum of losses, and the loss of each token, float32 [batch, length], in nats."""
        dropout = dropout_rng is not None and self.config.dropout_rate > 0.0
        hidden: Any = self.module.apply(
            {"params": params}, batch["decoder_input_tokens"], batch["decoder_positions"],
            batch["decoder_segment_ids"], deterministic=not dropout, rngs={"dropout": dropout_rng} if dropout else None)
        embedding, weights = output_head(params), batch["decoder_loss_weights"]
        return cross_entropy(hidden, embedding, batch["decoder_target_tokens"], weights,
                             chunk=chunk_of(len(weights), len(embedding), gradients=True))

    def loss_fn(self, params: Any, batch: Mapping[str, Any], dropout_rng: jax.Array | None) -> tuple[jax.Array, Any]:
        total, _ = self._losses(params, batch, dropout_rng)
        weights = batch["decoder_loss_weights"]
        counted = jnp.sum(weights)
        loss = total / (self._loss_normalizing_factor or jnp.maximum(counted, 1))
        return loss, {
            "loss": metrics.AveragePerStep(total=loss),
            "loss_per_nonpadding_target_token": clu_metrics.Average(total=total, count=counted),
            "nonpadding_fraction/loss_weights": clu_metrics.Average(total=counted, count=jnp.array(weights.size)),
            "timing/seconds": metrics.Time(),
            "timing/steps_per_second": metrics.StepsPerTime.from_model_output(),
            "timing/target_tokens_per_second": metrics.TimeRate.from_model_output(numerator=jnp.array(weights.size)),
        }

    def _compute_logits(self, params: Any, batch: Mapping[str, Any], dropout_rng: jax.Array | None = None) -> jax.Array:
        hidden = self.module.apply({"params": params}, batch["decoder_input_tokens"], batch["decoder_positions"],
                                   batch["decoder_segment_ids"])
        return self.module.apply({"params": params}, hidden, method="logits")

    def score_batch(self, params: Any, batch: Mapping[str, Any], return_intermediates: bool = False) -> Any:
        """The log-likelihood of each answer, in nats: float32 [batch]."""
        _, losses = self._losses(params, batch)
        scores = -losses * batch["decoder_loss_weights"]
        if return_intermediates:
            return scores.sum(-1), {"decoder": {"token_scores": (scores,)}}
        return scores.sum(-1)

    def predict_batch_with_aux(
        self, params: Any, batch: Mapping[str, Any], rng: jax.Array | None = None, *, return_all_decodes: bool = False,
        num_decodes: int = 1, decoder_params: MutableMapping[str, Any] | None = None,
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Continues each prompt. Half of the positions, or `max_decode_steps` if smaller, are reserved for the output;
        a prompt that does not fit in the rest is cut at its start.
        """
        options = dict(decoder_params or {})
        length = self.config.length
        room = length + 1 - min(options.get("max_decode_steps", length), length // 2)
        tokens, counts = _prompts(batch, room)
        # T5X's sequences begin with a 0, so its index i is position i - 1.
        prompt = jnp.pad(tokens, ((0, 0), (1, 0)))
        rows = len(prompt)
        index = jnp.broadcast_to(jnp.arange(length), (rows, length))
        # Slots for the prompt, then the same number for the output: all rows write the same slot, at their own
        # positions. The last token of a prompt is excluded: T5X's loop begins with it.
        cache = init_cache(self.config, rows, 2 * length + 1)
        _, cache = self._append(params, cache, tokens, index, (index < counts[:, None] - 1).astype(jnp.int32))

        def tokens_to_logits(state: decoding.DecodingState) -> tuple[jax.Array, Any]:
            positions = jnp.clip(state.cur_index - 1, 0, length - 1)[:, None]
            hidden, changed = self._append(params, _scalar_index(state.cache), state.cur_token, positions,
                                           jnp.ones_like(positions))
            logits = self.module.apply({"params": params}, hidden, method="logits")[:, 0]
            # Mask rows of the embedding without a token.
            logits = jnp.where(jnp.arange(logits.shape[-1]) < self._vocabulary.pieces, logits, -jnp.inf)
            return logits, _row_index(changed, len(positions))

        options.setdefault("eos_id", self._vocabulary.end_of_document_id)
        if rng is not None:
            options["decode_rng"] = rng
        sequences, scores = self._decode_fn(
            inputs=prompt, cache=_row_index(cache, rows), tokens_to_logits=tokens_to_logits, num_decodes=num_decodes,
            initial_index=counts, cache_offset=0, **options)
        if return_all_decodes:
            return sequences, {"scores": scores}
        return models.remove_prefix(sequences[:, -1], counts), {"scores": scores[:, -1]}

    def _append(
        self, params: Any, cache: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array
    ) -> tuple[jax.Array, Any]:
        hidden, changed = self.module.apply(
            {"params": params, "cache": cache}, tokens, positions, segments, decode=True, mutable=["cache"])
        return hidden, changed["cache"]


def _prompts(batch: Mapping[str, Any], room: int) -> tuple[jax.Array, jax.Array]:
    """The prompts of a batch without their answers, at most the last `room` tokens of each: int32 [batch, length],
    padded with zeros at the end, and their sizes, int32 [batch].
    """
    inputs, targets = batch["decoder_input_tokens"], batch["decoder_target_tokens"]
    answers = batch["decoder_loss_weights"] > 0
    whole = jnp.concatenate([inputs[:, :1], targets], axis=1)
    used = jnp.sum(batch["decoder_segment_ids"] > 0, axis=1)
    count = 1 + jnp.where(answers.any(1), jnp.argmax(answers, axis=1), used)
    dropped = jnp.maximum(0, count - room)
    index = jnp.arange(inputs.shape[1]) + dropped[:, None]
    tokens = jnp.take_along_axis(whole, jnp.minimum(index, inputs.shape[1]), axis=1)
    return jnp.where(index < count[:, None], tokens, 0), count - dropped


def _row_index(cache: Any, rows: int) -> Any:
    """The cache with the batch axis first everywhere, as T5X's sampling repeats and gathers rows."""
    return jax.tree.map(lambda leaf: jnp.full((rows,), leaf) if leaf.ndim == 0 else
                        leaf.swapaxes(0, 1) if leaf.ndim == 5 else leaf, cache)


def _scalar_index(cache: Any) -> Any:
    """The inverse of `_row_index`."""
    return jax.tree.map(lambda leaf: leaf[0] if leaf.ndim == 1 else
                        leaf.swapaxes(0, 1) if leaf.ndim == 5 else leaf, cache)
