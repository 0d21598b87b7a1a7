"""Slices per second from TFRecords to the device: the whole reader, and each stage of it added to those before.

    python benchmarks/input.py [--size 256] [--slices 3000] [--batch 240] [--rounds 5] [--index 1000000]
                               [--write docs/training.md]

Random slices (float16 image, uint8 label) are written by data_prep to a temporary folder and read in the shuffled
order of training, from the page cache: the disk is not measured. Stages take turns; medians (quartiles). Before that,
the time to open a data set of `--index` tiny slices.
"""

import argparse
import functools
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from common import spread, write_measured

from data_prep.slices import PatientSlices, write_dataset
from decomp_jax.config import DataConfig
from decomp_jax.data.pipeline import TRAIN_FIELDS, train_batches
from decomp_jax.data.records import SliceDataset
from decomp_jax.data.schema import Settings
from decomp_jax.mesh import data_mesh, keep_host_memory, to_global

SLICES_A_PATIENT = 60
TINY, TINY_SLICES_A_PATIENT = 8, 10_000


def noise(size: int, slices: int, patient: str) -> PatientSlices:
    rng = np.random.default_rng(int(patient))
    shape = (slices, size, size)
    return PatientSlices(
        patient,
        image=rng.random((*shape, 1), np.float32).astype(np.float16),
        label=rng.integers(0, 4, shape, np.uint8),
        slice_index=np.arange(slices, dtype=np.int32),
        position_mm=np.arange(slices, dtype=np.float32),
    )


def write(out: Path, size: int, slices: int, slices_a_patient: int) -> None:
    write_dataset(
        out, settings=Settings(source="images", size=size),
        splits={str(i): "train" for i in range(-(-slices // slices_a_patient))},
        prepare=functools.partial(noise, size, slices_a_patient), workers=1, on_error="stop",
    )


def stages(dataset: SliceDataset, batch: int, count: int, threads: int) -> dict[str, Callable[[], object]]:
    """Each reads `count` batches. The whole reader reads on between its turns, as far as it keeps ahead."""
    mesh = data_mesh()
    order = np.random.default_rng(0).permutation(len(dataset))[: batch * count].reshape(count, batch)
    loaded = dataset.stack(TRAIN_FIELDS, order[0])

    def to_device() -> None:
        for _ in range(count):
            jax.block_until_ready(to_global(mesh, loaded))

    batches = train_batches(dataset, DataConfig(read_threads=threads), mesh, batch_size=batch, seed=0)

    def whole() -> None:
        for read in itertools.islice(batches, count):
            jax.block_until_ready(read)

    return {
        "read, checked and stacked, one thread": lambda: [dataset.stack(TRAIN_FIELDS, rows) for rows in order],
        "host to device alone": to_device,
        "whole reader": whole,
    }


def opening(slices: int, rounds: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "data", TINY, slices, TINY_SLICES_A_PATIENT)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            dataset = SliceDataset(Path(folder) / "data", "train")
            times.append(1e3 * (time.perf_counter() - start))
    yield f"Opening a data set of {len(dataset):,} slices: {spread(times)} ms.\n"


def report(size: int, slices: int, batch: int, rounds: int, threads: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "data", size, slices, SLICES_A_PATIENT)
        dataset = SliceDataset(Path(folder) / "data", "train")
        count = len(dataset) // batch
        times: dict[str, list[float]] = {}
        reads = stages(dataset, batch, count, threads)
        for i in range(rounds + 1):
            for name, read in reads.items():
                start = time.perf_counter()
                read()
                if i:  # the first round fills the page cache
                    times.setdefault(name, []).append(time.perf_counter() - start)
    megabytes = size**2 * 3 / 1e6
    yield (f"{len(dataset):,} slices of {size}x{size}, {megabytes:.2f} MB each, batches of {batch}, {threads} threads, "
           f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end, {rounds} rounds.")
    yield "\n| stage | slices/s | MB/s |\n|---|---|---|"
    for name, values in times.items():
        rates = count * batch / np.array(values)
        yield f"| {name} | {spread(rates, 0)} | {np.median(rates) * megabytes:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--slices", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=DataConfig.read_threads, help="config.data.read_threads")
    parser.add_argument("--index", type=int, default=1_000_000, help="slices of the data set that is opened")
    parser.add_argument("--write", type=Path, help="document whose measured part to replace")
    flags = parser.parse_args()
    keep_host_memory()  # as train.py does
    lines = [
        *opening(flags.index, flags.rounds),  # first: the whole reader reads on
        *report(flags.size, flags.slices, flags.batch, flags.rounds, flags.threads),
    ]
    print("\n".join(lines))
    if flags.write:
        write_measured(flags.write, "input", lines)


if __name__ == "__main__":
    main()
