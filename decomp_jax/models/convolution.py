"""Convolutions that are cheaper than their definition, and equal to it within rounding.

One between two resolutions is a single convolution with a kernel one tap wider, of stride 2 or its transpose: a 3x3
takes 16/36 of the multiplications, and the image at the higher resolution is never made. (Average pooling adds up
neighbours after the convolution; the sum moves into the kernel. Upsampling is its transpose, four times.)

One of few channels is made wide by folding: neighbours along a row are taken as channels of one pixel, and the kernel
is widened with zeros to match. TPUs lay channels out in lanes of 128 and pad what is narrower, so that there a level's
features stay folded from one layer to the next, [b, h, w/fold, fold*c]; the fold halves with the resolution. CPUs have
fast kernels for 32 channels and nothing is gained between them, so that there each convolution folds for itself.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Channels that fill the registers of a device, by JAX's name of it.
LANES = {"tpu": 128}
CPU_CHANNELS = 32
LAYOUT = ("NHWC", "HWIO", "NHWC")
# Rows folded or not: c and d are channels times fold.
Image = Float[Array, "b h w c"]
Kernel = Float[Array, "k l i o"]
Result = Float[Array, "b h2 w2 d"]
Pooled = Float[Array, "b h//2 w2 d"]
Upsampled = Float[Array, "b 2*h w2 d"]
Convolution = Callable[..., Result]


def fold_of(features: int, width: int) -> int:
    """Neighbours along a row of `width` pixels that are folded where each has `features` channels: a power of 2."""
    fold = 1
    while 2 * fold * features <= LANES.get(jax.default_backend(), 1) and width % (2 * fold) == 0:
        fold *= 2
    return fold


def halved(fold: int) -> int:
    """Of the level at half the resolution."""
    return max(1, fold // 2)


def fold_rows(x: Float[Array, "b h w c"], fold: int) -> Float[Array, "b h w//{fold} {fold}*c"]:
    return x.reshape(*x.shape[:2], x.shape[2] // fold, fold * x.shape[3])


def unfold_rows(x: Float[Array, "b h w c"], fold: int) -> Float[Array, "b h w*{fold} c//{fold}"]:
    return x.reshape(*x.shape[:2], x.shape[2] * fold, x.shape[3] // fold)


def per_channel(values: Float[Array, "c"], fold: int, parts: int = 1) -> Float[Array, "{fold}*c"]:
    """Of each channel once, as they lie in folded rows (`parts`: of `convolve`)."""
    return values if fold == 1 else jnp.tile(values.reshape(parts, -1), fold).ravel()


def convolve(x: Image, kernel: Kernel, fold: int = 1, parts: int = 1) -> Result:
    """Stride 1, padded with zeros to the same size.

    Args:
        x: rows folded by `fold`, as the result's.
        parts: the kernel's outputs are so many kinds of as many channels each; one kind lies beside the other even
            where rows are folded.
    """
    if fold > 1:
        return _convolve_rows(x, kernel, fold, fold, parts)
    own = CPU_CHANNELS // max(kernel.shape[2:])
    if jax.default_backend() == "cpu" and own > 1 and x.shape[2] % own == 0:
        return _convolve_folded(x, kernel, own)
    return _convolve(x, kernel)


def convolve_and_pool(x: Image, kernel: Kernel, fold: int = 1) -> Pooled:
    """`convolve`, then the average of each 2x2 pixels. The result is folded half as often, once at least."""
    shifted = [jnp.pad(kernel, ((p, 1 - p), (q, 1 - q), (0, 0), (0, 0))) for p in (0, 1) for q in (0, 1)]
    pooling = sum(shifted) / 4
    if fold > 1:
        return _convolve_rows(x, pooling, fold, fold // 2)
    reach = 2 * [(len(kernel) // 2,) * 2]
    return jax.lax.conv_general_dilated(x, pooling, (2, 2), reach, dimension_numbers=LAYOUT)


def average_pool(x: Image, fold: int = 1) -> Pooled:
    """The average of each 2x2 pixels, folded as by `convolve_and_pool`."""
    if fold == 1:
        return nn.avg_pool(x, (2, 2), (2, 2))
    return convolve_and_pool(x, jnp.eye(x.shape[3] // fold, dtype=x.dtype)[None, None], fold)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def upsample_and_convolve(x: Image, kernel: Kernel, fold: int = 1) -> Upsampled:
    """Each pixel made 2x2, then `convolve`. The result is folded by `fold`, and x half as often, once at least."""
    b, h, w, _ = x.shape
    shape = (b, 2 * h, 2 * w, kernel.shape[3]) if fold == 1 else (b, 2 * h, w, fold * kernel.shape[3])
    result = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda y: convolve_and_pool(y, _transposed(kernel), fold), result)(x)[0]


def _transposed(kernel: Kernel) -> Float[Array, "k l o i"]:
    return 4 * kernel[::-1, ::-1].swapaxes(2, 3)


def _upsample_and_convolve_backward(
    fold: int, saved: tuple[Image, Kernel], gradient: Upsampled
) -> tuple[Image, Kernel]:
    """As of `convolve_and_pool`, with image and gradient exchanged: XLA's own for a transpose is 30 times slower."""
    x, kernel = saved
    of_x, of_kernel = jax.vjp(lambda kernel: convolve_and_pool(gradient, _transposed(kernel), fold), kernel)
    return of_x, *of_kernel(x)


upsample_and_convolve.defvjp(
    lambda x, kernel, fold: (upsample_and_convolve(x, kernel, fold), (x, kernel)), _upsample_and_convolve_backward
)


def _convolve(x: Image, kernel: Kernel) -> Result:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def _convolve_rows(x: Image, kernel: Kernel, reads: int, writes: int, parts: int = 1) -> Result:
    """A convolution of rows folded by `reads`, its result's by `writes`: of stride reads / writes in both directions.

    Padded with zeros, so that the kernel's centre (of an even one, the tap before it) meets the first pixel. Pixel q of
    a group of the result reads pixel p of the group of x that is `offset` further on by tap
    reads * offset + p - stride * q + centre.
    """
    (height, taps, i, o), stride = kernel.shape, reads // writes
    top, centre = (height - 1) // 2, (taps - 1) // 2
    first, last = -((reads - 1 + centre) // reads), (taps - 1 - centre + reads - stride) // reads
    offset, p, q = np.ix_(np.arange(first, last + 1), np.arange(reads), np.arange(writes))
    places = np.arange(taps)[:, None, None, None] == reads * offset + p - stride * q + centre
    wide = jnp.einsum("ktio,tnpq->knpiqo", kernel, places.astype(kernel.dtype), precision=jax.lax.Precision.HIGHEST)
    wide = wide.reshape(*wide.shape[:5], parts, o // parts).swapaxes(4, 5)
    wide = wide.reshape(height, last - first + 1, reads * i, writes * o)
    padding = ((top, height - stride - top), (-first, last))
    return jax.lax.conv_general_dilated(x, wide, (stride, 1), padding, dimension_numbers=LAYOUT)


def _fold_forward(x: Image, kernel: Kernel, fold: int) -> Result:
    return unfold_rows(_convolve_rows(fold_rows(x, fold), kernel, fold, fold), fold)


def _fold_backward(fold: int, saved: tuple[Image, Kernel], gradient: Result) -> tuple[Image, Kernel]:
    """The kernel's own gradient is cheaper without folding."""
    x, kernel = saved
    _, of_x = jax.vjp(lambda x: _fold_forward(x, kernel, fold), x)
    _, of_kernel = jax.vjp(lambda kernel: _convolve(x, kernel), kernel)
    return *of_x(gradient), *of_kernel(gradient)


_convolve_folded = jax.custom_vjp(_fold_forward, nondiff_argnums=(2,))
_convolve_folded.defvjp(lambda x, kernel, fold: (_fold_forward(x, kernel, fold), (x, kernel)), _fold_backward)
