import itertools

import numpy as np
import pytest

from decomp_jax.config import DataConfig
from decomp_jax.data.pipeline import split_batches, train_batches
from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError
from decomp_jax.mesh import data_mesh


@pytest.fixture(scope="module")
def dataset(phantom):
    return SliceDataset(phantom, "train")


def take(dataset, count, **options):
    options = {"batch_size": 16, "seed": 1} | options
    batches = train_batches(dataset, DataConfig(read_threads=2, prefetch=2), data_mesh(), **options)
    return [np.asarray(batch["image"]) for batch in itertools.islice(batches, count)]


def test_starting_at_a_step_continues_the_order(dataset):
    whole, rest = take(dataset, 14), take(dataset, 4, start_step=10)
    np.testing.assert_array_equal(np.stack(whole[10:]), np.stack(rest))


def test_an_epoch_shows_every_slice_once(dataset):
    n = len(dataset)
    images = np.concatenate(take(dataset, -(-n // 16)))[:n].reshape(n, -1)
    everything = dataset.stack(("image",))["image"].reshape(n, -1)
    order = lambda x: x[np.lexsort(x.T[::97])]
    np.testing.assert_array_equal(order(images), order(everything))


def test_seed_and_epoch_change_the_order(dataset):
    assert not np.array_equal(take(dataset, 1)[0], take(dataset, 1, seed=2)[0])


def test_too_large_a_batch_is_refused(dataset):
    with pytest.raises(UserError, match="batch_size=9999"):
        take(dataset, 1, batch_size=9999)


def test_split_batches_pad_the_last(dataset):
    valid = [count for _, count in split_batches(dataset, ("label",), 16)]
    shapes = {batch["label"].shape for batch, _ in split_batches(dataset, ("label",), 16)}
    assert sum(valid) == len(dataset) and shapes == {(16, 64, 64)}
