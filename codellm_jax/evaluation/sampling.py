"""Draws a token from its logits: penalties, temperature, top-k and top-p, with separate noise for each token.

Shape suffixes are explained at the top of `decoder.py`; here K is the number of tokens kept.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The rule by which a token is drawn from its logits; checked when created.

    In this order: the penalties are subtracted from the logits, frequency_penalty x c + presence_penalty x [c > 0] for
    a token generated c times so far (the prompt does not count); they are divided by the temperature; the `top_k` most
    likely tokens are kept; of these, the most likely ones that together reach `top_p` of what was kept; one is drawn.

    Attributes:
      temperature: 0 takes the most likely token: greedy.
      top_k: how many of the most likely tokens are kept; None keeps all.
      top_p: the probability that the kept tokens reach together; 1 keeps all.
      frequency_penalty: subtracted from a token's logit for each time that it was generated.
      presence_penalty: subtracted once from the logit of each token that was generated.
      max_new_tokens: maximum length of an answer in tokens.

    Raises:
      ValueError: in one line, if a value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    max_new_tokens: int = 500

    def __post_init__(self) -> None:
        for name, value, good, range_ in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "a number from 0 (greedy) on"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1, or None for all"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) < float("inf"), "finite"),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) < float("inf"), "finite"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
        ):
            if not good:
                raise ValueError(f"{name} must be {range_}, found {value}.")

    @property
    def penalized(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty)


# arXiv:2309.16298, in the released code.
PAPER_SAMPLING = Sampling(top_k=3, top_p=1.0, frequency_penalty=1.5, presence_penalty=0.3, max_new_tokens=500)


def draw(
    logits_BV: jax.Array, counts_BV: jax.Array | None, key_B: jax.Array, sampling: Sampling, drawable: int | None = None
) -> jax.Array:
    """Draws a token for each row, as described in `Sampling`.

    A token's noise is Gumbel-distributed from fold_in(row's key, token id), so that a draw does not depend on the order
    of the likely tokens. Among equal logits, greedy and `top_k` take the lower id first.

    Args:
      logits_BV: float32.
      counts_BV: float32, how often each token was generated before; may be None if there is no penalty.
      key_B: a PRNG key for each row.
      sampling: the rule.
      drawable: ids from here on are never drawn.

    Returns:
      int32 [B].
    """
    vocabulary_size = logits_BV.shape[1]
    drawable = vocabulary_size if drawable is None else drawable
    if drawable < vocabulary_size:
        logits_BV = jnp.where(jnp.arange(vocabulary_size) < drawable, logits_BV, -jnp.inf)
    if sampling.penalized:
        assert counts_BV is not None
        logits_BV = logits_BV - sampling.frequency_penalty * counts_BV - sampling.presence_penalty * (counts_BV > 0)
    if sampling.temperature == 0:
        return _first_highest(logits_BV)
    logits_BV = logits_BV / sampling.temperature
    kept = min(sampling.top_k or drawable, drawable)
    if kept == drawable and sampling.top_p == 1:
        values_BK, ids_BK = logits_BV, jnp.broadcast_to(jnp.arange(vocabulary_size), logits_BV.shape)
    else:
        values_BK, ids_BK = jax.lax.top_k(logits_BV, kept)
    if sampling.top_p < 1:
        probability_BK = jax.nn.softmax(values_BK)
        before_BK = jnp.cumsum(probability_BK, axis=-1) - probability_BK
        # The first is always kept; for the others `before` is the total probability of all likelier tokens.
        values_BK = jnp.where(before_BK.at[:, 0].set(0.0) < sampling.top_p, values_BK, -jnp.inf)
    noise_BK = jax.vmap(jax.vmap(_gumbel, (None, 0)))(key_B, ids_BK)
    chosen_B1 = jnp.argmax(values_BK + noise_BK, axis=-1)[:, None]
    return jnp.take_along_axis(ids_BK, chosen_B1, axis=1)[:, 0].astype(jnp.int32)


def _first_highest(logits_BV: jax.Array) -> jax.Array:
    """The argmax, in two passes that XLA on CPU vectorizes, unlike argmax itself: they take a fifth of its time there.
    """
    highest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    last = logits_BV.shape[1] - 1
    return jnp.min(jnp.where(logits_BV == highest_B1, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)


def _gumbel(key: jax.Array, token: jax.Array) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(key, token))
