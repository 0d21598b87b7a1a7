"""Random changes of training images, on the device: pure functions of a key."""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from decomp_jax.config import AugmentConfig
from decomp_jax.types import Targets

Batch = dict[str, Array]


def random_geometry(key: PRNGKeyArray, batch: Batch, config: AugmentConfig) -> Batch:
    """One random flip, rotation and scaling an image, applied to its images and label maps alike.

    Images [B,S,S,C] are interpolated linearly, integer maps [B,S,S] take the nearest pixel; outside is 0.
    """
    flip_key, angle_key, scale_key = jax.random.split(key, 3)
    n, size = batch["image"].shape[:2]
    flip = jax.random.bernoulli(flip_key, config.flip, (n,))
    if config.rotation or config.scale:
        angle = jnp.radians(config.rotation) * jax.random.uniform(angle_key, (n,), minval=-1.0)
        scale = jnp.exp(config.scale * jax.random.uniform(scale_key, (n,), minval=-1.0))
        grids = jax.vmap(functools.partial(_sampling_grid, size))(flip, angle, scale)
        return {name: _resample(value, grids) for name, value in batch.items()}
    return {name: jax.vmap(_mirror)(value, flip) for name, value in batch.items()}


def _mirror(values: Array, flip: Bool[Array, ""]) -> Array:
    return jnp.where(flip, values[:, ::-1], values)


def _sampling_grid(
    size: int, flip: Bool[Array, ""], angle: Float[Array, ""], scale: Float[Array, ""]
) -> Float[Array, "2 s s"]:
    """Where in the source each pixel of the result comes from."""
    axis = jnp.arange(size) - (size - 1) / 2
    y, x = jnp.meshgrid(axis, axis, indexing="ij")
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    source_y, source_x = cos * y - sin * x, sin * y + cos * x
    source_x = jnp.where(flip, -source_x, source_x)
    return jnp.stack([source_y, source_x]) + (size - 1) / 2


def _resample(values: Array, grids: Float[Array, "b 2 s s"]) -> Array:
    order = 0 if jnp.issubdtype(values.dtype, jnp.integer) else 1
    sample = functools.partial(map_coordinates, order=order, mode="constant")
    per_image = jax.vmap(sample)
    if values.ndim == 3:
        return per_image(values, grids)
    return jax.vmap(per_image, in_axes=(3, None), out_axes=3)(values, grids)


def transplant(
    key: PRNGKeyArray, image: Float[Array, "b s s c"], label: Int[Array, "b s s"], config: AugmentConfig
) -> Targets:
    """Pastes the lesion of the image before in the batch, mirrored and shifted at random, into an image.

    What lies under a pasted lesion is known, so the network sees the truth it has to paint in x_minus: `background`.
    """
    apply_key, flip_key, shift_key = jax.random.split(key, 3)
    n, size = label.shape[:2]
    donor_image, donor_label = jnp.roll(image, 1, 0), jnp.roll(label, 1, 0)
    flip = jax.random.bernoulli(flip_key, 0.5, (n,))
    shift = jax.random.randint(shift_key, (n, 2), -size // 8, size // 8 + 1)
    donor_image, donor_label = jax.vmap(_mirror_and_shift)(donor_image, donor_label, flip, shift)
    body = (image > config.foreground).any(-1)
    mask = (donor_label > 0) & body & jax.random.bernoulli(apply_key, config.transplant, (n, 1, 1))
    mask &= mask.mean((1, 2), keepdims=True) >= config.least_pasted
    soft = _blur3(mask.astype(image.dtype))
    alpha = jnp.where(mask, jnp.maximum(config.opacity, soft), soft / 2 * body)[..., None]
    mean, donor_mean = (_foreground_mean(x, config.foreground) for x in (image, donor_image))
    gain = mean / jnp.maximum(donor_mean, 1e-3)
    pasted = (1 - alpha) * image + alpha * jnp.clip(gain * donor_image, 0, 1)
    return Targets(
        image=pasted, label=jnp.where(mask, donor_label, label), background=image, background_label=label
    )


def _mirror_and_shift(image: Array, label: Array, flip: Array, shift: Array) -> tuple[Array, Array]:
    def move(x: Array) -> Array:
        return jnp.roll(_mirror(x, flip), shift, (0, 1))

    return move(image), move(label)


def _foreground_mean(image: Float[Array, "b s s c"], least: float) -> Float[Array, "b 1 1 c"]:
    foreground = image > least
    return (image * foreground).sum((1, 2), keepdims=True) / jnp.maximum(foreground.sum((1, 2), keepdims=True), 1)


def _blur3(mask: Float[Array, "b s s"]) -> Float[Array, "b s s"]:
    """Mean over 3x3 pixels."""
    padded = jnp.pad(mask, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9


def random_intensity(key: PRNGKeyArray, image: Float[Array, "b s s c"], strength: float) -> Float[Array, "b s s c"]:
    """x^gamma, log(gamma) uniform in +-strength, an image each."""
    gamma = jnp.exp(strength * jax.random.uniform(key, (image.shape[0], 1, 1, 1), minval=-1.0))
    return jnp.where(image > 0, jnp.clip(image, 1e-6, 1.0) ** gamma, 0.0)


def augment(key: PRNGKeyArray, batch: Batch, config: AugmentConfig) -> tuple[Float[Array, "b s s c"], Targets]:
    """The network's input and what its outputs are held to."""
    geometry_key, transplant_key, intensity_key = jax.random.split(key, 3)
    moved = random_geometry(geometry_key, batch, config)
    if config.transplant:
        targets = transplant(transplant_key, moved["image"], moved["label"], config)
    else:
        targets = Targets(moved["image"], moved["label"], moved["image"], moved["label"])
    image = random_intensity(intensity_key, targets.image, config.intensity) if config.intensity else targets.image
    return image, targets
