"""Batches for training and for passes over a split: each process reads its share ahead, in threads."""

import collections
import functools
import itertools
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from decomp_jax.config import DataConfig
from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError
from decomp_jax.mesh import to_global

TRAIN_FIELDS = ("image", "label")
IMAGES_PER_DEVICE = 64


def train_batches(
    dataset: SliceDataset, config: DataConfig, mesh: Mesh, *, batch_size: int, seed: int, start_step: int = 0
) -> Iterator[dict[str, jax.Array]]:
    """Endless global batches {image [B,S,S,C], label [B,S,S]} of labelled slices.

    The order is a function of the seed and the epoch alone: step s reads the same slices whatever the number of
    processes, and a run that starts at step s goes on exactly where one that stopped there was.
    Raises UserError if there are fewer labelled slices than a batch holds.
    """
    labelled = check_slices(dataset, batch_size)
    processes, process = jax.process_count(), jax.process_index()
    batches = (
        grain.MapDataset.source(labelled)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch_size // processes)
        .map(functools.partial(dataset.stack, TRAIN_FIELDS))
    )
    return _read_ahead(batches[start_step * processes + process :: processes], config, mesh)


def check_slices(dataset: SliceDataset, batch_size: int) -> np.ndarray:
    """Rows of the labelled slices. Raises UserError if they are fewer than a batch holds."""
    labelled = np.flatnonzero(dataset.rows["labelled"])
    if len(labelled) < batch_size:
        raise UserError(
            f"--config.train.batch_size={batch_size}: the train split has only {len(labelled)} labelled slices; take "
            "a smaller batch"
        )
    return labelled


def split_batches(
    dataset: SliceDataset,
    fields: Sequence[str],
    mesh: Mesh,
    *,
    batch_size: int | None = None,
    rows: np.ndarray | None = None,
    config: DataConfig = DataConfig(),
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """One pass over all rows in order, or those given: global batches of the fields, and how many rows of each count.

    The last batch is padded by repeating the last row; `valid` [B], beside the fields, is False there. Batches are the
    same whatever the number of processes.

    Args:
        batch_size: multiple of the devices, `IMAGES_PER_DEVICE` for each by default; less where there are fewer rows.
    """
    rows = np.arange(len(dataset)) if rows is None else rows
    most = batch_size or IMAGES_PER_DEVICE * mesh.size
    batch_size = min(most, max(-(-len(rows) // mesh.size), 1) * mesh.size)
    padded = np.pad(rows, (0, -len(rows) % batch_size), mode="edge")
    parts = {"rows": padded, "valid": np.arange(len(padded)) < len(rows)}
    processes, process = jax.process_count(), jax.process_index()
    share = {name: part.reshape(-1, processes, batch_size // processes)[:, process] for name, part in parts.items()}

    def read(i: int) -> dict[str, np.ndarray]:
        return dataset.stack(fields, share["rows"][i]) | {"valid": share["valid"][i]}

    batches = grain.MapDataset.range(len(share["rows"])).map(read)
    counts = parts["valid"].reshape(-1, batch_size).sum(1).tolist()
    return zip(_read_ahead(batches, config, mesh), counts, strict=True)


def _read_ahead(batches: grain.MapDataset, config: DataConfig, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """This process's rows of each batch, read in threads -> global batches, some on their way to the devices."""
    ahead = grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=config.read_threads)
    placed = (to_global(mesh, batch) for batch in batches.to_iter_dataset(ahead))
    queue = collections.deque(itertools.islice(placed, config.prefetch))
    while queue:
        batch = queue.popleft()
        queue.extend(itertools.islice(placed, 1))
        yield batch
