"""The two decoders of Table A.2: batch normalisation paints the segmentation, SPADE paints the image.

(The appendix's text names them the other way round; sections 2 and B and Figure B.1 say which is which.)
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from decomp_jax.models.blocks import BatchNorm, Conv, ResBlock, Stem, UpBlock, activation
from decomp_jax.models.convolution import fold_rows, halved, unfold_rows
from decomp_jax.models.spade import Spade, resize_nearest


def decoder_widths(widths: tuple[int, ...]) -> tuple[int, ...]:
    """Channels after each upsampling: the encoder's in reverse, and half of its first at full resolution."""
    return (*reversed(widths[:-1]), widths[0] // 2)


def decoder_levels(widths: tuple[int, ...], fold: int) -> tuple[tuple[int, int], ...]:
    """Channels and fold of rows after each upsampling; `fold` is that at full resolution."""
    folds = [fold]
    while len(folds) < len(widths):
        folds.append(halved(folds[-1]))
    return tuple(zip(decoder_widths(widths), reversed(folds), strict=True))


class SegmentationDecoder(nn.Module):
    """Abnormal code to logits of background and lesion classes.

    Attributes:
        output_gain: of the last kernel at the start, in units of He's deviation.
        fold: of rows at full resolution (`models/convolution.py`).
    """

    widths: tuple[int, ...]
    channels: int
    output_gain: float
    dtype: jnp.dtype
    decay: float
    fold: int

    @nn.compact
    def __call__(self, code: Float[Array, "b h w d"], *, train: bool) -> Float[Array, "b s s k"]:
        (first, fold), *others = decoder_levels(self.widths, self.fold)
        norm = functools.partial(BatchNorm, self.dtype, self.decay)
        stem = Stem(self.widths[-1], first, self.dtype, self.decay, fold, name="stem")
        x = stem(code.astype(self.dtype), train=train)
        x = ResBlock(first, norm, self.dtype, fold)(x, train=train)
        for features, fold in others:
            x = ResBlock(features, norm, self.dtype, fold)(UpBlock(features, self.dtype, fold)(x), train=train)
        x = activation(BatchNorm(self.dtype, self.decay, fold)(x, train=train))
        logits = Conv(self.channels, 5, dtype=self.dtype, fold=fold, gain=self.output_gain, name="conv")(x)
        return unfold_rows(logits, fold).astype(jnp.float32)


class ImageDecoder(nn.Module):
    """Normal code to image, the lesion layout entering through SPADE.

    `stem` is what no layout touches: computed once, it serves both the image with the lesion and the one without.

    Attributes: as of `SegmentationDecoder`.
    """

    widths: tuple[int, ...]
    channels: int
    spade_width: int
    output_gain: float
    dtype: jnp.dtype
    decay: float
    fold: int

    def setup(self) -> None:
        (first, fold), *others = decoder_levels(self.widths, self.fold)
        norm = functools.partial(Spade, self.spade_width, self.dtype, self.decay)
        self.stem_block = Stem(self.widths[-1], first, self.dtype, self.decay, fold)
        self.up_blocks = [UpBlock(features, self.dtype, fold) for features, fold in others]
        self.res_blocks = [ResBlock(features, norm, self.dtype, fold) for features, fold in ((first, fold), *others)]
        self.norm = BatchNorm(self.dtype, self.decay, self.fold)
        self.conv = Conv(self.channels, 5, dtype=self.dtype, fold=self.fold, gain=self.output_gain)

    def stem(self, code: Float[Array, "b h w d"], *, train: bool) -> Float[Array, "b g g2 c"]:
        return self.stem_block(code.astype(self.dtype), train=train)

    def paint(
        self, stem: Float[Array, "b g g2 c"], layout: Float[Array, "n s s k"], *, train: bool
    ) -> Float[Array, "b s s c2"]:
        """`layout` [B,S,S,L] masked logits, or zeros [1,S,S,L] for the null condition."""
        layout = layout.astype(self.dtype)
        x = self._paint(self.res_blocks[0], stem, layout, train)
        for up, block in zip(self.up_blocks, self.res_blocks[1:], strict=True):
            x = self._paint(block, up(x), layout, train)
        image = self.conv(activation(self.norm(x, train=train)))
        return unfold_rows(image, self.fold).astype(jnp.float32)

    def _paint(self, block: ResBlock, x: Array, layout: Array, train: bool) -> Array:
        return block(x, fold_rows(resize_nearest(layout, x.shape[1]), block.fold), train=train)
