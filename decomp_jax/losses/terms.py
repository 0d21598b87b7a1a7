"""The table of terms: each a function of what the network gave and what it should have given to a value an image.

A term's settings, its weight and constants, are its entry in `ObjectiveConfig`. The paper's terms name their equation;
the others are additions of this repository (docs/network.md).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decomp_jax.config import DiscriminationTerm, LayoutTerm, PixelTerm, StructureTerm, Term
from decomp_jax.losses import image, latent, segmentation
from decomp_jax.losses.cells import cell_means, class_fractions, lesion_cells, local_contrast, structure_parts
from decomp_jax.types import Outputs, Targets

PerImage = Float[Array, "b"]


@dataclasses.dataclass(frozen=True)
class Context:
    """What the terms look at, and what several of them derive from it.

    Attributes:
        valid: 1 for images that count, 0 for those that only fill up the batch.
        lesion_cell: share of its pixels with a lesion from which a cell counts as a lesion cell.
        nothing: the abnormal codebook has a "nothing" code.
    """

    outputs: Outputs
    targets: Targets
    valid: Float[Array, "b"]
    lesion_cell: float
    nothing: bool

    @property
    def grid(self) -> int:
        return self.outputs.latents.normal.shape[2]

    @functools.cached_property
    def onehot(self) -> Float[Array, "b s s k"]:
        """The true label, background first."""
        return jax.nn.one_hot(self.targets.label, self.outputs.seg_logits.shape[-1])

    @functools.cached_property
    def probs(self) -> Float[Array, "b s s k"]:
        """The predicted probabilities, background first."""
        return jax.nn.softmax(self.outputs.seg_logits)

    @functools.cached_property
    def class_fractions(self) -> Float[Array, "b h w l"]:
        """Share of each cell's pixels that carry each lesion class."""
        return class_fractions(self.onehot, self.grid)

    @functools.cached_property
    def lesion_fraction(self) -> Float[Array, "b h w"]:
        """f: share of each cell's pixels with a lesion."""
        return self.class_fractions.sum(-1)

    @functools.cached_property
    def lesion_cells(self) -> Float[Array, "b h w"]:
        """1 in the cells that the abnormal codes learn from (`cells.lesion_cells`), else 0."""
        cells = lesion_cells(self.lesion_fraction, self.lesion_cell, nothing=self.nothing)
        return cells.astype(jnp.float32)

    @functools.cached_property
    def all_cells(self) -> Float[Array, "b h w"]:
        return jnp.ones_like(self.lesion_fraction)

    @functools.cached_property
    def abnormal_mask(self) -> Float[Array, "b s s 1"]:
        """M: the pixels with a lesion."""
        return (self.targets.label > 0).astype(jnp.float32)[..., None]

    @functools.cached_property
    def background_mask(self) -> Float[Array, "b s s 1"]:
        """Pixels of `targets.background` without a lesion."""
        return (self.targets.background_label == 0).astype(jnp.float32)[..., None]


def codebook_normal(c: Context, _: Term) -> PerImage:
    """Equation 1: draws normal codes to z_e, where codebooks are trained by gradient."""
    return latent.codebook_loss(c.outputs.latents.normal, c.outputs.codes.z_q_normal, c.all_cells)


def codebook_abnormal(c: Context, _: Term) -> PerImage:
    """Equation 1: draws abnormal codes to z_e, in the cells that `lesion_cells` names."""
    return latent.codebook_loss(c.outputs.latents.abnormal, c.outputs.codes.z_q_lesion, c.lesion_cells)


def commitment_normal(c: Context, _: Term) -> PerImage:
    """Equation 1: draws the normal z_e to its codes."""
    return latent.commitment_loss(c.outputs.latents.normal, c.outputs.codes.z_q_normal, c.all_cells)


def commitment_abnormal(c: Context, _: Term) -> PerImage:
    """Equation 1: draws the abnormal z_e to its codes, in the cells that `lesion_cells` names."""
    return latent.commitment_loss(c.outputs.latents.abnormal, c.outputs.codes.z_q_lesion, c.lesion_cells)


def nothing(c: Context, _: Term) -> PerImage:
    """Draws the abnormal z_e of lesion-free cells to 0, the "nothing" code."""
    return latent.nothing_loss(c.outputs.latents.abnormal, c.lesion_fraction)


def layout(c: Context, settings: LayoutTerm) -> PerImage:
    """Draws the abnormal z_e of cells with a lesion to what share of the cell each lesion class takes."""
    z_e = c.outputs.latents.abnormal
    target = latent.layout_target(c.class_fractions, z_e.shape[-1], scale=settings.scale, whole=settings.whole)
    return latent.layout_loss(z_e, target, c.lesion_fraction)


def structure(c: Context, settings: StructureTerm) -> PerImage:
    """Draws the normal z_e to the local contrast of the image before a lesion was pasted, lesions left out."""
    z_e, background = c.outputs.latents.normal, c.targets.background
    size, channels = background.shape[2:]
    parts = structure_parts(z_e.shape[-1], channels, size // c.grid)
    contrast = local_contrast(background, c.background_mask, window=settings.window, flat=settings.flat)
    weight = c.background_mask * jnp.where(c.abnormal_mask > 0, settings.pasted, 1.0)
    pieces, weights = (cell_means(x, c.grid, parts) for x in (contrast, weight))
    return latent.structure_loss(z_e, pieces, jnp.repeat(weights, channels, -1), scale=settings.scale)


def discrimination(c: Context, settings: DiscriminationTerm) -> PerImage:
    """Equation 3: keeps the abnormal z_e of lesion-free images off the lesion codes."""
    is_normal = 1 - (c.targets.label > 0).any((1, 2)).astype(jnp.float32)
    return latent.discrimination_loss(
        c.outputs.latents.abnormal, c.outputs.codes.z_q_lesion, margin=settings.margin, is_normal=is_normal
    )


def generalized_dice(c: Context, _: Term) -> PerImage:
    """Equation 4."""
    return segmentation.generalized_dice(c.probs, c.onehot, c.valid)


def soft_dice(c: Context, _: Term) -> PerImage:
    """Dice over the batch, mean over the lesion classes."""
    return segmentation.soft_dice(c.probs, c.onehot, c.valid)


def cross_entropy(c: Context, _: Term) -> PerImage:
    """Equation 5."""
    return segmentation.cross_entropy(c.outputs.seg_logits, c.onehot)


def reconstruction_minus(c: Context, settings: PixelTerm) -> PerImage:
    """Equation 7, held to the image before a lesion was pasted into it."""
    return image.reconstruction_minus(c.outputs.x_minus, c.targets.background, c.background_mask, settings.reduction)


def reconstruction_plus(c: Context, settings: PixelTerm) -> PerImage:
    """Equation 8."""
    return image.reconstruction_plus(c.outputs.x_plus, c.targets.image, c.abnormal_mask, settings.reduction)


def residual(c: Context, settings: PixelTerm) -> PerImage:
    """Equation 10."""
    return image.residual_l1(c.outputs.x_minus, c.outputs.x_plus, 1 - c.abnormal_mask, settings.reduction)


# Names are those of the fields of `ObjectiveConfig`.
TERMS: dict[str, Callable[[Context, Term], PerImage]] = {
    term.__name__: term
    for term in (
        codebook_normal,
        codebook_abnormal,
        commitment_normal,
        commitment_abnormal,
        nothing,
        layout,
        structure,
        discrimination,
        generalized_dice,
        soft_dice,
        cross_entropy,
        reconstruction_minus,
        reconstruction_plus,
        residual,
    )
}
