"""The objective: where the terms are reduced to means over the batch, weighted and summed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decomp_jax.config import LossWeights
from decomp_jax.losses import image as on_image
from decomp_jax.losses import latent, segmentation
from decomp_jax.losses.cells import cell_means, class_fractions, local_contrast, structure_parts
from decomp_jax.types import Outputs, Targets


# Length of z_e_abnormal in a cell full of lesion, and how much of its square says that there is a lesion, not which.
LAYOUT_SCALE = 14.0
LAYOUT_WHOLE = 0.7
# Deviation of local contrast in the channels of z_e_normal that carry the structure. Beside LAYOUT_SCALE it decides what
# the two codes weigh where their distances are added up: at 1, a mix of two images keeps about as much of either.
STRUCTURE_SCALE = 1.0
# Lesion pixels from which on a cell's lesion code is trained.
CELL_PIXELS = 3
# Structure under a pasted lesion counts so many times: one cell in fifty alone teaches what a lesion hides.
PASTED_WEIGHT = 5.0


def objective(
    outputs: Outputs,
    targets: Targets,
    weights: LossWeights,
    *,
    margin: float,
    nothing: bool,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted sum of the terms, and each term alone (mean over the batch, unweighted).

    Terms whose weight is 0 are neither computed nor returned.

    Args:
        margin: pi of equation 3.
        nothing: cells without a finding carry the "nothing" code; otherwise the abnormal path is trained on all cells
            of images with a lesion, as in the paper.
    """
    latents, codes = outputs.latents, outputs.codes
    classes = outputs.seg_logits.shape[-1]
    grid, code_dim = latents.normal.shape[2:]
    size, channels = targets.image.shape[2:]
    parts = structure_parts(code_dim, channels, size // grid)
    onehot = jax.nn.one_hot(targets.label, classes)
    fractions = class_fractions(onehot, grid)
    fraction = fractions.sum(-1)
    has_lesion = (targets.label > 0).any((1, 2)).astype(jnp.float32)
    pixels_in_cell = (size // grid) ** 2
    all_cells = jnp.ones_like(fraction)
    lesion_cells = (
        (fraction > (CELL_PIXELS - 0.5) / pixels_in_cell).astype(jnp.float32)
        if nothing
        else all_cells * has_lesion[:, None, None]
    )
    abnormal_mask = (targets.label > 0).astype(jnp.float32)[..., None]
    background_mask = (targets.background_label == 0).astype(jnp.float32)[..., None]
    structure_weight = background_mask * jnp.where(abnormal_mask > 0, PASTED_WEIGHT, 1.0)
    probs = jax.nn.softmax(outputs.seg_logits)
    terms: dict[str, Callable[[], Array]] = {
        "codebook_normal": lambda: latent.codebook_loss(latents.normal, codes.z_q_normal, all_cells),
        "codebook_abnormal": lambda: latent.codebook_loss(
            latents.abnormal, codes.z_q_lesion, lesion_cells
        ),
        "commitment_normal": lambda: latent.commitment_loss(latents.normal, codes.z_q_normal, all_cells),
        "commitment_abnormal": lambda: latent.commitment_loss(
            latents.abnormal, codes.z_q_lesion, lesion_cells
        ),
        "nothing": lambda: latent.nothing_loss(latents.abnormal, fraction),
        "layout": lambda: latent.layout_loss(latents.abnormal, fractions, scale=LAYOUT_SCALE, whole=LAYOUT_WHOLE),
        "structure": lambda: latent.structure_loss(
            latents.normal,
            cell_means(local_contrast(targets.background), grid, parts),
            jnp.repeat(cell_means(structure_weight, grid, parts), channels, -1),
            scale=STRUCTURE_SCALE,
        ),
        "discrimination": lambda: latent.discrimination_loss(
            latents.abnormal, codes.z_q_lesion, margin=margin, is_normal=1 - has_lesion
        ),
        "generalized_dice": lambda: segmentation.generalized_dice(probs, onehot),
        "soft_dice": lambda: segmentation.soft_dice(probs, onehot),
        "cross_entropy": lambda: segmentation.cross_entropy(outputs.seg_logits, onehot),
        "reconstruction_minus": lambda: on_image.reconstruction_minus(
            outputs.x_minus, targets.background, background_mask
        ),
        "reconstruction_plus": lambda: on_image.reconstruction_plus(outputs.x_plus, targets.image, abnormal_mask),
        "residual": lambda: on_image.residual_l1(outputs.x_minus, outputs.x_plus, 1 - abnormal_mask),
    }
    active = {name: term().mean() for name, term in terms.items() if getattr(weights, name)}
    total = sum(getattr(weights, name) * value for name, value in active.items())
    return total, active
