"""Convolutions, normalisations and residual blocks of Tables A.1 and A.2."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from decomp_jax.models.convolution import convolve, convolve_and_pool, upsample_and_convolve


def he_init(gain: float = 1.0) -> nn.initializers.Initializer:
    """Normal with `gain` times He's standard deviation."""
    return nn.initializers.variance_scaling(2.0 * gain**2, "fan_in", "truncated_normal")


def activation(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Leaky ReLU; the paper doesn't say which activation it takes."""
    return nn.leaky_relu(x, 0.2)


def conv(
    features: int,
    size: int = 3,
    *,
    dtype: jnp.dtype,
    convolution: Callable = convolve,
    gain: float = 1.0,
    use_bias: bool = True,
    name: str | None = None,
) -> nn.Conv:
    """A convolution that keeps the size, or halves or doubles it as `convolution` does."""
    return nn.Conv(
        features,
        (size, size),
        kernel_init=he_init(gain),
        conv_general_dilated=convolution,
        use_bias=use_bias,
        dtype=dtype,
        name=name,
    )


class BatchNorm(nn.Module):
    """Batch normalisation over the global batch; `affine=False` leaves scale and bias to SPADE."""

    dtype: jnp.dtype
    decay: float
    affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=self.decay,
            dtype=self.dtype,
            use_scale=self.affine,
            use_bias=self.affine,
        )(x)


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 convolution on the skip where the width changes.

    Attributes:
        norm: makes a normalisation; called as norm(x, *condition, train=...), so BatchNorm and Spade both fit.
        pool: averages the result over each 2x2 pixels, as Table A.1 does after a block.
    """

    features: int
    norm: Callable[[], nn.Module]
    dtype: jnp.dtype
    pool: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *condition: Array, train: bool) -> Float[Array, "b h2 w2 f"]:
        last = convolve_and_pool if self.pool else convolve
        h = x
        for convolution in (convolve, last):
            h = activation(self.norm()(h, *condition, train=train))
            h = conv(self.features, convolution=convolution, dtype=self.dtype)(h)
        if x.shape[-1] != self.features:
            return h + conv(self.features, 1, convolution=last, use_bias=False, dtype=self.dtype, name="skip")(x)
        return h + (nn.avg_pool(x, (2, 2), (2, 2)) if self.pool else x)


class UpBlock(nn.Module):
    """Table A.2 "Upsample": nearest neighbour to twice the size, then a 3x3 convolution."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w f"]:
        return conv(self.features, convolution=upsample_and_convolve, dtype=self.dtype)(x)


class Stem(nn.Module):
    """Table A.2 "Conv-block" and first "Upsample": what a decoder does before its first residual block."""

    features: int
    first_up: int
    dtype: jnp.dtype
    decay: float

    @nn.compact
    def __call__(self, code: Float[Array, "b h w d"], *, train: bool) -> Float[Array, "b 2*h 2*w u"]:
        x = conv(self.features, dtype=self.dtype)(code)
        x = conv(self.features, dtype=self.dtype)(activation(BatchNorm(self.dtype, self.decay)(x, train=train)))
        return UpBlock(self.first_up, self.dtype)(activation(BatchNorm(self.dtype, self.decay)(x, train=train)))
