"""What a compiled program holds, and sends between devices, read from its optimised HLO.

With n devices in a group, one array of N bytes costs each device, whatever the algorithm, at least
these bytes out of its links (reduce-scatter's N is what goes in, all-gather's what comes out):

(1) all-gather, reduce-scatter, all-to-all: N (n - 1) / n
(2) all-reduce: 2 N (n - 1) / n
(3) collective-permute: N
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
ITEM_SIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
ITEM_SIZE |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "f8e4m3fn": 1}


def temporaries(program: jax.stages.Compiled) -> int:
    """Bytes beside a program's arguments: scratch, and results that take no argument's place."""
    memory = program.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + results


@dataclass(frozen=True)
class Collective:
    """One operation, `times` a step. `shapes` are of its result, such as ("bf16[384,1152]",)."""

    kind: str
    shapes: tuple[str, ...]
    size: int  # N, in bytes
    groups: np.ndarray  # [groups, n], numbers of devices
    times: int

    @property
    def bytes(self) -> float:
        """That each device sends a step: (1) to (3)."""
        n = self.groups.shape[1]
        if self.kind == "collective-permute":
            return self.times * self.size
        passes = 2 if self.kind == "all-reduce" else 1
        return self.times * passes * self.size * (n - 1) / n


def array_bytes(shape: str) -> int:
    """Of an array such as `f32[32,256,384]`."""
    name, dimensions = re.fullmatch(r"(\w+)\[([\d,]*)\]", shape).groups()
    return ITEM_SIZE[name] * math.prod(int(n) for n in dimensions.split(",") if n)


def collectives(hlo: str) -> list[Collective]:
    """Every collective of an optimised program, with the trips of the loops around it.

    One that a TPU's compiler has spread over several fusions counts once: channel and shapes tell.
    A reduce-scatter is there a fusion of that name, with an all-reduce inside that is cut up.
    """
    programs = computations(hlo)
    entry = next(name for name, lines in programs.items() if lines[0].startswith("ENTRY"))
    found = {}
    for name, line, times in walk(programs, entry, 1):
        match = re.search(rf" = (.*?) ({KINDS})(-start)?\(", line)
        if match is None:
            continue
        kind, groups = match[2], device_groups(line)
        shapes = result_shapes(match[1], kind, bool(match[3]))
        size = sum(map(array_bytes, shapes))
        if kind == "reduce-scatter":
            size *= groups.shape[1]
        if name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        channel = re.search(r"channel_id=(\d+)", line)
        key = (channel[1], kind, shapes) if channel else line
        found[key] = Collective(kind, shapes, size, groups, times)
    return [each for each in found.values() if each.groups.shape[1] > 1]


def computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation, by its name, the first its header."""
    programs, lines = {}, []
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", line)
        if header:
            lines = programs[header[1]] = []
        lines.append(line)
    return programs


def walk(programs: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, str, int]]:
    """Each line that a computation runs and those it calls: (computation, line, times it runs)."""
    for line in programs[name][1:]:
        yield name, line, times
        body = re.search(r"body=%([^\s,}]+)", line)
        if body:
            yield from walk(programs, body[1], times * trip_count(programs, line))
        called = re.findall(r"(?:calls|to_apply|\w+_computation)=%([^\s,}]+)", line)
        for group in re.findall(r"(?:branch|called)_computations=\{([^}]*)\}", line):
            called += re.findall(r"%([^\s,}]+)", group)
        for other in called:
            yield from walk(programs, other, times)


def trip_count(programs: dict[str, list[str]], line: str) -> int:
    """Of a while: what the compiler noted, or the bound that its condition compares with."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%([^\s,}]+)", line)[1]
    lines = [text for _, text, _ in walk(programs, condition, 1)]
    bounds = [int(n) for text in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
    return max(bounds, default=1)


def result_shapes(text: str, kind: str, is_start: bool) -> tuple[str, ...]:
    """The arrays that a collective results in, without layouts.

    The start of an asynchronous one names its operands first.
    """
    text = re.sub(r"\{[^{}]*\}", "", text)
    shapes = tuple(re.findall(r"\w+\[[\d,]*\]", text))
    if kind == "collective-permute" and is_start:
        return shapes[1:2]
    if text.startswith("((") or (is_start and kind != "all-reduce" and len(shapes) == 2):
        return shapes[len(shapes) // 2 :]
    return shapes


def device_groups(line: str) -> np.ndarray:
    """The devices that exchange, `[groups, n]`, in any of the four ways that HLO writes them."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        return np.array(re.findall(r"(\d+),(\d+)", pairs[1]), int)
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:.*?) \{(.*?)\}", line)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        inside = re.findall(r"'(\w+)'", mesh[2])
        names = list(sizes)
        devices = np.arange(math.prod(sizes.values()))
        ids = re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)", line)
        if ids:
            devices = devices.reshape(numbers(ids[1])).transpose(numbers(ids[2]))
        devices = devices.reshape(list(sizes.values()))
        order = [names.index(name) for name in names if name not in inside]
        order += [names.index(name) for name in inside]
        return devices.transpose(order).reshape(-1, math.prod(sizes[name] for name in inside))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        shape, sizes, order = (numbers(part) if part else None for part in iota.groups())
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(shape)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    if listed:
        return np.array([numbers(row) for row in re.findall(r"\{([\d,]+)\}", listed[1])])
    return np.zeros((1, 1), int)


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
