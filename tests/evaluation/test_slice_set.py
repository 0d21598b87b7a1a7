"""Thumbnails, scratch files, and the columns that say what kind of slice it is."""

import errno
import gc
from pathlib import Path

import numpy as np
import pytest
from skimage.measure import block_reduce

from decomp_jax.errors import UserError
from decomp_jax.evaluation import scratch as module
from decomp_jax.evaluation.scores import kind_columns, query_blocks
from decomp_jax.evaluation.scratch import map_blocks, scratch
from decomp_jax.evaluation.slices import SliceSet, lesion_side, shrink
from tests.evaluation.fakes import FakeDecomposer, Heads


@pytest.mark.parametrize(("size", "side"), [(32, 32), (64, 64), (96, 96), (128, 64), (240, 80), (256, 64)])
def test_thumbnails_are_means_of_pixels(size: int, side: int) -> None:
    images = np.random.default_rng(0).random((2, size, size, 2)).astype(np.float16)
    factor = size // side
    expected = block_reduce(images.astype(np.float32), (1, factor, factor, 1), np.mean)
    np.testing.assert_allclose(shrink(images), expected, atol=1e-3)
    assert shrink(images).shape == (2, side, side, 2) and shrink(images).dtype == np.float16


def test_a_set_holds_what_its_data_set_holds(query: SliceSet, heads: dict[str, Heads]) -> None:
    fields = heads["query"].fields
    for name in ("label", "anatomy"):
        np.testing.assert_array_equal(getattr(query, name), fields[name])
    np.testing.assert_array_equal(query.thumbnail, fields["image"])
    np.testing.assert_array_equal(query.images(np.array([7, 2])), fields["image"][[7, 2]])
    np.testing.assert_array_equal(query.lesion, fields["label"].any((1, 2)))
    np.testing.assert_allclose(query.lesion_area, (fields["label"] > 0).mean((1, 2)))
    np.testing.assert_array_equal(query.lesion_side, lesion_side(fields["label"]))


def test_slabs_are_of_slices_without_labels_too(decomposer: FakeDecomposer) -> None:
    """As in a bank; patients without any label are not read."""
    heads = Heads(4, 6, seed=2)
    whole = SliceSet.encode(decomposer, heads, "query", slab_mm=6.0)
    heads.rows["labelled"][[1, 8, 9, *range(12, 18)]] = False
    some = SliceSet.encode(decomposer, heads, "query", slab_mm=6.0)
    left = np.flatnonzero(heads.rows["labelled"])
    np.testing.assert_array_equal(some.positions, left)
    for name in ("label", "z_e_abnormal", "z_e_normal", "segmentation"):
        np.testing.assert_array_equal(getattr(some, name), getattr(whole, name)[left])
    np.testing.assert_array_equal(some.bank.abnormal_indices, whole.bank.abnormal_indices[left])


def test_blocks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    array = np.random.default_rng(0).integers(0, 9, (11, 3))
    np.testing.assert_array_equal(map_blocks(lambda part: part.sum(1), array), array.sum(1))
    blocks = query_blocks(np.arange(11), references=2**21)
    assert max(len(block) for block in blocks) <= 2 and np.array_equal(np.concatenate(blocks), np.arange(11))


def test_scratch_files_are_gone_with_their_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    array = scratch((5, 1000), np.int32)
    array[3] = 7
    assert not list(tmp_path.iterdir()) and array.sum() == 7000
    part = array[3]
    del array
    gc.collect()
    assert part.sum() == 7000


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "posix_fallocate", full)
    with pytest.raises(UserError, match=f"{tmp_path}: No space left"):
        scratch((5,), np.int32)


def test_why_a_column_is_left_out() -> None:
    columns = {
        "patient_id": np.array(["a", "b"]), "kind": np.array(["x", "y"]), "grade": np.array([1.0, 2.0]),
        "site": np.array(["x", "x"]), "other": np.array(["p", "q"]),
    }
    query, reference = (
        np.rec.fromarrays([values if name != "other" else values_of_other for name, values in columns.items()],
                          names=list(columns)).view(np.ndarray)
        for values_of_other in (np.array(["r", "s"]), columns["other"])
    )
    reasons = kind_columns(query, reference)
    assert reasons.keys() == {"kind", "grade", "site", "other"} and reasons["kind"] == ""
    assert "numbers" in reasons["grade"] and "one value" in reasons["site"] and "no value" in reasons["other"]
