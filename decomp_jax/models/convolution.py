"""Convolutions that are cheaper than their definition, and equal to it within rounding.

One between two resolutions is a single convolution with a kernel one tap wider, of stride 2 or its transpose: a 3x3
takes 16/36 of the multiplications, and the image at the higher resolution is never made. (Average pooling adds up
neighbours after the convolution; the sum moves into the kernel. Upsampling is its transpose, four times.)

One of few channels is made wide on CPUs: XLA hands its fast CPU kernels only convolutions of 32 channels.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

CPU_CHANNELS = 32
LAYOUT = ("NHWC", "HWIO", "NHWC")
Image = Float[Array, "b h w i"]
Kernel = Float[Array, "k l i o"]
Result = Float[Array, "b h w o"]
Pooled = Float[Array, "b h//2 w//2 o"]
Upsampled = Float[Array, "b 2*h 2*w o"]


def convolve(
    x: Image, kernel: Kernel, strides: Sequence[int] = (1, 1), padding: str = "SAME", **options: Any
) -> Result:
    """Stride 1, padded with zeros to the same size. Serves as `nn.Conv(conv_general_dilated=...)`."""
    _require_plain(strides, padding, options)
    fold = CPU_CHANNELS // max(kernel.shape[2:])
    if jax.default_backend() == "cpu" and fold > 1 and x.shape[2] % fold == 0:
        return _convolve_folded(x, kernel, fold)
    return _convolve(x, kernel)


def convolve_and_pool(
    x: Image, kernel: Kernel, strides: Sequence[int] = (1, 1), padding: str = "SAME", **options: Any
) -> Pooled:
    """`convolve`, then the average of each 2x2 pixels. Serves as `nn.Conv(conv_general_dilated=...)`."""
    _require_plain(strides, padding, options)
    shifted = [jnp.pad(kernel, ((p, 1 - p), (q, 1 - q), (0, 0), (0, 0))) for p in (0, 1) for q in (0, 1)]
    reach = 2 * [(len(kernel) // 2,) * 2]
    return jax.lax.conv_general_dilated(x, sum(shifted) / 4, (2, 2), reach, dimension_numbers=LAYOUT)


@jax.custom_vjp
def _upsample_and_convolve(x: Image, kernel: Kernel) -> Upsampled:
    b, h, w, _ = x.shape
    result = jax.ShapeDtypeStruct((b, 2 * h, 2 * w, kernel.shape[3]), x.dtype)
    return jax.linear_transpose(lambda y: convolve_and_pool(y, _transposed(kernel)), result)(x)[0]


def _transposed(kernel: Kernel) -> Float[Array, "k l o i"]:
    return 4 * kernel[::-1, ::-1].swapaxes(2, 3)


def _upsample_and_convolve_backward(saved: tuple[Image, Kernel], gradient: Upsampled) -> tuple[Image, Kernel]:
    """As of `convolve_and_pool`, with image and gradient exchanged: XLA's own for a transpose is 30 times slower."""
    x, kernel = saved
    of_x, of_kernel = jax.vjp(lambda kernel: convolve_and_pool(gradient, _transposed(kernel)), kernel)
    return of_x, *of_kernel(x)


_upsample_and_convolve.defvjp(
    lambda x, kernel: (_upsample_and_convolve(x, kernel), (x, kernel)), _upsample_and_convolve_backward
)


def upsample_and_convolve(
    x: Image, kernel: Kernel, strides: Sequence[int] = (1, 1), padding: str = "SAME", **options: Any
) -> Upsampled:
    """Each pixel made 2x2, then `convolve`. Serves as `nn.Conv(conv_general_dilated=...)`."""
    _require_plain(strides, padding, options)
    return _upsample_and_convolve(x, kernel)


def _require_plain(strides: Sequence[int], padding: str, options: dict[str, Any]) -> None:
    """What `nn.Conv` may ask for: other strides, padding, dilation, groups and precision would not be heeded."""
    plain = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1, "precision": None}
    asked = {"strides": tuple(strides), "padding": padding} | {name: options.get(name, plain[name]) for name in plain}
    expected = {"strides": (1, 1), "padding": "SAME"} | plain
    if asked != expected:
        raise ValueError(f"this convolution heeds none of {asked}, only {expected}")


def _convolve(x: Image, kernel: Kernel) -> Result:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def _fold_forward(x: Image, kernel: Kernel, fold: int) -> Result:
    """The same convolution over `fold` neighbours along a row as channels of one pixel: a reshape, and a wider kernel.

    A tap `t` from neighbour p of pixel `offset` reaches neighbour q of the result: t = fold * offset + p - q + centre.
    """
    (b, h, w, i), (taps, o) = x.shape, kernel.shape[1::2]
    reach = -(-(taps // 2) // fold)
    offset, p, q = np.ix_(np.arange(-reach, reach + 1), np.arange(fold), np.arange(fold))
    places = np.arange(taps)[:, None, None, None] == fold * offset + p - q + taps // 2
    wide = jnp.einsum("ktio,tnpq->knpiqo", kernel, places.astype(kernel.dtype), precision=jax.lax.Precision.HIGHEST)
    wide = wide.reshape(len(kernel), 2 * reach + 1, fold * i, fold * o)
    return _convolve(x.reshape(b, h, w // fold, fold * i), wide).reshape(b, h, w, o)


def _fold_backward(fold: int, saved: tuple[Image, Kernel], gradient: Result) -> tuple[Image, Kernel]:
    """The kernel's own gradient is cheaper without folding."""
    x, kernel = saved
    _, of_x = jax.vjp(lambda x: _fold_forward(x, kernel, fold), x)
    _, of_kernel = jax.vjp(lambda kernel: _convolve(x, kernel), kernel)
    return *of_x(gradient), *of_kernel(gradient)


_convolve_folded = jax.custom_vjp(_fold_forward, nondiff_argnums=(2,))
_convolve_folded.defvjp(lambda x, kernel, fold: (_fold_forward(x, kernel, fold), (x, kernel)), _fold_backward)
