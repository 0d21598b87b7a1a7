"""Random changes of training images, on the device: pure functions of a key.

Nothing here is a gather, which TPUs are slow at: pixels move by shifts of 1, 2, 4, ... and by products with matrices.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
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
    batch = {name: jax.vmap(_mirror)(value, flip) for name, value in batch.items()}
    if not (config.rotation or config.scale):
        return batch
    angle = jnp.radians(config.rotation) * jax.random.uniform(angle_key, (n,), minval=-1.0)
    scale = jnp.exp(config.scale * jax.random.uniform(scale_key, (n,), minval=-1.0))
    resample = functools.partial(_resample, reach=_reach(size, config))
    return {name: jax.vmap(resample)(value, angle, scale) for name, value in batch.items()}


def _mirror(values: Array, flip: Bool[Array, ""]) -> Array:
    return jnp.where(flip, values[:, ::-1], values)


def _reach(size: int, config: AugmentConfig) -> int:
    """How far a pass of `_resample` may move a pixel along its line."""
    angle, scale = math.radians(config.rotation), math.exp(config.scale)
    return math.ceil(size / 2 * max(scale * math.tan(angle), scale / math.cos(angle) - 1)) + 2


def _resample(values: Array, angle: Float[Array, ""], scale: Float[Array, ""], *, reach: int) -> Array:
    """Image [S,S,C] or integer map [S,S], rotated and scaled about its centre, in two passes (Catmull and Smith 1980).

    Pixel (y, x) of the result lies at (cos y - sin x, sin y + cos x) / scale of the source. The first pass moves pixels
    along rows, the second along columns.
    """
    if values.ndim == 3:
        return jax.vmap(functools.partial(_resample, reach=reach), (2, None, None), 2)(values, angle, scale)
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    rows = _resample_lines(values, (cos**2 + sin**2) / cos, sin / cos, reach)
    return _resample_lines(rows.T, cos, -sin, reach).T


def _resample_lines(values: Array, scale: Float[Array, ""], shear: Float[Array, ""], reach: int) -> Array:
    """values[j, scale i + shear j] for all lines j and places i, counted from the centre.

    A line is shifted by whole pixels. The matrices take its pixels at the whole places before, at and after scale i,
    the same in all lines; what is left of the place, between -1 and 1, is the weight of these three.
    """
    size = len(values)
    centre = (size - 1) / 2
    shift, place = (factor * (jnp.arange(size) - centre) for factor in (shear, scale))
    whole_shift, place = jnp.round(shift), place + centre
    whole_place = jnp.round(place)
    rest = (shift - whole_shift)[:, None] + place - whole_place
    rest = jnp.round(rest) if jnp.issubdtype(values.dtype, jnp.integer) else rest
    lines = _shift(jnp.pad(values, ((0, 0), (reach, reach))), whole_shift.astype(int)[:, None], reach, 1)
    places = jnp.arange(-reach, size + reach)[:, None]

    def term(step: int) -> Float[Array, "s s"]:
        taken = jnp.matmul(lines.astype(float), (places == whole_place + step).astype(float), precision="highest")
        return jnp.maximum(0, 1 - jnp.abs(rest - step)) * taken

    return sum(term(step) for step in (-1, 0, 1)).astype(values.dtype)


def _shift(values: Array, shift: Int[Array, "..."], most: int, axis: int) -> Array:
    """values[i + shift] along an axis, 0 from outside; `shift` is one number, or one a line, at most +-`most`."""
    bits = (2 * most).bit_length()
    widths = [(0, 0)] * values.ndim
    widths[axis] = (most, 2**bits - 1 - most)
    values = jnp.pad(values, widths)
    for bit in range(bits):
        near, far = lax.slice_in_dim(values, 0, -(2**bit), axis=axis), lax.slice_in_dim(values, 2**bit, None, axis=axis)
        values = jnp.where((shift + most) >> bit & 1, far, near)
    return values


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
    mean = _foreground_mean(image, config.foreground)
    donor_mean = jnp.roll(mean, 1, 0)
    gain = mean / jnp.maximum(donor_mean, 1e-3)
    pasted = (1 - alpha) * image + alpha * jnp.clip(gain * donor_image, 0, 1)
    return Targets(
        image=pasted, label=jnp.where(mask, donor_label, label), background=image, background_label=label
    )


def _mirror_and_shift(image: Array, label: Array, flip: Array, shift: Array) -> tuple[Array, Array]:
    def move(x: Array) -> Array:
        most = len(x) // 8
        rows = _shift(_mirror(x, flip), -shift[0], most, 0)
        return _shift(rows, -shift[1], most, 1)

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


def random_scanner(key: PRNGKeyArray, image: Float[Array, "b s s c"], config: AugmentConfig) -> Float[Array, "b s s c"]:
    """Contrast, bias field, sharpness and noise of another scanner, an image each; the background stays 0."""
    contrast_key, bias_key, sharpness_key, noise_key = jax.random.split(key, 4)
    n, size, _, channels = image.shape
    mean = _foreground_mean(image, config.foreground)
    contrast = jnp.exp(config.contrast * jax.random.uniform(contrast_key, (n, 1, 1, channels), minval=-1.0))
    coarse = config.bias * jax.random.normal(bias_key, (n, 4, 4, channels))
    bias = jnp.exp(jax.image.resize(coarse, (n, size, size, channels), "cubic"))
    changed = jnp.maximum(mean + contrast * (image - mean), 0) * bias
    share = config.sharpness * jax.random.uniform(sharpness_key, (n, 1, 1, 1), minval=-0.5)
    changed += share * (jnp.moveaxis(jax.vmap(_blur3)(jnp.moveaxis(changed, 3, 0)), 0, 3) - changed)
    sigma_key, noise_key = jax.random.split(noise_key)
    changed += config.noise * jax.random.uniform(sigma_key, (n, 1, 1, 1)) * jax.random.normal(noise_key, image.shape)
    return jnp.where(image > 0, jnp.clip(changed, 1e-6, 1.0), 0.0)


def drop_channels(key: PRNGKeyArray, image: Float[Array, "b s s c"], probability: float) -> Float[Array, "b s s c"]:
    """Each channel of each image is 0 with a probability, but for one, at random, of those that show something."""
    chance = jax.random.uniform(key, (image.shape[0], 1, 1, image.shape[-1]))
    chance = jnp.where((image > 0).any((1, 2), keepdims=True), chance, -1)
    return jnp.where((chance >= probability) | (chance == chance.max(-1, keepdims=True)), image, 0)


def augment(key: PRNGKeyArray, batch: Batch, config: AugmentConfig) -> tuple[Float[Array, "b s s c"], Targets]:
    """The network's input and what its outputs are held to.

    The latter have all channels, and the intensities of the data: what the input lacks is to be painted from what it
    has, and an image's codes are not to depend on it.
    """
    geometry_key, transplant_key, intensity_key = jax.random.split(key, 3)
    moved = random_geometry(geometry_key, batch, config)
    if config.transplant:
        targets = transplant(transplant_key, moved["image"], moved["label"], config)
    else:
        targets = Targets(moved["image"], moved["label"], moved["image"], moved["label"])
    image = random_intensity(intensity_key, targets.image, config.intensity) if config.intensity else targets.image
    if config.contrast or config.bias or config.sharpness or config.noise:
        image = random_scanner(jax.random.fold_in(intensity_key, 0), image, config)
    if config.drop_channel:
        image = drop_channels(jax.random.fold_in(intensity_key, 1), image, config.drop_channel)
    return image, targets
