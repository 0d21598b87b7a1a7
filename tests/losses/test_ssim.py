import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from decomp_jax.losses.ssim import ssim


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    a = rng.random((3, 32, 40, 1)).astype(np.float32)
    return a, np.clip(a + rng.normal(0, 0.2, a.shape), 0, 1).astype(np.float32)


def test_equals_scikit_image(pair):
    a, b = pair
    expected = []
    for x, y in zip(a[..., 0], b[..., 0]):
        _, maps = structural_similarity(
            x, y, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )
        expected.append(maps[5:-5, 5:-5].mean())
    np.testing.assert_allclose(ssim(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-4)


def test_equals_dm_pix(pair):
    a, b = map(jnp.asarray, pair)
    np.testing.assert_allclose(ssim(a, b), dm_pix.ssim(a, b), rtol=1e-4)


@pytest.mark.parametrize("mask", ["empty", "full", "half"])
def test_gradients_are_finite_on_masked_images(pair, mask):
    a, b = map(jnp.asarray, pair)
    m = {"empty": jnp.zeros_like(a), "full": jnp.ones_like(a), "half": jnp.ones_like(a).at[:, :16].set(0)}[mask]
    gradient = jax.grad(lambda x: ssim(m * x, m * b).sum())(a)
    assert jnp.isfinite(gradient).all()
    assert (jnp.abs(gradient).max() > 0) == (mask != "empty")


def test_data_range_scales_out(pair):
    a, b = map(jnp.asarray, pair)
    np.testing.assert_allclose(ssim(255 * a, 255 * b, data_range=255.0), ssim(a, b), rtol=1e-3)
