"""Log-likelihoods of continuations, given prompts.

    values = score(params, config, requests)  # in the order of the requests; `score_greedily` returns more

Rows are trees. The candidates of one question often have a common beginning. This stem occurs once in a row, and each
candidate's rest follows as a branch: a separate segment, whose positions continue from the stem's and which attends to
the stem and itself (`shared_segment` of the decoder). One pass over stem + rest + rest + ... tokens thus replaces as
many passes over stem + rest, without a cache or a second program. `_plan_group` decides when it pays off.

Rows have few different lengths (`_few_lengths`: at most MOST_LENGTHS in a call), and rows of a length come in batches
of one size, so that few programs are compiled. Only the tokens of continuations are multiplied with the vocabulary, a
chunk at a time. Shape suffixes are explained at the top of `decoder.py`.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding

from codellm_jax.evaluation.buckets import (
    length_bucket,
    place,
    power_of_two,
    replicate,
    round_up,
    shards_of,
    unknown_id,
)
from codellm_jax.model.attention import axes_that_split, platform
from codellm_jax.model.decoder import Decoder, DecoderConfig, output_head, products_of_block

DEFAULT_BATCH_TOKENS = 8192
MOST_LENGTHS = 6  # row lengths in one call
FINE = 16  # lengths per octave among which a call chooses
# Padding, in batches, that justifies another program. To compile one takes as long as two batches (a small model on 2
# CPU cores), but once: an evaluation is repeated for every checkpoint.
WORTH = 0.25
# Positions per device whose logits are in memory at a time: 512 x 130,344 x 4 bytes are 0.25 GiB.
LOGIT_POSITIONS = 512
# Cost of a FLOP of attention relative to one of a large matmul, including softmax and masking. Measured on 2 CPU cores,
# 4 layers of width 256 and 512 with rows of 256 to 1,024 tokens: 1.7 to 3.8.
ATTENTION_SLOWNESS = 2.5

STEM = 0  # segment id of a row's stem; branches are 1, 2, ...; padding is -1


class Request(NamedTuple):
    """One continuation to score.

    Attributes:
      group: requests of the same group, such as a question's candidates, may share a stem. It changes no result.
      prompt: token ids, at least one; of one that is too long the end is kept (`prompt_tokens_cut`).
      continuation: token ids, at least one, each of which gets a log-likelihood.
    """

    group: int
    prompt: Sequence[int]
    continuation: Sequence[int]


class _Branch(NamedTuple):
    """The part of a request beyond its row's stem."""

    requests: tuple[int, ...]  # indices; several if their tokens are the same
    tokens: tuple[int, ...]  # the last one is only predicted
    scored: int  # predicted tokens at the end that count


class _Row(NamedTuple):
    stem: tuple[int, ...]
    branches: list[_Branch]

    @property
    def length(self) -> int:
        return len(self.stem) + sum(len(branch.tokens) - 1 for branch in self.branches)


class _Batch(NamedTuple):
    """Rows on devices."""

    tokens: jax.Array  # int32 [B, L]
    positions: jax.Array  # int32 [B, L]
    segments: jax.Array  # int32 [B, L]
    scored: jax.Array  # int32 [B, L] padded to whole chunks: indices of the scored hidden states, then padding
    targets: jax.Array  # int32, shaped like `scored`: the tokens that they predict
    most: np.ndarray  # int32 scalar: the most scored tokens in a row


def fault(request: Request, length: int, vocabulary_size: int) -> str | None:
    """The reason why a model of `length` positions cannot score a request, as the end of a sentence; None if it can."""
    if not request.continuation:
        return "its continuation is empty: there is no token to score"
    if not request.prompt:
        return "its prompt is empty, and the first token of a row cannot be predicted: give at least one prompt token"
    if len(request.continuation) > length:
        return (f"its continuation has {len(request.continuation)} tokens, "
                f"but the model can predict at most {length} after one prompt token")
    wrong = unknown_id((*request.prompt, *request.continuation), vocabulary_size)
    if wrong is not None:
        return f"it holds the token id {wrong}, but the model knows 0 to {vocabulary_size - 1}"
    return None


def prompt_tokens_cut(request: Request, length: int) -> int:
    """Tokens cut from the beginning of a request's prompt to fit a model of `length` positions.

    The last token of a continuation is only predicted, so prompt and continuation have room for length + 1 tokens.
    """
    return max(0, len(request.prompt) + len(request.continuation) - (length + 1))


class Scores(NamedTuple):
    """The scores of one continuation's tokens."""

    log_likelihoods: np.ndarray  # float64, nats, with the precision of the model's float32; so are their sums
    greedy: np.ndarray  # bool: whether no other token is likelier


def score(params: Any, config: DecoderConfig, requests: Sequence[Request], **options: Any) -> list[np.ndarray]:
    """The log-likelihoods from `score_greedily`, float64 [tokens of the continuation] in nats."""
    return [found.log_likelihoods for found in score_greedily(params, config, requests, **options)]


def score_greedily(
    params: Any,
    config: DecoderConfig,
    requests: Sequence[Request],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    sharding: NamedSharding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Scores]:
    """Computes the log-likelihood of every continuation token, and whether greedy decoding would choose it.

    Results do not depend on the other requests, their order and groups, `batch_tokens` or the mesh, beyond the rounding
    of `config.dtype`. Requests of a group with the same tokens are scored once, so that their numbers are identical.

    Args:
      params: the decoder's parameters.
      config: the decoder's configuration.
      requests: what to score.
      batch_tokens: tokens in a batch, including padding; a batch has at least one row per shard.
      sharding: of a [batch, length] array; call under its mesh and the rules of the logical axes, as in training.
        None: one device.
      progress: called with requests done and requests in all after each batch.

    Returns:
      A `Scores` for each request.

    Raises:
      ValueError: in one line that names the request by its index: its prompt or its continuation is empty, or the
        continuation alone is longer than the model, or an id is unknown. Nothing is computed then; `fault` checks this
        beforehand.
    """
    results: list[Any] = [None] * len(requests)
    done = 0
    for finished in _finished_batches(params, config, requests, batch_tokens, sharding):
        for index, scores in finished:
            results[index] = scores
        done += len(finished)
        if progress is not None:
            progress(done, len(requests))
    return results


def _finished_batches(
    params: Any, config: DecoderConfig, requests: Sequence[Request], batch_tokens: int, sharding: NamedSharding | None
) -> Iterator[list[tuple[int, Scores]]]:
    """Yields the results of each batch while the next is being computed."""
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, found {batch_tokens}.")
    for index, request in enumerate(requests):
        reason = fault(request, config.length, config.vocabulary_size)
        if reason is not None:
            raise ValueError(f"Request {index} of group {request.group} cannot be scored: {reason}.")
    shards = shards_of(sharding)
    waiting: tuple[list[_Row], Any] | None = None
    for rows, batch_size, length in _plan_batches(_plan_rows(config, requests), config.length, batch_tokens, shards):
        chunk = _chunk(batch_size, shards)
        batch = _assemble(rows, batch_size, length, chunk, sharding)
        scored = _score_batch(params, batch, config=config, chunk=chunk, sharding=sharding)
        if waiting is not None:
            yield _results(*waiting)
        waiting = rows, scored
    if waiting is not None:
        yield _results(*waiting)


def lower_largest(
    params: Any, config: DecoderConfig, *, batch_tokens: int = DEFAULT_BATCH_TOKENS, sharding: NamedSharding
) -> jax.stages.Lowered:
    """The program of a full batch of the longest rows, for ahead-of-time compilation; arguments as for `score`.

    `params` may be abstract, and the mesh may have devices that are not attached.
    """
    shards, length = shards_of(sharding), config.length
    rows = _full_batch(batch_tokens, length, shards)
    chunk = _chunk(rows, shards)
    tokens_BL, scored_BL = (jax.ShapeDtypeStruct((rows, width), jnp.int32, sharding=sharding)
                            for width in (length, round_up(length, chunk)))
    arrays: Any = tokens_BL, tokens_BL, tokens_BL, scored_BL, scored_BL, np.asarray(1, np.int32)
    return _score_batch.lower(params, _Batch(*arrays), config=config, chunk=chunk, sharding=sharding)


def _full_batch(batch_tokens: int, length: int, shards: int) -> int:
    """Rows of a full batch: as many as `batch_tokens` holds, at least one for each shard."""
    return max(shards, batch_tokens // length // shards * shards)


def _chunk(rows: int, shards: int) -> int:
    """Positions of a row whose logits are computed at a time."""
    return max(1, min(64, power_of_two(LOGIT_POSITIONS * shards // rows + 1) // 2))


def _results(rows: list[_Row], scored: tuple[jax.Array, jax.Array]) -> list[tuple[int, Scores]]:
    """Splits a batch's scores into (request, its scores); waits for the device."""
    values_BL, greedy_BL = map(np.asarray, scored)
    found = []
    for b, row in enumerate(rows):  # rows of padding follow
        start = 0
        for branch in row.branches:
            part = slice(start, start + branch.scored)
            found += [(request, Scores(values_BL[b, part].astype(np.float64), greedy_BL[b, part].copy()))
                      for request in branch.requests]
            start += branch.scored
    return found


# Packing requests into rows.


def _plan_rows(config: DecoderConfig, requests: Sequence[Request]) -> list[_Row]:
    """The rows of all requests, longest first."""
    groups: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.group, []).append(index)
    rows = []
    for members in groups.values():
        sequences: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index in members:
            request = requests[index]
            cut = prompt_tokens_cut(request, config.length)
            tokens = (*tuple(request.prompt)[cut:], *request.continuation)
            sequences.setdefault((tokens, len(request.continuation)), []).append(index)
        rows += _plan_group(config, [
            _Branch(tuple(indices), tokens, scored) for (tokens, scored), indices in sequences.items()])
    return sorted(rows, key=lambda row: (-row.length, row.branches[0].requests))


def _plan_group(config: DecoderConfig, sequences: list[_Branch]) -> list[_Row]:
    """The rows of one group: its sequences share a stem if the estimated cost is lower.

    The stem is the longest common beginning that leaves each branch the last token of its prompt, which predicts the
    first scored token. Branches fill a row after the stem up to the model's length; then another row begins with the
    stem. This is used if it costs less than a row for each sequence, both estimated by `_cost` on padded rows.
    """
    alone = [_Row((), [sequence]) for sequence in sequences]
    if len(sequences) == 1:
        return alone
    first, last = min(s.tokens for s in sequences), max(s.tokens for s in sequences)
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    stem = first[: min(common, *(len(s.tokens) - s.scored - 1 for s in sequences))]
    together: list[_Row] = []
    for sequence in sorted(sequences, key=lambda s: -len(s.tokens)):
        branch = sequence._replace(tokens=sequence.tokens[len(stem) :])
        if not together or together[-1].length + len(branch.tokens) - 1 > config.length:
            together.append(_Row(stem, []))
        together[-1].branches.append(branch)

    def cost(rows: list[_Row]) -> float:
        return sum(_cost(config, length_bucket(row.length, config.length)) for row in rows)

    return together if cost(together) < cost(alone) else alone


def _cost(config: DecoderConfig, length: int) -> float:
    """Multiply-adds of a row's forward pass per layer: for each token those of the block's kernels and, weighted, L H K
    of attention."""
    return length * (sum(products_of_block(config)) + ATTENTION_SLOWNESS * length * config.query_width)


def _plan_batches(
    rows: list[_Row], longest: int, batch_tokens: int, shards: int
) -> Iterator[tuple[list[_Row], int, int]]:
    """Divides rows, longest first, into batches; yields (rows, batch size with padding, length).

    The batch size follows from the length. A batch also takes shorter rows, so only the last one may have rows of
    padding; its size is the smallest full size / 4^k that fits.
    """
    lengths = _few_lengths(rows, longest, batch_tokens)
    start = 0
    while start < len(rows):
        length = next(length for length in lengths if length >= rows[start].length)
        size = _full_batch(batch_tokens, length, shards)
        taken = rows[start : start + size]
        while size > shards and round_up(-(-size // 4), shards) >= len(taken):
            smaller = round_up(-(-size // 4), shards)
            if smaller == size:
                break
            size = smaller
        yield taken, size, length
        start += len(taken)


def _few_lengths(rows: list[_Row], longest: int, batch_tokens: int) -> list[int]:
    """Row lengths to use, ascending.

    Fine lengths are merged into the next longer one where that adds the least padding, until at most MOST_LENGTHS
    remain and another merge would add more than WORTH of a batch. Then they are rounded up to lengths that other calls
    are likely to have compiled, unless that adds as much.
    """
    worth = int(WORTH * batch_tokens)
    counts = dict(sorted(Counter(length_bucket(row.length, longest, FINE) for row in rows).items()))
    while len(counts) > 1:
        lengths = list(counts)
        padding = [(longer - length) * counts[length] for length, longer in zip(lengths, lengths[1:], strict=False)]
        least = int(np.argmin(padding))
        if len(lengths) <= MOST_LENGTHS and padding[least] > worth:
            break
        counts[lengths[least + 1]] += counts.pop(lengths[least])
    common = {length: length_bucket(length, longest) for length in counts}
    return sorted({length if (common[length] - length) * count > worth else common[length]
                   for length, count in counts.items()})


def _assemble(
    rows: list[_Row], batch_size: int, length: int, chunk: int, sharding: NamedSharding | None
) -> _Batch:
    """Fills the arrays of a batch with rows."""
    tokens_BL, positions_BL = np.zeros((2, batch_size, length), np.int32)
    segments_BL = np.full((batch_size, length), STEM - 1, np.int32)
    scored_BL, targets_BL = np.zeros((2, batch_size, round_up(length, chunk)), np.int32)
    most = 0
    for b, row in enumerate(rows):
        stem = len(row.stem)
        tokens_BL[b, :stem], positions_BL[b, :stem], segments_BL[b, :stem] = row.stem, np.arange(stem), STEM
        start, written = stem, 0
        for segment, branch in enumerate(row.branches, STEM + 1):
            stop = start + len(branch.tokens) - 1
            tokens_BL[b, start:stop] = branch.tokens[:-1]
            positions_BL[b, start:stop] = np.arange(stem, stem + stop - start)
            segments_BL[b, start:stop] = segment
            scored_BL[b, written : written + branch.scored] = np.arange(stop - branch.scored, stop)
            targets_BL[b, written : written + branch.scored] = branch.tokens[-branch.scored :]
            start, written = stop, written + branch.scored
        most = max(most, written)
    tokens, positions, segments, scored, targets = (
        place(array, sharding) for array in (tokens_BL, positions_BL, segments_BL, scored_BL, targets_BL))
    return _Batch(tokens, positions, segments, scored, targets, np.asarray(most, np.int32))


def _at(logits_NV: jax.Array, ids_N: jax.Array) -> jax.Array:
    """The logit of an id in each row.

    On TPU, or where the vocabulary is sharded and indexing would gather it, by a pass over all logits, which on CPU
    would take a twentieth of the time of scoring.
    """
    if platform() == "tpu" or axes_that_split("activation_vocab"):
        is_it_NV = ids_N[:, None] == jnp.arange(logits_NV.shape[1])
        return jnp.sum(jnp.where(is_it_NV, logits_NV, 0.0), axis=-1)
    return jnp.take_along_axis(logits_NV, ids_N[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("config", "chunk", "sharding"))
def _score_batch(
    params: Any, batch: _Batch, *, config: DecoderConfig, chunk: int, sharding: NamedSharding | None
) -> tuple[jax.Array, jax.Array]:
    """Log-likelihoods of `batch.targets`, float32, and whether no token is likelier, bool, both of their shape; values
    after a row's last target are undefined.

    Only as many chunks are computed as the row with the most targets needs, so that the stems' logits cost nothing.
    """
    hidden_BLD: Any = Decoder(config).apply(
        {"params": params}, batch.tokens, batch.positions, batch.segments, shared_segment=STEM
    )
    # Cast, and gathered if sharded, once instead of in every iteration of the loop.
    embedding_VD = nn.with_logical_constraint(
        output_head(params).astype(hidden_BLD.dtype), ("activation_vocab", "activation_embed")
    )

    def one_chunk(index: jax.Array, scores: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = index * chunk
        at_BC, targets_BC = (
            jax.lax.dynamic_slice_in_dim(array, start, chunk, axis=1) for array in (batch.scored, batch.targets)
        )
        hidden_BCD = jnp.take_along_axis(hidden_BLD, at_BC[:, :, None], axis=1)
        hidden_ND = hidden_BCD.reshape(-1, hidden_BCD.shape[-1])
        logits_NV = jnp.einsum("ND,VD->NV", hidden_ND, embedding_VD, preferred_element_type=jnp.float32)
        logits_NV = nn.with_logical_constraint(logits_NV, ("activation_batch", "activation_vocab"))
        # Exactly the value compared with the highest.
        target_N = _at(logits_NV, targets_BC.reshape(-1))
        highest_N = jnp.max(logits_NV, axis=-1)
        partition_N = jnp.sum(jnp.exp(logits_NV - highest_N[:, None]), axis=-1)
        found = target_N - highest_N - jnp.log(partition_N), target_N == highest_N
        values_BL, greedy_BL = (
            jax.lax.dynamic_update_slice_in_dim(old, new.reshape(at_BC.shape), start, axis=1)
            for old, new in zip(scores, found, strict=True)
        )
        return values_BL, greedy_BL

    chunks = -(-batch.most // chunk)
    nothing = jnp.zeros(batch.targets.shape, jnp.float32), jnp.zeros(batch.targets.shape, bool)
    values_BL, greedy_BL = jax.lax.fori_loop(0, chunks, one_chunk, nothing)
    return replicate(values_BL, sharding), replicate(greedy_BL, sharding)
