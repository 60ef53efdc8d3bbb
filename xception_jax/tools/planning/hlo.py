"""Reads the communication and the arrays in memory of a compiled program from its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

from xception_jax.logs.profile import layer_of

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """A communication between devices.

    Attributes:
      kind: one of `KINDS`.
      layer, direction: its origin, as in `xception_jax.logs.profile.layer_of`. XLA may combine several arrays; this is
        the origin of one of them.
      bytes: size of all its arrays on each device, before a scatter or after a gather.
      arrays: number of arrays that are sent together.
      devices: number of devices in one group.
    """

    kind: str
    layer: str
    direction: str
    bytes: int
    arrays: int
    devices: int

    @property
    def bytes_sent(self) -> float:
        """Returns the bytes that each device sends in a ring: (n - 1) / n of the array, twice for an all-reduce."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.devices - 1) / self.devices


@dataclasses.dataclass(frozen=True)
class _Instruction:
    shape: str
    opcode: str
    rest: str


def collectives(hlo: str, num_devices: int) -> Counter[Collective]:
    """Counts the collectives of one run of a program.

    A collective in a loop counts once per iteration if XLA knows their number. A collective in a branch counts as if
    the branch were taken.

    Args:
      hlo: `compiled.as_text()`.
      num_devices: number of devices that the program is compiled for.
    """
    computations, entry = _parse(hlo)
    times = _times(computations, entry)
    found: Counter[Collective] = Counter()
    for name, instructions in computations.items():
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or not times[name]:
                continue
            devices = _group_size(instruction.rest, num_devices)
            sizes = [_size(*array) for array in _ARRAY.findall(instruction.shape)]
            if instruction.opcode == "collective-permute-start":
                sizes = sizes[1:2]  # (input, output, two counters)
            elif instruction.opcode == "all-gather-start":
                sizes = sizes[len(sizes) // 2 :]  # (inputs, outputs)
            total = sum(sizes) * (devices if kind == "reduce-scatter" else 1)
            op_name = _OP_NAME.search(instruction.rest)
            layer, direction = layer_of(op_name[1] if op_name else "")
            found[Collective(kind, layer, direction, total, len(sizes), devices)] += times[name]
    return found


def arrays_in_memory(hlo: str, dtype: str) -> Counter[tuple[int, ...]]:
    """Counts the arrays of a type that operations write to memory, by shape. Arrays inside a fusion are excluded.

    Args:
      hlo: `compiled.as_text()`.
      dtype: XLA's name of the type, such as 'f32'.
    """
    computations, _ = _parse(hlo)
    fused = {
        called
        for instructions in computations.values()
        for instruction in instructions
        if instruction.opcode in ("fusion", "reduce", "all-reduce", "scatter", "sort", "map", "select-and-scatter")
        for called in _CALLED.findall(instruction.rest)
    }
    free = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call")
    return Counter(
        tuple(map(int, filter(None, sides.split(","))))
        for name, instructions in computations.items()
        if name not in fused
        for instruction in instructions
        if instruction.opcode not in free and not instruction.opcode.endswith("-done")
        for kind, sides in _ARRAY.findall(instruction.shape)
        if kind == dtype
    )


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Returns the instructions of each computation, and the name of the entry computation."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append(_Instruction(*instruction.groups()))
    return computations, entry


def _calls(instruction: _Instruction) -> Iterator[tuple[str, int]]:
    """Yields the computations that an instruction calls, and how often."""
    trips = _TRIPS.search(instruction.rest) if instruction.opcode == "while" else None
    for name in _CALLED.findall(instruction.rest):
        yield name, int(trips[1]) if trips else 1
    for names in _BRANCHES.findall(instruction.rest):
        for name in names.split(","):
            yield name.strip().lstrip("%"), 1


def _times(computations: dict[str, list[_Instruction]], entry: str) -> Counter[str]:
    """Returns how often each computation runs when the entry runs once."""
    times: Counter[str] = Counter()

    def run(name: str, count: int) -> None:
        times[name] += count
        for instruction in computations.get(name, ()):
            for called, trips in _calls(instruction):
                run(called, count * trips)

    run(entry, 1)
    return times


def _group_size(rest: str, num_devices: int) -> int:
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
        sides = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        # Part of an axis may be given: 'x':(1)2 is two of its devices.
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sides[axis]) for axis, part in parts)
    return num_devices


def _size(dtype: str, sides: str) -> int:
    bits = re.search(r"\d+", dtype)
    width = int(bits[0]) // 8 if bits else 1  # pred
    return max(width, 1) * math.prod(map(int, filter(None, sides.split(","))))
