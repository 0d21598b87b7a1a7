"""Spatially-adaptive normalisation (Park et al. 2019; Figure B.1): the lesion layout modulates the image decoder."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decomp_jax.models.blocks import BatchNorm, Conv, activation


def masked_logits(logits: Float[Array, "b h w s"]) -> Float[Array, "b h w s-1"]:
    """Lesion logits where their class wins, 0 elsewhere: "logit applied by the segmentation mask" (Figure B.1).

    The background channel is dropped, so an image in which no lesion is found equals the null condition.
    """
    winner = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype)
    return (logits * winner)[..., 1:]


def resize_nearest(layout: Float[Array, "b h w s"], size: int) -> Float[Array, "b {size} {size} s"]:
    """A smaller layout by nearest neighbour; its side must be a multiple of `size`."""
    step = layout.shape[1] // size
    return layout[:, step // 2 :: step, step // 2 :: step]


class Spade(nn.Module):
    """Parameter-free batch normalisation, scaled by 1 + gamma(layout) and shifted by beta(layout).

    `layout` may have batch 1, as the null condition does: its gamma and beta are then computed once for all images.

    Attributes:
        fold: of the rows of both.
    """

    width: int
    dtype: jnp.dtype
    decay: float
    fold: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], layout: Float[Array, "n h w s"], *, train: bool
    ) -> Float[Array, "b h w c"]:
        features = x.shape[-1] // self.fold
        make = functools.partial(Conv, dtype=self.dtype, fold=self.fold)
        normalised = BatchNorm(self.dtype, self.decay, self.fold, affine=False)(x, train=train)
        hidden = activation(make(min(self.width, features), name="shared")(layout))
        gamma, beta = jnp.split(make(2 * features, parts=2, name="gamma_beta")(hidden), 2, axis=-1)
        return normalised * (1 + gamma) + beta
