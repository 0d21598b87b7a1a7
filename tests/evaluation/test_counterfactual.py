"""Image measures against scikit-image."""

import dataclasses

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from decomp_jax.evaluation.counterfactual import counterfactual_table, inpaint, ssim_map
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.inference.decomposer import Decomposition
from tests.evaluation.fakes import FakeDecomposer, Heads


def test_ssim_map_is_that_of_scikit_image() -> None:
    a, b = np.random.default_rng(0).random((2, 24, 24)).astype(np.float32)
    _, expected = structural_similarity(
        a, b, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    np.testing.assert_allclose(ssim_map(a[None, ..., None], b[None, ..., None])[0, ..., 0], expected, atol=2e-4)


def test_inpainting_fills_the_mask_from_around_it_alone() -> None:
    image = np.full((1, 32, 32, 1), 0.5, np.float32)
    mask = np.zeros((1, 32, 32), bool)
    mask[0, 8:24, 8:24] = True
    lesion = np.where(mask[..., None], 1.0, image)
    np.testing.assert_allclose(inpaint(lesion, mask), image, atol=1e-5)


def test_table_agrees_with_scikit_image(decomposer: FakeDecomposer, heads: dict[str, Heads], query: SliceSet) -> None:
    table = counterfactual_table(decomposer, heads["query"], query)
    assert {name: left.mean for name, left in table["lesion left in percent"].items()} == {
        "x_minus": 0, "x + x_minus - x_plus": 0,
    }
    images = table["images"]
    healthy, patients = heads["query"].fields["healthy"].astype(float), query.rows["patient_id"]
    gains = {patient: [] for patient in np.unique(patients[query.lesion])}
    for i in np.flatnonzero(query.lesion):
        inside = query.label[i] > 0
        image = query.images(np.array([i]))
        x_minus = decomposer.decompose(image).x_minus[0]
        painted, taken = (
            peak_signal_noise_ratio(healthy[i][inside], image[inside].astype(float), data_range=1)
            for image in (x_minus, image[0])
        )
        gains[patients[i]].append(painted - taken)
    expected = np.mean([np.mean(of_patient) for of_patient in gains.values()])
    assert images["x_minus"]["psnr gain inside"].mean == pytest.approx(expected, abs=1e-3)
    assert images["x"]["near percent"].mean == 0
    assert images["ceiling"]["near percent"].mean > images["x_minus"]["near percent"].mean > 20


class WithAnother(FakeDecomposer):
    """Paints a second channel, which it can't know."""

    def decompose(self, images: np.ndarray) -> Decomposition:
        assert not images[..., 1].any()
        found = super().decompose(images)
        paintings = (getattr(found, name) for name in ("x_plus", "x_minus"))
        x_plus, x_minus = (np.concatenate([x[..., :1], np.full_like(x[..., :1], 0.7)], -1) for x in paintings)
        return dataclasses.replace(found, x_plus=x_plus, x_minus=x_minus)


def test_channels_that_the_data_lack_do_not_count(
    decomposer: FakeDecomposer, heads: dict[str, Heads], query: SliceSet
) -> None:
    expected = counterfactual_table(decomposer, heads["query"], query)
    lacking = Heads(5, 6, seed=0, prefix="q")
    for name in ("image", "healthy"):
        lacking.fields[name] = np.concatenate([lacking.fields[name], np.zeros_like(lacking.fields[name])], -1)
    found = counterfactual_table(WithAnother(decomposer.settings), lacking, query)
    assert repr(found) == repr(expected)  # bounds of few patients are nan
