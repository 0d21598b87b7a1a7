"""Convolutions, normalisations and residual blocks of Tables A.1 and A.2."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from decomp_jax.models.convolution import convolve

BATCH_NORM_DECAY = 0.95
he_init = nn.initializers.he_normal()
# Half of He's deviation: the normal code starts at the length that its structure has.
half_init = nn.initializers.variance_scaling(0.5, "fan_in", "truncated_normal")
# Small first outputs: He initialisation of the last convolution spends hundreds of steps on shrinking it.
small_init = nn.initializers.variance_scaling(0.02, "fan_in", "truncated_normal")


def activation(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return nn.leaky_relu(x, 0.2)


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Nearest neighbour, by broadcasting."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def conv(features: int, size: int = 3, *, dtype: jnp.dtype, init: Callable = he_init, name: str | None = None) -> nn.Conv:
    return nn.Conv(
        features, (size, size), dtype=dtype, kernel_init=init, name=name, conv_general_dilated=convolve
    )


class BatchNorm(nn.Module):
    """Batch normalisation over the global batch; `affine=False` leaves scale and bias to SPADE."""

    dtype: jnp.dtype
    affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=BATCH_NORM_DECAY,
            dtype=self.dtype,
            use_scale=self.affine,
            use_bias=self.affine,
        )(x)


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 convolution on the skip where the width changes.

    Attributes:
        norm: makes a normalisation; called as norm(x, *condition, train=...), so BatchNorm and Spade both fit.
    """

    features: int
    norm: Callable[[], nn.Module]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *condition: Array, train: bool) -> Float[Array, "b h w f"]:
        h = x
        for _ in range(2):
            h = conv(self.features, dtype=self.dtype)(activation(self.norm()(h, *condition, train=train)))
        skip = x if x.shape[-1] == self.features else nn.Conv(
            self.features, (1, 1), use_bias=False, dtype=self.dtype, kernel_init=he_init, name="skip"
        )(x)
        return skip + h


class UpBlock(nn.Module):
    """Table A.2 "Upsample": nearest neighbour to twice the size, then a 3x3 convolution."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w f"]:
        return conv(self.features, dtype=self.dtype)(upsample(x))


class Stem(nn.Module):
    """Table A.2 "Conv-block" and first "Upsample": what a decoder does before its first residual block."""

    features: int
    first_up: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, code: Float[Array, "b h w d"], *, train: bool) -> Float[Array, "b 2*h 2*w u"]:
        x = conv(self.features, dtype=self.dtype)(code)
        x = conv(self.features, dtype=self.dtype)(activation(BatchNorm(self.dtype)(x, train=train)))
        return UpBlock(self.first_up, self.dtype)(activation(BatchNorm(self.dtype)(x, train=train)))
