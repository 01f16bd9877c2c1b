"""AdamW against a plain numpy one, and the learning rate against its formula."""

import math

import jax
import numpy as np
import optax
import pytest

from codellm_jax.runtime.optimization import (
    adamw,
    chain,
    decayed,
    inverse_square_root,
    warmup_constant,
    warmup_cosine,
    warmup_linear,
    warmup_stable_decay,
)


def tree(dice: np.random.Generator, size: float = 1.0) -> dict:
    return {"embedding": size * dice.normal(size=(7, 4)),
            "norm": {"scale": size * dice.normal(size=4), "bias": size * dice.normal(size=4)},
            "block": {"query_kernel": size * dice.normal(size=(4, 5)), "query_bias": size * dice.normal(size=5)}}


def as_float32(values: dict) -> dict:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), values)


class PlainAdamW:
    """Loshchilov and Hutter (2019) after clipping to a global norm, in float64."""

    def __init__(self, params, rates, b1, b2, eps, weight_decay, clip_norm, undecayed):
        self.params = {name: value.astype(np.float64) for name, value in params.items()}
        self.m = {name: np.zeros_like(value) for name, value in self.params.items()}
        self.v = {name: np.zeros_like(value) for name, value in self.params.items()}
        self.rates, self.b1, self.b2, self.eps = rates, b1, b2, eps
        self.weight_decay, self.clip_norm, self.undecayed, self.steps = weight_decay, clip_norm, undecayed, 0

    def step(self, gradients):
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
        shrink = min(1.0, self.clip_norm / norm)
        rate = self.rates(self.steps)
        self.steps += 1
        for name, gradient in gradients.items():
            gradient = gradient.astype(np.float64) * shrink
            self.m[name] = self.b1 * self.m[name] + (1 - self.b1) * gradient
            self.v[name] = self.b2 * self.v[name] + (1 - self.b2) * gradient**2
            m = self.m[name] / (1 - self.b1**self.steps)
            v = self.v[name] / (1 - self.b2**self.steps)
            decay = 0.0 if name in self.undecayed else self.weight_decay
            self.params[name] = self.params[name] - rate * (m / (np.sqrt(v) + self.eps) + decay * self.params[name])


def flat(values: dict) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(values)}


@pytest.mark.parametrize("settings", [
    {}, {"b1": 0.8, "b2": 0.99, "eps": 1e-3, "weight_decay": 0.5, "clip_norm": 0.1}, {"clip_norm": 1e9},
    {"weight_decay": 0.0}])
def test_adamw_is_the_one_of_the_paper(settings):
    dice = np.random.default_rng(0)

    def rates(step):
        return 1e-2 * (step + 1)

    params = as_float32(tree(dice))
    optimizer = adamw(rates, **settings)
    every = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0} | settings
    plain = PlainAdamW(flat(params), rates, **every, undecayed={"norm/scale", "norm/bias", "block/query_bias"})
    state = optimizer.init(params)
    # Small gradients and large ones: below the clipping norm and far above it.
    for size in (1e-2, 10.0, 1e-3, 3.0, 1.0, 100.0):
        gradients = as_float32(tree(dice, size))
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        plain.step(flat(gradients))
        for name, found in flat(params).items():
            np.testing.assert_allclose(found, plain.params[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_a_first_moment_in_bfloat16():
    """Is half as large, and a rounding of bfloat16 away from the whole one's step."""
    dice = np.random.default_rng(0)
    params, gradients = as_float32(tree(dice)), as_float32(tree(dice))
    steps, moments = {}, {}
    for mu_dtype in ("float32", "bfloat16"):
        optimizer = adamw(lambda step: 1e-2, mu_dtype=mu_dtype)
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(gradients, state, params)
        steps[mu_dtype] = flat(updates)
        moments[mu_dtype] = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments["bfloat16"] == moments["float32"] * 3 // 4
    for name, wanted in steps["float32"].items():
        np.testing.assert_allclose(steps["bfloat16"][name], wanted, rtol=0.02, atol=1e-5, err_msg=name)
    with pytest.raises(ValueError, match="mu_dtype must be float32 or bfloat16, found 'int8'"):
        adamw(lambda step: 1e-2, mu_dtype="int8")


def test_decay_leaves_out_biases_and_scales():
    assert decayed(tree(np.random.default_rng(0))) == {
        "embedding": True, "norm": {"scale": False, "bias": False},
        "block": {"query_kernel": True, "query_bias": False}}


@pytest.mark.parametrize(("peak", "final", "warmup", "steps"), [
    (1e-4, 1e-6, 500, 80_000), (1e-3, 1e-5, 30, 350), (1.0, 0.0, 1, 2), (2.0, 0.5, 0, 10)])
def test_warmup_cosine_is_its_formula(peak, final, warmup, steps):
    schedule = warmup_cosine(peak, final, warmup, steps)
    for step in {0, 1, warmup // 2, warmup - 1, warmup, warmup + 1, (warmup + steps) // 2, steps - 1, steps, steps + 9}:
        if step < 0:
            continue
        if step < warmup:
            expected = peak * step / warmup
        else:
            progress = min(1.0, (step - warmup) / (steps - warmup))
            expected = final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
        np.testing.assert_allclose(float(schedule(step)), expected, rtol=1e-5, atol=1e-7 * peak, err_msg=str(step))
    assert float(schedule(warmup)) == pytest.approx(peak) and float(schedule(steps)) == pytest.approx(final)


def plain_stable_decay(step, peak, final, warmup, steps, decay_steps, shape):
    """The same step by step, in Python's numbers."""
    if step < warmup:
        return peak * step / warmup
    begins = steps - decay_steps
    if step <= begins:
        return peak
    part = min(1.0, (step - begins) / decay_steps)
    left = {"linear": 1 - part, "one_minus_sqrt": 1 - math.sqrt(part), "cosine": (1 + math.cos(math.pi * part)) / 2}
    return final + (peak - final) * left[shape]


@pytest.mark.parametrize("shape", ["linear", "one_minus_sqrt", "cosine"])
@pytest.mark.parametrize(("warmup", "steps", "decay_steps", "as_steps"), [
    (3, 40, 10, 10), (0, 40, 0.25, 10), (5, 40, 35, 35), (5, 40, 0, 0)])
def test_warmup_stable_decay_is_its_formula(shape, warmup, steps, decay_steps, as_steps):
    schedule = warmup_stable_decay(2e-3, 1e-4, warmup, steps, decay_steps, shape)
    found = [float(schedule(step)) for step in range(steps + 3)]
    wanted = [plain_stable_decay(step, 2e-3, 1e-4, warmup, steps, as_steps, shape) if as_steps else
              2e-3 * min(1, step / max(1, warmup) if warmup else 1) for step in range(steps + 3)]
    np.testing.assert_allclose(found[:steps], wanted[:steps], rtol=1e-5, atol=1e-9)
    if as_steps:
        np.testing.assert_allclose(found[steps:], 1e-4, rtol=1e-5)
    assert jax.jit(schedule)(7).dtype == np.float32 and float(jax.jit(schedule)(7)) == pytest.approx(found[7], rel=1e-6)


def test_linear_constant_and_square_root_are_their_formulas():
    steps = range(60)
    linear = [1e-3 * min(step / 10, 1 - (step - 10) / 50 if step > 10 else 1) for step in steps]
    np.testing.assert_allclose([float(warmup_linear(1e-3, 0.0, 10, 60)(step)) for step in steps], linear, rtol=1e-5,
                               atol=1e-10)
    np.testing.assert_allclose([float(warmup_constant(1e-3, 4)(step)) for step in steps],
                               [1e-3 * min(1, step / 4) for step in steps], rtol=1e-6)
    np.testing.assert_allclose([float(inverse_square_root(1e-3, 16)(step)) for step in steps],
                               [1e-3 * (step / 16 if step < 16 else math.sqrt(16 / step)) for step in steps], rtol=1e-6)


def test_a_branch_warms_up_again():
    """As if its first step were step 0 of a run that ends with it."""
    for again, plain in ((warmup_cosine(1e-3, 1e-5, 5, 60, begin_step=20), warmup_cosine(1e-3, 1e-5, 5, 40)),
                         (warmup_linear(1e-3, 0.0, 5, 60, begin_step=20), warmup_linear(1e-3, 0.0, 5, 40)),
                         (warmup_stable_decay(1e-3, 0.0, 5, 60, 8, "cosine", 20),
                          warmup_stable_decay(1e-3, 0.0, 5, 40, 8, "cosine")),
                         (warmup_constant(1e-3, 5, 20), warmup_constant(1e-3, 5)),
                         (inverse_square_root(1e-3, 5, 20), inverse_square_root(1e-3, 5))):
        assert [float(again(20 + step)) for step in range(40)] == [float(plain(step)) for step in range(40)]


@pytest.mark.parametrize(("make", "message"), [
    (lambda: warmup_stable_decay(1e-3, 0.0, 10, 100, 91), "at most the 90 steps of the run after the warm-up"),
    (lambda: warmup_stable_decay(1e-3, 0.0, 10, 100, 1.5), "fraction of the run from 0.0 to 1.0"),
    (lambda: warmup_stable_decay(1e-3, 0.0, 10, 100, 0.1, "sqrt"), "one of linear, one_minus_sqrt, cosine, found"),
    (lambda: inverse_square_root(1e-3, 0), "WARMUP_STEPS = 0 must be at least 1"),
    (lambda: warmup_linear(1e-3, 1e-2, 0, 10), "must be at least FINAL_LEARNING_RATE"),
])
def test_schedules_out_of_range_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_no_steps_and_falling_rates_are_refused():
    with pytest.raises(ValueError, match="TRAIN_STEPS must be a whole number of at least 1, found 0"):
        warmup_cosine(1e-3, 1e-5, 0, 0)
    for peak, final in ((-1e-3, 1e-5), (1e-5, 1e-3), (1e-3, -1e-5)):
        with pytest.raises(ValueError, match="LEARNING_RATE = .* must be at least FINAL_LEARNING_RATE"):
            warmup_cosine(peak, final, 1, 10)


@pytest.mark.parametrize(("warmup", "steps"), [(10, 10), (11, 10), (-1, 10)])
def test_a_warmup_longer_than_the_run_is_refused_in_one_line(warmup, steps):
    with pytest.raises(ValueError, match=f"WARMUP_STEPS = {warmup} must be at least 0 and below the {steps}") as raised:
        warmup_cosine(1e-3, 1e-5, warmup, steps)
    assert "\n" not in str(raised.value)


def test_chain_ends_with_the_learning_rate():
    optimizer = chain(lambda step: 0.5 / (step + 1), [optax.clip(2.0), optax.trace(decay=0.5)])
    params = {"x": np.zeros(3, np.float32)}
    state = optimizer.init(params)
    gradient = {"x": np.array([1.0, -8.0, 0.0], np.float32)}
    first, state = optimizer.update(gradient, state, params)
    second, state = optimizer.update(gradient, state, params)
    np.testing.assert_allclose(first["x"], [-0.5, 1.0, 0.0])
    np.testing.assert_allclose(second["x"], [-0.25 * 1.5, 0.25 * 3.0, 0.0])
    plain, _ = chain(lambda step: 3.0, []).update(gradient, chain(lambda step: 3.0, []).init(params), params)
    np.testing.assert_allclose(plain["x"], [-3.0, 24.0, 0.0])
