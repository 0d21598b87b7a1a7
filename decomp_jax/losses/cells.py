"""What each cell of the code grid holds, the targets of its code: shares of the lesion classes, and local structure."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Deviation of the Gaussian window of local contrast, in image sides, and the variance at which a window counts as flat.
WINDOW = 1 / 16
FLAT = 1e-3


def cell_means(image: Float[Array, "b s s c"], grid: int, parts: int = 1) -> Float[Array, "b {grid} {grid} {parts}**2*c"]:
    """Means of the parts x parts pieces into which each cell of the code grid is cut."""
    b, s, _, c = image.shape
    piece = s // (grid * parts)
    means = image.reshape(b, grid, parts, piece, grid, parts, piece, c).mean((3, 6))
    return means.transpose(0, 1, 3, 2, 4, 5).reshape(b, grid, grid, parts * parts * c)


def class_fractions(onehot: Float[Array, "b s s k"], grid: int) -> Float[Array, "b {grid} {grid} l"]:
    """Share of each cell's pixels that carry each lesion class (class 0, background, is left out)."""
    return cell_means(onehot, grid)[..., 1:]


def local_contrast(image: Float[Array, "b s s c"]) -> Float[Array, "b s s c"]:
    """(x - mean) / deviation under a Gaussian window around each pixel: free of brightness, contrast and bias field."""
    window = _gaussian_rows(image.shape[1])

    def blur(x: Array) -> Array:
        return jnp.einsum("gh,bhwc,vw->bgvc", window, x, window, precision=jax.lax.Precision.HIGHEST)

    mean = blur(image)
    return (image - mean) / jnp.sqrt(jnp.maximum(blur(image**2) - mean**2, 0) + FLAT)


def structure_parts(code_dim: int, channels: int, cell_pixels: int) -> int:
    """Pieces along a cell's side whose local contrast goes into its code: as many as half of the code's channels hold."""
    return min(2 ** int(math.log2(max(code_dim / (2 * channels), 1)) // 2), cell_pixels)


@functools.cache
def _gaussian_rows(size: int) -> np.ndarray:
    """[size, size]: row i is a Gaussian window around pixel i, of sum 1."""
    distance = np.arange(size)[:, None] - np.arange(size)
    rows = np.exp(-0.5 * (distance / (WINDOW * size)) ** 2)
    return (rows / rows.sum(1, keepdims=True)).astype(np.float32)
