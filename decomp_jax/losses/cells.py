"""What each cell of the code grid holds: shares of the lesion classes, and local contrast."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# Share of a window that must be free of lesion for its mean and deviation to be taken.
LEAST_WINDOW = 1e-3


def cell_means(
    image: Float[Array, "b s s c"], grid: int, parts: int = 1
) -> Float[Array, "b {grid} {grid} {parts}**2*c"]:
    """Means of the parts x parts pieces into which each cell of the code grid is cut."""
    b, s, _, c = image.shape
    piece = s // (grid * parts)
    means = image.reshape(b, grid, parts, piece, grid, parts, piece, c).mean((3, 6))
    return means.transpose(0, 1, 3, 2, 4, 5).reshape(b, grid, grid, parts * parts * c)


def class_fractions(onehot: Float[Array, "b s s k"], grid: int) -> Float[Array, "b {grid} {grid} l"]:
    """Share of each cell's pixels that carry each lesion class (class 0, background, is left out)."""
    return cell_means(onehot, grid)[..., 1:]


def lesion_cells(lesion_fraction: Float[Array, "b h w"], least: float, *, nothing: bool) -> Bool[Array, "b h w"]:
    """Cells whose code the abnormal path learns from, in its losses and in the update of its codebook.

    Args:
        lesion_fraction: share of each cell's pixels with a lesion.
        least: share from which a cell counts as a lesion cell.
        nothing: there is a "nothing" code for all other cells. Without one, as in the paper, all cells of images with a
            lesion are taken.
    """
    if nothing:
        return lesion_fraction >= least
    return jnp.broadcast_to(lesion_fraction.any((1, 2), keepdims=True), lesion_fraction.shape)


def local_contrast(
    image: Float[Array, "b s s c"], weight: Float[Array, "b s s 1"] | None = None, *, window: float, flat: float
) -> Float[Array, "b s s c"]:
    """(x - mean) / deviation under a Gaussian window around each pixel: free of brightness, contrast and bias field.

    Args:
        weight: of each pixel in the means and deviations, so that pixels of weight 0 do not show around them.
        window: deviation of the window, in image sides.
        flat: variance that is added, so that windows without contrast stay near 0.
    """
    rows = _gaussian_rows(image.shape[1], window)

    def blur(x: Array) -> Array:
        return jnp.einsum("gh,bhwc,vw->bgvc", rows, x, rows, precision=jax.lax.Precision.HIGHEST)

    if weight is None:
        mean, square = blur(image), blur(image**2)
    else:
        total = jnp.maximum(blur(weight), LEAST_WINDOW)
        mean, square = blur(weight * image) / total, blur(weight * image**2) / total
    return (image - mean) / jnp.sqrt(jnp.maximum(square - mean**2, 0) + flat)


def structure_parts(code_dim: int, channels: int, cell_pixels: int) -> int:
    """Pieces along a cell's side whose local contrast goes into its code: as many as half of its channels hold."""
    return min(2 ** int(math.log2(max(code_dim / (2 * channels), 1)) // 2), cell_pixels)


@functools.cache
def _gaussian_rows(size: int, window: float) -> np.ndarray:
    """[size, size]: row i is a Gaussian window around pixel i, of sum 1."""
    distance = np.arange(size)[:, None] - np.arange(size)
    rows = np.exp(-0.5 * (distance / (window * size)) ** 2)
    return (rows / rows.sum(1, keepdims=True)).astype(np.float32)
