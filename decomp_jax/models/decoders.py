"""The two decoders of Table A.2: batch normalisation paints the segmentation, SPADE paints the image.

(The appendix's text names them the other way round; sections 2 and B and Figure B.1 say which is which.)
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from decomp_jax.models.blocks import BatchNorm, ResBlock, Stem, UpBlock, activation, conv
from decomp_jax.models.spade import Spade, resize_nearest


def decoder_widths(widths: tuple[int, ...]) -> tuple[int, ...]:
    """Channels after each upsampling: the encoder's in reverse, and half of its first at full resolution."""
    return (*reversed(widths[:-1]), widths[0] // 2)


class SegmentationDecoder(nn.Module):
    """Abnormal code to logits of background and lesion classes.

    Attributes:
        output_gain: of the last kernel at the start, in units of He's deviation.
    """

    widths: tuple[int, ...]
    channels: int
    output_gain: float
    dtype: jnp.dtype
    decay: float

    @nn.compact
    def __call__(self, code: Float[Array, "b h w d"], *, train: bool) -> Float[Array, "b s s k"]:
        first, *others = decoder_widths(self.widths)
        norm = functools.partial(BatchNorm, self.dtype, self.decay)
        x = Stem(self.widths[-1], first, self.dtype, self.decay, name="stem")(code.astype(self.dtype), train=train)
        x = ResBlock(first, norm, self.dtype)(x, train=train)
        for features in others:
            x = ResBlock(features, norm, self.dtype)(UpBlock(features, self.dtype)(x), train=train)
        x = activation(BatchNorm(self.dtype, self.decay)(x, train=train))
        return conv(self.channels, 5, dtype=self.dtype, gain=self.output_gain, name="conv")(x).astype(jnp.float32)


class ImageDecoder(nn.Module):
    """Normal code to image, the lesion layout entering through SPADE.

    `stem` is what no layout touches: computed once, it serves both the image with the lesion and the one without.
    """

    widths: tuple[int, ...]
    channels: int
    spade_width: int
    output_gain: float
    dtype: jnp.dtype
    decay: float

    def setup(self) -> None:
        first, *others = decoder_widths(self.widths)
        norm = functools.partial(Spade, self.spade_width, self.dtype, self.decay)
        self.stem_block = Stem(self.widths[-1], first, self.dtype, self.decay)
        self.up_blocks = [UpBlock(features, self.dtype) for features in others]
        self.res_blocks = [ResBlock(features, norm, self.dtype) for features in (first, *others)]
        self.norm = BatchNorm(self.dtype, self.decay)
        self.conv = conv(self.channels, 5, dtype=self.dtype, gain=self.output_gain)

    def stem(self, code: Float[Array, "b h w d"], *, train: bool) -> Float[Array, "b g g c"]:
        return self.stem_block(code.astype(self.dtype), train=train)

    def paint(
        self, stem: Float[Array, "b g g c"], layout: Float[Array, "n s s k"], *, train: bool
    ) -> Float[Array, "b s s c2"]:
        """`layout` [B,S,S,L] masked logits, or zeros [1,S,S,L] for the null condition."""
        layout = layout.astype(self.dtype)
        x = self.res_blocks[0](stem, resize_nearest(layout, stem.shape[1]), train=train)
        for up, block in zip(self.up_blocks, self.res_blocks[1:], strict=True):
            x = up(x)
            x = block(x, resize_nearest(layout, x.shape[1]), train=train)
        return self.conv(activation(self.norm(x, train=train))).astype(jnp.float32)
