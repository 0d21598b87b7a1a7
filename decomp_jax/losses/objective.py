"""The objective: the one place where terms are reduced to means over the batch, weighted and summed."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from decomp_jax.config import ObjectiveConfig
from decomp_jax.losses.terms import TERMS, Context
from decomp_jax.types import Outputs, Targets


def objective(
    outputs: Outputs,
    targets: Targets,
    config: ObjectiveConfig,
    *,
    nothing: bool,
    valid: Bool[Array, "b"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted sum of the terms, and each term alone (mean over the batch, unweighted).

    Terms whose weight is 0 are neither computed nor returned.

    Args:
        nothing: the abnormal codebook has a "nothing" code for cells without a finding.
        valid: False for images that only fill up the batch; None: all count.
    """
    valid = jnp.ones(len(targets.label)) if valid is None else valid.astype(jnp.float32)
    context = Context(outputs, targets, valid, config.lesion_cell, nothing)
    values = {name: TERMS[name](context, settings) for name, settings in config.terms.items()}
    means = {name: valid @ value / valid.sum() for name, value in values.items()}
    total = sum(settings.weight * means[name] for name, settings in config.terms.items())
    return total, means
