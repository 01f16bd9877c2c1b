"""The traffic between devices of a compiled program and its timing, read from the program's text (HLO).

    for traffic in read_program(compiled.as_text(), {"data": 1, "fsdp": 64, "model": 1}).traffic: ...

XLA writes a loop's body once and does not report the total traffic. Here each collective counts once for each iteration
of the loops around it, and its group of devices is mapped back to the axes of the mesh.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# The bytes that a device sends, with rings, per byte of result in a group of n devices; the result of a reduce-scatter
# is 1/n of its input.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
# The same per byte of input, for XLA's transfers between slices through the host.
SENT_BY_HOST = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "one-to-one": lambda n: 1,
}
ITEM_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4, "token": 0}  # other types contain their bits: f32, s8, f8e4m3fn

_NAME = r"%?([\w.\-]+)"
_COMPUTATION = re.compile(rf"^(ENTRY )?{_NAME} \(.*\{{$")
_COLLECTIVE = re.compile(rf"^\s+(?:ROOT )?{_NAME} = (.*?) ({'|'.join(SENT)})(-start)?\(")
_HOST = re.compile(rf"^\s+(?:ROOT )?{_NAME} = \((\S+?), .* send\(.*_xla_megascale_transfer_type=\"(\w+)\"")
_WHILE = re.compile(rf" while\({_NAME}\), condition={_NAME}, body={_NAME}")
_CALLED = re.compile(rf"(?:calls|to_apply|true_computation|false_computation)={_NAME}")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# In XLA for TPU: the fusions that begin and end a collective, and their callees that compute meanwhile.
_ASYNCHRONOUS = re.compile(r"^\s+(?:ROOT )?%?async-collective-|calls=%?async_collective_fusion")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


class Traffic(NamedTuple):
    """Collectives of one kind over the same axes of the mesh.

    Attributes:
      kind: a key of SENT.
      axes: the mesh axes along which a group's devices differ.
      operations: in one run of the program.
      sent: the bytes that each device sends in one run of the program, with rings.
      asynchronous: the part of these bytes that the program sends while it computes.
    """

    kind: str
    axes: tuple[str, ...]
    operations: int
    sent: float
    asynchronous: float = 0.0


class Part(NamedTuple):
    """The program outside of its loops, or the body of one loop without its inner loops.

    Attributes:
      turns: the number of executions in one run of the program.
      cycles: of one execution, as the compiler estimates them; operations without an estimate count as zero.
      waiting: the bytes that a device sends in one execution while it does nothing else.
      asynchronous: the bytes that it sends in one execution while it computes.
      between_slices: the bytes that its host sends in one execution, while it computes.
    """

    turns: int
    cycles: float
    waiting: float
    asynchronous: float
    between_slices: float


class Program(NamedTuple):
    """The result of `read_program`; see `Traffic` and `Part`.

    `unknown_loops` have iteration counts that only depend on the run; each counts as one iteration. `has_kernels` says
    whether there are kernels other than XLA's, such as attention's, for which the compiler estimates no cycles.
    """

    traffic: list[Traffic]
    unknown_loops: int
    parts: list[Part]
    has_kernels: bool


class _Collective(NamedTuple):
    times: int
    sent: float
    kind: str
    axes: tuple[str, ...]
    asynchronous: bool
    part: str  # name of the computation that runs it


def read_program(hlo: str, mesh_shape: Mapping[str, int]) -> Program:
    """Sums the collectives of a compiled program, and the cycles that the compiler estimates.

    A collective is asynchronous if it is written as a start and a done, or is part of the fusions into which XLA for
    TPU combines it with the computation meanwhile.

    Args:
      hlo: the text of the program after partitioning, `compiled.as_text()`.
      mesh_shape: the axes of the mesh and their sizes, in order; if slices are joined, the first axis is "slices".

    Returns:
      The traffic, most bytes first; parts in the order of their begin.

    Raises:
      ValueError: this is not the text of a compiled program.
    """
    computations, entry = _computations(hlo)
    # A collective that XLA cuts into pieces, to compute beside it, occurs in several places under one channel and name.
    channels: dict[tuple[Any, ...], _Collective] = {}
    turns: dict[str, int] = {}
    unknown = 0

    def visit(name: str, times: int, part: str, beside: bool) -> None:
        nonlocal unknown
        for line in computations[name]:
            if found := _COLLECTIVE.match(line):
                kind, group, size = _read(found, line, name, mesh_shape)
                channel = re.search(r"channel_id=\d+", line)
                key: tuple[Any, ...] = (found.group(1),)
                if channel:
                    key = channel.group(), *re.findall(r'op_name="[^"]*"', line), kind, size, *group
                if len(group) > 1 and (key not in channels or times > channels[key].times):
                    channels[key] = _Collective(times, size * SENT[kind](len(group)), kind, _axes(group, mesh_shape),
                                                beside or found.group(4) is not None, part)
                continue
            if found := _HOST.match(line):
                _, shape, kind = found.groups()
                kind = kind.lower().replace("_", "-")
                sent = _bytes(shape) * SENT_BY_HOST.get(kind, SENT_BY_HOST["one-to-one"])(mesh_shape["slices"])
                channels[("host", found.group(1))] = _Collective(times, sent, kind, ("slices",), True, part)
                continue
            if found := _WHILE.search(line):
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                count = int(known.group(1)) if known else _turns(computations, name, *found.groups())
                unknown += count is None
                run(found.group(3), times * (1 if count is None else count))
                continue
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(_NAME, branches)
            for other in called:
                if other in has_collectives:
                    visit(other, times, part, beside or bool(_ASYNCHRONOUS.search(line)))

    def run(name: str, times: int) -> None:
        turns[name] = turns.get(name, 0) + times
        visit(name, times, name, False)

    has_collectives = _reaching_collectives(computations)
    run(entry, 1)
    parts = []
    for name, times in turns.items():
        sums = {"waiting": 0.0, "asynchronous": 0.0, "between_slices": 0.0}
        for one in channels.values():
            if one.part == name and times:
                where = "between_slices" if "slices" in one.axes else "asynchronous" if one.asynchronous else "waiting"
                sums[where] += one.sent * one.times / times
        cycles = sum(int(found.group(1)) for line in computations[name] if (found := _CYCLES.search(line)))
        parts.append(Part(times, cycles, **sums))
    return Program(_summed(channels.values()), unknown, parts, 'custom_call_target="tpu_custom_call"' in hlo)


def _summed(collectives: Iterable[_Collective]) -> list[Traffic]:
    """Traffic of each kind along the same axes, most bytes first."""
    sums: dict[tuple[str, tuple[str, ...]], Traffic] = {}
    for one in collectives:
        before, sent = sums.get((one.kind, one.axes), Traffic(one.kind, one.axes, 0, 0.0)), one.times * one.sent
        sums[one.kind, one.axes] = before._replace(
            operations=before.operations + one.times, sent=before.sent + sent,
            asynchronous=before.asynchronous + sent * one.asynchronous)
    return sorted(sums.values(), key=lambda one: -one.sent)


def _read(
    found: re.Match[str], line: str, inside: str, mesh_shape: Mapping[str, int]
) -> tuple[str, list[int], float]:
    """The kind, group and result bytes of one collective."""
    _, shape, kind, start = found.groups()
    group, size = _group(line, mesh_shape), _bytes(shape)
    if start and kind != "all-reduce":  # its result holds the operand too
        size *= {"all-gather": len(group) / (len(group) + 1), "reduce-scatter": 1 / (len(group) + 1)}.get(kind, 0.5)
    if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):
        return "reduce-scatter", group, size / len(group)  # XLA's fusion of it with the slice that is kept
    return kind, group, size


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            lines = computations[found.group(2)] = []
            entry = found.group(2) if found.group(1) else entry
        elif line.startswith(" "):
            lines.append(line)
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation.")
    return computations, entry


def _reaching_collectives(computations: Mapping[str, Sequence[str]]) -> set[str]:
    """The names of computations that contain collectives, directly or in their callees."""
    reaching = {name for name, lines in computations.items()
                if any(_COLLECTIVE.match(line) or _HOST.match(line) for line in lines)}
    called = re.compile(rf"(?:calls|to_apply|body|computation)={_NAME}")
    calls = {name: {other for line in lines for other in called.findall(line)} for name, lines in computations.items()}
    while more := {name for name, others in calls.items() if others & reaching} - reaching:
        reaching |= more
    return reaching


def _turns(
    computations: Mapping[str, Sequence[str]], inside: str, operand: str, condition: str, body: str
) -> int | None:
    """The number of iterations of a loop with the condition `counter < constant`; None for others.

    The counter starts at zero and grows by one unless the text has constants that say otherwise; the loops into which
    XLA cuts a matmul of gathered weights may increment by two.
    """
    text = "\n".join(computations[condition])
    bounds = re.findall(r" [su]32\[\]\S* constant\((\d+)\)", text)
    counter = re.findall(r" [su]32\[\]\S* get-tuple-element\(.*?\), index=(\d+)", text)
    if len(bounds) != 1 or len(counter) != 1:
        return None
    before, within = _definitions(computations[inside]), _definitions(computations[body])
    start = _constant(before, _element(before.get(operand, ""), int(counter[0]))) or 0
    root = next(line for line in computations[body] if line.lstrip().startswith("ROOT "))
    grown = re.search(rf" add\({_NAME}, {_NAME}\)", within.get(_element(root, int(counter[0])), ""))
    step = next(filter(None, (_constant(within, name) for name in (grown.groups() if grown else ()))), 1)
    return max(0, math.ceil((int(bounds[0]) - start) / step))


def _definitions(lines: Sequence[str]) -> dict[str, str]:
    """The lines of a computation by the names they define."""
    return {found.group(1): line for line in lines if (found := re.match(rf"\s+(?:ROOT )?{_NAME} = ", line))}


def _element(line: str, index: int) -> str:
    """The name of an element of the tuple on a line; empty for lines without one."""
    elements = re.search(r" tuple\((.*?)\)(?:,|$)", line)
    return re.findall(_NAME, re.sub(r"/\*.*?\*/", "", elements.group(1)))[index] if elements else ""


def _constant(definitions: Mapping[str, str], name: str) -> int | None:
    """The value of a constant, through its copies; None if it is not a constant."""
    while copied := re.search(rf" copy\({_NAME}\)", definitions.get(name, "")):
        name = copied.group(1)
    found = re.search(r" constant\((-?\d+)\)", definitions.get(name, ""))
    return int(found.group(1)) if found else None


def _bytes(shape: str) -> float:
    """The bytes of an array's or a tuple's type in HLO notation."""
    total = 0.0
    for kind, sizes in _ARRAY.findall(shape):
        bits = ITEM_BITS.get(kind)
        if bits is None:
            digits = re.search(r"\d+", kind)
            bits = int(digits.group()) if digits else 0
        total += bits / 8 * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def _group(line: str, mesh_shape: Mapping[str, int]) -> list[int]:
    """The first group of devices, as indices into the flattened mesh."""
    devices = math.prod(mesh_shape.values())
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return [int(found.group(1)), int(found.group(2))]
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(device) for device in found.group(1).split(",")]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return _device_ids(found.group(3)).reshape(int(found.group(1)), int(found.group(2)))[0].tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}", line):
        axes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found.group(1))}
        order = found.group(2) or f"[{math.prod(axes.values())}]"
        grid = _device_ids(order).reshape(*axes.values())
        index = tuple(slice(None) if f"'{axis}'" in found.group(3) else 0 for axis in axes)
        return np.ravel(grid[index]).tolist()
    return list(range(devices))


def _device_ids(order: str) -> np.ndarray:
    """The device numbers in an order that XLA writes as [16,16]T(1,0), a grid whose axes are then transposed, or as a
    list.
    """
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    if not found:
        return np.array([int(device) for device in re.findall(r"\d+", order)])
    sizes = [int(size) for size in found.group(1).split(",")]
    grid = np.arange(math.prod(sizes)).reshape(sizes)
    return grid.transpose([int(axis) for axis in found.group(2).split(",")]) if found.group(2) else grid


def _axes(group: Sequence[int], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(group, tuple(mesh_shape.values())))
    return tuple(axis for axis, along in zip(mesh_shape, places, strict=True) if len(set(along.tolist())) > 1)
