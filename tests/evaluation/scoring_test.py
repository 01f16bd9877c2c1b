"""Scores equal those of a plain loop, one request at a time, whatever stands beside them in a batch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from codellm_jax.evaluation import scoring
from codellm_jax.evaluation.buckets import length_bucket, power_of_two
from codellm_jax.evaluation.scoring import Request, fault, prompt_tokens_cut, score
from codellm_jax.model.decoder import Decoder, DecoderConfig
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh, shardings_of

TINY = DecoderConfig(layers=3, hidden=16, heads=2, feedforward=24, vocabulary_size=23, length=96)
ARCHITECTURES = {"query layer": TINY, "gpt": dataclasses.replace(TINY, query_layer=False)}


@functools.cache
def make_params(config: DecoderConfig) -> Any:
    """Drawn large enough that likelihoods differ by far more than rounding."""
    tokens_BL = jnp.zeros((1, 4), jnp.int32)
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), *[tokens_BL] * 3)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), nn.unbox(boxed))


@functools.cache
def all_log_probabilities(config: DecoderConfig) -> Any:
    """A jitted function from a row [L] to log softmax of all its logits [L, V]."""

    @jax.jit
    def run(params: Any, tokens_L: jax.Array) -> jax.Array:
        length = len(tokens_L)
        inputs = tokens_L[None], jnp.arange(length)[None], jnp.zeros((1, length), jnp.int32)
        hidden_BLD = Decoder(config).apply({"params": params}, *inputs)
        return jax.nn.log_softmax(Decoder(config).apply({"params": params}, hidden_BLD, method="logits"))[0]

    return run


@functools.cache
def plainly_greedy(config: DecoderConfig, prompt: tuple[int, ...], continuation: tuple[int, ...]) -> np.ndarray:
    """Whether each token is the likeliest of all in the plain computation."""
    tokens = (prompt + continuation)[-(config.length + 1) :]
    values_LV = np.asarray(all_log_probabilities(config)(make_params(config), jnp.asarray(tokens[:-1], jnp.int32)))
    return (values_LV.argmax(axis=1) == np.asarray(tokens[1:]))[-len(continuation) :]


@functools.cache
def plain_score(config: DecoderConfig, prompt: tuple[int, ...], continuation: tuple[int, ...]) -> np.ndarray:
    """The definition: the exact sequence, unpadded and alone, cut from the left if it is too long."""
    tokens = (prompt + continuation)[-(config.length + 1) :]
    values_LV = np.asarray(all_log_probabilities(config)(make_params(config), jnp.asarray(tokens[:-1], jnp.int32)))
    values_L = values_LV[np.arange(len(tokens) - 1), np.asarray(tokens[1:])]
    return values_L[-len(continuation) :]


def make_requests(config: DecoderConfig) -> list[Request]:
    """Groups of 1 to 5 candidates with long, short and no common beginnings; few lengths, for the plain loop."""
    rng = np.random.default_rng(2)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(config.vocabulary_size, size=count).tolist())

    requests = []
    for group, (candidates, stem) in enumerate([(1, 0), (2, 40), (3, 4), (4, 60), (5, 20), (4, 0), (2, 80), (3, 33)]):
        beginning = draw(stem)
        for candidate in range(candidates):
            prompt, continuation = beginning + draw(1 + candidate % 2 * 4), draw(3 + candidate % 3 * 5)
            requests.append(Request(group, prompt, continuation))
    same, other = draw(30), draw(6)
    requests += [Request(100, same, (*other, k)) for k in range(3)]  # the candidates themselves begin alike
    requests += [Request(101, same, other), Request(101, same, other)]  # twins
    requests += [Request(102, (*same, *other)[:31], (7,)), Request(102, same, (other[0], 7))]  # cut elsewhere
    requests += [Request(103, draw(1), draw(1)), Request(103, draw(1), draw(96))]  # the least and the most
    return requests


def expect(config: DecoderConfig, requests: list[Request], found: list[np.ndarray], **tolerance: Any) -> None:
    assert len(found) == len(requests)
    for request, values in zip(requests, found, strict=True):
        assert values.dtype == np.float64
        expected = plain_score(config, tuple(request.prompt), tuple(request.continuation))
        np.testing.assert_allclose(values, expected, **({"atol": 1e-5, "rtol": 1e-5} | tolerance))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_plain_loop(architecture: str) -> None:
    config = ARCHITECTURES[architecture]
    requests, seen = make_requests(config), []
    found = score(make_params(config), config, requests, batch_tokens=500, progress=lambda *a: seen.append(a))
    expect(config, requests, found)
    assert seen[-1] == (len(requests), len(requests)) and len(seen) > 2
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("batch_tokens", [1, 97, 333, 8192])
def test_batches_and_order_change_nothing(batch_tokens: int) -> None:
    requests = make_requests(TINY)
    order = np.random.default_rng(batch_tokens).permutation(len(requests))
    shuffled = [requests[i] for i in order]
    expect(TINY, shuffled, score(make_params(TINY), TINY, shuffled, batch_tokens=batch_tokens))


def test_groups_change_nothing() -> None:
    requests = make_requests(TINY)
    for regrouped in ([r._replace(group=i) for i, r in enumerate(requests)], [r._replace(group=7) for r in requests]):
        expect(TINY, regrouped, score(make_params(TINY), TINY, regrouped, batch_tokens=512))


def test_every_request_is_scored_once() -> None:
    requests = make_requests(TINY)
    batches = scoring._finished_batches(make_params(TINY), TINY, requests, 300, None)
    pairs = [pair for batch in batches for pair in batch]
    found = dict(pairs)
    assert len(pairs) == len(found)
    expect(TINY, requests, [found[i].log_likelihoods for i in range(len(requests))])
    assert score(make_params(TINY), TINY, []) == []


@pytest.mark.parametrize("batch_tokens", [1, 97, 8192])
def test_the_same_tokens_have_the_same_numbers(batch_tokens: int) -> None:
    """For they are scored once, so that no rounding of rows and batches can tell them apart."""
    rng = np.random.default_rng(6)
    prompt, continuation = rng.integers(23, size=(2, 40)).tolist()
    others = [Request(0, prompt[:size], continuation[:size]) for size in (3, 9, 17, 33)]
    twins = [Request(0, prompt, continuation), Request(0, tuple(prompt), tuple(continuation))]
    longer = Request(0, [1] * 30 + prompt + [2] * 20, continuation)  # the same once it is cut
    requests = [twins[0], *others, twins[1], longer, longer._replace(prompt=[7] * 80 + list(longer.prompt))]
    found = score(make_params(TINY), TINY, requests, batch_tokens=batch_tokens)
    np.testing.assert_array_equal(found[0], found[5])
    np.testing.assert_array_equal(found[6], found[7])
    expect(TINY, requests, found)
    planned = [branch.requests for row in scoring._plan_rows(TINY, requests) for branch in row.branches]
    assert sorted(planned) == [(0, 5), (1,), (2,), (3,), (4,), (6, 7)]


def test_prompts_too_long_keep_their_end() -> None:
    rng = np.random.default_rng(3)
    prompt = tuple(rng.integers(23, size=120).tolist())
    requests = [Request(0, prompt[-size:], (5,) * count) for size in (95, 96, 97, 120) for count in (1, 2)]
    assert [prompt_tokens_cut(request, TINY.length) for request in requests] == [0, 0, 0, 1, 1, 2, 24, 25]
    expect(TINY, requests, score(make_params(TINY), TINY, requests))
    full = [Request(0, prompt[-1:], (5,) * 96), Request(0, prompt, (5,) * 96)]
    np.testing.assert_array_equal(*score(make_params(TINY), TINY, full))
    assert prompt_tokens_cut(full[1], TINY.length) == 119


@pytest.mark.parametrize(("request_", "message"), [
    (Request(4, (1,), ()), "Request 1 of group 4 .* its continuation is empty"),
    (Request(4, (), (1,)), "Request 1 of group 4 .* its prompt is empty"),
    (Request(4, (1,), (1,) * 97), "97 tokens, but the model can predict at most 96"),
    (Request(4, (1, 23), (1,)), "token id 23, but the model knows 0 to 22"),
    (Request(4, (1,), (-1,)), "token id -1"),
])
def test_faults_are_one_line(request_: Request, message: str) -> None:
    good = Request(0, (1,), (2,))
    assert fault(good, TINY.length, TINY.vocabulary_size) is None
    with pytest.raises(ValueError, match=message) as error:
        score(make_params(TINY), TINY, [good, request_])
    assert "\n" not in str(error.value)


def four_way(stem: int, rest: int, questions: int = 3) -> list[Request]:
    rng = np.random.default_rng(4)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(TINY.vocabulary_size, size=count).tolist())

    requests = []
    for group in range(questions):
        prompt = draw(stem)
        requests += [Request(group, prompt, draw(rest)) for _ in range(4)]
    return requests


def test_stems_are_computed_once_where_it_pays() -> None:
    long_stems = scoring._plan_rows(TINY, four_way(60, 5))
    assert [(len(row.stem), len(row.branches), row.length) for row in long_stems] == [(59, 4, 79)] * 3
    # A stem of one token: rows of 96 and 32 tokens would be as many as four of 32, and attention would cost more.
    short_stems = scoring._plan_rows(TINY, four_way(2, 30))
    assert [(len(row.stem), len(row.branches), row.length) for row in short_stems] == [(0, 1, 31)] * 12
    # What does not fit behind a stem goes behind the same stem once more.
    split = scoring._plan_rows(TINY, four_way(60, 15))
    assert sorted(len(row.branches) for row in split) == [2] * 6 and max(row.length for row in split) <= TINY.length


def test_few_programs_are_compiled() -> None:
    """At most MOST_LENGTHS lengths, and one smaller batch at the end; a second call compiles nothing."""
    config = dataclasses.replace(TINY, layers=1, hidden=8, heads=1, length=512)
    rng = np.random.default_rng(5)
    requests = [Request(i, (1,) * rng.integers(1, 500), (2,) * rng.integers(1, 13)) for i in range(300)]
    scoring._score_batch.clear_cache()
    first = score(make_params(config), config, requests, batch_tokens=2048)
    count = scoring._score_batch._cache_size()
    assert 1 < count <= scoring.MOST_LENGTHS + 1
    again = score(make_params(config), config, requests[::-1], batch_tokens=2048)
    assert scoring._score_batch._cache_size() == count
    for one, other in zip(first, again[::-1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_rows_of_a_call_are_as_long_as_pays() -> None:
    """By hand, with batches of 4,096 tokens, of which a quarter, 1,024 tokens of padding, justifies a program."""
    def lengths(*rows_of: tuple[int, int]) -> list[int]:
        branches = [scoring._Branch((0,), (1,) * (length + 1), 1) for length, count in rows_of for _ in range(count)]
        return scoring._few_lengths([scoring._Row((), [branch]) for branch in branches], 512, 4096)

    assert lengths((260, 21)) == [320]  # 48 x 21 = 1,008 more than with 272
    assert lengths((260, 22)) == [272]  # 1,056 more
    assert lengths((250, 64), (260, 22)) == [272]  # 16 x 64 = 1,024 more than with 256 and 272
    assert lengths((250, 65), (260, 22)) == [256, 272]
    assert lengths((17, 2), (500, 2)) == [512]
    many = lengths(*[(length, 100) for length in range(16, 512, 16)])
    assert len(many) == scoring.MOST_LENGTHS and many[-1] == 496 and many == sorted(set(many))


def test_buckets() -> None:
    lengths = sorted({length_bucket(n, 1024) for n in range(1, 1025)})
    assert lengths == [16, 32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024]
    assert all(n <= length_bucket(n, 1000) <= 1000 for n in range(1, 1001))
    fine = sorted({length_bucket(n, 1024, scoring.FINE) for n in range(1, 1025)})
    assert fine == [16, 32, *range(64, 512, 16), *range(512, 1025, 32)]
    assert [power_of_two(n) for n in (0, 1, 2, 3, 4, 5)] == [1, 1, 2, 4, 4, 8]


@pytest.mark.parametrize("shape", [MeshShape(data=8), MeshShape(data=2, fsdp=2, model=2)], ids=["data", "mixed"])
def test_a_mesh_changes_nothing(shape: MeshShape) -> None:
    config = dataclasses.replace(TINY, vocabulary_size=24)
    requests = make_requests(config)
    mesh = make_mesh(shape)
    tokens_BL = jnp.zeros((1, 4), jnp.int32)
    shardings = shardings_of(
        jax.eval_shape(Decoder(config).init, jax.random.key(0), *[tokens_BL] * 3)["params"], mesh, shape)
    params = jax.tree.map(jax.device_put, make_params(config), shardings)
    with jax.set_mesh(mesh), nn.logical_axis_rules(shape.all_rules()):
        found = score(params, config, requests, batch_tokens=700, sharding=batch_sharding(mesh))
    expect(config, requests, found)


def test_the_largest_program_is_the_one_that_full_rows_take(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = MeshShape(data=2, fsdp=4)
    mesh, params, shapes = make_mesh(shape), make_params(TINY), []
    real = scoring._score_batch

    def spy(*arrays: Any, **options: Any) -> jax.Array:
        shapes.append(([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays)], options))
        return real(*arrays, **options)

    requests = [Request(0, [i] * 5, [1] * (TINY.length - 4)) for i in range(16)]
    with jax.set_mesh(mesh), nn.logical_axis_rules(shape.all_rules()):
        options: dict[str, Any] = {"batch_tokens": 16 * TINY.length, "sharding": batch_sharding(mesh)}
        lowered = scoring.lower_largest(params, TINY, **options)
        assert "module" in lowered.as_text()
        monkeypatch.setattr(scoring, "_score_batch", spy)
        score(params, TINY, requests, **options)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(lowered.args_info)] == shapes[0][0]
    assert len(shapes) == 1 and shapes[0][1]["chunk"] == scoring._chunk(16, 8)


def test_bfloat16_is_near() -> None:
    config = dataclasses.replace(TINY, dtype="bfloat16")
    requests = make_requests(TINY)
    found = score(make_params(TINY), config, requests, batch_tokens=500)
    expect(TINY, requests, found, atol=0.5, rtol=0.1)


@pytest.mark.slow
def test_tokens_that_greedy_decoding_would_choose_are_told():
    """Requests that go on greedily from a prompt, then differently; beside them the random ones of the other tests."""
    config, params = TINY, make_params(TINY)
    requests = make_requests(config)
    for group, request in enumerate(requests[:6], 1000):
        tokens = list(request.prompt)
        for _ in range(5):
            values_LV = np.asarray(all_log_probabilities(config)(params, jnp.asarray(tokens, jnp.int32)))
            tokens.append(int(values_LV[-1].argmax()))
        likeliest = tokens[len(request.prompt) :]
        requests.append(Request(group, request.prompt, likeliest))
        requests.append(Request(group, request.prompt, [*likeliest[:3], (likeliest[3] + 1) % 23, likeliest[4]]))
    found = scoring.score_greedily(params, config, requests, batch_tokens=200)
    for request, scores in zip(requests, found, strict=True):
        assert scores.greedy.dtype == bool
        expected = plainly_greedy(config, tuple(request.prompt), tuple(request.continuation))
        np.testing.assert_array_equal(scores.greedy, expected)
    assert all(scores.greedy.all() for scores in found[-12::2]) and not any(s.greedy[3] for s in found[-11::2])
