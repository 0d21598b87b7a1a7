"""Targets of the codes against SciPy, scikit-image and hand-worked values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import block_reduce

from decomp_jax.losses.cells import cell_means, class_fractions, local_contrast, structure_parts


CONTRAST = {"window": 1 / 16, "flat": 1e-3}


def test_class_fractions_by_hand():
    label = jnp.zeros((1, 4, 4), jnp.int32).at[0, 0, 0].set(2).at[0, 2:, 2:].set(1)
    shares = class_fractions(jax.nn.one_hot(label, 3), 2)
    np.testing.assert_array_equal(shares, [[[[0, 0.25], [0, 0]], [[0, 0], [1, 0]]]])


def test_cell_means_are_block_means_cell_by_cell():
    image = np.random.default_rng(0).random((2, 16, 16, 3)).astype(np.float32)
    blocks = block_reduce(image, (1, 4, 4, 1), np.mean)  # two pieces a side of cells of 8 pixels
    found = np.asarray(cell_means(jnp.asarray(image), 2, 2)).reshape(2, 2, 2, 2, 2, 3)
    for y, x, i, j in np.ndindex(2, 2, 2, 2):
        np.testing.assert_allclose(found[:, y, x, i, j], blocks[:, 2 * y + i, 2 * x + j], rtol=1e-5)


def test_local_contrast_equals_scipy():
    image = np.zeros((1, 64, 64, 1), np.float32)
    image[0, 24:40, 24:40, 0] = np.random.default_rng(1).random((16, 16))
    blur = lambda x: ndimage.gaussian_filter(x, 4, mode="constant", truncate=16)
    x = image[0, ..., 0].astype(np.float64)
    expected = (x - blur(x)) / np.sqrt(np.maximum(blur(x**2) - blur(x) ** 2, 0) + 1e-3)
    found = local_contrast(jnp.asarray(image), **CONTRAST)[0, ..., 0]
    np.testing.assert_allclose(found[20:44, 20:44], expected[20:44, 20:44], atol=1e-4)


def test_local_contrast_forgets_gain_where_there_is_contrast():
    image = jnp.asarray(np.random.default_rng(2).random((1, 64, 64, 1)), jnp.float32)
    change = jnp.abs(local_contrast(image, **CONTRAST) - local_contrast(2 * image, **CONTRAST)).mean()
    assert change < 0.02 * jnp.abs(local_contrast(image, **CONTRAST)).mean()


def test_what_is_left_out_does_not_show_around_it():
    """Local contrast beside a masked square is the same whatever is in the square."""
    rng = np.random.default_rng(3)
    image = jnp.asarray(rng.random((1, 64, 64, 1)), jnp.float32)
    weight = jnp.ones((1, 64, 64, 1)).at[:, 20:40, 20:40].set(0.0)
    other = jnp.where(weight > 0, image, 0.9)
    shown, changed = (local_contrast(x, weight, **CONTRAST) for x in (image, other))
    np.testing.assert_allclose((weight * shown), (weight * changed), atol=1e-4)
    uniform = local_contrast(image, jnp.full_like(weight, 0.5), **CONTRAST)
    np.testing.assert_allclose(uniform[:, 24:40, 24:40], local_contrast(image, **CONTRAST)[:, 24:40, 24:40], atol=1e-3)


@pytest.mark.parametrize(
    "code_dim, channels, cell_pixels, parts", [(64, 1, 32, 4), (64, 4, 32, 2), (32, 1, 8, 4), (4, 1, 8, 1), (512, 1, 8, 8)]
)
def test_pieces_take_at_most_half_of_the_code(code_dim, channels, cell_pixels, parts):
    assert structure_parts(code_dim, channels, cell_pixels) == parts
