"""The decomposition network (Figure 2): encoder, two codebooks, segmentation decoder, image decoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decomp_jax.config import ModelConfig
from decomp_jax.models import vq
from decomp_jax.models.convolution import fold_of
from decomp_jax.models.decoders import ImageDecoder, SegmentationDecoder
from decomp_jax.models.encoder import Encoder
from decomp_jax.models.spade import masked_logits
from decomp_jax.types import Codes, Latents, Outputs


class DecompositionNet(nn.Module):
    """Splits an image into a normal and an abnormal code, and paints it with and without the lesion.

    Attributes:
        size: side S of the images.
        channels: number of modalities C.
        lesion_classes: excludes the background.
    """

    config: ModelConfig
    size: int
    channels: int
    lesion_classes: int

    @property
    def grid(self) -> int:
        """Side of the code grid: each encoder level halves the image."""
        return self.size // 2 ** len(self.config.widths)

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.dtype)

    def setup(self) -> None:
        config = self.config
        encoder_widths = tuple(config.encoder_widening * width for width in config.widths)
        # Without a block at full resolution the encoder's first features are those of half of it.
        finest = encoder_widths[0] if config.full_resolution_block else encoder_widths[0] // 2
        self.encoder = Encoder(
            encoder_widths,
            config.full_resolution_block,
            config.code_dim,
            config.own_blocks,
            config.normal_gain,
            self.dtype,
            config.batch_norm_decay,
            fold_of(finest, self.size),
        )
        decoding = (config.output_gain, self.dtype, config.batch_norm_decay, fold_of(config.widths[0] // 2, self.size))
        self.segmentation_decoder = SegmentationDecoder(config.widths, self.lesion_classes + 1, *decoding)
        self.image_decoder = ImageDecoder(config.widths, self.channels, config.spade_width, *decoding)
        shape = (config.codebook_size, config.code_dim)
        self.normal_codebook = self.param("normal_codebook", vq.init_codebook, shape)
        self.abnormal_codebook = self.param(
            "abnormal_codebook", vq.init_codebook, shape, nothing=bool(config.nothing_threshold)
        )

    def __call__(self, image: Float[Array, "b s s c"], *, quantised: Float[Array, ""] | float, train: bool) -> Outputs:
        """The whole network. `quantised` blends what the decoders see, from z_e (0) to codes (1)."""
        latents = self.encode(image, train=train)
        codes = self.quantize(latents)
        normal = latents.normal + quantised * (codes.z_st_normal - latents.normal)
        abnormal = latents.abnormal + quantised * (codes.z_st_abnormal - latents.abnormal)
        seg_logits = self.segment(abnormal, train=train)
        x_plus, x_minus = self.render_both(normal, seg_logits, train=train)
        return Outputs(latents, codes, seg_logits, x_plus, x_minus)

    def encode(self, image: Float[Array, "b s s c"], *, train: bool) -> Latents:
        """z_e of both paths."""
        return Latents(*self.encoder(image, train=train))

    def codebooks(self) -> tuple[Float[Array, "k d"], Float[Array, "k d"]]:
        """Normal and abnormal codebook; code 0 of the latter is the zero vector where "nothing" is in use."""
        return self.normal_codebook, self.abnormal_codebook

    def quantize(self, latents: Latents) -> Codes:
        """Nearest codes of both paths; abnormal cells below the threshold take code 0 where "nothing" is in use."""
        normal_codebook, abnormal_codebook = self.codebooks()
        normal_indices = vq.nearest_code(latents.normal, normal_codebook)
        if self.config.nothing_threshold:
            lesion_indices = 1 + vq.nearest_code(latents.abnormal, abnormal_codebook[1:])
            finding = vq.is_finding(latents.abnormal, self.config.nothing_threshold)
            abnormal_indices = jnp.where(finding, lesion_indices, 0)
        else:
            lesion_indices = abnormal_indices = vq.nearest_code(latents.abnormal, abnormal_codebook)
        z_q_normal = vq.lookup(normal_indices, normal_codebook)
        z_q_abnormal = vq.lookup(abnormal_indices, abnormal_codebook)
        through = vq.rotate_through if self.config.rotation_trick else vq.straight_through
        return Codes(
            normal_indices=normal_indices,
            abnormal_indices=abnormal_indices,
            lesion_indices=lesion_indices,
            z_q_normal=z_q_normal,
            z_q_abnormal=z_q_abnormal,
            z_q_lesion=vq.lookup(lesion_indices, abnormal_codebook),
            z_st_normal=through(latents.normal, z_q_normal),
            z_st_abnormal=through(latents.abnormal, z_q_abnormal),
        )

    def segment(self, abnormal: Float[Array, "b h w d"], *, train: bool) -> Float[Array, "b s s k"]:
        """Logits of background and lesion classes."""
        return self.segmentation_decoder(abnormal, train=train)

    def render(
        self, normal: Float[Array, "b h w d"], seg_logits: Float[Array, "b s s k"] | None, *, train: bool
    ) -> Float[Array, "b s s c"]:
        """Image of a normal code with the lesion that the logits show; None paints it lesion-free (null condition)."""
        return self.image_decoder.paint(
            self.image_decoder.stem(normal, train=train), self._layout(seg_logits), train=train
        )

    def render_both(
        self, normal: Float[Array, "b h w d"], seg_logits: Float[Array, "b s s k"], *, train: bool
    ) -> tuple[Float[Array, "b s s c"], Float[Array, "b s s c"]]:
        """x_plus and x_minus, sharing the decoder's stem."""
        stem = self.image_decoder.stem(normal, train=train)
        return tuple(
            self.image_decoder.paint(stem, self._layout(logits), train=train) for logits in (seg_logits, None)
        )

    def _layout(self, seg_logits: Float[Array, "b s s k"] | None) -> Float[Array, "n s s l"]:
        if seg_logits is None:
            return jnp.zeros((1, self.size, self.size, self.lesion_classes), self.dtype)
        layout = masked_logits(seg_logits)
        return jax.lax.stop_gradient(layout) if self.config.spade_stop_gradient else layout
