"""The encoder of Table A.1: one image to the features of two paths."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from decomp_jax.models.blocks import BatchNorm, ResBlock, activation, conv
from decomp_jax.models.convolution import convolve, convolve_and_pool


class Encoder(nn.Module):
    """Image to z_e of the normal and the abnormal path.

    Attributes:
        widths: channels at full, half, quarter ... resolution.
        full_resolution_block: a residual block before the first average pool (none in Table A.1).
        code_dim: D.
        own_blocks: last residual blocks of which each path has its own (0: both share all, as in Table A.1).
        normal_gain: of the initial kernel before the normal z_e, in units of He's deviation.
        decay: of the moving statistics of batch normalisation.
    """

    widths: tuple[int, ...]
    full_resolution_block: bool
    code_dim: int
    own_blocks: int
    normal_gain: float
    dtype: jnp.dtype
    decay: float

    @nn.compact
    def __call__(
        self, image: Float[Array, "b s s c"], *, train: bool
    ) -> tuple[Float[Array, "b h w d"], Float[Array, "b h w d"]]:
        first, *blocks = self.widths
        shared = len(blocks) - self.own_blocks
        convolution = convolve if self.full_resolution_block else convolve_and_pool
        x = conv(first, 5, convolution=convolution, dtype=self.dtype, name="conv")(image.astype(self.dtype))
        if self.full_resolution_block:
            x = self._down(x, first, "full_block", train)
        for i, features in enumerate(blocks[:shared]):
            x = self._down(x, features, f"block_{i}", train)
        return tuple(self._head(x, blocks[shared:], path, train) for path in ("normal", "abnormal"))

    def _down(self, x: Array, features: int, name: str, train: bool) -> Array:
        norm = functools.partial(BatchNorm, self.dtype, self.decay)
        return ResBlock(features, norm, self.dtype, pool=True, name=name)(x, train=train)

    def _head(self, x: Array, blocks: list[int], path: str, train: bool) -> Float[Array, "b h w d"]:
        for i, features in enumerate(blocks):
            x = self._down(x, features, f"{path}_block_{i}", train)
        x = activation(BatchNorm(self.dtype, self.decay, name=f"{path}_norm")(x, train=train))
        gain = self.normal_gain if path == "normal" else 1.0
        return conv(self.code_dim, dtype=self.dtype, gain=gain, name=f"{path}_conv")(x).astype(jnp.float32)
