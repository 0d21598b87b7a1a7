"""Whether bfloat16 reaches the losses of float32: the same short training in both, and in float32 with another seed.

    python benchmarks/precision.py --data DIR [--config configs/demo.py] [--steps 400] [--write docs/training.md]

Prints the mean of the total loss, and of its largest terms at the end, over each tenth of the steps. The other seed shows
how far two runs differ by chance.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from common import load_config, write_measured

from decomp_jax.config import Config
from decomp_jax.data.pipeline import train_batches
from decomp_jax.data.records import SliceDataset
from decomp_jax.mesh import data_mesh
from decomp_jax.training.loop import make_model
from decomp_jax.training.state import create_state, make_optimizer
from decomp_jax.training.step import compile_train_step

TERMS = ("term/soft_dice", "term/cross_entropy", "term/reconstruction_minus", "term/reconstruction_plus")


def train(config: Config, dataset: SliceDataset) -> dict[str, np.ndarray]:
    """Metrics [steps] of a run."""
    mesh, model, tx = data_mesh(), make_model(config, dataset), make_optimizer(config.train)
    state, step = create_state(config, model, tx, mesh), compile_train_step(model, tx, config, mesh)
    batches = train_batches(dataset, config.data, mesh, batch_size=config.train.batch_size, seed=config.train.seed)
    found = []
    for _ in range(config.train.steps):
        state, metrics = step(state, next(batches))
        found.append(metrics)
    found = jax.device_get(found)
    return {name: np.array([one[name] for one in found]) for name in found[0]}


def report(config: Config, dataset: SliceDataset) -> Iterator[str]:
    train_config, steps = config.train, config.train.steps
    runs = {
        "float32": ("float32", train_config),
        "bfloat16": ("bfloat16", train_config),
        "float32, other seed": ("float32", dataclasses.replace(train_config, seed=train_config.seed + 1)),
    }
    found = {}
    for name, (dtype, of_run) in runs.items():
        model = dataclasses.replace(config.model, dtype=dtype)
        found[name] = train(dataclasses.replace(config, model=model, train=of_run), dataset)
    tenths = np.array_split(np.arange(steps), 10)
    yield f"{jax.devices()[0].device_kind}, {steps} steps of {train_config.batch_size}; mean over the steps."
    yield "\n| value | steps | " + " | ".join(found) + " |\n|---|---|" + "---|" * len(found)
    for name, where in [("loss/total", some) for some in tenths] + [(term, tenths[-1]) for term in TERMS]:
        values = " | ".join(f"{run[name][where].mean():.3f}" for run in found.values())
        yield f"| {name} | {where[0] + 1}-{where[-1] + 1} | {values} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set written by `python -m data_prep`")
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--write", type=Path, help="document whose measured part to replace")
    flags = parser.parse_args()
    config = load_config(flags.config)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=flags.steps))
    lines = list(report(config, SliceDataset(flags.data, "train")))
    print("\n".join(lines))
    if flags.write:
        write_measured(flags.write, "precision", lines)


if __name__ == "__main__":
    main()
