"""A drawn lesion and a drawn region, as latents and as weights."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from skimage.measure import block_reduce

from decomp_jax.errors import UserError
from decomp_jax.inference.sketch import cell_shares, region_weights, sketch_latents
from tests.inference.test_decomposer import CONFIG, SETTINGS, decomposer

__all__ = ["decomposer"]


@pytest.mark.parametrize("size", [(16, 16), (7, 10), (3, 2)])
def test_shares_are_those_of_areas(size):
    labels = np.random.default_rng(0).integers(0, 4, size)
    finer = np.kron(labels, np.ones((4, 4), int))  # so that cells are whole pixels
    expected = block_reduce((finer[..., None] == [1, 2, 3]).astype(float), (*size, 1), np.mean)
    np.testing.assert_allclose(cell_shares(labels, 4, 3), expected, atol=1e-12)


def test_a_sketch_is_what_the_layout_term_asks_for(decomposer):
    """Half of one cell necrosis, a quarter of another enhancing tumour: by hand."""
    labels = np.zeros((16, 16), np.uint8)
    labels[:4, :2], labels[8:10, 12:14] = 1, 3
    latents, term = sketch_latents(decomposer, labels), CONFIG.objective.layout
    expected = np.zeros((4, 4, CONFIG.model.code_dim))
    expected[0, 0, :2] = term.scale * np.sqrt([term.whole * 0.5, (1 - term.whole) * 0.5])
    expected[2, 3, [0, 3]] = term.scale * np.sqrt([term.whole * 0.25, (1 - term.whole) * 0.25])
    np.testing.assert_allclose(latents, expected, rtol=1e-6)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(sketch_latents(decomposer, labels[::2, ::2].astype(float)), latents, rtol=1e-6)


@pytest.mark.parametrize("labels, message", [
    (np.full((4, 4), 4), "has class 4; draw with 0 .nothing., 1 NCR, 2 ED, 3 ET"),
    (np.full((4, 4), -1), "has class -1"),
    (np.full((4, 4), 0.5), "needs whole numbers"),
    (np.ones((4, 4, 3), int), "needs whole numbers .y,x., not int64 .4, 4, 3."),
    (np.full((4, 4), np.nan), "needs whole numbers"),
    (np.zeros((4, 4), int), "is empty"),
])
def test_bad_sketches(decomposer, labels, message):
    with pytest.raises(UserError, match=message):
        sketch_latents(decomposer, labels)


def test_a_network_without_layout_has_no_sketches():
    config = dataclasses.replace(CONFIG, objective=dataclasses.replace(
        CONFIG.objective, layout=dataclasses.replace(CONFIG.objective.layout, weight=0.0)))
    with pytest.raises(UserError, match="trained without the objective's term `layout`"):
        sketch_latents(SimpleNamespace(config=config, settings=SETTINGS), np.ones((4, 4), int))


def test_a_region_weighs_cells_by_their_share():
    mask = np.zeros((8, 8), bool)
    mask[:4, :2] = mask[6, 6] = True
    expected = np.zeros((4, 4))
    expected[:2, 0], expected[3, 3] = 1, 0.25
    np.testing.assert_array_equal(region_weights(mask, 4), expected)
    with pytest.raises(UserError, match="region: is empty"):
        region_weights(mask & False, 4)


def test_a_sketch_is_painted_through_its_codes(decomposer):
    images = np.random.default_rng(1).random((2, 16, 16, 1)).astype(np.float32)
    output = decomposer.decompose(images)
    codes = decomposer.quantize(output.z_e_normal, output.z_e_abnormal)
    np.testing.assert_array_equal(codes.normal_indices, output.normal_indices)
    np.testing.assert_array_equal(codes.abnormal_indices, output.abnormal_indices)
