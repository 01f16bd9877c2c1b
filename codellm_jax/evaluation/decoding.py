"""Generation with a cache of keys and values.

    for piece in stream(params, config, prompts, PAPER_SAMPLING, stop_ids={end}):  # as tokens come
        ...
    texts = generate(params, config, prompts, PAPER_SAMPLING, stop_ids={end})      # all at once

Prompts of a batch are padded on the right to one length, with a separate segment for the padding that no token attends
to. New tokens go into the slots after it, at positions that continue from each prompt's end. Tokens are drawn on the
device in turns of `turn` steps; between turns the host checks which rows have ended.

The randomness of a token depends only on the seed, the number of its request, its step and its id, not on the rest of
the batch. Shape suffixes are explained at the top of `decoder.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from codellm_jax.evaluation.buckets import SHORTEST, place, power_of_two, replicate, round_up, shards_of, unknown_id
from codellm_jax.evaluation.sampling import Sampling, draw
from codellm_jax.model.decoder import Decoder, DecoderConfig, blocks_apart, init_cache, rounded

TURN = 16  # steps between two checks by the host
# Up to this many layers, blocks are compiled one by one, which takes a quarter of a second each; a scan, used for more
# layers, copies each block's cache and kernels at each step.
FEW = 24


class Generation(NamedTuple):
    """The continuation of one prompt.

    Attributes:
      ids: the new tokens, without a stop id.
      reason: "end", a stop id was drawn; "stop", `stopped` returned True; "length", `max_new_tokens` or the model's
        last position was reached.
      prompt_tokens_cut: tokens cut from the beginning of a prompt that is too long.
    """

    ids: list[int]
    reason: str
    prompt_tokens_cut: int


class Piece(NamedTuple):
    """The new tokens of one row in one turn, and the reason if the row ended (see `Generation`)."""

    row: int  # index of the prompt
    ids: list[int]
    reason: str | None


def generate(
    params: Any,
    config: DecoderConfig,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int = 0,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[Generation]:
    """Continues every prompt.

    Args:
      params, config, prompts, sampling, seed, options: as for `stream`.
      progress: called with prompts done and prompts in all, each time that one is done.

    Returns:
      A generation for each prompt, in order.
    """
    ids: list[list[int]] = [[] for _ in prompts]
    reasons = [""] * len(prompts)
    done = 0
    for piece in stream(params, config, prompts, sampling, seed, **options):
        ids[piece.row] += piece.ids
        if piece.reason is not None:
            reasons[piece.row] = piece.reason
            done += 1
            if progress is not None:
                progress(done, len(prompts))
    room = options.get("room", 1)
    return [
        Generation(new, reason, prompt_tokens_cut(prompt, config.length, room))
        for new, reason, prompt in zip(ids, reasons, prompts, strict=True)
    ]


def prompt_tokens_cut(prompt: Sequence[int], length: int, room: int = 1) -> int:
    """Tokens cut from the beginning of a prompt, so that a model of `length` positions can add `room` tokens.

    The last new token is never an input, so prompt and new tokens have room for length + 1 tokens.
    """
    return max(0, len(prompt) - (length + 1 - room))


def stream(
    params: Any,
    config: DecoderConfig,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int = 0,
    *,
    numbers: Sequence[int] | None = None,
    stop_ids: Collection[int] = (),
    stopped: Callable[[int, list[int]], bool] | None = None,
    drawable: int | None = None,
    room: int = 1,
    batch_size: int = 16,
    turn: int = TURN,
    sharding: NamedSharding | None = None,
) -> Iterator[Piece]:
    """Continues every prompt, and yields each turn's new tokens for each row of a batch that has not ended.

    The same seed and numbers give the same tokens for any batch size, order, `turn` and mesh, except for ties decided
    by rounding: logits of differently shaped programs differ in their last bits.

    Args:
      params: the decoder's parameters.
      config: the decoder's configuration.
      prompts: token ids, at least one each; of a prompt that is too long the end is kept (`prompt_tokens_cut`).
      sampling: how tokens are drawn.
      seed: of all draws.
      numbers: of each request, in [0, 2^32), on which its draws depend. Default: 0, 1, 2, ... Several samples of one
        prompt need different numbers.
      stop_ids: tokens that end a row; they are not part of it.
      stopped: given a row (an index into `prompts`) and all of its new tokens, returns whether they contain a stop
        condition. The row is cut after the first token at which it is True, so it must stay True with more tokens. It
        is called a few times per turn.
      drawable: ids from here on are never drawn: rows of the embedding without a token. Default: all can be drawn.
      room: positions that a prompt must leave, at least 1.
      batch_size: rows at a time; prompts of similar length are batched together.
      turn: steps between two checks.
      sharding: of a [batch, length] array; call under its mesh and the rules of the logical axes, as in training.
        None: one device.

    Raises:
      ValueError: in one line, if a prompt is empty or contains an unknown id, or an argument is out of range.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    drawable = config.vocabulary_size if drawable is None else drawable
    for name, value, most in (
        ("room", room, config.length), ("drawable", drawable, config.vocabulary_size), ("batch_size", batch_size, None),
        ("turn", turn, None),
    ):
        if value < 1 or (most is not None and value > most):
            raise ValueError(f"{name} must be at least 1{f' and at most {most}' if most else ''}, found {value}.")
    if len(numbers) != len(prompts):
        raise ValueError(f"each prompt needs a number: found {len(prompts)} prompts and {len(numbers)} numbers.")
    for row, prompt in enumerate(prompts):
        wrong = unknown_id(prompt, config.vocabulary_size)
        if not len(prompt):
            raise ValueError(f"Prompt {row} is empty: give at least one token, such as the end-of-document token.")
        if wrong is not None:
            raise ValueError(f"Prompt {row} holds the token id {wrong}; the model knows 0 to "
                             f"{config.vocabulary_size - 1}.")
    return _batches(
        params, config, [list(p[prompt_tokens_cut(p, config.length, room) :]) for p in prompts], sampling,
        jax.random.key(seed, impl="threefry2x32"), numbers, frozenset(stop_ids), stopped, drawable, batch_size,
        min(turn, sampling.max_new_tokens), sharding,
    )


def _batches(
    params: Any, config: DecoderConfig, prompts: list[list[int]], sampling: Sampling, key: jax.Array,
    numbers: Sequence[int], stop_ids: frozenset[int], stopped: Callable[[int, list[int]], bool] | None, drawable: int,
    batch_size: int, turn: int, sharding: NamedSharding | None,
) -> Iterator[Piece]:
    """Generates batch by batch, the longest prompts first."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    rule = dataclasses.replace(sampling, max_new_tokens=1)  # so that it does not change the program
    params_of_blocks = _apart(params, config=config)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        live = {b: _Progress(config, len(prompts[row]), sampling.max_new_tokens) for b, row in enumerate(rows)}
        state, base = _begin(params, config, [prompts[row] for row in rows], sampling.penalized, sharding)
        size = base.shape[0]
        number_B = np.zeros(size, np.uint32)
        number_B[: len(rows)] = [numbers[row] for row in rows]
        placed_B = place(number_B, sharding)
        slots = state.cache["cached_mask"]["segment_ids"].shape[1]
        used = slots
        while live:
            used += turn
            if used > slots:
                # Slots double, so that few programs are compiled and few steps attend to empty slots.
                slots = power_of_two(used)
                state = state._replace(cache=_grow(state.cache, slots=slots))
            state, ids_SB = _advance(
                params_of_blocks, state, base, placed_B, key, config=config, sampling=rule, drawable=drawable,
                turn=turn, sharding=sharding,
            )
            ids_BS = np.asarray(ids_SB).T.tolist()
            for b in list(live):
                row = rows[b]
                ask = None if stopped is None else functools.partial(stopped, row)
                added, reason = live[b].add(ids_BS[b], stop_ids, ask)
                if reason is not None:
                    del live[b]
                yield Piece(row, added, reason)


def lower_largest(
    params: Any, config: DecoderConfig, sampling: Sampling, *, batch_size: int = 16, turn: int = TURN,
    sharding: NamedSharding,
) -> jax.stages.Lowered:
    """The program of a turn after prompts of the model's length, for ahead-of-time compilation.

    Arguments as for `stream`; `params` may be abstract, and the mesh may have devices that are not attached. The cache
    is sharded by rows and heads, as in `Attention`. The program splits the parameters into blocks, which `stream` does
    once beforehand; both copies count towards memory, as they do there.
    """
    rows = round_up(power_of_two(batch_size), shards_of(sharding))
    slots = power_of_two(config.length + turn)
    heads = f"activation_{config.key_axis}"

    def laid_out(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names: tuple[str | None, ...] = {
            0: (), 1: ("activation_batch",), 2: ("activation_batch", None),
            4: ("activation_batch", heads, None, None), 5: (None, "activation_batch", heads, None, None)}[leaf.ndim]
        axes = nn.logical_to_mesh_axes(names) or PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(sharding.mesh, axes))

    cache = jax.eval_shape(lambda: _apart(init_cache(config, rows, slots), config=config))
    logits_BV = jax.ShapeDtypeStruct((rows, config.vocabulary_size), jnp.float32)
    counts_BV = logits_BV if sampling.penalized else None
    leaves: Any = cache, logits_BV, counts_BV, jax.ShapeDtypeStruct((), jnp.int32)
    state: Any = jax.tree.map(laid_out, _State(*leaves))
    base_B, number_B = (laid_out(jax.ShapeDtypeStruct((rows,), dtype)) for dtype in (jnp.int32, jnp.uint32))
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    return _advance.lower(
        params, state, base_B, number_B, key, config=config,
        sampling=dataclasses.replace(sampling, max_new_tokens=1), drawable=config.vocabulary_size, turn=turn,
        sharding=sharding)


class _Progress:
    """The tokens of one row on the host."""

    def __init__(self, config: DecoderConfig, prompt_length: int, max_new_tokens: int) -> None:
        self.ids: list[int] = []
        self.most = min(max_new_tokens, config.length + 1 - prompt_length)

    def add(
        self, new: list[int], stop_ids: frozenset[int], stopped: Callable[[list[int]], bool] | None
    ) -> tuple[list[int], str | None]:
        """Adds a turn's tokens; returns those that count, and the reason why the row ended, or None."""
        new = new[: self.most - len(self.ids)]
        end = next((i for i, token in enumerate(new) if token in stop_ids), None)
        new = new[:end]
        reason: str | None
        if stopped is not None and new and stopped([*self.ids, *new]):
            low, high = 1, len(new)  # `stopped` is True with `high` new tokens; find the fewest
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if stopped([*self.ids, *new[:middle]]) else (middle + 1, high)
            new, reason = new[:high], "stop"
        elif end is not None:
            reason = "end"
        else:
            reason = "length" if len(self.ids) + len(new) == self.most else None
        self.ids += new
        return new, reason


# On the device.


class _State(NamedTuple):
    """The state between two steps."""

    cache: Any
    logits_BV: jax.Array  # float32, of the next token
    counts_BV: jax.Array | None  # float32, how often each token was generated; None without penalties
    step: jax.Array  # int32 scalar, tokens generated


def _begin(
    params: Any, config: DecoderConfig, prompts: list[list[int]], counted: bool, sharding: NamedSharding | None
) -> tuple[_State, jax.Array]:
    """The state after the prompts, and the position int32 [B] of each row's first new token.

    If the rows of a batch are on one device, a prompt of several rows is read once if this divides the rows to read by
    a power of four; that few sizes are compiled.
    """
    shards = shards_of(sharding)
    size = read = round_up(power_of_two(len(prompts)), shards)
    distinct = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
    while shards == 1 and (fewer := read // 4) >= len(distinct):
        read = fewer
    shared = read < size
    length = min(config.length, max(SHORTEST, power_of_two(max(map(len, prompts)))))
    tokens_RL, segments_RL = np.zeros((2, read, length), np.int32)
    length_R = np.ones(read, np.int32)
    for r, prompt in enumerate(distinct if shared else prompts):
        tokens_RL[r, : len(prompt)], segments_RL[r, : len(prompt)], length_R[r] = prompt, 1, len(prompt)
    rows_B = np.zeros(size, np.int32)
    rows_B[: len(prompts)] = [distinct.index(prompt) for prompt in prompts]
    base_B = length_R[rows_B] if shared else length_R
    arrays = place(tokens_RL, sharding), place(segments_RL, sharding), place(length_R, sharding)
    state = _read_prompts(params, *arrays, rows_B if shared else None, config=config, counted=counted)
    return state, place(base_B, sharding)


@functools.partial(jax.jit, static_argnames=("config", "counted"))
def _read_prompts(
    params: Any, tokens_RL: jax.Array, segments_RL: jax.Array, length_R: jax.Array, rows_B: np.ndarray | None, *,
    config: DecoderConfig, counted: bool,
) -> _State:
    """Fills a cache with just the slots for R prompts; the logits are those after each prompt's last token.

    Row b of the state continues prompt `rows_B[b]`; None: prompt b.
    """
    read, length = tokens_RL.shape
    positions_RL = jnp.broadcast_to(jnp.arange(length), tokens_RL.shape)
    variables = {"params": params, "cache": init_cache(config, read, length)}
    logits_BV, cache = _append(config, variables, tokens_RL, positions_RL, segments_RL, last_B=length_R - 1)
    if rows_B is not None:
        logits_BV = logits_BV[rows_B]
        cache = jax.tree.map(lambda leaf: jnp.take(leaf, rows_B, axis=_row_axis(leaf)) if leaf.ndim else leaf, cache)
    counts_BV = None
    if counted:
        counts_BV = nn.with_logical_constraint(jnp.zeros_like(logits_BV), ("activation_batch", "activation_vocab"))
    return _State(_apart(cache, config=config), logits_BV, counts_BV, jnp.zeros((), jnp.int32))


def _row_axis(leaf: jax.Array) -> int:
    """The axis of rows in a leaf of a cache: [B, M] of the mask, [..., B, H, M, K] of keys and values."""
    return 0 if leaf.ndim == 2 else leaf.ndim - 4


@functools.partial(jax.jit, static_argnames=("config",))
def _apart(collection: Any, *, config: DecoderConfig) -> Any:
    """Rounded parameters or a cache, with separate blocks if blocks are few."""
    if "token_embedding" in collection:
        collection = rounded(collection, config.dtype)
    return blocks_apart(collection) if config.layers <= FEW else collection


def _append(
    config: DecoderConfig, variables: Any, tokens_BL: jax.Array, positions_BL: jax.Array, segments_BL: jax.Array,
    last_B: jax.Array,
) -> tuple[jax.Array, Any]:
    """Appends tokens to the cache; returns the logits [B, V] after the ones at `last_B`, and the cache."""
    has_head = "lm_head" in variables["params"]  # also of a tied head, once it is `rounded`
    decoder = Decoder(dataclasses.replace(config, tied_head=not has_head), apart="blocks" not in variables["cache"])
    applied: Any = decoder.apply(variables, tokens_BL, positions_BL, segments_BL, decode=True, mutable=["cache"])
    hidden_BLD, changed = applied
    hidden_B1D = jnp.take_along_axis(hidden_BLD, last_B[:, None, None], axis=1)
    logits_BLV: Any = decoder.apply(variables, hidden_B1D, method="logits")
    return logits_BLV[:, 0], changed["cache"]


@functools.partial(jax.jit, static_argnames=("slots",))
def _grow(cache: Any, *, slots: int) -> Any:
    """The cache padded with empty slots to `slots` in all."""

    def grow(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 0:  # the index
            return leaf
        axis = 1 if leaf.ndim == 2 else leaf.ndim - 2  # [B, M] and [..., B, H, M, K]
        padding = [(0, 0)] * leaf.ndim
        padding[axis] = (0, slots - leaf.shape[axis])
        return jnp.pad(leaf, padding)

    return jax.tree.map(grow, cache)


@functools.partial(
    jax.jit, static_argnames=("config", "sampling", "drawable", "turn", "sharding"), donate_argnames=("state",)
)
def _advance(
    params: Any, state: _State, base_B: jax.Array, number_B: jax.Array, key: jax.Array, *, config: DecoderConfig,
    sampling: Sampling, drawable: int, turn: int, sharding: NamedSharding | None,
) -> tuple[_State, jax.Array]:
    """Draws `turn` tokens per row; returns the new state and ids_SB, int32 [turn, B]. Ended rows continue, unused."""
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, number_B)
    params = _apart(params, config=config)

    def one_step(state: _State, _: None) -> tuple[_State, jax.Array]:
        step_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, state.step)
        ids_B = draw(state.logits_BV, state.counts_BV, step_key_B, sampling, drawable)
        counts_BV = state.counts_BV
        if counts_BV is not None:
            counts_BV = counts_BV + (ids_B[:, None] == jnp.arange(counts_BV.shape[1]))
        positions_B1 = jnp.minimum(base_B + state.step, config.length - 1)[:, None]  # only ended rows go beyond
        variables = {"params": params, "cache": state.cache}
        logits_BV, cache = _append(
            config, variables, ids_B[:, None], positions_B1, jnp.ones_like(positions_B1), last_B=jnp.zeros_like(ids_B)
        )
        return _State(cache, logits_BV, counts_BV, state.step + 1), ids_B

    state, ids_SB = jax.lax.scan(one_step, state, None, length=turn)
    return state, replicate(ids_SB, sharding)
