"""Terms on the encoder's outputs and the codebooks (equations 1-3)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def cell_distance(z_e: Float[Array, "b h w d"], z_q: Float[Array, "b h w d"]) -> Float[Array, "b h w"]:
    """||z_e - z_q||^2 of each cell: summed over D, so that the paper's pi = 10 has its natural scale."""
    return jnp.sum((z_e - z_q) ** 2, -1)


def codebook_loss(
    z_e: Float[Array, "b h w d"], z_q: Float[Array, "b h w d"], cells: Float[Array, "b h w"]
) -> Float[Array, "b"]:
    """First term of equation 1: draws codes to the encoder's outputs, in the cells of weight > 0."""
    return (cells * cell_distance(jax.lax.stop_gradient(z_e), z_q)).mean((1, 2))


def commitment_loss(
    z_e: Float[Array, "b h w d"], z_q: Float[Array, "b h w d"], cells: Float[Array, "b h w"]
) -> Float[Array, "b"]:
    """Second term of equation 1, without beta: draws the encoder's outputs to their codes."""
    return (cells * cell_distance(z_e, jax.lax.stop_gradient(z_q))).mean((1, 2))


def nothing_loss(z_e: Float[Array, "b h w d"], lesion_fraction: Float[Array, "b h w"]) -> Float[Array, "b"]:
    """Draws cells without any lesion to the zero vector, the "nothing" code."""
    return ((lesion_fraction == 0) * jnp.sum(z_e**2, -1)).mean((1, 2))


def layout_target(
    class_fractions: Float[Array, "b h w l"], code_dim: int, *, scale: float, whole: float
) -> Float[Array, "b h w {code_dim}"]:
    """The abnormal z_e that says which share of each cell every lesion class takes.

    Channel 0 holds scale * sqrt(whole * f), f being the share of the cell's pixels with a lesion, the next L channels
    scale * sqrt((1 - whole) * f_k) of each class k, and all others 0: what they tell the decoders of the cell's inside
    must not outweigh its layout. The squared length of a cell is then scale^2 f, whatever `whole` is. Of all maps on
    the code grid that were tried, L2 of root shares ranks images nearest to their Dice; `whole` trades class against
    place.
    """
    fraction = class_fractions.sum(-1, keepdims=True)
    shares = jnp.concatenate([whole * fraction, (1 - whole) * class_fractions], -1)
    others = code_dim - shares.shape[-1]
    return scale * jnp.sqrt(jnp.pad(shares, ((0, 0), (0, 0), (0, 0), (0, others))))


def layout_loss(
    z_e: Float[Array, "b h w d"], target: Float[Array, "b h w d"], lesion_fraction: Float[Array, "b h w"]
) -> Float[Array, "b"]:
    """Draws cells with a lesion to `layout_target`, so that L2 compares what lesion is where.

    Together with `nothing_loss` it is a regression over all cells.
    """
    return _distance_to(target, z_e, lesion_fraction[..., None] > 0)


def structure_loss(
    z_e: Float[Array, "b h w d"], structure: Float[Array, "b h w s"], weight: Float[Array, "b h w s"], *, scale: float
) -> Float[Array, "b"]:
    """Draws the first S channels of z_e to scale * the local contrast of the cell's pieces, weighted piece by piece.

    L2 between codes then compares where edges and folds are, not how bright the image is: of local contrast alone L2
    ranks images nearer to their anatomy than of pixels (docs/network.md).
    """
    return _distance_to(scale * structure, z_e, weight)


def _distance_to(target: Float[Array, "b h w c"], z_e: Float[Array, "b h w d"], weight: Array) -> Float[Array, "b"]:
    """Squared distance of the first channels to `target`, summed over them, mean over cells."""
    return (weight * (z_e[..., : target.shape[-1]] - target) ** 2).sum(-1).mean((1, 2))


def discrimination_loss(
    z_e: Float[Array, "b h w d"], z_q: Float[Array, "b h w d"], *, margin: float, is_normal: Float[Array, "b"]
) -> Float[Array, "b"]:
    """Equation 3 on images without abnormality: keeps the mean cell at least `margin` from its code."""
    distance = cell_distance(z_e, jax.lax.stop_gradient(z_q)).mean((1, 2))
    return is_normal * jnp.maximum(margin - distance, 0.0)
