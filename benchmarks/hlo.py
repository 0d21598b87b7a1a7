"""A compiled program as text, XLA's HLO: what each of its computations costs, loops counted as often as they run.

Traffic is what every instruction outside of fusions reads and writes of a chip's main memory, each operand once, in the
layout that the compiler chose, padding included; of slices and look-ups, what is taken. What stays in a TPU's scratch
memory, `S(1)` in a layout, is not counted.
"""

import collections
import dataclasses
import functools
import re

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "f32": 32,
        "s32": 32, "u32": 32, "f64": 64, "s64": 64, "u64": 64, "c64": 64}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Neither read nor write: they name what is there, or stand for what other lines say.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "copy-done", "slice-done", "all-reduce-done", "all-gather-done", "collective-permute-done", "async-update",
        "async-done", "iota")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A tensor in the compiled program.

    Attributes:
        bytes: without padding.
        padded: in memory, in tiles.
        main: whether it lies in the chip's main memory, and not in its scratch memory.
    """

    text: str
    dims: tuple[int, ...]
    bytes: float
    padded: float
    main: bool


@dataclasses.dataclass
class Cost:
    """Of a computation: sums over its instructions."""

    flops: float = 0.0
    look_ups: float = 0.0
    traffic: float = 0.0
    unpadded: float = 0.0
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    reduced: float = 0.0
    padding: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Cost", times: int = 1) -> None:
        self.flops += times * other.flops
        self.look_ups += times * other.look_ups
        self.traffic += times * other.traffic
        self.unpadded += times * other.unpadded
        self.reduced += times * other.reduced
        for name in ("collectives", "padding"):
            for key, value in getattr(other, name).items():
                getattr(self, name)[key] += times * value


SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*)$")


def read_shape(match: re.Match) -> Shape | None:
    """`bf16[30,256,256,16]{0,3,2,1:T(8,128)(2,1)S(1)}`: the last two axes of the layout are padded to whole tiles."""
    kind, dims_text, order, layout = match.groups()
    if kind not in BITS:
        return None
    dims = tuple(int(dim) for dim in filter(None, dims_text.split(",")))
    tiles = re.search(r"T\(([\d,]+)\)", layout or "")
    padded = list(dims)
    if tiles and order:
        minor = [int(axis) for axis in order.split(",")]
        for axis, tile in zip(minor, reversed([int(size) for size in tiles[1].split(",")])):
            padded[axis] = -(-padded[axis] // tile) * tile
    scale = BITS[kind] / 8
    main = "S(" not in (layout or "")
    return Shape(match[0], dims, scale * float(np.prod(dims)), scale * float(np.prod(padded)), main)


def read_shapes(text: str) -> list[Shape]:
    return [shape for shape in map(read_shape, SHAPE.finditer(text)) if shape]


class Program:
    """The compiled program as text: what each computation costs, loops counted as often as they run."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[tuple[str, str, str, str]]] = {}
        self.entry = ""
        current: list = []
        for line in text.splitlines():
            if head := re.match(r"^(ENTRY )?%?([\w.-]+) (?:\(.*)?.*\{$", line):
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif match := INSTRUCTION.match(line):
                current.append(match.groups())
        self._results = {name: result for lines in self.computations.values() for name, result, _, _ in lines}

    @functools.cache
    def cost(self, computation: str) -> Cost:
        total = Cost()
        for _, result, kind, rest in self.computations[computation]:
            called = re.findall(r"(?:calls|to_apply|body|branch_computations)=\{?%?([\w.-]+)", rest)
            if kind == "while":
                total.add(self.cost(called[0]), self._trips(re.search(r"condition=%?([\w.-]+)", rest)[1]))
            elif kind in ("call", "conditional", "async-start"):
                for name in called:
                    total.add(self.cost(name))
            elif kind not in FREE:
                self._add(total, result, kind, rest, called)
        return total

    def _trips(self, condition: str) -> int:
        """How often a loop runs: the bound that its counter, which begins at 0, is compared with."""
        bounds = [re.match(r"\d+", rest) for _, _, kind, rest in self.computations[condition] if kind == "constant"]
        return max(int(bound[0]) for bound in bounds if bound)

    def _add(self, total: Cost, result: str, kind: str, rest: str, called: list[str]) -> None:
        names = operand_names(rest)
        if kind == "fusion":
            touched = [self._read(called[0], i, self._results[name]) for i, name in enumerate(names)]
            touched.append(self._written(called[0], result))
        else:
            touched = self._touched(result, kind, names)
        shapes = [shape for text in touched for shape in read_shapes(text) if shape.main]
        total.traffic += sum(shape.padded for shape in shapes)
        total.unpadded += sum(shape.bytes for shape in shapes)
        for shape in shapes:
            total.padding[shape.text] += shape.padded - shape.bytes
        total.flops += self._flops(result, kind, rest) + sum(self._nested(name)[0] for name in called)
        total.look_ups += entries(result, kind) + sum(self._nested(name)[1] for name in called)
        base = kind.removesuffix("-start")
        if base in COLLECTIVES:
            total.collectives[base] += 1
            total.reduced += sum(shape.bytes for name in names for shape in read_shapes(self._results[name]))

    def _touched(self, result: str, kind: str, names: list[str]) -> list[str]:
        """What an instruction reads and writes: of slices and look-ups the part that is taken or replaced."""
        if kind in ("dynamic-slice", "gather", "slice"):
            return [result, result]
        if kind == "dynamic-update-slice":
            return 2 * [self._results[names[1]]]
        # Between main and scratch memory; the result names the source, too.
        if kind == "copy-start":
            return [match[0] for match in list(SHAPE.finditer(result))[:2]]
        if kind == "slice-start":
            taken = list(SHAPE.finditer(result))[len(names)][0]
            return [taken, re.sub(r"S\(\d+\)", "", taken)]
        return [result, *(self._results.get(name, "") for name in names)]

    def _read(self, computation: str, number: int, operand: str) -> str:
        """What a fusion reads of an operand: the slices and looked-up entries where it takes nothing else."""
        lines = self.computations[computation]
        own = next(
            (name for name, _, kind, rest in lines if kind == "parameter" and rest.startswith(f"{number})")), None
        )
        uses = [(result, kind, operand_names(rest)) for _, result, kind, rest in lines if own in operand_names(rest)]
        taken = [result for result, kind, names in uses
                 if kind in ("dynamic-slice", "gather", "slice") and names[0] == own]
        replaced = [kind for _, kind, names in uses if kind == "dynamic-update-slice" and names[0] == own]
        if len(taken) + len(replaced) < len(uses):
            return operand
        return " ".join(taken)

    def _written(self, computation: str, result: str) -> str:
        """What a fusion writes: of an array that it changes in place, the part that is replaced."""
        _, _, kind, rest = self.computations[computation][-1]
        return self._results[operand_names(rest)[1]] if kind == "dynamic-update-slice" else result

    @functools.cache
    def _nested(self, computation: str) -> tuple[float, float]:
        """Products and look-ups within a fusion."""
        flops = look_ups = 0.0
        for _, result, kind, rest in self.computations[computation]:
            flops, look_ups = flops + self._flops(result, kind, rest), look_ups + entries(result, kind)
            for name in re.findall(r"calls=%?([\w.-]+)", rest):
                flops, look_ups = (one + other for one, other in zip((flops, look_ups), self._nested(name)))
        return flops, look_ups

    def _flops(self, result: str, kind: str, rest: str) -> float:
        """Multiplications and additions of a product or convolution; other arithmetic is not counted."""
        if kind not in ("dot", "convolution"):
            return 0.0
        left, right = (read_shapes(self._results[name])[0].dims for name in re.findall(r"%([\w.-]+)", rest)[:2])
        size = float(np.prod(read_shapes(result)[0].dims))
        if kind == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
            return 2 * size * float(np.prod([left[int(axis)] for axis in axes[1].split(",") if axis]))
        labels = re.search(r"dim_labels=\w+_(\w+)->", rest)[1]
        kernel = float(np.prod(right)) / right[labels.index("o")]
        window = re.search(r"window=\{([^}]*)\}", rest)
        dilation = re.search(r"lhs_dilate=([\dx]+)", window[1]) if window else None
        return 2 * size * kernel / (float(np.prod([int(d) for d in dilation[1].split("x")])) if dilation else 1.0)


def entries(result: str, kind: str) -> float:
    return float(np.prod(read_shapes(result)[0].dims)) if kind == "gather" else 0.0


def operand_names(rest: str) -> list[str]:
    return re.findall(r"%([\w.-]+)", rest.partition("), ")[0])
