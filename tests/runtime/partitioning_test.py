"""Meshes, rules, and that parameters and activations really lie where the rules say."""

import dataclasses
import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from codellm_jax.model import decoder as decoder_module
from codellm_jax.model import parts as parts_module
from codellm_jax.model.decoder import Decoder, DecoderConfig
from codellm_jax.pods.collectives import read_program
from codellm_jax.runtime import partitioning
from codellm_jax.runtime.optimization import adamw
from codellm_jax.runtime.partitioning import (
    AXIS_RULES,
    MeshShape,
    batch_sharding,
    make_mesh,
    require_divisible,
)
from codellm_jax.runtime.state import abstract_state, bytes_per_device, initial_state

CONFIG = DecoderConfig(layers=3, hidden=32, heads=4, feedforward=64, vocabulary_size=128, length=16)
GROUPED = dataclasses.replace(
    CONFIG, kv_heads=2, positions="rotary", norm="rms", activation="swiglu", biases="query_key_value",
    query_key_norm="width", tied_head=False)
MIXED = MeshShape(data=2, fsdp=2, model=2)
WHOLE_KEYS = (("kv_heads", None), ("activation_kv_heads", None))


@pytest.mark.parametrize(("shape", "devices", "sizes"), [
    (MeshShape(), 8, (8, 1, 1)), (MeshShape(), 1, (1, 1, 1)), (MeshShape(data=2, fsdp=-1), 8, (2, 4, 1)),
    (MeshShape(data=1, fsdp=2, model=-1), 8, (1, 2, 4)), (MIXED, 8, (2, 2, 2)),
    (MeshShape(data=8), 8, (8, 1, 1)), (MeshShape(data=-1, model=8), 8, (1, 1, 8)),
    (MeshShape(data=4, fsdp=2, slices=2), 8, (4, 2, 1)), (MeshShape(slices=4, fsdp=2), 8, (4, 2, 1)),
    (MeshShape(data=-1, fsdp=16, model=8), 1024, (8, 16, 8))])
def test_sizes(shape, devices, sizes):
    assert shape.sizes(devices) == sizes


@pytest.mark.parametrize(("shape", "devices", "message"), [
    (MeshShape(data=3), 8, "data=3, fsdp=1, model=1 does not fit 8 devices"),
    (MeshShape(model=3), 8, "does not fit 8 devices"), (MeshShape(data=2, fsdp=2), 8, "does not fit 8 devices"),
    (MeshShape(data=16), 8, "does not fit 8 devices"), (MeshShape(data=-1, fsdp=16), 8, "does not fit 8 devices"),
    (MeshShape(slices=3), 8, "mesh.slices=3 must divide the data axis, which has 8"),
    (MeshShape(fsdp=8, slices=2), 8, "mesh.slices=2 must divide the data axis, which has 1")])
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(shape, devices, message):
    with pytest.raises(ValueError, match=message) as raised:
        shape.sizes(devices)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("axes", [{"data": 0}, {"fsdp": -2}, {"data": -1, "fsdp": -1}, {"slices": 0},
                                  {"data": -1, "model": -1}])
def test_malformed_axes_are_refused_in_one_line(axes):
    with pytest.raises(ValueError, match="Mesh axes must be positive, at most one of them -1") as raised:
        MeshShape(**axes)
    assert "\n" not in str(raised.value)


def test_an_unknown_rule_names_the_nearest():
    with pytest.raises(ValueError, match="unknown axis 'activation_bath'; nearest: activation_batch"):
        MeshShape(rules=(("activation_bath", "data"),))


def test_rules_stand_in_for_the_defaults():
    found = MeshShape(rules=(("embed", None), ("position", "fsdp"))).all_rules()
    assert dict(found) == dict(AXIS_RULES) | {"embed": None, "position": "fsdp"}
    assert [name for name, _ in found] == [name for name, _ in AXIS_RULES]


def test_mesh_of_all_devices():
    mesh = make_mesh(MIXED)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "model": 2}
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert make_mesh(MeshShape(), jax.devices()[:3]).size == 3


def test_slices_on_devices_that_have_none():
    plain, sliced = make_mesh(MeshShape(data=4, fsdp=2)), make_mesh(MeshShape(data=4, fsdp=2, slices=2))
    assert (plain.devices == sliced.devices).all()


class SlicedDevice:
    """As much of a TPU of one of two slices as building a mesh looks at."""

    def __init__(self, number: int) -> None:
        self.id, self.slice_index, self.process_index = number, number // 4, number // 4
        self.platform, self.device_kind = "cpu", "cpu"

    def __repr__(self) -> str:
        return f"device {self.id} of slice {self.slice_index}"


def test_slices_are_joined_along_data(monkeypatch):
    monkeypatch.setattr("codellm_jax.runtime.partitioning.Mesh", lambda grid, *_, **__: grid)
    devices = [SlicedDevice(number) for number in range(8)]
    grid = make_mesh(MeshShape(data=4, fsdp=2, slices=2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    assert slices[:, :, 0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize(("batch", "microbatches", "multiple", "near"), [
    (6, 1, 4, 8), (1, 1, 4, 4), (8, 4, 16, 16), (0, 1, 4, 4), (9, 2, 8, 8), (33, 1, 4, 32)])
def test_a_batch_that_cannot_be_divided(batch, microbatches, multiple, near):
    with pytest.raises(ValueError, match=f"BATCH_SIZE = {batch} cannot be divided by the mesh: data 2 x fsdp 2 x "
                                         f"{microbatches} microbatches need a multiple of {multiple}, such as {near}"):
        require_divisible(batch, microbatches, make_mesh(MIXED))


def test_a_batch_that_can_be_divided():
    for batch, microbatches in ((4, 1), (16, 4), (8, 2)):
        require_divisible(batch, microbatches, make_mesh(MIXED))


def test_batches_are_split_over_data_and_fsdp():
    array = jax.device_put(np.zeros((8, 5)), batch_sharding(make_mesh(MIXED)))
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 5)}


def specs(shape: MeshShape, config: DecoderConfig = CONFIG) -> dict[str, tuple]:
    """Of each parameter and of its two moments: the mesh axes of each of its axes."""
    state = abstract_state(Decoder(config), adamw(lambda step: 1e-3), make_mesh(shape), shape)
    return {jax.tree_util.keystr(path): tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def test_parameters_and_moments_are_sharded():
    found = specs(MIXED)
    expected = {
        "['token_embedding']": ("model", "fsdp"), "['position_embedding']": (None, "fsdp"),
        "['blocks']['attention']['query_kernel']": (None, "fsdp", "model"),
        "['blocks']['attention']['output_kernel']": (None, "model", "fsdp"),
        "['blocks']['attention']['query_bias']": (None, "model", None),
        "['blocks']['feedforward']['down_kernel']": (None, "model", "fsdp"),
        "['blocks']['feedforward_norm']['scale']": (None, "fsdp"),
        "['query_block']['feedforward']['down_kernel']": ("model", "fsdp"),
    }
    for name, axes in expected.items():
        same = {key: value for key, value in found.items() if key.endswith(name)}
        assert len(same) == 3 and set(same.values()) == {axes}, name  # the parameter, AdamW's mu and nu
    assert found[".step"] == () and found[".rng"] == (None,)
    overridden = specs(MeshShape(data=2, fsdp=2, model=2, rules=(("embed", None), ("vocab", ("fsdp", "model")))))
    assert overridden[".params['token_embedding']"] == (("fsdp", "model"), None)
    assert overridden[".params['blocks']['attention']['query_kernel']"] == (None, None, "model")


def test_on_tpu_rows_are_split_where_the_mesh_divides_them(monkeypatch):
    monkeypatch.setattr(partitioning, "is_laid_by_rows", lambda mesh: True)
    found = specs(MIXED)
    for name, axes in {
        ".params['blocks']['attention']['output_kernel']": (None, ("model", "fsdp"), None),
        ".params['query_block']['feedforward']['down_kernel']": (("model", "fsdp"), None),
        ".params['blocks']['attention']['query_kernel']": (None, "fsdp", "model"),
        ".params['blocks']['feedforward']['up_kernel']": (None, "fsdp", "model"),
        ".params['blocks']['feedforward']['down_bias']": (None, "fsdp"),
        ".params['token_embedding']": ("model", "fsdp"),
    }.items():
        moments = [key for key in found if key.endswith(name.removeprefix(".params"))]
        assert len(moments) == 3 and {found[key] for key in moments} == {axes}, name
    narrow = specs(MIXED, dataclasses.replace(CONFIG, feedforward=66))  # 66 rows: by 2, and not by 4
    assert narrow[".params['blocks']['feedforward']['down_kernel']"] == (None, "model", "fsdp")
    whole = specs(dataclasses.replace(MIXED, rules=(("embed", None),)))
    assert whole[".params['blocks']['feedforward']['down_kernel']"] == (None, "model", None)


@pytest.mark.parametrize(("shape", "rows", "at_once"), [
    (MeshShape(data=1, fsdp=8), 20, True), (MeshShape(data=1, fsdp=8), 64, False), (MeshShape(data=8), 20, False),
    (MeshShape(data=2, fsdp=2, model=2), 20, False),
], ids=["part_of_a_tile", "whole_tiles", "not_split", "columns_split_too"])
def test_kernels_of_parts_of_tiles_are_gathered_at_once(monkeypatch, shape, rows, at_once):
    monkeypatch.setattr(parts_module, "platform", lambda: "tpu")
    assert not parts_module.gathers_at_once(rows)  # on one device
    with jax.set_mesh(make_mesh(shape)), nn.logical_axis_rules(shape.all_rules()):
        assert parts_module.gathers_at_once(rows) is at_once
        monkeypatch.setattr(parts_module, "platform", lambda: "gpu")
        assert not parts_module.gathers_at_once(rows)


def test_grouped_heads_are_sharded_where_the_mesh_divides_them():
    found = specs(MIXED, GROUPED)
    attention = ".params['blocks']['attention']"
    assert found[f"{attention}['query_kernel']"] == found[f"{attention}['key_kernel']"] == (None, "fsdp", "model")
    assert found[f"{attention}['value_bias']"] == (None, "model", None)
    assert found[f"{attention}['key_norm']['scale']"] == (None, "model", None)
    assert found[".params['lm_head']"] == ("model", "fsdp")
    one_head = dataclasses.replace(GROUPED, kv_heads=1)
    refusal = ("cannot divide the parameter model.kv_heads = 1 into 2: choose a mesh.model that does, or keep keys and "
               "values whole on each device with --gin.mesh.rules=")
    with pytest.raises(ValueError, match=refusal) as raised:
        specs(MIXED, one_head)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="cannot divide the parameter model.heads = 4 into 8: choose .* does.$"):
        specs(MeshShape(data=1, model=8, rules=WHOLE_KEYS), dataclasses.replace(one_head, query_key_norm="none",
                                                                               biases="none"))
    found = specs(dataclasses.replace(MIXED, rules=WHOLE_KEYS), one_head)
    assert found[f"{attention}['query_kernel']"] == (None, "fsdp", "model")
    assert found[f"{attention}['key_kernel']"] == (None, "fsdp", None)


@pytest.mark.parametrize(("kv_heads", "rules"), [(2, ()), (1, WHOLE_KEYS)])
def test_grouped_heads_compute_the_same_on_a_mesh(kv_heads, rules):
    shape, config = dataclasses.replace(MIXED, rules=rules), dataclasses.replace(GROUPED, kv_heads=kv_heads)
    model, dice = Decoder(config), np.random.default_rng(0)
    ids = dice.integers(0, 16, (8, 16)).astype(np.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids, ids)["params"])

    def run(params: object) -> tuple:
        return jax.value_and_grad(lambda params: jnp.sum(jnp.sin(
            model.apply({"params": params}, ids, ids, ids * 0))))(params)

    expected = jax.jit(run)(params)
    abstract = abstract_state(model, adamw(lambda step: 1e-3), make_mesh(shape), shape).params
    with jax.set_mesh(make_mesh(shape)), nn.logical_axis_rules(shape.all_rules()):
        found = jax.jit(run)(jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, abstract))
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4), found, expected)


def test_programs_for_several_cpu_devices_are_compiled_anew_in_each_process(tmp_path):
    """One read back from JAX's cache ended in a deadlock, such as that of the test before with one head of keys."""
    script = """if True:
        import jax, sys
        from codellm_jax.runtime.partitioning import MeshShape, make_mesh
        jax.jit(lambda x: x + 1)(0.0)  # JAX has looked at its setting
        make_mesh(MeshShape(data=int(sys.argv[1])), jax.devices()[:int(sys.argv[1])])
        jax.jit(lambda x: x + 2)(0.0)
    """
    for devices, kept in (("2", 1), ("1", 2)):
        cache = tmp_path / devices
        subprocess.run([sys.executable, "-c", script, devices], check=True, timeout=120, env=os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"})
        assert len(list(cache.glob("jit_*-cache"))) == kept


def test_the_first_state_lies_where_it_should_and_is_the_same_on_any_mesh():
    model, optimizer = Decoder(CONFIG), adamw(lambda step: 1e-3)
    states = []
    for shape, devices in ((MeshShape(), 1), (MIXED, 8), (MeshShape(data=1, fsdp=8), 8)):
        abstract = abstract_state(model, optimizer, make_mesh(shape, jax.devices()[:devices]), shape)
        state = initial_state(model, optimizer, abstract, seed=3)
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
            assert {shard.data.shape for shard in leaf.addressable_shards} == {
                wanted.sharding.shard_shape(wanted.shape)}
        on_device = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards
                        if shard.device == jax.devices()[0])
        assert on_device == bytes_per_device(abstract)
        states.append(jax.device_get(state))
    for other in states[1:]:
        for one, two in zip(jax.tree.leaves(states[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-6)
    biases = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(states[0].params) if "bias" in str(path[-1])]
    assert biases and not any(leaf.any() for leaf in biases)
    kernel = states[0].params["blocks"]["feedforward"]["up_kernel"]
    assert abs(kernel.std() - 0.02) < 0.002 and np.abs(kernel[0] - kernel[1]).max() > 0.01


def seen_activations(monkeypatch, rules, config=CONFIG) -> tuple[dict[tuple, tuple], jax.sharding.Sharding]:
    """Compiles a forward pass whose inputs and parameters are all replicated, so that nothing but the constraints
    could shard anything; returns the shape that a device holds of each named activation, and the result's sharding."""
    seen: dict[tuple, tuple] = {}
    real = parts_module.constrain

    def watched(array: jax.Array, *axes: str) -> jax.Array:
        constrained = real(array, *axes)
        jax.debug.inspect_array_sharding(constrained, callback=functools.partial(note, constrained.shape, axes))
        return constrained

    def note(shape: tuple[int, ...], axes: tuple[str, ...], sharding: jax.sharding.Sharding) -> None:
        seen[axes[1:]] = sharding.shard_shape(shape)

    mesh = make_mesh(MIXED)
    # The query layer alone: an inspection is an effect, which Flax's scan takes no constants with.
    model = Decoder(dataclasses.replace(config, layers=1))
    params = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), *[jnp.zeros((1, 8), jnp.int32)] * 3)))
    for module in (decoder_module, parts_module):
        monkeypatch.setattr(module, "constrain", watched)
    replicated = NamedSharding(mesh, PartitionSpec())

    def forward(params, tokens):
        hidden = model.apply({"params": params}, tokens, tokens, tokens)
        return hidden, model.apply({"params": params}, hidden, method="logits")

    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        compiled = jax.jit(forward, in_shardings=(replicated, replicated)).lower(
            params["params"], jax.ShapeDtypeStruct((8, 16), jnp.int32)).compile()
    return seen, compiled.output_shardings


def test_activations_are_sharded_by_the_constraints(monkeypatch):
    seen, (hidden, logits) = seen_activations(monkeypatch, MIXED.all_rules())
    assert seen[("activation_length", "activation_embed")] == (2, 16, 32)
    assert seen[("activation_length", "activation_heads", "activation_kv")] == (2, 16, 2, 8)
    assert seen[("activation_length", "activation_mlp")] == (2, 16, 32)
    assert seen[("activation_length", "activation_vocab")] == (2, 16, 64)
    assert hidden.shard_shape((8, 16, 32)) == (2, 16, 32)
    assert logits.shard_shape((8, 16, 128)) == (2, 16, 64)


def test_activations_of_grouped_heads_are_sharded(monkeypatch):
    seen, _ = seen_activations(monkeypatch, MIXED.all_rules(), GROUPED)
    assert seen[("activation_length", "activation_heads", "activation_kv")] == (2, 16, 2, 8)
    assert seen[("activation_length", "activation_kv_heads", "activation_kv")] == (2, 16, 1, 8)


def test_without_rules_the_same_program_shards_nothing(monkeypatch):
    """The control: were the constraints silent no-ops, the test above would see this."""
    seen, (hidden, _) = seen_activations(monkeypatch, [(name, None) for name, _ in AXIS_RULES])
    assert seen[("activation_length", "activation_mlp")] == (8, 16, 64)
    assert hidden.shard_shape((8, 16, 32)) == (8, 16, 32)


def test_an_embedding_stays_where_it_is():
    """No device gathers the table or its gradient: what crosses the network are the rows that were looked up."""
    mesh = make_mesh(MeshShape(data=1, fsdp=8))
    rows, width, batch, length = 4096, 64, 16, 8
    table = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=batch_sharding(mesh))

    def loss(table, ids):
        return jnp.sum(jnp.square(decoder_module._look_up_tokens(table, ids)))

    with jax.set_mesh(mesh), nn.logical_axis_rules(MeshShape().all_rules()):
        compiled = jax.jit(jax.grad(loss), out_shardings=table.sharding).lower(table, ids).compile()
    traffic = read_program(compiled.as_text(), dict(mesh.shape)).traffic
    assert {one.kind for one in traffic} <= {"all-to-all", "all-gather", "all-reduce"}
    looked_up = batch * length * width * 4 / 8
    assert sum(one.sent for one in traffic if one.kind == "all-to-all") > looked_up
    assert sum(one.sent for one in traffic if one.kind != "all-to-all") <= batch * length * 4  # the ids
    dice = np.random.default_rng(0)
    values = dice.normal(size=(rows, width)).astype(np.float32)
    numbers = dice.integers(0, 5, size=(batch, length)).astype(np.int32)
    expected = np.zeros_like(values)
    np.add.at(expected, numbers, 2 * values[numbers])
    np.testing.assert_allclose(
        compiled(jax.device_put(values, table.sharding), jax.device_put(numbers, ids.sharding)), expected, rtol=1e-5)


def test_overridden_rules_reach_activations(monkeypatch):
    rules = MeshShape(rules=(("activation_mlp", None), ("activation_batch", "data"))).all_rules()
    seen, (hidden, _) = seen_activations(monkeypatch, rules)
    assert seen[("activation_length", "activation_mlp")] == (4, 16, 64)
    assert hidden.shard_shape((8, 16, 32)) == (4, 16, 32)


@pytest.mark.slow
def test_offloaded_inputs_of_blocks_lie_with_the_host_and_change_no_gradient():
    """Between the passes the scan hands on one stack of inputs: by "offload" in the host's memory, by no other."""
    shape, ids = MIXED, np.random.default_rng(0).integers(0, 128, (8, 16))
    params = nn.unbox(jax.jit(Decoder(CONFIG).init)(jax.random.key(0), ids, ids % 16, ids * 0)["params"])
    gradients, stacks_with_host = {}, {}
    with jax.set_mesh(make_mesh(shape)), nn.logical_axis_rules(shape.all_rules()):
        for remat in ("full", "offload"):
            model = Decoder(dataclasses.replace(CONFIG, remat=remat))
            gradient = jax.grad(lambda params, model=model: jnp.sum(
                jnp.sin(model.apply({"params": params}, ids, ids % 16, ids * 0))))
            stacks_with_host[remat] = "f32<host>[2,8,16,32]" in str(jax.make_jaxpr(gradient)(params))
            gradients[remat] = jax.jit(gradient)(params)
    assert stacks_with_host == {"full": False, "offload": True}
    assert all(leaf.any() for leaf in jax.tree.leaves(gradients["full"]))
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6), *gradients.values())


def test_bytes_per_device_by_hand():
    mesh = make_mesh(MIXED)
    leaves = {"a": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))),
              "b": jax.ShapeDtypeStruct((5,), jnp.int8, sharding=NamedSharding(mesh, PartitionSpec())),
              "c": jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))}
    assert bytes_per_device(leaves) == math.prod((4, 6)) * 4 + 5 + 4


def test_moments_of_another_shape_than_their_parameter_are_whole_on_each_device():
    """Adafactor keeps means of rows and columns, and a single zero in the place of what it does not keep."""
    optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=16)
    state = abstract_state(Decoder(CONFIG), optimizer, make_mesh(MIXED), MIXED)
    sizes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    others = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape not in sizes]
    assert others and all(leaf.sharding.is_fully_replicated for leaf in others)
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.opt_state))
