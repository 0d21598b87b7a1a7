"""Encoding beside training: images per second of the encoder alone, the whole forward pass, and a training step.

    python benchmarks/encoding.py [--config=configs/demo.py] [--size=64] [--batch=64]

Interleaved in one process; medians over the rounds, and the ratio to the forward pass in each round.
"""

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np
from common import load_config

from decomp_jax.mesh import data_mesh
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training.state import create_state, make_optimizer
from decomp_jax.training.step import compile_train_step


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    config, mesh = load_config(args.config), data_mesh()
    model = DecompositionNet(config.model, size=args.size, channels=1, lesion_classes=3)
    tx = make_optimizer(config.train)
    state = create_state(config, model, tx, mesh)
    variables = jax.tree.map(np.asarray, {"params": state.params, "batch_stats": state.batch_stats})
    rng = np.random.default_rng(0)
    image = rng.random((args.batch, args.size, args.size, 1), np.float32)
    batch = {"image": image, "label": rng.integers(0, 4, image.shape[:3]).astype(np.uint8)}

    def encode(variables: dict, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        latents = model.apply(variables, image, train=False, method="encode")
        codes = model.apply(variables, latents, method="quantize")
        return codes.normal_indices, codes.abnormal_indices

    encode = jax.jit(encode)
    forward = jax.jit(lambda variables, image: model.apply(variables, image, quantised=1.0, train=False))
    step = compile_train_step(model, tx, config, mesh)

    def train() -> object:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    timed = {"encode": lambda: encode(variables, image), "forward": lambda: forward(variables, image), "train": train}
    for function in timed.values():
        seconds(function)
    rounds = [{name: seconds(function) for name, function in timed.items()} for _ in range(args.rounds)]
    print(f"{args.config}, {args.size} px, batch {args.batch}, {jax.devices()[0].device_kind}, {args.rounds} rounds")
    print("| pass | images/s | times the forward pass (least to most) |\n|---|---|---|")
    for name in timed:
        ratios = sorted(each["forward"] / each[name] for each in rounds)
        rate = args.batch / np.median([each[name] for each in rounds])
        print(f"| {name} | {rate:.0f} | {np.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")


if __name__ == "__main__":
    main()
