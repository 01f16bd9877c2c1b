"""The chunked cross-entropy equals the one by the book, and never holds all logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from codellm_jax.model import losses
from codellm_jax.model.losses import DEFAULT_CHUNK, _transposed, chunk_of, cross_entropy
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 10, 8, 37


def make_inputs(dtype: str = "float32") -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    hidden_BLD = jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)), dtype)
    embedding_VD = jnp.asarray(rng.normal(size=(VOCABULARY, WIDTH)), jnp.float32)
    targets_BL = jnp.asarray(rng.integers(VOCABULARY, size=(BATCH, LENGTH)), jnp.int32)
    weights_BL = jnp.asarray(rng.uniform(size=(BATCH, LENGTH)) * (rng.uniform(size=(BATCH, LENGTH)) < 0.7), jnp.float32)
    return hidden_BLD, embedding_VD, targets_BL, weights_BL


def by_the_book(hidden_BLD, embedding_VD, targets_BL, weights_BL) -> tuple[jax.Array, jax.Array]:
    logits_BLV = jnp.einsum("BLD,VD->BLV", hidden_BLD.astype(jnp.float32), embedding_VD)
    loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL)
    return jnp.sum(loss_BL * weights_BL), loss_BL


def value_and_gradients(function, inputs, scale: float = 1.0):
    def scaled(hidden_BLD, embedding_VD):
        loss_sum, loss_BL = function(hidden_BLD, embedding_VD, *inputs[2:])
        return scale * loss_sum, loss_BL

    return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))(*inputs[:2])


@pytest.mark.parametrize("chunk", [1, 4, 5, 10, 64])  # 4 does not divide 10
def test_equals_full_logits(chunk: int) -> None:
    inputs = make_inputs()
    (loss_sum, loss_BL), gradients = value_and_gradients(lambda *a: cross_entropy(*a, chunk=chunk), inputs, scale=2.5)
    (expected_sum, expected_BL), expected_gradients = value_and_gradients(by_the_book, inputs, scale=2.5)
    np.testing.assert_allclose(loss_sum, expected_sum, rtol=1e-6)
    np.testing.assert_allclose(loss_BL, expected_BL, atol=1e-5)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, atol=1e-5)
    undifferentiated_sum, undifferentiated_BL = jax.jit(lambda *a: cross_entropy(*a, chunk=chunk))(*inputs)
    np.testing.assert_allclose(undifferentiated_sum * 2.5, loss_sum, rtol=1e-6)
    np.testing.assert_allclose(undifferentiated_BL, loss_BL, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [37, 48])  # 48 is whole lines of a cache
def test_the_two_copies_transpose(vocabulary: int) -> None:
    array = np.arange(5.0 * vocabulary).reshape(5, vocabulary)
    np.testing.assert_array_equal(_transposed(jnp.asarray(array)), array.T)


def test_bfloat16_hidden_states() -> None:
    inputs = make_inputs("bfloat16")
    (loss_sum, loss_BL), gradients = value_and_gradients(lambda *a: cross_entropy(*a, chunk=4), inputs)
    (expected_sum, _), expected_gradients = value_and_gradients(by_the_book, inputs)
    assert (loss_sum.dtype, loss_BL.dtype) == (jnp.float32, jnp.float32)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(loss_sum, expected_sum, rtol=2e-2)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(np.asarray(gradient, np.float32), np.asarray(expected, np.float32), atol=0.06)


@pytest.mark.parametrize("chunk", [4, LENGTH])  # several chunks, and a single one
@pytest.mark.parametrize("rows", [8, 16])  # 10 tokens of a device are fewer than twice the width, 20 are more
@pytest.mark.parametrize("shape", [MeshShape(data=1, fsdp=8), MeshShape(data=2, fsdp=4), MeshShape(data=8)])
def test_devices_sum_the_gradient_once(shape: MeshShape, rows: int, chunk: int) -> None:
    """On eight devices the gradients are those of one; the embedding's is summed in four parts, outside of the loop and
    in the compute dtype, and sharded like the embedding.
    """
    rng, vocabulary = np.random.default_rng(1), 400  # parts of 128, 128, 128 and 16
    inputs = (jnp.asarray(rng.normal(size=(rows, LENGTH, WIDTH)), jnp.float32),
              jnp.asarray(rng.normal(size=(vocabulary, WIDTH)), jnp.float32),
              jnp.asarray(rng.integers(vocabulary, size=(rows, LENGTH)), jnp.int32),
              jnp.asarray(rng.uniform(size=(rows, LENGTH)), jnp.float32))

    def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cross_entropy(*arrays, chunk=chunk)

    (expected_sum, expected_BL), expected = value_and_gradients(loss, inputs)
    mesh = make_mesh(shape)
    of_rows, of_width = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    sharded = [jax.device_put(array, of_width if index == 1 else of_rows) for index, array in enumerate(inputs)]
    with jax.set_mesh(mesh), nn.logical_axis_rules(shape.all_rules()):
        (loss_sum, loss_BL), gradients = value_and_gradients(loss, sharded)
        gradient = jax.jit(jax.grad(lambda *a: loss(*a)[0], argnums=1))
        in_half = gradient.lower(sharded[0].astype("bfloat16"), *sharded[1:])
    np.testing.assert_allclose(loss_sum, expected_sum, rtol=1e-6)
    np.testing.assert_allclose(loss_BL, expected_BL, atol=1e-5)
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert gradients[1].sharding.shard_shape(gradients[1].shape) == (vocabulary, WIDTH // shape.fsdp)
    kind = "reduce_scatter" if shape.fsdp > 1 else "all_reduce"
    sums = re.findall(rf"stablehlo.{kind}.*?: \((tensor<[^)]*)\) ->", in_half.as_text(), re.DOTALL)
    assert sums == [f"tensor<{size}x{WIDTH}xbf16>" for size in (128, 128, 128, 16)]


@pytest.mark.parametrize(("shape", "rows"), [(MeshShape(data=2, fsdp=2, model=2), 8), (MeshShape(data=1, fsdp=8), 3)],
                         ids=["vocabulary_split_too", "rows_not_divided"])
def test_the_partitioner_sums_on_other_meshes(shape: MeshShape, rows: int) -> None:
    inputs = tuple(jnp.tile(array, (3, *[1] * (array.ndim - 1)))[:rows] if index != 1 else array
                   for index, array in enumerate(make_inputs()))
    _, expected = value_and_gradients(cross_entropy, inputs)
    with jax.set_mesh(make_mesh(shape)), nn.logical_axis_rules(shape.all_rules()):
        _, found = value_and_gradients(cross_entropy, inputs)
    for gradient, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-5)


def test_weight_zero_counts_nothing() -> None:
    hidden_BLD, embedding_VD, targets_BL, _ = make_inputs()
    weights_BL = jnp.ones((BATCH, LENGTH)).at[1].set(0.0)
    inputs = hidden_BLD, embedding_VD, targets_BL, weights_BL
    (loss_sum, loss_BL), (hidden_gradient_BLD, _) = value_and_gradients(cross_entropy, inputs)
    np.testing.assert_allclose(loss_sum, loss_BL[0].sum() + loss_BL[2].sum(), rtol=1e-6)
    assert not hidden_gradient_BLD[1].any()
    changed = hidden_BLD, embedding_VD, targets_BL.at[1].set(0), weights_BL
    np.testing.assert_array_equal(cross_entropy(*changed)[0], cross_entropy(*inputs)[0])


def test_losses_and_weights_pass_no_gradient() -> None:
    hidden_BLD, embedding_VD, targets_BL, weights_BL = make_inputs()
    through_losses = jax.grad(lambda hidden: cross_entropy(hidden, embedding_VD, targets_BL, weights_BL)[1].sum())
    through_weights = jax.grad(lambda weights: cross_entropy(hidden_BLD, embedding_VD, targets_BL, weights)[0])
    assert not through_losses(hidden_BLD).any()
    assert not through_weights(weights_BL).any()


def test_large_logits_do_not_overflow() -> None:
    inputs = make_inputs()
    inputs = (inputs[0] * 1e4, *inputs[1:])
    (loss_sum, _), gradients = value_and_gradients(cross_entropy, inputs)
    assert np.isfinite(loss_sum) and all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("differentiated", [False, True])
def test_never_holds_all_logits(differentiated: bool) -> None:
    """At the vocabulary of the study the temporaries stay near one chunk's logits."""
    batch, length, width, vocabulary, chunk = 2, 1024, 16, 130_344, 8
    shapes = (batch, length, width), (vocabulary, width), (batch, length), (batch, length)
    dtypes = jnp.float32, jnp.float32, jnp.int32, jnp.float32
    abstract = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]

    def loss(*inputs):
        return cross_entropy(*inputs, chunk=chunk)[0]

    function = jax.grad(loss, argnums=(0, 1)) if differentiated else loss
    temporaries = jax.jit(function).lower(*abstract).compile().memory_analysis().temp_size_in_bytes
    all_logits, chunk_logits = (4 * vocabulary * batch * positions for positions in (length, chunk))
    assert temporaries < 4 * chunk_logits + 4 * (4 * vocabulary * width) < all_logits / 10


@pytest.mark.parametrize("devices, rows, vocabulary_size, training, evaluating", [
    (1, 8, 8192, DEFAULT_CHUNK, DEFAULT_CHUNK),
    (1, 32, 40_064, 52, 52),  # 32 x 52 x 40,064 x 4 bytes are just under 256 MiB
    (1, 2048, 130_432, 1, 1),  # one position at least, though it takes a GiB
    # Several devices take large chunks: 4 rows of 418 positions on each of 64 are just under 256 MiB.
    (64, 256, 40_064, 418, DEFAULT_CHUNK),
    (8, 4096, 130_432, DEFAULT_CHUNK, 1),
])
def test_the_chunk_is_what_a_device_can_hold(
    devices: int, rows: int, vocabulary_size: int, training: int, evaluating: int
) -> None:
    mesh = jax.sharding.AbstractMesh((devices,), ("data",))
    with jax.sharding.use_abstract_mesh(mesh):
        assert chunk_of(rows, vocabulary_size, gradients=True) == training
        assert chunk_of(rows, vocabulary_size, gradients=False) == evaluating
    assert chunk_of(8, 8192, gradients=True) == DEFAULT_CHUNK  # outside a mesh


def test_a_gpu_takes_larger_chunks_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "platform", lambda: "gpu")
    assert chunk_of(16, 40_064, gradients=True) == 418  # 16 x 418 x 40,064 x 4 bytes are just under 1 GiB
    assert chunk_of(16, 40_064, gradients=False) == DEFAULT_CHUNK
    assert chunk_of(16_384, 130_432, gradients=True) == 1


def test_evaluation_computes_no_gradients() -> None:
    """Undifferentiated, one matmul per chunk (and the product for the target's logit); differentiated, three."""
    inputs = make_inputs()
    forward = str(jax.make_jaxpr(lambda *a: cross_entropy(*a)[0])(*inputs)).count("dot_general")
    with_gradients = str(jax.make_jaxpr(jax.grad(lambda *a: cross_entropy(*a)[0], (0, 1)))(*inputs))
    assert (forward, with_gradients.count("dot_general")) == (2, 4)


def test_errors_say_what_was_found() -> None:
    hidden_BLD, embedding_VD, targets_BL, weights_BL = make_inputs()
    with pytest.raises(ValueError, match="chunk must be at least 1 position, found 0"):
        cross_entropy(hidden_BLD, embedding_VD, targets_BL, weights_BL, chunk=0)
    with pytest.raises(ValueError, match="found .*37"):
        cross_entropy(hidden_BLD, embedding_VD.T, targets_BL, weights_BL)
