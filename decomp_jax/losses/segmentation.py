"""Terms on the segmentation (equations 4-5). Class 0 is background."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def generalized_dice(probs: Float[Array, "b h w k"], onehot: Float[Array, "b h w k"]) -> Float[Array, ""]:
    """Equation 4 over the lesion classes of the batch, w_k = 1 / n_k^2 (Sudre et al. 2017).

    A class absent from the batch has weight 0; with no lesion at all the loss is 1 and its gradient 0.
    """
    n = onehot[..., 1:].sum((0, 1, 2))
    weight = jnp.where(n > 0, 1 / jnp.maximum(n, 1.0) ** 2, 0.0)
    shared, total = _overlaps(probs, onehot)
    return 1 - 2 * jnp.sum(weight * shared) / (jnp.sum(weight * total) + 1e-8)


def soft_dice(probs: Float[Array, "b h w k"], onehot: Float[Array, "b h w k"]) -> Float[Array, ""]:
    """1 - mean over the lesion classes of their soft Dice in the batch: large classes count as much as small ones."""
    shared, total = _overlaps(probs, onehot)
    return 1 - jnp.mean(2 * shared / (total + 1e-5))


def cross_entropy(logits: Float[Array, "b h w k"], onehot: Float[Array, "b h w k"]) -> Float[Array, "b"]:
    """Equation 5 over background and lesion classes, mean over pixels."""
    return -jnp.sum(onehot * jax.nn.log_softmax(logits), -1).mean((1, 2))


def _overlaps(probs: Array, onehot: Array) -> tuple[Float[Array, "l"], Float[Array, "l"]]:
    shared = (probs * onehot)[..., 1:].sum((0, 1, 2))
    total = (probs + onehot)[..., 1:].sum((0, 1, 2))
    return shared, total
