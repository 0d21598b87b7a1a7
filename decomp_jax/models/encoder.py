"""The encoder of Table A.1: one image to the features of two paths."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from decomp_jax.models.blocks import BatchNorm, Conv, ResBlock, activation
from decomp_jax.models.convolution import convolve, convolve_and_pool, fold_rows, halved, unfold_rows


class Encoder(nn.Module):
    """Image to z_e of the normal and the abnormal path.

    Attributes:
        widths: channels at full, half, quarter ... resolution.
        full_resolution_block: a residual block before the first average pool (none in Table A.1).
        code_dim: D.
        own_blocks: last residual blocks of which each path has its own (0: both share all, as in Table A.1).
        normal_gain: of the initial kernel before the normal z_e, in units of He's deviation.
        decay: of the moving statistics of batch normalisation.
        fold: of rows at full resolution (`models/convolution.py`).
    """

    widths: tuple[int, ...]
    full_resolution_block: bool
    code_dim: int
    own_blocks: int
    normal_gain: float
    dtype: jnp.dtype
    decay: float
    fold: int

    @nn.compact
    def __call__(
        self, image: Float[Array, "b s s c"], *, train: bool
    ) -> tuple[Float[Array, "b h w d"], Float[Array, "b h w d"]]:
        first, *blocks = self.widths
        shared, fold = len(blocks) - self.own_blocks, self.fold
        convolution = convolve if self.full_resolution_block else convolve_and_pool
        make = functools.partial(Conv, dtype=self.dtype, fold=fold)
        x = make(first, 5, convolution=convolution, name="conv")(fold_rows(image.astype(self.dtype), fold))
        if self.full_resolution_block:
            x = self._down(x, first, fold, "full_block", train)
        for i, features in enumerate(blocks[:shared]):
            fold = halved(fold)
            x = self._down(x, features, fold, f"block_{i}", train)
        return tuple(self._head(x, blocks[shared:], halved(fold), path, train) for path in ("normal", "abnormal"))

    def _down(self, x: Array, features: int, fold: int, name: str, train: bool) -> Array:
        norm = functools.partial(BatchNorm, self.dtype, self.decay)
        return ResBlock(features, norm, self.dtype, fold, pool=True, name=name)(x, train=train)

    def _head(self, x: Array, blocks: list[int], fold: int, path: str, train: bool) -> Float[Array, "b h w d"]:
        for i, features in enumerate(blocks):
            x = self._down(x, features, fold, f"{path}_block_{i}", train)
            fold = halved(fold)
        x = activation(BatchNorm(self.dtype, self.decay, fold, name=f"{path}_norm")(x, train=train))
        gain = self.normal_gain if path == "normal" else 1.0
        z_e = Conv(self.code_dim, dtype=self.dtype, fold=fold, gain=gain, name=f"{path}_conv")(x)
        return unfold_rows(z_e, fold).astype(jnp.float32)
