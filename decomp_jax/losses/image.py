"""Terms on the painted images (equations 7, 8 and 10)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from decomp_jax.losses.ssim import ssim


def masked_l2(
    prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Float[Array, "b h w 1"], reduction: str
) -> Float[Array, "b"]:
    """||mask prediction - mask target||_2^2, its sum or its mean over all pixels."""
    return _reduce((mask * (prediction - target)) ** 2, reduction)


def masked_dssim(
    prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Float[Array, "b h w 1"]
) -> Float[Array, "b"]:
    """1 - SSIM(mask prediction, mask target); 0 where the mask is empty."""
    return 1 - ssim(mask * prediction, mask * target)


def reconstruction_minus(
    x_minus: Float[Array, "b h w c"],
    image: Float[Array, "b h w c"],
    normal_mask: Float[Array, "b h w 1"],
    reduction: str = "mean",
) -> Float[Array, "b"]:
    """Equation 7: the lesion-free painting is held to the image where that is normal."""
    return masked_l2(x_minus, image, normal_mask, reduction) + masked_dssim(x_minus, image, normal_mask)


def reconstruction_plus(
    x_plus: Float[Array, "b h w c"],
    image: Float[Array, "b h w c"],
    abnormal_mask: Float[Array, "b h w 1"],
    reduction: str = "mean",
) -> Float[Array, "b"]:
    """Equation 8: the whole painting is held to the image, and once more inside the lesion."""
    everywhere = jnp.ones_like(abnormal_mask)
    return sum(
        masked_l2(x_plus, image, mask, reduction) + masked_dssim(x_plus, image, mask)
        for mask in (everywhere, abnormal_mask)
    )


def residual_l1(
    x_minus: Float[Array, "b h w c"],
    x_plus: Float[Array, "b h w c"],
    normal_mask: Float[Array, "b h w 1"],
    reduction: str = "mean",
) -> Float[Array, "b"]:
    """Equation 10: both paintings agree where the image is normal."""
    return _reduce(jnp.abs(normal_mask * (x_minus - x_plus)), reduction)


def _reduce(pixels: Float[Array, "b h w c"], reduction: str) -> Float[Array, "b"]:
    return {"mean": jnp.mean, "sum": jnp.sum}[reduction](pixels, (1, 2, 3))
