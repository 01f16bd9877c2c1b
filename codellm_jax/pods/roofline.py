"""The time of a train step: a lower bound from its computation, memory access and traffic and the chip's peak rates;
and an estimate from the compiler's cycle counts.
"""

from collections.abc import Sequence
from typing import NamedTuple

from codellm_jax.model.decoder import DecoderConfig, flops_per_token, products_of_block
from codellm_jax.model.splash import LANES
from codellm_jax.pods.collectives import Part, Traffic
from codellm_jax.pods.topologies import Topology
from codellm_jax.runtime.progress import PEAK_FLOPS

ASSUMPTIONS = (
    "computing: model FLOPs with causal attention counted as half, plus recomputation by remat, at the vendor's "
    "bfloat16 peak;",
    "memory: arguments are read and written once, temporaries written and read once, at the vendor's bandwidth;",
    "links: rings that keep all links of a chip busy in both directions; slices without wrap-around links have "
    "fewer;",
    "network: traffic between slices, over its share of the host's network cards;",
    "a step takes the longest of these if all overlap, their sum if none do; latencies and the host are ignored.",
)

ATTENTION_PART = 0.5  # of the peak: the assumed rate of attention's kernel for heads of a multiple of 128
ESTIMATED = (
    "computing: the cycles that the compiler estimates for each operation, at the core's clock; it estimates none for "
    "gathers of rows, sorts and concurrent copies, which count as zero;",
    "attention's kernel, without compiler estimate: its causal FLOPs, including recomputation, at "
    f"{ATTENTION_PART:.0%} of the peak, less where heads are padded to 128;",
    "links: rings that keep all links of a chip busy; collectives that the program waits for take their time alone;",
    "asynchronous collectives take no time as far as their loop's computation covers them, assumed to be even;",
    "latencies, the host and input are ignored.",
)


class Estimate(NamedTuple):
    """The estimated seconds of one step, from a compiled program's text."""

    computing: float
    attention: float
    waiting: float  # for collectives without concurrent computation
    uncovered: float  # the part of asynchronous collectives not covered by computation
    step: float  # their sum
    utilization: float  # model FLOPs, causal, over the peak


class Roofline(NamedTuple):
    """The seconds of one step."""

    computing: float
    memory: float
    links: float
    network: float
    overlapped: float  # the longest of the four
    in_turn: float  # their sum
    utilization: float  # model FLOPs, causal, over the peak, if all overlap


def roofline(
    config: DecoderConfig, tokens: int, topology: Topology, device_kind: str, devices: int, arguments: float,
    temporaries: float, traffic: Sequence[Traffic],
) -> Roofline:
    """A lower bound for the time of a train step, under ASSUMPTIONS.

    Args:
      config: the decoder.
      tokens: of the global batch.
      topology: its chip determines the bandwidths.
      device_kind: determines the peak, as named by JAX.
      devices: the number that share the work evenly.
      arguments, temporaries: bytes per device.
      traffic: the bytes that a device sends; entries along "slices" cross the network.
    """
    peak = PEAK_FLOPS[device_kind]
    model_flops = flops_per_token(config, causal=True) * tokens / devices
    computing = (model_flops + recomputed_flops_per_token(config) * tokens / devices) / peak
    memory = 2 * (arguments + temporaries) / topology.chip.memory_bandwidth
    between = sum(one.sent for one in traffic if "slices" in one.axes)
    links = (sum(one.sent for one in traffic) - between) / topology.chip.link_bandwidth
    network = between / topology.chip.network_bandwidth
    parts = computing, memory, links, network
    return Roofline(*parts, max(parts), sum(parts), model_flops / peak / max(parts))


def estimate(
    config: DecoderConfig, tokens: int, topology: Topology, device_kind: str, devices: int, parts: Sequence[Part],
    has_kernels: bool,
) -> Estimate:
    """An estimate for the time of a train step, under ESTIMATED.

    Args:
      config: the decoder.
      tokens: of the global batch.
      topology: its chip determines clock and bandwidths.
      device_kind: determines the peak, as named by JAX.
      devices: the number that share the work evenly.
      parts: of the compiled program (`collectives.read_program`).
      has_kernels: whether attention is a separate kernel, without estimated cycles.
    """
    peak, chip = PEAK_FLOPS[device_kind], topology.chip
    computing = sum(part.turns * part.cycles for part in parts) / chip.clock
    attention = 0.0
    if has_kernels:
        padded = -(-config.size_of_head // LANES) * LANES / config.size_of_head
        attention = attention_flops_per_token(config) * padded * tokens / devices / peak / ATTENTION_PART
    waiting = sum(part.turns * part.waiting for part in parts) / chip.link_bandwidth
    uncovered = sum(
        part.turns * max(0.0, part.asynchronous / chip.link_bandwidth - part.cycles / chip.clock,
                         part.between_slices / chip.network_bandwidth - part.cycles / chip.clock) for part in parts)
    step = computing + attention + waiting + uncovered
    return Estimate(computing, attention, waiting, uncovered, step,
                    flops_per_token(config, causal=True) * tokens / devices / peak / step)


def attention_flops_per_token(config: DecoderConfig) -> float:
    """The FLOPs of attention's own products, causal, including recomputation, per token of a full row:

      7 layers L H K    two products forward, four backward, and the scores recomputed;
      9 layers L H K    under "offload" and "full", which run the forward pass twice
    """
    again = 2 if config.remat in ("offload", "full") else 0
    return float((7 + again) * config.layers * config.length * config.query_width)


def recomputed_flops_per_token(config: DecoderConfig) -> float:
    """The FLOPs that a backward pass recomputes, per token of a full row; for each layer

      under "offload", "full"  2 (2 D H K + 2 D G K + D F)  +  2 L H K    projections, the MLP's first matmul (2 D F if
                                                                         gated), attention's products
      under "attention"        2 (D H K + D F)                           the output projection, the MLP's first matmul
      under "dots", "none"     0                                         only elementwise operations

    plus L H K in every case, since attention keeps no scores: its backward pass recomputes them. Products of attention
    count as half, for causality. The MLP's second matmul is not recomputed, because no gradient needs its output except
    that of a norm after it. The same holds for the output projection if the MLP runs beside attention (residual
    "parallel") and does not use its output.
    """
    attention, products = config.length * config.query_width, products_of_block(config)
    normed = config.norm_place == "after"
    behind_attention = products.expand + (products.output if normed or config.residual == "sequential" else 0) + (
        products.contract if normed else 0)
    all_of_block = 2 * (products.query + products.key_value + behind_attention) + 2 * attention
    again = {
        "offload": all_of_block,
        "full": all_of_block,
        "attention": 2 * behind_attention,
    }.get(config.remat, 0)
    return float(config.layers * (again + attention))
