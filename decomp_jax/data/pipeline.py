"""Batches for training and for passes over a split, read ahead in threads and moved ahead to the devices."""

import collections
import functools
import itertools
from collections.abc import Iterator

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from decomp_jax.config import DataConfig
from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError
from decomp_jax.mesh import to_global

TRAIN_FIELDS = ("image", "label")


def train_batches(
    dataset: SliceDataset, config: DataConfig, mesh: Mesh, *, batch_size: int, seed: int, start_step: int = 0
) -> Iterator[dict[str, jax.Array]]:
    """Endless global batches {image [B,S,S,C], label [B,S,S]} of labelled slices.

    The order is a function of the seed and the epoch alone: step s reads the same slices whatever the number of
    processes, and a run that starts at step s goes on exactly where one that stopped there was.
    Raises UserError if there are fewer labelled slices than a batch holds.
    """
    labelled = np.flatnonzero(dataset.rows["labelled"])
    if len(labelled) < batch_size:
        raise UserError(
            f"--config.train.batch_size={batch_size}: the train split has only {len(labelled)} labelled slices"
        )
    processes, process = jax.process_count(), jax.process_index()
    batches = (
        grain.MapDataset.source(labelled)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch_size // processes)
        .map(functools.partial(dataset.stack, TRAIN_FIELDS))
    )
    mine = batches[start_step * processes + process :: processes]
    ahead = grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=config.read_threads)
    local = iter(mine.to_iter_dataset(ahead))
    return _ahead((to_global(mesh, batch) for batch in local), config.prefetch)


def split_batches(
    dataset: SliceDataset, fields: tuple[str, ...], batch_size: int, rows: np.ndarray | None = None
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """One pass over all rows, or those given: (fields padded to `batch_size` by repeating the last row, valid rows)."""
    rows = np.arange(len(dataset)) if rows is None else rows
    for first in range(0, len(rows), batch_size):
        valid = rows[first : first + batch_size]
        padded = np.concatenate([valid, np.full(batch_size - len(valid), valid[-1])])
        yield dataset.stack(fields, padded.tolist()), len(valid)


def _ahead(batches: Iterator[dict[str, jax.Array]], count: int) -> Iterator[dict[str, jax.Array]]:
    """Keeps `count` batches on their way to the devices."""
    queue = collections.deque(itertools.islice(batches, count))
    while queue:
        batch = queue.popleft()
        queue.extend(itertools.islice(batches, 1))
        yield batch
