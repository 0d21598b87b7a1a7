"""Convolutions, normalisations and residual blocks of Tables A.1 and A.2."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decomp_jax.models.convolution import (
    Convolution, average_pool, convolve, convolve_and_pool, fold_rows, halved, per_channel, upsample_and_convolve,
)

EPSILON = 1e-5  # of variances


def he_init(gain: float = 1.0) -> nn.initializers.Initializer:
    """Normal with `gain` times He's standard deviation."""
    return nn.initializers.variance_scaling(2.0 * gain**2, "fan_in", "truncated_normal")


def activation(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Leaky ReLU; the paper doesn't say which activation it takes."""
    return nn.leaky_relu(x, 0.2)


class Conv(nn.Module):
    """A convolution that keeps the size, or halves or doubles it as `convolution` does.

    Attributes:
        fold: of rows at the higher resolution (`models/convolution.py`).
        parts: the features are so many kinds of as many each, one beside the other even where rows are folded.
    """

    features: int
    size: int = 3
    _: dataclasses.KW_ONLY
    dtype: jnp.dtype
    fold: int
    convolution: Convolution = convolve
    gain: float = 1.0
    use_bias: bool = True
    parts: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        options = {} if self.parts == 1 else {"parts": self.parts}
        fold = halved(self.fold) if self.convolution is upsample_and_convolve else self.fold
        shape = (self.size, self.size, x.shape[-1] // fold, self.features)
        kernel = jnp.asarray(self.param("kernel", he_init(self.gain), shape), self.dtype)
        result = self.convolution(x.astype(self.dtype), kernel, self.fold, **options)
        if not self.use_bias:
            return result
        bias = jnp.asarray(self.param("bias", nn.initializers.zeros, (self.features,)), self.dtype)
        return result + per_channel(bias, result.shape[-1] // self.features, self.parts)


class BatchNorm(nn.Module):
    """Batch normalisation over the global batch; `affine=False` leaves scale and bias to SPADE.

    As Flax's, of rows that may be folded; its parameters lie one name deeper, where those of Flax's have been.
    """

    dtype: jnp.dtype
    decay: float
    fold: int
    affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        return _BatchNorm(self.dtype, self.decay, self.fold, self.affine, name="BatchNorm_0")(x, train=train)


class _BatchNorm(nn.Module):
    dtype: jnp.dtype
    decay: float
    fold: int
    affine: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        shape = (x.shape[-1] // self.fold,)
        moving_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        moving_var = self.variable("batch_stats", "var", jnp.ones, shape)
        mean, var = jnp.asarray(moving_mean.value), jnp.asarray(moving_var.value)
        if train:
            wide = x.astype(jnp.float32)
            mean, square = (self._mean(values) for values in (wide, jnp.square(wide)))
            var = jnp.maximum(0.0, square - jnp.square(mean))
            if not self.is_initializing():
                moving_mean.value = self.decay * moving_mean.value + (1 - self.decay) * mean
                moving_var.value = self.decay * moving_var.value + (1 - self.decay) * var
        factor = jax.lax.rsqrt(var + EPSILON)
        if self.affine:
            factor *= self.param("scale", nn.initializers.ones, shape)
        result = (x - per_channel(mean, self.fold)) * per_channel(factor, self.fold)
        if self.affine:
            result += per_channel(jnp.asarray(self.param("bias", nn.initializers.zeros, shape)), self.fold)
        return result.astype(self.dtype)

    def _mean(self, values: Float[Array, "b h w c"]) -> Float[Array, "c2"]:
        return values.mean((0, 1, 2)).reshape(self.fold, -1).mean(0)


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 convolution on the skip where the width changes.

    Attributes:
        norm: makes a normalisation; called as norm(x, *condition, train=...), so BatchNorm and Spade both fit.
        fold: of the rows of x.
        pool: averages the result over each 2x2 pixels, as Table A.1 does after a block.
    """

    features: int
    norm: Callable[..., nn.Module]
    dtype: jnp.dtype
    fold: int
    pool: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *condition: Array, train: bool) -> Float[Array, "b h2 w2 f"]:
        make = functools.partial(Conv, self.features, dtype=self.dtype, fold=self.fold)
        last = convolve_and_pool if self.pool else convolve
        h = x
        for convolution in (convolve, last):
            h = activation(self.norm(fold=self.fold)(h, *condition, train=train))
            h = make(convolution=convolution)(h)
        if x.shape[-1] != self.fold * self.features:
            return h + make(1, convolution=last, use_bias=False, name="skip")(x)
        return h + (average_pool(x, self.fold) if self.pool else x)


class UpBlock(nn.Module):
    """Table A.2 "Upsample": nearest neighbour to twice the size, then a 3x3 convolution.

    Attributes:
        fold: of the rows of the result.
    """

    features: int
    dtype: jnp.dtype
    fold: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h w2 f"]:
        return Conv(self.features, dtype=self.dtype, fold=self.fold, convolution=upsample_and_convolve)(x)


class Stem(nn.Module):
    """Table A.2 "Conv-block" and first "Upsample": what a decoder does before its first residual block.

    Attributes:
        fold: of the rows of the result.
    """

    features: int
    first_up: int
    dtype: jnp.dtype
    decay: float
    fold: int

    @nn.compact
    def __call__(self, code: Float[Array, "b h w d"], *, train: bool) -> Float[Array, "b 2*h w2 u"]:
        fold = halved(self.fold)
        make = functools.partial(Conv, self.features, dtype=self.dtype, fold=fold)
        norm = functools.partial(BatchNorm, self.dtype, self.decay, fold)
        x = make()(fold_rows(code, fold))
        x = make()(activation(norm()(x, train=train)))
        return UpBlock(self.first_up, self.dtype, self.fold)(activation(norm()(x, train=train)))
