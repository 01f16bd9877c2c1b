"""How long a train step takes: at least, by what it computes, reads and sends and by what a chip can in a second; and
about, by the cycles that its compiler estimates."""

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
    "a step takes the longest of these if all overlap, their sum if none do; latencies and the host are left out.",
)

ATTENTION_PART = 0.5  # of the peak: what attention's kernel is taken to reach with heads of a multiple of 128
ESTIMATED = (
    "computing: the cycles that the compiler estimates for each operation, at the core's clock; it gives none for "
    "gathers of rows, sorts and copies beside computing, which count nothing;",
    "attention's kernel, for which it gives none: its FLOPs by causality, and those made again, at "
    f"{ATTENTION_PART:.0%} of the peak, less where heads are padded to 128;",
    "links: rings that keep all links of a chip busy; collectives that the program waits for take their time alone;",
    "asynchronous collectives take no time as far as their loop's computing covers them, as if it did so evenly;",
    "latencies, the host and input are left out.",
)


class Estimate(NamedTuple):
    """Seconds of one step, by a compiled program's text."""

    computing: float
    attention: float
    waiting: float  # for collectives that stand alone
    uncovered: float  # of asynchronous collectives, what computing does not cover
    step: float  # their sum
    utilization: float  # model FLOPs, causal, over the peak


class Roofline(NamedTuple):
    """Seconds of one step."""

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
    """Bounds the time of a train step from below, under ASSUMPTIONS.

    Args:
      config: the decoder.
      tokens: of the global batch.
      topology: its chip gives the bandwidths.
      device_kind: gives the peak, as JAX names it.
      devices: that share the work evenly.
      arguments, temporaries: bytes of a device.
      traffic: bytes that a device sends; over the network those along "slices".
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
    """Estimates the time of a train step, as ESTIMATED says.

    Args:
      config: the decoder.
      tokens: of the global batch.
      topology: its chip gives clock and bandwidths.
      device_kind: gives the peak, as JAX names it.
      devices: that share the work evenly.
      parts: of the compiled program (`collectives.read_program`).
      has_kernels: whether attention is a kernel of its own, without estimated cycles.
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
    """FLOPs of attention's own products, causal, those made again counted in, per token of a full row:

      7 layers L H K    two products forward, four backward, and the scores made again;
      9 layers L H K    under "offload" and "full", which run the forward pass twice
    """
    again = 2 if config.remat in ("offload", "full") else 0
    return float((7 + again) * config.layers * config.length * config.query_width)


def recomputed_flops_per_token(config: DecoderConfig) -> float:
    """FLOPs that a backward pass computes again, per token of a full row, a layer's being

      under "offload", "full"  2 (2 D H K + 2 D G K + D F)  +  2 L H K    projections, the MLP's first matmul (2 D F if
                                                                         gated), attention's products
      under "attention"        2 (D H K + D F)                           the output projection, the MLP's first matmul
      under "dots", "none"     0                                         but what is elementwise

    and L H K more whatever is kept, for attention keeps no scores: its backward pass makes them again. Products of
    attention are counted by half, as causality allows. The MLP's second matmul is not made again, for no gradient
    takes what it returns, but that of a norm behind it. So it is with the output projection where the MLP stands beside
    attention (residual "parallel") and takes nothing of it.
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
