"""Convolutions of few channels, made wide on CPUs: XLA hands its fast CPU kernels only convolutions of 32 channels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

CPU_CHANNELS = 32
Image = Float[Array, "b h w i"]
Kernel = Float[Array, "k l i o"]
Result = Float[Array, "b h w o"]


def convolve(x: Image, kernel: Kernel, *_: Any, **__: Any) -> Result:
    """Stride 1, padded with zeros to the same size. Serves as `nn.Conv(conv_general_dilated=...)`."""
    fold = CPU_CHANNELS // max(kernel.shape[2:])
    if jax.default_backend() == "cpu" and fold > 1 and x.shape[2] % fold == 0:
        return _convolve_folded(x, kernel, fold)
    return _convolve(x, kernel)


def _convolve(x: Image, kernel: Kernel) -> Result:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


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
