"""What a pod would run, as the TPU compiler sees it: memory, arithmetic, traffic and padding. No TPU is needed.

    pip install -e ".[tpu]"
    python benchmarks/aot.py --topology=v5e:2x4 --what=train [--config=configs/brats.py] [--size=256] [--batch=240]
    python benchmarks/aot.py --topology=v5e:2x2 --chips=1 --what=search [--codes=1000000] [--batch=64]

Compiles the jitted training step, `encode`, or the search (scan and exact look) for the chips of a topology, and reads
the program that comes out. What it says is a prediction:

- The time of a program is at least that of its arithmetic at the chip's peak rate, and that of its traffic at the
  bandwidth of its memory, whichever is longer; collectives come on top.
- Traffic is what every instruction outside of fusions reads and writes of the chip's main memory, each operand once, in
  the layout that the compiler chose, padding included; of slices and look-ups, what is taken. Loops count as often as
  they run. What stays in scratch memory (VMEM) is not counted.
- Look-ups of single entries, which TPUs do one after the other, cost more than their traffic: they are counted apart.
"""

import argparse
import collections
import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
               "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3",
               "TF_CPP_MIN_LOG_LEVEL": "3"}

import jax
import jax.numpy as jnp
import numpy as np
from common import load_config, write_measured
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from decomp_jax.models.network import DecompositionNet
from decomp_jax.retrieval import distance
from decomp_jax.training.state import create_state, make_optimizer
from decomp_jax.training.step import compile_train_step


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, as read in November 2026.

    Attributes:
        flops, int8: peak rates a second, of bfloat16 and of int8.
        bandwidth: bytes a second of its main memory.
        memory: bytes of it.
        link: bytes a second of all links to other chips together.
    """

    flops: float
    int8: float
    bandwidth: float
    memory: float
    link: float


CHIPS = {
    "v4": Chip(275e12, 275e12, 1.228e12, 32e9, 300e9),
    "v5e": Chip(197e12, 394e12, 819e9, 16e9, 200e9),
    "v5p": Chip(459e12, 918e12, 2.765e12, 95e9, 600e9),
    "v6e": Chip(918e12, 1836e12, 1.64e12, 32e9, 448e9),
}
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


def train_program(args: argparse.Namespace, mesh: Mesh) -> Callable[[], Any]:
    config = load_config(args.config)
    model = DecompositionNet(config.model, size=args.size, channels=1, lesion_classes=3)
    tx = make_optimizer(config.train)
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    shapes = jax.eval_shape(lambda: create_state(config, model, tx, mesh))
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)
    side = (args.batch, args.size, args.size)
    batch = {"image": jax.ShapeDtypeStruct((*side, 1), jnp.float16, sharding=split),
             "label": jax.ShapeDtypeStruct(side, jnp.uint8, sharding=split)}
    if args.what == "train":
        return compile_train_step(model, tx, config, mesh).lower(state, batch)

    def encode(params: Any, batch_stats: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        variables = {"params": params, "batch_stats": batch_stats}
        latents = model.apply(variables, image.astype(jnp.float32), train=False, method="encode")
        codes = model.apply(variables, latents, method="quantize")
        return codes.normal_indices, codes.abnormal_indices

    return jax.jit(encode).lower(state.params, state.batch_stats, batch["image"])


def search_program(args: argparse.Namespace, mesh: Mesh) -> Any:
    """The scan and the first exact look of `decomp_jax.retrieval.search` for codes of one path, ten hits a query."""
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    codes, cells, size = -(-args.codes // distance.BLOCK) * distance.BLOCK, 64, 512
    buckets = distance.Buckets(cells, 0, ((codes // mesh.size, 0),))

    def array(shape: tuple[int, ...], kind: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    with jax.enable_x64(True):
        distinct = distance.DistinctCodes(
            array((codes, cells), jnp.uint16, split), array((0,), jnp.uint16, split),
            array((codes,), jnp.int32, split), array((codes,), jnp.int32, split),
        )
        lines = args.batch * cells
        tables = distance.Tables(
            array((lines, size), jnp.int64, whole), array((lines, size), jnp.uint8, whole),
            array((args.batch, cells), jnp.int32, whole), array((args.batch,), jnp.int64, whole),
        )
        groups = 10 + distance.GROUP // 2
        return distance.nearest(mesh, buckets, groups, 10).lower(
            distinct, tables, array((args.batch, 2), jnp.int32, whole)
        )


def measure(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Lines of the table."""
    kind = args.topology.partition(":")[0]
    chip = CHIPS[kind]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    devices = devices[: args.chips or len(devices)]
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    jax.default_backend = lambda: "tpu"  # what the library asks to choose between its ways for CPUs and accelerators
    start = time.perf_counter()
    lowered = (search_program if args.what == "search" else train_program)(args, mesh)
    lowering, start = time.perf_counter() - start, time.perf_counter()
    compiled = lowered.compile()
    compiling = time.perf_counter() - start
    text = compiled.as_text()
    if args.hlo:
        args.hlo.write_text(text)
    program = Program(text)
    cost, memory = program.cost(program.entry), compiled.memory_analysis()
    analysis = compiled.cost_analysis()
    each = args.batch if args.what == "search" else args.batch / len(devices)
    unit = "query" if args.what == "search" else "image"
    peak = chip.int8 if args.what == "search" else chip.flops
    yield "program", f"{args.what}, {len(devices)} x {kind}, " + (
        f"{args.codes:,} codes, {args.batch} queries" if args.what == "search" else
        f"{args.config}, {args.size} px, batch {args.batch}")
    yield "lowering, compiling", f"{lowering:.0f} s, {compiling:.0f} s"
    temporary, arguments = memory.temp_size_in_bytes, memory.argument_size_in_bytes
    yield "memory a chip: temporary + arguments", (
        f"{temporary / 1e9:.2f} + {arguments / 1e9:.2f} GB of {chip.memory / 1e9:.0f}"
    )
    yield "work a chip", (
        f"{cost.flops / 1e12:.2f} T (compiler: {analysis.get('flops', 0) / 1e12:.2f}), "
        f"{cost.flops / peak * 1e3:.1f} ms at peak"
    )
    yield "traffic a chip", (
        f"{cost.traffic / 1e9:.1f} GB ({cost.unpadded / 1e9:.1f} without padding; compiler, loops once: "
        f"{analysis.get('bytes accessed', 0) / 1e9:.1f}), "
        f"{cost.traffic / chip.bandwidth * 1e3:.1f} ms at full bandwidth"
    )
    yield "single entries looked up", f"{cost.look_ups / 1e6:,.0f} M"
    yield f"traffic a{'n' if unit == 'image' else ''} {unit}", f"{cost.traffic / each / 1e9:.2f} GB"
    counts = ", ".join(f"{count} {name}" for name, count in cost.collectives.items()) or "none"
    exchange = 2 * cost.reduced / chip.link
    yield "collectives", f"{counts}; {cost.reduced / 1e6:.1f} MB, {exchange * 1e3:.1f} ms"
    rate = args.batch / (max(cost.flops / peak, cost.traffic / chip.bandwidth) + exchange)
    hosts = len({device.process_index for device in devices})
    yield f"{unit}s a second, at most", f"{rate:,.0f}; {rate / hosts:,.0f} a host of {hosts}"
    if args.what == "train":
        train = load_config(args.config).train
        images = train.steps * train.batch_size
        hours = images / rate / 3600
        yield "the run of this configuration, at least", (
            f"{images / 1e6:.1f} M images, {images / args.batch:,.0f} steps: {hours:.2f} h, "
            f"{hours * len(devices):.1f} chip-hours"
        )
    for text, lost in cost.padding.most_common(args.tensors):
        yield f"padding of `{text.replace('|', ' ')}`", f"{lost / 1e9:.1f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4", help="kind and arrangement of chips (default: %(default)s)")
    parser.add_argument("--chips", type=int, default=0, help="only the first so many of them")
    parser.add_argument("--what", choices=("train", "encode", "search"), default="train")
    parser.add_argument("--config", default="configs/brats.py")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=240, help="global batch of images, or queries")
    parser.add_argument("--codes", type=int, default=1_000_000)
    parser.add_argument("--tensors", type=int, default=5, help="of those that padding costs most")
    parser.add_argument("--hlo", type=Path, help="file for the compiled program")
    parser.add_argument("--write", metavar="FILE:NAME", help="document and name of its measured part")
    args = parser.parse_args()
    lines = ["| | |", "|---|---|"]
    print("\n".join(lines))
    for name, value in measure(args):
        lines.append(f"| {name} | {value} |")
        print(lines[-1], flush=True)
    if args.write:
        path, _, name = args.write.partition(":")
        write_measured(Path(path), name, lines)


if __name__ == "__main__":
    main()
