"""What a pod would run, as the TPU compiler sees it: memory, arithmetic, traffic and padding. No TPU is needed.

    pip install -e ".[tpu]"
    python benchmarks/aot.py --topology=v5e:2x4 --what=train [--config=configs/brats.py] [--size=256] [--batch=240]
    python benchmarks/aot.py --topology=v5e:2x2 --chips=1 --what=search [--codes=1000000] [--batch=64]

Compiles the jitted training step, `encode`, or the search (scan and exact look) for the chips of a topology, and reads
the program that comes out. What it says is a prediction:

- The time of a program is at least that of its arithmetic at the chip's peak rate, and that of its traffic at the
  bandwidth of its memory, whichever is longer; collectives come on top.
- Traffic is that of the chip's main memory alone (`benchmarks/hlo.py`). Loops count as often as they run.
- Look-ups of single entries, which TPUs do one after the other, cost more than their traffic: they are counted apart.
"""

import argparse
import dataclasses
import os
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
from hlo import Program
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
    units = "queries" if unit == "query" else "images"
    yield f"{units} a second, at most", f"{rate:,.0f}; {rate / hosts:,.0f} on each of {hosts} hosts"
    if args.what == "train":
        yield from planned(args, rate, len(devices))
    if args.what == "encode":
        yield f"{args.slices:,} slices, at least", f"{args.slices / rate:.2g} s"
    for text, lost in cost.padding.most_common(args.tensors):
        yield f"padding of `{text.replace('|', ' ')}`", f"{lost / 1e9:.1f} GB"


def planned(args: argparse.Namespace, rate: float, chips: int) -> Iterator[tuple[str, str]]:
    """What the configuration's run takes, at so many images a second: a validation's are a third of a step's work."""
    train = load_config(args.config).train
    images = train.steps * train.batch_size
    validated = train.steps // train.eval_every * train.eval_slices if train.eval_every else 0
    hours = (images + validated / 3) / rate / 3600
    yield "the run of this configuration, at least", (
        f"{images / 1e6:.1f} M images, {images / args.batch:,.0f} steps; {validated / 1e3:,.0f} k validated: "
        f"{60 * hours:.1f} min, {hours * chips:.1f} chip-hours"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4", help="kind and arrangement of chips (default: %(default)s)")
    parser.add_argument("--chips", type=int, default=0, help="only the first so many of them")
    parser.add_argument("--what", choices=("train", "encode", "search"), default="train")
    parser.add_argument("--config", default="configs/brats.py")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=240, help="global batch of images, or queries")
    parser.add_argument("--codes", type=int, default=1_000_000)
    parser.add_argument("--slices", type=int, default=175_000, help="to encode (default: about BraTS 2023's)")
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
