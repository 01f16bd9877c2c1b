"""Traffic: bytes computed by hand from programs that are compiled here, and from lines as TPUs' programs have them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from codellm_jax.pods.collectives import Part, Traffic, read_program

SHAPE = {"data": 2, "fsdp": 2, "model": 2}


def traffic_of(function, *specs: PartitionSpec, size: tuple[int, ...] = (16, 64)) -> list[Traffic]:
    """Of a function under shard_map, compiled for eight devices; arguments are float32 of one size."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), tuple(SHAPE), axis_types=(AxisType.Auto,) * 3)
    arrays = [jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in specs]
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    found, unknown, *_ = read_program(jax.jit(mapped).lower(*arrays).compile().as_text(), SHAPE)
    assert unknown == 0
    return found


@pytest.mark.parametrize(("axes", "devices"), [(("data",), 2), (("fsdp",), 2), (("model",), 2),
                                               (("data", "model"), 4), (("data", "fsdp", "model"), 8)])
def test_bytes_and_axes_of_a_sum(axes, devices):
    found = traffic_of(lambda x: jax.lax.psum(x, axes), PartitionSpec())
    assert found == [Traffic("all-reduce", axes, 1, 2 * (devices - 1) / devices * 16 * 64 * 4)]


def test_bytes_of_the_other_kinds():
    gathered = traffic_of(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True).sum(), PartitionSpec("fsdp"))
    assert gathered == [Traffic("all-gather", ("fsdp",), 1, 1 / 2 * 16 * 64 * 4)]
    scattered = traffic_of(lambda x: jax.lax.psum_scatter(x, ("data", "fsdp"), tiled=True).sum(), PartitionSpec())
    assert scattered == [Traffic("reduce-scatter", ("data", "fsdp"), 1, 3 / 4 * 16 * 64 * 4)]
    swapped = traffic_of(lambda x: jax.lax.ppermute(x, "model", [(0, 1), (1, 0)]), PartitionSpec())
    assert swapped == [Traffic("collective-permute", ("model",), 1, 16 * 64 * 4)]


def test_a_loop_sends_as_often_as_it_turns():
    def nested(x):
        def outer(x, _):
            return jax.lax.scan(lambda y, _: (jnp.sin(jax.lax.psum(y, "fsdp")), None), x, None, length=5)[0], None
        return jax.lax.psum(jax.lax.scan(outer, x, None, length=7)[0], "model")

    found = traffic_of(nested, PartitionSpec())
    assert found == [Traffic("all-reduce", ("fsdp",), 35, 35 * 4096.0), Traffic("all-reduce", ("model",), 1, 4096.0)]


def test_a_loop_of_unknown_length_is_counted_for_one_turn_and_told():
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    looped = jax.shard_map(lambda x, n: jax.lax.fori_loop(0, n[0], lambda _, y: jnp.sin(jax.lax.psum(y, "data")), x),
                           mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    text = jax.jit(looped).lower(jnp.ones(8), jnp.ones(1, jnp.int32)).compile().as_text()
    found, unknown, *_ = read_program(text, {"data": 8})
    assert found == [Traffic("all-reduce", ("data",), 1, 2 * 7 / 8 * 32)] and unknown == 1


# As XLA for TPU writes them: it shortens what does not matter here.
TPU = """HloModule jit_train_step
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (input.7: f32[40064,2560]) -> f32[40064,640] {
  %all-reduce.99 = f32[400,64]{1,0} all-reduce(%input.7), channel_id=20, replica_groups={{0,1,2,3}}
  ROOT %dynamic-slice.384 = f32[400,16]{1,0} dynamic-slice(%all-reduce.99, %c, %m), dynamic_slice_sizes={400,16}
}

%piece.1 (p: f32[4]) -> f32[4] {
  ROOT %all-gather.180 = f32[4,10]{1,0} all-gather(%p), channel_id=46, replica_groups=mesh['a'=1,'b'=4] {'b'}
}

%piece.2 (p: f32[4]) -> f32[4] {
  ROOT %all-gather.182 = f32[4,10]{1,0} all-gather(%p), channel_id=46, replica_groups=mesh['a'=1,'b'=4] {'b'}
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(31)
  %p.1 = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %constant.5), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %fusion.532 = f32[400,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[]{:T(128)}, f32[4]{0}) tuple(%n, %y)
}

ENTRY %main.118_spmd (param.61: s32[]) -> f32[4] {
  %constant.1 = s32[]{:T(128)} constant(1)
  %copy.1 = s32[]{:T(128)} copy(%constant.1)
  %tuple.295 = (s32[]{:T(128)}, f32[4]{0}) tuple(%copy.1, /*index=1*/%z)
  %while.75 = (s32[]{:T(128)}, f32[4]{0}) while(%tuple.295), condition=%condition, body=%body, metadata={op_name="x"}
  %start = f32[4] fusion(%z), kind=kLoop, calls=%piece.1
  %done = f32[4] fusion(%start), kind=kLoop, calls=%piece.2
  %all-gather-start.2 = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%z), channel_id=3, replica_groups=[1,4]<=[4]
  %all-reduce.161 = (f32[100]{0}, bf16[100]{0}) all-reduce(%a, %b), channel_id=68, replica_groups={{0,2},{1,3}}
  %alone = f32[99]{0} all-reduce(%a), channel_id=69, replica_groups={{0},{1},{2},{3}}
  ROOT %r = f32[4]{0} get-tuple-element(%while.75), index=1
}
"""


def test_lines_of_a_program_for_tpus():
    found, unknown, *_ = read_program(TPU, {"data": 2, "fsdp": 2, "model": 1})
    assert unknown == 0
    both = ("data", "fsdp")
    assert {(one.kind, one.axes): (one.operations, one.sent) for one in found} == {
        ("reduce-scatter", both): (30, 30 * 3 / 4 * 400 * 64 * 4),  # turns 1 to 30
        ("all-gather", both): (2, 3 / 4 * 160 + 3 / 4 * 32 * 4 * 2),  # one of them in two pieces
        ("all-reduce", ("data",)): (1, 2 * 1 / 2 * 100 * (4 + 2)),
    }


# A loop of 5 turns that gathers beside a matmul (in three places under one channel) and waits for two sums, one
# of what was gathered; outside it a gather that has begun before what else is computed.
SCHEDULED = """HloModule jit_train_step
%begin.1 (p: f32[4]) -> f32[16] {
  ROOT %all-gather.1 = f32[16]{0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4]
}

%async_collective_fusion.2 (p: f32[4], x: f32[9]) -> f32[16] {
  %all-gather.2 = f32[16]{0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4]
  ROOT %product = f32[16]{0} fusion(%x), backend_config={"window_config":{"estimated_cycles":"7"}}
}

%all-reduce-scatter.4 (p: f32[80]) -> f32[20] {
  %all-reduce.4 = f32[80]{0} all-reduce(%p), channel_id=4, replica_groups=[1,4]<=[4]
  ROOT %mine = f32[20]{0} dynamic-slice(%all-reduce.4, %c), dynamic_slice_sizes={20}
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %constant.5 = s32[] constant(5)
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%counter, %constant.5), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %async-collective-start.1 = f32[16]{0} fusion(%y), kind=kCustom, calls=%begin.1
  %fusion.2 = f32[16]{0} fusion(%y), calls=%async_collective_fusion.2, backend_config={"estimated_cycles":"1000"}
  %async-collective-done.1 = f32[16]{0} fusion(%fusion.2), kind=kCustom, calls=%begin.1
  %all-reduce.3 = f32[100]{0} all-reduce(%g), channel_id=2, replica_groups=[1,4]<=[4], metadata={op_name="x"}
  %fusion.4 = f32[20]{0} fusion(%async-collective-done.1), kind=kCustom, calls=%all-reduce-scatter.4
  %kernel = f32[9]{0} custom-call(%q), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], f32[4]{0}) tuple(%n, %y)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %zero = s32[] constant(0)
  %tuple.1 = (s32[], f32[4]{0}) tuple(%zero, %a)
  %while.1 = (s32[], f32[4]{0}) while(%tuple.1), condition=%condition, body=%body
  %all-gather-start.2 = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), channel_id=3, replica_groups=[1,4]<=[4]
  %copy.1 = f32[9]{0} copy(%c), backend_config={"flag_configs":[],"estimated_cycles":"30"}
  %copy.2 = f32[9]{0} copy(%c), backend_config={"flag_configs":[],"estimated_cycles":"12"}
  ROOT %r = f32[4]{0} get-tuple-element(%while.1), index=1
}
"""


def test_what_a_program_sends_while_it_computes():
    found = read_program(SCHEDULED, {"fsdp": 4})
    gather, reduced, scattered = 3 / 4 * 16 * 4, 2 * 3 / 4 * 100 * 4, 3 / 4 * 80 * 4
    assert found.traffic == [Traffic("all-reduce", ("fsdp",), 5, 5 * reduced),
                             Traffic("reduce-scatter", ("fsdp",), 5, 5 * scattered),
                             Traffic("all-gather", ("fsdp",), 6, 6 * gather, 6 * gather)]
    assert found.parts == [Part(1, 42, 0.0, gather, 0.0), Part(5, 1000, reduced + scattered, gather, 0.0)]
    assert found.has_kernels and not read_program(RING, {"fsdp": 2}).has_kernels


# A matmul whose weights go around a ring while it runs: two pieces a turn, one each way.
RING = """HloModule jit_train_step
%condition.2 (p: (f32[8], u32[])) -> pred[] {
  %bound = u32[]{:T(128)} constant(16)
  %p.1 = (f32[8]{0}, u32[]{:T(128)}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%p.1), index=1
  ROOT %lt = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%body.2 (p: (f32[8], u32[])) -> (f32[8], u32[]) {
  %p.2 = (f32[8]{0}, u32[]{:T(128)}) parameter(0)
  %counter.2 = u32[]{:T(128)} get-tuple-element(%p.2), index=1
  %two = u32[]{:T(128)} constant(2)
  %more = u32[]{:T(128)} add(%counter.2, %two), metadata={op_name="x"}
  %sent.1 = f32[8]{0} collective-permute(%a), channel_id=5, source_target_pairs={{0,1},{1,0}}
  %sent.2 = f32[8]{0} collective-permute(%sent.1), channel_id=6, source_target_pairs={{0,1},{1,0}}
  ROOT %t = (f32[8]{0}, u32[]{:T(128)}) tuple(%sent.2, %more), metadata={op_name="x"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %zero = u32[]{:T(128)} constant(0)
  %begin = (f32[8]{0}, u32[]{:T(128)}) tuple(%a, %zero)
  %while.1 = (f32[8]{0}, u32[]{:T(128)}) while(%begin), condition=%condition.2, body=%body.2
  ROOT %r = f32[8]{0} get-tuple-element(%while.1), index=0
}
"""


def test_a_loop_that_counts_by_two_turns_half_as_often():
    assert read_program(RING, {"fsdp": 2})[:2] == ([Traffic("collective-permute", ("fsdp",), 16, 16 * 32.0)], 0)


@pytest.mark.parametrize(("groups", "axes"), [
    ("[2,4]<=[8]", ("fsdp", "model")), ("[4,2]<=[2,4]T(1,0)", ("data",)), ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "model")),
    ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)), ("mesh['a'=2,'b'=4] {'b'}", ("fsdp", "model")),
    ("mesh['a'=2,'b'=4] {'a'}", ("data",)), ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data", "fsdp")),
    ("mesh['a'=2,'b'=4], device_ids=(0,4,1,5,2,6,3,7) {'a'}", ("fsdp",)), ("{}", ("data", "fsdp", "model")),
])
def test_ways_to_write_groups(groups, axes):
    text = ("ENTRY %main (p: f32[4]) -> f32[4] {\n"
            f"  ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add\n}}\n")
    (found,) = read_program(text, SHAPE).traffic
    devices = math.prod(SHAPE[axis] for axis in axes)
    assert found == Traffic("all-reduce", axes, 1, 2 * (devices - 1) / devices * 16)


def test_what_hosts_send_between_slices():
    line = ('  %send.34 = (f32[17,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%b, %after-all), channel_id=2, '
            'is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",'
            '_xla_megascale_transfer_type="ALL_REDUCE"}')
    text = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n{line}\n}}\n"
    found, *_ = read_program(text, {"slices": 2, "data": 1, "fsdp": 8})
    sent = 17 * 8 * 128 * 4
    assert found == [Traffic("all-reduce", ("slices",), 1, sent, sent)]


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_program("module @jit_step {}", SHAPE)
