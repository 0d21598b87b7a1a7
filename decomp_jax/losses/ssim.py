"""Structural similarity (Wang et al. 2004), differentiable everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


WINDOW, SIGMA = 11, 1.5  # pixels


@functools.cache
def _blur_matrix(size: int) -> np.ndarray:
    """[size-WINDOW+1, size]: each row a Gaussian window, so blurring an axis is one product of matrices."""
    taps = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    rows = np.arange(size - WINDOW + 1)[:, None]
    matrix = np.zeros((size - WINDOW + 1, size), np.float32)
    matrix[rows, rows + np.arange(WINDOW)] = taps / taps.sum()
    return matrix


def _blur(x: Float[Array, "m b h w c"]) -> Float[Array, "m b g v c"]:
    down = _blur_matrix(x.shape[2])
    across = _blur_matrix(x.shape[3])
    return jnp.einsum("gh,mbhwc,vw->mbgvc", down, x, across, precision=jax.lax.Precision.HIGHEST)


def ssim(
    a: Float[Array, "b h w c"], b: Float[Array, "b h w c"], *, data_range: float = 1.0
) -> Float[Array, "b"]:
    """Mean SSIM of each pair over the windows that lie inside the image, and over channels.

    Variances are E[x^2] - E[x]^2 without clipping or square roots: gradients stay finite on constant images, which
    masked images are in large part.
    """
    # Stacked along an axis of their own: images joined along the batch would travel between the devices that share it.
    mu_a, mu_b, aa, bb, ab = _blur(jnp.stack([a, b, a * a, b * b, a * b]))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    structure = (2 * (ab - mu_a * mu_b) + c2) / (aa - mu_a**2 + bb - mu_b**2 + c2)
    return (luminance * structure).mean((1, 2, 3))
