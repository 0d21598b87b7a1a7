"""Terms on the segmentation (equations 4-5). Class 0 is background.

The Dice terms are taken over the whole batch, where classes that are absent from one image are present in another.
Their value an image is its part in that: the mean over the batch is the term.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def generalized_dice(
    probs: Float[Array, "b h w k"], onehot: Float[Array, "b h w k"], valid: Float[Array, "b"]
) -> Float[Array, "b"]:
    """Equation 4 over the lesion classes of the batch, w_k = 1 / n_k^2 (Sudre et al. 2017).

    A class absent from the batch has weight 0; with no lesion at all the loss is 1 and its gradient 0.
    """
    n = (valid[:, None] * onehot[..., 1:].sum((1, 2))).sum(0)
    # Multiplied by the smallest n^2, so that the sums below are of the size of a lesion, whatever the batch.
    smallest = jnp.min(jnp.where(n > 0, n, jnp.inf))
    weight = jnp.where(n > 0, (smallest / jnp.maximum(n, 1.0)) ** 2, 0.0)
    intersection, total = _overlaps(probs, onehot, valid)
    return 1 - valid.sum() * 2 * intersection @ weight / (total @ weight + 1e-5)


def soft_dice(
    probs: Float[Array, "b h w k"], onehot: Float[Array, "b h w k"], valid: Float[Array, "b"]
) -> Float[Array, "b"]:
    """1 - mean over the lesion classes of their soft Dice in the batch: large classes count as much as small ones."""
    intersection, total = _overlaps(probs, onehot, valid)
    return 1 - valid.sum() * jnp.mean(2 * intersection / (total + 1e-5), -1)


def cross_entropy(logits: Float[Array, "b h w k"], onehot: Float[Array, "b h w k"]) -> Float[Array, "b"]:
    """Equation 5 over background and lesion classes, mean over pixels."""
    return -jnp.sum(onehot * jax.nn.log_softmax(logits), -1).mean((1, 2))


def _overlaps(probs: Array, onehot: Array, valid: Array) -> tuple[Float[Array, "b l"], Float[Array, "l"]]:
    """Intersection of each image, and the sum of both sizes over the batch, of each lesion class."""
    intersection = (probs * onehot)[..., 1:].sum((1, 2))
    total = (probs + onehot)[..., 1:].sum((1, 2))
    return intersection, valid @ total
