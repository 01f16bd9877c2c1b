"""Topologies of TPUs that are not attached: their names, the properties of their chips, and devices to compile for.

    devices = compile_only_devices(parse_topology("v4-128"))

Names are Cloud TPU's: v2, v3, v4 and v5p count TensorCores (v4-128 has 64 chips), v5e (or v5litepod) and v6e count
chips; 2xv5e-256 means two slices. `gpu:2` means two GPUs of one machine, with their memory given; this machine's
processor stands in for them.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import math
import os
import re
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """The properties of a TPU generation, for each device that JAX sees: a chip, or in v2 and v3 one of its two cores.

    Memory is the compiler's limit. Bandwidths are the vendor's, in bytes/s: of the memory; of all links to other chips
    of the slice together, one way; and of the chip's share of its host's network cards, one way.

    Attributes:
      cores_in_name: TensorCores per chip if names count those, else 1.
      devices: per chip.
      largest: the number of chips in the largest slice.
      cube: slices are three-dimensional, made of cubes of 4 x 4 x 4 from 64 chips on; else two-dimensional.
      ring: the number of chips along one dimension from which links close it to a ring.
      clock: cycles/s of a core: the vendor's bfloat16 peak divided by the multiply-adds of its matrix units per cycle.
    """

    memory_gib: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    cores_in_name: int
    devices: int
    largest: int
    cube: bool
    ring: int
    clock: float


CHIPS = {
    "v2": Chip(7.48, 350 * GIGA, 124 * GIGA, 1.6 * GIGA, 2, 2, 256, False, 16, 0.7 * GIGA),
    "v3": Chip(15.48, 450 * GIGA, 164 * GIGA, 1.6 * GIGA, 2, 2, 1024, False, 32, 0.94 * GIGA),
    "v4": Chip(30.75, 1200 * GIGA, 300 * GIGA, 6.25 * GIGA, 2, 1, 4096, True, 4, 1.05 * GIGA),
    "v5e": Chip(15.75, 819 * GIGA, 200 * GIGA, 3.1 * GIGA, 1, 1, 256, False, 16, 1.5 * GIGA),
    "v5p": Chip(95.74, 2765 * GIGA, 600 * GIGA, 6.25 * GIGA, 2, 1, 6144, True, 4, 1.75 * GIGA),
    "v6e": Chip(31.25, 1640 * GIGA, 400 * GIGA, 12.5 * GIGA, 1, 1, 256, False, 16, 1.75 * GIGA),
}
MOST_SLICES = 256


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice, or several equal ones; or GPUs."""

    name: str
    generation: str  # a key of CHIPS, or "gpu"
    shape: tuple[int, ...]  # chips of a slice along each dimension
    slices: int = 1
    memory_gib: float = math.nan  # of a GPU

    @property
    def chip(self) -> Chip:
        """The properties of its chip; for a GPU, only the memory is known."""
        if self.generation == "gpu":
            return Chip(self.memory_gib, math.nan, math.nan, math.nan, 1, 1, 1, False, self.chips + 1, math.nan)
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """The number in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def rings(self) -> tuple[bool, ...]:
        """For each dimension, whether links close it to a ring: in three-dimensional slices, only dimensions of whole
        cubes ("System architecture", Cloud TPU's documentation).
        """
        whole = not self.chip.cube or all(side % self.chip.ring == 0 for side in self.shape)
        return tuple(whole and side >= self.chip.ring for side in self.shape)


def _shape(chips: int, cube: bool) -> tuple[int, ...] | None:
    """The shape that Cloud TPU gives a slice of this many chips; None if there is no such slice."""
    if chips == 1:
        return None if cube else (1, 1)
    if cube and chips > 32:
        cubes, rest = divmod(chips, 64)
        if rest:
            return None
        sides = [(a, b, cubes // a // b) for a in range(1, cubes + 1) for b in range(a, cubes + 1)
                 if cubes % (a * b) == 0 and cubes // a // b >= b]
        return tuple(4 * side for side in min(sides, key=sum))
    if chips < 4 or chips & (chips - 1):
        return None
    power = chips.bit_length() - 1
    if cube:  # 2x2x1, 2x2x2, 2x2x4, 2x4x4
        return {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}[chips]
    return 1 << power // 2, 1 << (power + 1) // 2


def topology_names() -> dict[str, Topology]:
    """All slices by name, smallest first."""
    found = {}
    for generation, chip in CHIPS.items():
        for chips in range(1, chip.largest + 1):
            shape = _shape(chips, chip.cube)
            if shape is not None and (chips > 1 or chip.cores_in_name == 1):
                name = f"{generation}-{chips * chip.cores_in_name}"
                found[name] = Topology(name, generation, shape)
    return found


def parse_topology(name: str) -> Topology:
    """The topology with a name such as v4-128, v5litepod-16 or 2xv5e-256.

    Raises:
      ValueError: there is none of this name; the one-line message has the nearest names.
    """
    slices, one = re.fullmatch(r"(?:(\d+)x)?(.*)", name.strip().lower()).groups()  # type: ignore[union-attr]
    one = re.sub(r"^v5litepod-", "v5e-", one)
    known = topology_names()
    if one not in known:
        generation, _, size = one.partition("-")
        if generation in CHIPS and size.isdecimal():
            sizes = {known_name: int(known_name.partition("-")[2]) for known_name, topology in known.items()
                     if topology.generation == generation}
            near = sorted(sizes, key=lambda other: abs(math.log(sizes[other] / max(1, int(size)))))[:3]
        else:
            near = difflib.get_close_matches(one, [n for n in known if known[n].chips <= 256], n=3, cutoff=0.0)
        counted = "TensorCores" if generation in CHIPS and CHIPS[generation].cores_in_name == 2 else "chips"
        raise ValueError(f"There is no TPU topology {name!r}" + (
            f" (the number counts {counted})" if generation in CHIPS else "") + f"; nearest: {', '.join(near)}.")
    topology = dataclasses.replace(known[one], slices=int(slices or 1))
    if not 1 <= topology.slices <= MOST_SLICES or (topology.slices > 1 and topology.generation in ("v2", "v3")):
        raise ValueError(f"{name!r}: slices are joined from v4 on, 1 to {MOST_SLICES} of them.")
    return dataclasses.replace(topology, name=(f"{slices}x" if topology.slices > 1 else "") + one)


def with_memory(name: str, memory: str | None) -> Topology:
    """The topology of a name for TPUs, or of GPUs such as gpu:2, each with this much memory.

    Raises:
      ValueError: with a one-line message; the name is unknown, or the memory is missing, malformed or given for TPUs.
    """
    cards = re.fullmatch(r"gpu:([1-9]\d*)", name.strip().lower())
    if not cards:
        if memory is not None:
            raise ValueError(f"--memory is for cards such as --topology=gpu:2; how much {name!r} has is known.")
        return parse_topology(name)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB)?", memory or "", re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"--topology={name} needs the memory of a card, such as --memory=80GiB" + (
            f"; found {memory!r}." if memory else "."))
    gib = float(found[1]) * (GIGA / 2**30 if (found[2] or "").lower() == "gb" else 1)
    return Topology(cards[0], "gpu", (int(cards[1]),), memory_gib=gib)


def _devices_of_this_machine(count: int) -> "list[jax.Device]":
    """`count` devices of this machine's processor, which share its cores.

    Raises:
      ValueError: JAX has started with fewer.
    """
    flags, count_flag = os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count"
    if count_flag not in flags:  # read once, at the first use of devices
        os.environ["XLA_FLAGS"] = f"{flags} {count_flag}={count}".strip()
    import jax

    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"{count} cards were requested, but JAX has started with {len(devices)} devices here.")
    return devices[:count]


def compile_only_devices(topology: Topology, report: Callable[[str], None] = print) -> "list[jax.Device]":
    """Devices that programs can be compiled for but not run on; waits for other processes that use libtpu.

    Raises:
      ValueError: libtpu is not installed, or is in use by a program other than this package's.
    """
    if topology.generation == "gpu":
        return _devices_of_this_machine(topology.chips)
    if not has_libtpu():
        raise ValueError("TPU programs are compiled by libtpu, which is not installed: pip install '.[tpu]'.")
    _wait_for_compiler(report)
    # Without these, libtpu queries the metadata of a TPU machine for minutes, and complains that there is none.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v4-8"),
                        ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.generation == "v4":
        options["chip_config_name"] = "megacore"  # both TensorCores of a chip are one device
    if topology.shape == (1, 1):
        options["chips_per_host_bounds"] = [1, 1, 1]
    if any(topology.rings):
        options["wrap"] = [*topology.rings, *[False] * (3 - len(topology.rings))]
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    layout = "x".join(map(str, topology.shape))
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{topology.generation}:{layout}", **options)
    except RuntimeError as error:
        if "lockfile" not in str(error):
            raise
        raise ValueError("another program on this machine holds libtpu, which serves one process at a time: wait until "
                         "it has ended, or if there is none remove /tmp/libtpu_lockfile.") from None
    return list(found.devices)


def has_libtpu() -> bool:
    """Whether programs for TPUs can be compiled here."""
    from importlib.util import find_spec

    return find_spec("libtpu") is not None


def _wait_for_compiler(report: Callable[[str], None]) -> None:
    """Waits for other processes of this machine that compile for TPUs: libtpu aborts in the second one.

    A process holds libtpu until it ends, and likewise this lock.
    """
    global _lock
    if _lock is not None:
        return
    path = os.path.join(tempfile.gettempdir(), "codellm_jax_libtpu.lock")
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR))
        os.chmod(path, 0o666)  # all users of the machine share the lock
    _lock = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        report("Waiting for another process of this machine that compiles for TPUs.")
        fcntl.flock(_lock, fcntl.LOCK_EX)


_lock: int | None = None  # file descriptor, open while this process lives
