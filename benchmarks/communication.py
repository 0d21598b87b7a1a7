"""What the compiled training step communicates, and the scaling that predicts.

    python benchmarks/communication.py [--config=configs/brats.py] [--size=256] [--batch=240] [--devices=8]
        [--images_per_second=2000] [--gigabytes_per_second=50] [--latency_us=20]

Compiles the step for fake devices and adds up the collectives of the program that comes out. The prediction: a ring
all-reduce of B bytes over N chips takes 2 (N-1)/N B / bandwidth, each collective starts `latency_us` late, nothing of
it is hidden behind computing, and a chip computes `images_per_second` whatever its share of the batch.
"""

import argparse
import collections
import os
import re

from hlo import COLLECTIVES, read_shapes

CHIPS = (8, 16, 32, 64, 128, 256, 512, 1024)


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Of each kind of collective in a program: how many there are, and the bytes of their results on one device."""
    found: dict[str, list[int]] = collections.defaultdict(list)
    for line in hlo.splitlines():
        match = re.match(rf"\s*(?:ROOT )?%?\S+ = (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if match:
            found[match[2]].append(sum(int(shape.bytes) for shape in read_shapes(match[1])))
    return {kind: (len(sizes), sum(sizes)) for kind, sizes in found.items()}


def compiled_step(path: str, size: int, batch: int) -> tuple[str, int]:
    """The optimised program of the training step over all devices, and the number of its parameters."""
    import jax
    import jax.numpy as jnp

    from common import load_config

    from decomp_jax.mesh import data_mesh
    from decomp_jax.models.network import DecompositionNet
    from decomp_jax.training.state import create_state, make_optimizer
    from decomp_jax.training.step import compile_train_step

    config, mesh = load_config(path), data_mesh()
    model = DecompositionNet(config.model, size=size, channels=1, lesion_classes=3)
    tx = make_optimizer(config.train)
    state = jax.eval_shape(lambda: create_state(config, model, tx, mesh))
    images = {
        "image": jax.ShapeDtypeStruct((batch, size, size, 1), jnp.float16),
        "label": jax.ShapeDtypeStruct((batch, size, size), jnp.uint8),
    }
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return compile_train_step(model, tx, config, mesh).lower(state, images).compile().as_text(), parameters


def scaling_table(
    reduced: int, launches: int, *, batch: int, images_per_second: float, bandwidth: float, latency: float
) -> str:
    """Markdown: seconds of communication, and the share of perfect scaling, for a batch that grows with the chips (30 a
    chip) and for one that stays (where the chips can share it)."""
    lines = ["| chips | all-reduce, ms | 30 images a chip: images/s, efficiency | batch of {} : images/s, efficiency |"
             .format(batch).replace(" :", ":"), "|---|---|---|---|"]
    for chips in CHIPS:
        communication = 2 * (chips - 1) / chips * reduced / bandwidth + launches * latency
        cells = []
        for each in (30, batch // chips if batch % chips == 0 else 0):
            seconds = each / images_per_second + communication
            efficiency = each / images_per_second / seconds
            cells.append(f"{chips * each / seconds:,.0f}, {100 * efficiency:.0f} %" if each else "-")
        lines.append(f"| {chips:,} | {1e3 * communication:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/brats.py")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=240, help="global batch")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--images_per_second", type=float, default=2000, help="of one chip alone")
    parser.add_argument("--gigabytes_per_second", type=float, default=50, help="each chip's link, each way")
    parser.add_argument("--latency_us", type=float, default=20, help="of each collective")
    args = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={args.devices}"}

    hlo, parameters = compiled_step(args.config, args.size, args.batch)
    found = collectives(hlo)
    print(f"{args.config}, {args.size} px, batch {args.batch} over {args.devices} devices; "
          f"{parameters / 1e6:.2f} M parameters, {4 * parameters / 1e6:.1f} MB of gradients\n")
    print("| collective | in a step | MB on each device |\n|---|---|---|")
    for kind, (count, size) in found.items():
        print(f"| {kind} | {count} | {size / 1e6:.2f} |")
    launches, reduced = (sum(part) for part in zip(*found.values()))
    print(f"\n{args.images_per_second:,.0f} images/s a chip, {args.gigabytes_per_second:.0f} GB/s a link, "
          f"{args.latency_us:.0f} us a collective:\n")
    print(scaling_table(
        reduced, launches, batch=args.batch, images_per_second=args.images_per_second,
        bandwidth=1e9 * args.gigabytes_per_second, latency=1e-6 * args.latency_us,
    ))


if __name__ == "__main__":
    main()
