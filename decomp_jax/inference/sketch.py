"""What a reader drew, as a search takes it: vectors for a lesion, weights of cells for a region."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Integer, Shaped

from decomp_jax.errors import UserError
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.losses.latent import layout_target


def cell_shares(
    labels: Integer[np.ndarray, "y x"], grid: int, classes: int
) -> Float[np.ndarray, "h w l"]:
    """Share of each cell of a grid x grid code that each of the classes 1..L takes, in a label map of any size."""
    onehot = labels[..., None] == np.arange(1, classes + 1)
    down, across = (_overlaps(length, grid) for length in labels.shape)
    return np.einsum("hy,yxl,wx->hwl", down, onehot, across, optimize=True)


def sketch_latents(decomposer: Decomposer, labels: Shaped[np.ndarray, "y x"]) -> Float32[np.ndarray, "h w d"]:
    """The abnormal z_e of a drawn lesion: what the `layout` term of the objective draws that of such an image to.

    Args:
        labels: whole numbers, 0 for none and 1..L for the network's lesion classes, of any size; the drawing fills the
            field of view.

    Raises:
        UserError: the drawing is no such map, or empty, or the network was trained without the term.
    """
    names, term = decomposer.settings.lesion_classes, decomposer.config.objective.layout
    if not term.weight:
        raise UserError("sketch: the network was trained without the objective's term `layout`, so that a drawn lesion "
                        "has no code; take a network that was trained with it")
    whole = np.asarray(labels)
    if whole.ndim != 2 or not whole.size or not np.array_equal(whole, np.rint(whole)):
        raise UserError(f"sketch: needs whole numbers [y,x], not {whole.dtype} {list(whole.shape)}")
    if strange := sorted({*np.unique(whole)} - {*range(len(names) + 1)}):
        meaning = ", ".join(f"{number} {name}" for number, name in enumerate(names, start=1))
        raise UserError(f"sketch: has class {strange[0]:g}; draw with 0 (nothing), {meaning}")
    if not whole.any():
        raise UserError("sketch: is empty; draw a lesion")
    shares = jnp.asarray(cell_shares(whole.astype(int), decomposer.grid, len(names)), jnp.float32)
    code_dim = decomposer.config.model.code_dim
    return np.asarray(layout_target(shares[None], code_dim, scale=term.scale, whole=term.whole))[0]


def region_weights(mask: Bool[np.ndarray, "y x"], grid: int) -> Float[np.ndarray, "h w"]:
    """Weight of each cell of the code grid: the share of it that lies in the region. The mask may have any size.

    Raises UserError if the region is empty.
    """
    if not mask.any():
        raise UserError("region: is empty; mark the part of the image that is to count")
    return cell_shares(mask.astype(int), grid, 1)[..., 0]


def _overlaps(length: int, cells: int) -> Float[np.ndarray, "cells length"]:
    """Share of each cell that each of `length` pixels along it takes."""
    edges = np.arange(length + 1) * cells / length  # of pixels, in cells
    begins, ends = edges[:-1], edges[1:]
    cell = np.arange(cells)[:, None]
    return np.clip(np.minimum(ends, cell + 1) - np.maximum(begins, cell), 0, None)
