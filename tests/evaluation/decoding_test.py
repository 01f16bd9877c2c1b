"""Generation equals a slow loop without a cache, whatever stands beside a request in its batch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from codellm_jax.evaluation import decoding
from codellm_jax.evaluation.decoding import Generation, generate, prompt_tokens_cut, stream
from codellm_jax.evaluation.sampling import PAPER_SAMPLING, Sampling, draw
from codellm_jax.model.decoder import Decoder, DecoderConfig
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh, shardings_of

TINY = DecoderConfig(layers=3, hidden=16, heads=2, feedforward=24, vocabulary_size=24, length=40)
ARCHITECTURES = {"query layer": TINY, "gpt": dataclasses.replace(TINY, query_layer=False)}
GREEDY = Sampling(temperature=0.0, max_new_tokens=20)
SAMPLINGS = {
    "greedy": GREEDY,
    "greedy with penalties": dataclasses.replace(GREEDY, frequency_penalty=1.5, presence_penalty=0.3),
    "plain": Sampling(max_new_tokens=20),
    "paper": dataclasses.replace(PAPER_SAMPLING, max_new_tokens=20),
    "all": Sampling(0.7, top_k=9, top_p=0.8, frequency_penalty=0.5, presence_penalty=-0.2, max_new_tokens=20),
    "top-p": Sampling(2.0, top_p=0.6, max_new_tokens=20),
}
RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(24, size=size).tolist() for size in (5, 1, 30, 17, 16, 9, 38, 2)]


@functools.cache
def make_params(config: DecoderConfig) -> Any:
    tokens_BL = jnp.zeros((1, 4), jnp.int32)
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), *[tokens_BL] * 3)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), nn.unbox(boxed))


@functools.cache
def next_logits(config: DecoderConfig) -> Any:
    """A jitted function from a row, padded behind, and its true length to the logits behind it [V]."""

    @jax.jit
    def run(params: Any, tokens_L: jax.Array, length: jax.Array) -> jax.Array:
        inputs = tokens_L[None], jnp.arange(config.length)[None], jnp.zeros((1, config.length), jnp.int32)
        hidden_BLD = Decoder(config).apply({"params": params}, *inputs)
        return Decoder(config).apply({"params": params}, hidden_BLD, method="logits")[0, length - 1]

    return run


@jax.jit
def noise_of(seed: int, number: int, step: int) -> jax.Array:
    """Gumbel noise of all tokens: the keys that decoding.py promises."""
    fold = jax.random.fold_in
    key = fold(fold(jax.random.key(seed), number), step)
    return jnp.stack([jax.random.gumbel(fold(key, token)) for token in range(TINY.vocabulary_size)])


def slow_draw(logits_V: np.ndarray, generated: list[int], sampling: Sampling, noise_V: np.ndarray) -> int:
    """The rule token by token."""
    logits_V = logits_V.astype(np.float64)
    for token in set(generated):
        logits_V[token] -= sampling.frequency_penalty * generated.count(token) + sampling.presence_penalty
    if sampling.temperature == 0:
        return int(np.argmax(logits_V))
    logits_V /= sampling.temperature
    ranked = sorted(range(len(logits_V)), key=lambda token: -logits_V[token])[: sampling.top_k]
    weights = np.exp(logits_V[ranked] - logits_V[ranked].max())
    kept, mass = [], 0.0
    for token, weight in zip(ranked, weights / weights.sum(), strict=True):
        if mass < sampling.top_p or sampling.top_p == 1:
            kept.append(token)
        mass += weight
    return max(kept, key=lambda token: logits_V[token] + noise_V[token])


def slow_generate(config: DecoderConfig, prompt: list[int], number: int, sampling: Sampling, seed: int) -> list[int]:
    tokens, generated = prompt[-config.length :], []
    while len(generated) < sampling.max_new_tokens and len(tokens) <= config.length:
        row_L = np.zeros(config.length, np.int32)
        row_L[: len(tokens)] = tokens
        logits_V = np.asarray(next_logits(config)(make_params(config), row_L, len(tokens)))
        noise_V = np.asarray(noise_of(seed, number, len(generated)))
        generated.append(slow_draw(logits_V, generated, sampling, noise_V))
        tokens = [*tokens, generated[-1]]
    return generated


def ids_of(generations: list[Generation]) -> list[list[int]]:
    return [generation.ids for generation in generations]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_equals_the_slow_loop(sampling: str) -> None:
    rule = SAMPLINGS[sampling]
    found = generate(make_params(TINY), TINY, PROMPTS, rule, seed=3, turn=6)
    assert ids_of(found) == [slow_generate(TINY, prompt, r, rule, 3) for r, prompt in enumerate(PROMPTS)]
    # The prompts of 30 and 38 tokens reach the model's end: 40 positions and one token that is no input.
    assert [len(one.ids) for one in found] == [20, 20, 11, 20, 20, 20, 3, 20]
    assert {(one.reason, one.prompt_tokens_cut) for one in found} == {("length", 0)}


def test_without_the_query_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "FEW", 0)  # blocks in a scan
    config, rule = ARCHITECTURES["gpt"], SAMPLINGS["paper"]
    found = generate(make_params(config), config, PROMPTS, rule, seed=1)
    assert ids_of(found) == [slow_generate(config, prompt, r, rule, 1) for r, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(("batch_size", "turn"), [(1, 16), (3, 5), (8, 20)])
def test_batches_and_order_change_nothing(batch_size: int, turn: int) -> None:
    rule = SAMPLINGS["paper"]
    expected = [slow_generate(TINY, prompt, r, rule, 5) for r, prompt in enumerate(PROMPTS)]
    order = np.random.default_rng(batch_size).permutation(len(PROMPTS)).tolist()
    options: dict[str, Any] = {"numbers": order, "batch_size": batch_size, "turn": turn}
    found = generate(make_params(TINY), TINY, [PROMPTS[r] for r in order], rule, seed=5, **options)
    assert ids_of(found) == [expected[r] for r in order]


@pytest.mark.parametrize("model", [1, 2])
@pytest.mark.parametrize(("of_prompts", "read"), [
    ((5, 3), 2), ((8,), 2), ((13, 1, 2), 4), ((1,) * 8, 8), ((6, 1, 1), 8)])
def test_samples_share_the_reading_of_their_prompt(
    of_prompts: tuple[int, ...], read: int, model: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, shape, sizes = SAMPLINGS["paper"], MeshShape(data=1, model=model), []
    mesh = make_mesh(shape, jax.devices()[:model])
    prompts = [prompt for prompt, samples in zip(PROMPTS, of_prompts, strict=False) for _ in range(samples)]
    real = decoding._read_prompts

    def spy(params: Any, tokens_RL: jax.Array, *rest: Any, **options: Any) -> Any:
        sizes.append(tokens_RL.shape[0])
        return real(params, tokens_RL, *rest, **options)

    monkeypatch.setattr(decoding, "_read_prompts", spy)
    params = jax.device_put(make_params(TINY), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh), nn.logical_axis_rules(shape.all_rules()):
        found = generate(params, TINY, prompts, rule, seed=3, batch_size=16, sharding=batch_sharding(mesh))
    assert ids_of(found) == [slow_generate(TINY, prompt, r, rule, 3) for r, prompt in enumerate(prompts)]
    assert sizes == [read]


def test_numbers_and_seeds_make_different_samples() -> None:
    sample = functools.partial(generate, make_params(TINY), TINY, [PROMPTS[0]] * 4, SAMPLINGS["plain"])
    texts = [tuple(ids) for ids in ids_of(sample(seed=0) + sample(seed=1))]
    assert len(set(texts)) == 8
    assert ids_of(sample(seed=1, numbers=[2, 2, 0, 1])) == [list(texts[i]) for i in (6, 6, 4, 5)]


def test_stop_ids_end_a_row() -> None:
    whole = ids_of(generate(make_params(TINY), TINY, PROMPTS, GREEDY))
    end = whole[0][7]
    found = generate(make_params(TINY), TINY, PROMPTS, GREEDY, stop_ids={end}, turn=4)
    for generation, ids in zip(found, whole, strict=True):
        ended = end in ids
        assert generation.ids == (ids[: ids.index(end)] if ended else ids)
        assert generation.reason == ("end" if ended else "length")


@pytest.mark.parametrize("turn", [1, 4, 16])
def test_the_host_stops_rows_at_the_very_token(turn: int) -> None:
    """As a stop string would: after the fewest tokens that make `stopped` say yes, wherever turns begin."""
    rule = dataclasses.replace(SAMPLINGS["plain"], max_new_tokens=18)
    whole = ids_of(generate(make_params(TINY), TINY, PROMPTS, rule))

    def stopped(row: int, ids: list[int]) -> bool:
        return sum(ids) > 40 + 20 * row

    asked: dict[str, Any] = {"stopped": stopped, "turn": turn}
    for row, (found, ids) in enumerate(zip(generate(make_params(TINY), TINY, PROMPTS, rule, **asked), whole,
                                           strict=True)):
        fewest = next((n for n in range(1, len(ids) + 1) if stopped(row, ids[:n])), None)
        assert (found.ids, found.reason) == ((ids, "length") if fewest is None else (ids[:fewest], "stop"))


def test_stream_yields_turns_and_ends_each_row_once() -> None:
    pieces = list(stream(make_params(TINY), TINY, PROMPTS[:3], GREEDY, turn=8))
    assert [(piece.row, len(piece.ids), piece.reason) for piece in pieces if piece.row == 0] == [
        (0, 8, None), (0, 8, None), (0, 4, "length")]
    assert sorted(piece.row for piece in pieces if piece.reason) == [0, 1, 2]
    joined = [sum((piece.ids for piece in pieces if piece.row == row), []) for row in range(3)]
    seen: list[tuple[int, int]] = []
    found = generate(make_params(TINY), TINY, PROMPTS[:3], GREEDY, progress=lambda *a: seen.append(a))
    assert joined == ids_of(found) and seen == [(1, 3), (2, 3), (3, 3)]
    assert generate(make_params(TINY), TINY, [], GREEDY) == []


def test_prompts_too_long_keep_their_end() -> None:
    prompt = np.random.default_rng(8).integers(24, size=60).tolist()
    found, cut = generate(make_params(TINY), TINY, [prompt, prompt[-40:]], GREEDY, numbers=[0, 0])
    assert found == Generation(slow_generate(TINY, prompt, 0, GREEDY, 0), "length", 20) and len(found.ids) == 1
    assert cut == found._replace(prompt_tokens_cut=0)
    (roomy,) = generate(make_params(TINY), TINY, [prompt], GREEDY, room=10)
    assert roomy == Generation(slow_generate(TINY, prompt[-31:], 0, GREEDY, 0), "length", 29) and len(roomy.ids) == 10
    assert [prompt_tokens_cut([1] * n, 40) for n in (1, 40, 41)] == [0, 0, 1]


# draw, by hand.

LOGITS = np.log(np.asarray([[0.1, 0.5, 0.1, 0.3]], np.float32))


def drawn(sampling: Sampling, counts: tuple[float, ...] = (0,) * 4, draws: int = 4000, **options: Any) -> np.ndarray:
    """How often each of the four tokens comes."""
    keys = jax.random.split(jax.random.key(0), draws)
    counts_BV = jnp.broadcast_to(jnp.asarray(counts, jnp.float32), (draws, 4))
    ids = draw(jnp.broadcast_to(LOGITS, (draws, 4)), counts_BV, keys, sampling, **options)
    assert ids.dtype == jnp.int32
    return np.bincount(ids, minlength=4) / draws


@pytest.mark.parametrize(("sampling", "expected"), [
    (Sampling(), [0.1, 0.5, 0.1, 0.3]),
    (Sampling(temperature=0.5), [1 / 36, 25 / 36, 1 / 36, 9 / 36]),
    (Sampling(temperature=0.0), [0, 1, 0, 0]),
    (Sampling(top_k=1), [0, 1, 0, 0]),
    (Sampling(top_k=2), [0, 5 / 8, 0, 3 / 8]),
    (Sampling(top_k=3), [1 / 9, 5 / 9, 0, 3 / 9]),  # of equals the lower id is kept
    (Sampling(top_k=9), [0.1, 0.5, 0.1, 0.3]),  # more than there are
    (Sampling(top_p=0.45), [0, 1, 0, 0]),
    (Sampling(top_p=0.55), [0, 5 / 8, 0, 3 / 8]),
    (Sampling(top_p=0.85), [1 / 9, 5 / 9, 0, 3 / 9]),
    (Sampling(top_p=1e-9), [0, 1, 0, 0]),
    (Sampling(top_k=2, top_p=0.6), [0, 1, 0, 0]),  # 5/8 of what top-k kept is enough
], ids=str)
def test_what_is_kept(sampling: Sampling, expected: list[float]) -> None:
    found = drawn(sampling)
    np.testing.assert_allclose(found, expected, atol=0.03)
    np.testing.assert_array_equal(found > 0, np.asarray(expected) > 0)


def test_penalties() -> None:
    """Token 1 came twice, token 3 once: logits fall by 2 f + p and f + p."""
    rule = Sampling(frequency_penalty=0.5, presence_penalty=0.25)
    weights = np.asarray([0.1, 0.5 * np.exp(-1.25), 0.1, 0.3 * np.exp(-0.75)])
    np.testing.assert_allclose(drawn(rule, (0, 2, 0, 1)), weights / weights.sum(), atol=0.03)
    greedy = Sampling(temperature=0.0, frequency_penalty=0.3)
    assert drawn(greedy, (0, 1, 0, 0))[1] == 1 and drawn(greedy, (0, 2, 0, 0))[3] == 1
    before_temperature = Sampling(temperature=0.5, presence_penalty=np.log(5 / 3).item())
    np.testing.assert_allclose(drawn(before_temperature, (0, 1, 0, 0)), np.asarray([1, 9, 1, 9]) / 20, atol=0.03)


def test_rows_of_padding_are_never_drawn() -> None:
    np.testing.assert_allclose(drawn(Sampling(), drawable=3), np.asarray([1, 5, 1, 0]) / 7, atol=0.03)
    np.testing.assert_array_equal(drawn(Sampling(top_k=4), drawable=2) > 0, [True, True, False, False])
    found = ids_of(generate(make_params(TINY), TINY, PROMPTS, SAMPLINGS["top-p"], drawable=5))
    assert set(sum(found, [])) <= set(range(5))


@pytest.mark.parametrize(("wrong", "message"), [
    ({"temperature": -1.0}, "temperature must be a number from 0"), ({"temperature": float("nan")}, "temperature"),
    ({"top_k": 0}, "top_k must be at least 1, or None"), ({"top_p": 0.0}, "top_p must be above 0"),
    ({"top_p": 1.5}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, found 0"),
    ({"frequency_penalty": float("inf")}, "frequency_penalty must be finite"),
])
def test_sampling_is_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


@pytest.mark.parametrize(("prompts", "options", "message"), [
    ([[1], []], {}, "Prompt 1 is empty"), ([[1, 24]], {}, "Prompt 0 holds the token id 24; the model knows 0 to 23"),
    ([[1]], {"room": 41}, "room must be at least 1 and at most 40, found 41"),
    ([[1]], {"batch_size": 0}, "batch_size must be at least 1, found 0"),
    ([[1]], {"numbers": [1, 2]}, "1 prompts and 2 numbers"),
    ([[1]], {"drawable": 25}, "drawable must be at least 1 and at most 24"),
])
def test_slips_are_one_line(prompts: list[list[int]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        stream(make_params(TINY), TINY, prompts, GREEDY, **options)  # at once, not at the first piece
    assert "\n" not in str(error.value)


def test_few_programs_are_compiled() -> None:
    """Slots double from the prompt's: 16, 32 and 64 here; other seeds, limits and prompts add none."""
    functions = decoding._advance, decoding._read_prompts
    for function in functions:
        function.clear_cache()
    for seed, limit in ((0, 30), (1, 25)):
        rule = dataclasses.replace(SAMPLINGS["paper"], max_new_tokens=limit)
        generate(make_params(TINY), TINY, [[1] * (seed + 5), [2] * 3], rule, seed=seed)
    assert [function._cache_size() for function in functions] == [2, 1]


def test_a_mesh_changes_nothing() -> None:
    """Batch, parameters, heads and vocabulary all split; 8 prompts in batches of 5, of which a shard holds 2."""
    rule, shape = dataclasses.replace(SAMPLINGS["paper"], max_new_tokens=10), MeshShape(data=2, fsdp=2, model=2)
    mesh = make_mesh(shape)
    tokens_BL = jnp.zeros((1, 4), jnp.int32)
    shardings = shardings_of(
        jax.eval_shape(Decoder(TINY).init, jax.random.key(0), *[tokens_BL] * 3)["params"], mesh, shape)
    params = jax.tree.map(jax.device_put, make_params(TINY), shardings)
    with jax.set_mesh(mesh), nn.logical_axis_rules(shape.all_rules()):
        found = generate(params, TINY, PROMPTS, rule, seed=5, batch_size=5, sharding=batch_sharding(mesh))
    assert ids_of(found) == [slow_generate(TINY, prompt, r, rule, 5) for r, prompt in enumerate(PROMPTS)]


def test_the_largest_program_is_the_one_that_the_longest_prompts_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """In shapes and, of the cache, in how it lies on the mesh; it takes parameters stacked, and cuts them itself."""
    rule, shape = dataclasses.replace(SAMPLINGS["paper"], max_new_tokens=16), MeshShape(data=2, fsdp=2, model=2)
    mesh, params, seen = make_mesh(shape), make_params(TINY), []
    real = decoding._advance

    def spy(*arrays: Any, **options: Any) -> Any:
        seen.append([(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(arrays[1:])])
        return real(*arrays, **options)

    with jax.set_mesh(mesh), nn.logical_axis_rules(shape.all_rules()):
        lowered = decoding.lower_largest(params, TINY, rule, batch_size=8, sharding=batch_sharding(mesh))
        shardings = jax.tree.leaves(lowered.compile().input_shardings[0][1:])
        monkeypatch.setattr(decoding, "_advance", spy)
        next(stream(params, TINY, [[1] * TINY.length] * 8, rule, batch_size=8, sharding=batch_sharding(mesh)))
    given = lowered.args_info[0]
    assert [leaf.shape for leaf in jax.tree.leaves(given[0])] == [leaf.shape for leaf in jax.tree.leaves(params)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(given[1:])] == [
        (shape, dtype) for shape, dtype, _ in seen[0]]
    cached = [(found, sharding, shape) for (shape, _, found), sharding in zip(seen[0], shardings, strict=True)
              if len(shape) >= 4 and 64 in shape]
    assert cached and all(found.is_equivalent_to(sharding, len(shape)) for found, sharding, shape in cached)


@pytest.mark.parametrize("more", [{}, {"query_layer": False}, {"query_layer": False, "tied_head": False}],
                         ids=["query layer", "gpt", "untied"])
@pytest.mark.parametrize("few", [24, 0])
def test_in_bfloat16_logits_are_those_of_the_whole_row(
    more: dict[str, Any], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token written is the best by the model without a cache, or within rounding of it; kernels and the head are
    rounded once, before the first step.
    """
    monkeypatch.setattr(decoding, "FEW", few)
    jax.clear_caches()
    config = dataclasses.replace(TINY, dtype="bfloat16", **more)
    params = make_params(dataclasses.replace(TINY, **more))
    for prompt, answer in zip(PROMPTS, generate(params, config, PROMPTS, GREEDY), strict=True):
        assert len(answer.ids) == min(20, config.length + 1 - len(prompt))
        for place, token in enumerate(answer.ids):
            row = np.zeros(config.length, np.int32)
            length = len(prompt) + place
            row[:length] = [*prompt, *answer.ids[:place]]
            logits_V = next_logits(config)(params, jnp.asarray(row), length)
            assert logits_V[token] > logits_V.max() - 0.02 * logits_V.std()
    rounded = decoding._apart(params, config=config)
    floats = {"token_embedding", "position_embedding", "query_embedding"}
    assert {leaf.dtype.name for path, leaf in jax.tree_util.tree_leaves_with_path(rounded)
            if path[-1].key == "lm_head" or path[-1].key.endswith("_kernel")} == {"bfloat16"}
    assert all(rounded[name].dtype == jnp.float32 for name in floats & rounded.keys())


def test_bfloat16_runs() -> None:
    config = dataclasses.replace(TINY, dtype="bfloat16")
    found = generate(make_params(TINY), config, PROMPTS, SAMPLINGS["paper"])
    assert all(0 <= token < 24 for ids in ids_of(found) for token in ids) and len(found[0].ids) == 20
