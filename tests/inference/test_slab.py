"""Slabs: whole scans, batches of a split, and slices asked with agree with each other and with SciPy."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from decomp_jax.data.schema import Settings
from decomp_jax.inference import slab
from decomp_jax.preparation.picture import FOREGROUND
from decomp_jax.types import Latents

CELLS = (2, 2, 3)


class Eyes:
    """Stands in for `Decomposer`: its latents are the images."""

    def latents(self, images: np.ndarray) -> Latents:
        return Latents(-images, images)


def rows_of(*heights: list[float]) -> np.ndarray:
    """Slices at these heights, a list a patient."""
    rows = np.zeros(sum(map(len, heights)), [("patient_id", "U4"), ("position_mm", "f4")])
    rows["patient_id"] = np.repeat([f"p{i}" for i in range(len(heights))], [*map(len, heights)])
    rows["position_mm"] = np.concatenate(heights)
    return rows


def vectors(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, *CELLS)).astype(np.float32)


def expected(z_e: np.ndarray, rows: np.ndarray, slab_mm: float) -> np.ndarray:
    """Slice by slice, from all slices."""
    means = []
    for row in rows:
        apart = np.abs(rows["position_mm"] - row["position_mm"]) / slab_mm
        share = np.exp(-(apart**2) / 2) * (apart <= 3) * (rows["patient_id"] == row["patient_id"])
        means.append(np.tensordot(share / share.sum(), z_e, 1))
    return np.array(means)


def test_the_slab_is_an_eighth_of_a_cell() -> None:
    assert slab.default_slab_mm(Settings("brats", 64), grid=8) == 4
    assert slab.default_slab_mm(Settings("volumes", 64, field_mm=400.0), grid=16) == 3.125


@pytest.mark.parametrize("spacing", [1.0, 2.5])
def test_a_scan_is_filtered_as_scipy_does(spacing: float) -> None:
    """Away from its ends."""
    z_e, heights = vectors(40), spacing * np.arange(40)
    found = slab.over_scan(slab.latents_of(Eyes(), z_e), heights, slab_mm=4.0)
    reach = int(12 / spacing)
    filtered = gaussian_filter1d(z_e.astype(float), 4 / spacing, axis=0, radius=reach)
    np.testing.assert_allclose(found.abnormal[reach:-reach], filtered[reach:-reach], atol=1e-6)
    np.testing.assert_array_equal(found.normal, -z_e)


def test_ends_gaps_and_other_patients_count_nothing() -> None:
    rows = rows_of([0, 1, 2, 9, 10, 40], [3, 5, 7, 11], [8])
    z_e = vectors(len(rows))
    weights = slab.slab_weights(rows["patient_id"], rows["position_mm"], 4.0)
    reach = weights.shape[1] // 2
    found = slab.over_slab(np.pad(z_e, [(reach, reach)] + [(0, 0)] * 3), weights)
    np.testing.assert_allclose(found, expected(z_e, rows, 4.0), atol=1e-6)
    np.testing.assert_array_equal(found[[5, 10]], z_e[[5, 10]])


@pytest.mark.parametrize("heights, slab_mm", [([np.nan] * 9, 4.0), ([*range(9)], 0.0)])
def test_without_heights_or_slabs_a_slice_is_by_itself(heights: list[float], slab_mm: float) -> None:
    found = slab.over_scan(slab.latents_of(Eyes(), vectors(9)), np.array(heights), slab_mm)
    np.testing.assert_array_equal(found.abnormal, vectors(9))
    assert slab.slab_around(np.array(heights), 3, slab_mm).tolist() == [3]


@pytest.mark.parametrize("count, widths", [(1, {1}), (slab.FEW, {1}), (slab.FEW + 1, {slab.BATCH}), (20, {slab.BATCH})])
def test_a_few_slices_are_encoded_without_others(count: int, widths: set[int]) -> None:
    seen = []

    class Counting(Eyes):
        def latents(self, images: np.ndarray) -> Latents:
            seen.append(len(images))
            return super().latents(images)

    found = slab.over_scan(slab.latents_of(Counting(), vectors(count)), np.arange(float(count)), 0.0)
    np.testing.assert_array_equal(found.abnormal, vectors(count))
    assert {*seen} == widths


def test_pictures_have_no_slabs() -> None:
    assert slab.default_slab_mm(Settings(source="scans", size=64), 8) == 4
    assert slab.default_slab_mm(Settings(source="pictures", size=64, foreground=FOREGROUND), 8) == 0


def test_batches_are_parts_of_one_pass() -> None:
    """Slabs pass the edges of batches, and end with patients; the last batch is padded."""
    rows = rows_of([*range(10)], [*range(0, 14, 2)], [*range(4)])
    z_e = vectors(len(rows))
    padded = np.pad(z_e, [(0, 3)] + [(0, 0)] * 3, mode="edge")
    batches = ((i, {"image": padded[8 * i : 8 * i + 8]}) for i in range(3))
    notes, _, latents = zip(*slab.with_slab_latents(Eyes(), batches, rows, 1.5))
    found = np.concatenate([part.abnormal for part in latents])[: len(rows)]
    np.testing.assert_allclose(found, expected(z_e, rows, 1.5), atol=1e-6)
    assert notes == (0, 1, 2)
    np.testing.assert_array_equal(np.concatenate([part.normal for part in latents]), -padded)


def test_slabs_wider_than_a_batch_are_cut() -> None:
    rows, z_e = rows_of([*range(12)]), vectors(12)
    batches = ((None, {"image": z_e[2 * i : 2 * i + 2]}) for i in range(6))
    found = np.concatenate([part.abnormal for *_, part in slab.with_slab_latents(Eyes(), batches, rows, 4.0)])
    share = np.exp(-(np.arange(-2, 3) ** 2) / 32)
    np.testing.assert_allclose(found[6], np.tensordot(share / share.sum(), z_e[4:9], 1), atol=1e-6)


def test_what_a_slice_is_asked_with_needs_no_more_than_its_slab() -> None:
    z_e, heights = vectors(60), 0.9 * np.arange(60)
    near = slab.slab_around(heights, 20, 4.0)
    assert (near.min(), near.max()) == (7, 33)
    part = slab.over_scan(slab.latents_of(Eyes(), z_e[near]), heights[near], 4.0).abnormal[near == 20]
    np.testing.assert_allclose(part[0], slab.over_scan(slab.latents_of(Eyes(), z_e), heights, 4.0).abnormal[20], atol=1e-6)
