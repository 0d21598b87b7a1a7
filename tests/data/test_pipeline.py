import itertools

import jax
import numpy as np
import pytest

from decomp_jax.config import DataConfig
from decomp_jax.data import pipeline
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
    n = len(dataset)
    epochs = np.concatenate(take(dataset, 2 * n // 16 + 1))[: 2 * n].reshape(2, n, -1)
    assert not np.array_equal(epochs[0], epochs[1])


def test_unlabelled_slices_are_not_trained_on(dataset, monkeypatch):
    rows = dataset.rows.copy()
    rows["labelled"] = np.arange(len(rows)) % 3 == 0
    monkeypatch.setattr(dataset, "rows", rows)
    images = np.concatenate(take(dataset, len(rows) // 16))
    labelled = {image.tobytes() for image in dataset.stack(("image",), np.flatnonzero(rows["labelled"]))["image"]}
    assert {image.tobytes() for image in images} <= labelled


def test_too_large_a_batch_is_refused(dataset):
    with pytest.raises(UserError, match="batch_size=9999"):
        take(dataset, 1, batch_size=9999)


def labels_of(batches):
    return [(np.asarray(batch["label"]), np.asarray(batch["valid"]), count) for batch, count in batches]


@pytest.mark.parametrize("batch_size", [16, 17, None])
def test_a_pass_reads_every_row_once_in_order(dataset, batch_size):
    labels, valid, counts = zip(*labels_of(split_batches(dataset, ("label",), data_mesh(), batch_size=batch_size)))
    assert len({label.shape for label in labels}) == 1 and sum(counts) == len(dataset)
    assert [mask.sum() for mask in valid] == [*counts]
    read = np.concatenate([label[mask] for label, mask in zip(labels, valid)])
    np.testing.assert_array_equal(read, dataset.stack(("label",))["label"])


def test_a_pass_over_some_rows(dataset):
    rows = np.array([7, 3, 5, 3, 11])
    ((labels, valid, count),) = labels_of(split_batches(dataset, ("label",), data_mesh(), rows=rows))
    assert count == valid.sum() == 5
    np.testing.assert_array_equal(labels[:5], dataset.stack(("label",), rows)["label"])
    assert not labels_of(split_batches(dataset, ("label",), data_mesh(), rows=rows[:0]))


def test_processes_share_each_batch(dataset, monkeypatch):
    """Side by side, what each of two processes reads is what one reads."""
    monkeypatch.setattr(pipeline, "to_global", lambda mesh, batch: batch)

    def read(processes, process):
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        monkeypatch.setattr(jax, "process_index", lambda: process)
        return labels_of(split_batches(dataset, ("label",), data_mesh(), batch_size=14))

    for whole, *halves in zip(read(1, 0), read(2, 0), read(2, 1), strict=True):
        np.testing.assert_array_equal(whole[0], np.concatenate([half[0] for half in halves]))
        np.testing.assert_array_equal(whole[1], np.concatenate([half[1] for half in halves]))
        assert {half[2] for half in halves} == {whole[2]}


def test_a_damaged_record_is_told(dataset, monkeypatch):
    def damaged(*_):
        raise UserError("record 0 is damaged")

    monkeypatch.setattr(dataset, "stack", damaged)
    with pytest.raises(UserError, match="record 0 is damaged"):
        labels_of(split_batches(dataset, ("label",), data_mesh()))
