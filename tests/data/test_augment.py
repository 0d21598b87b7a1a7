import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from decomp_jax.config import AugmentConfig
from decomp_jax.data.augment import (
    augment, drop_channels, random_geometry, random_intensity, random_scanner, transplant,
)

STILL = AugmentConfig(flip=0.0, rotation=0.0, scale=0.0, transplant=0.0)
RNG = np.random.default_rng(0)


@pytest.fixture
def batch():
    y, x = np.mgrid[:32, :32]
    disc = (y - 15.5) ** 2 + (x - 15.5) ** 2 < 144
    image = ndimage.gaussian_filter(RNG.random((4, 32, 32)), (0, 2, 2)) * disc
    label = ((y - 10) ** 2 + (x - 20) ** 2 < 16) * np.arange(4)[:, None, None]
    anatomy = disc * np.where(x < 16, 2, 1)
    return {
        "image": jnp.asarray(image[..., None], jnp.float32),
        "label": jnp.asarray(label, jnp.int32),
        "anatomy": jnp.asarray(np.broadcast_to(anatomy, (4, 32, 32)), jnp.int32),
    }


def test_nothing_asked_nothing_changed(batch):
    moved = random_geometry(jax.random.key(0), batch, STILL)
    for name, value in batch.items():
        np.testing.assert_allclose(moved[name], value, atol=1e-6)


def test_flip_mirrors_images_and_labels(batch):
    config = AugmentConfig(flip=1.0, rotation=0.0, scale=0.0)
    moved = random_geometry(jax.random.key(0), batch, config)
    for name, value in batch.items():
        np.testing.assert_allclose(moved[name], value[:, :, ::-1], atol=1e-6)


def test_rotation_equals_scipy(batch):
    """On a smooth image: where scipy interpolates along y and x at once, two passes do so along x and a slanted line.

    Either is off by at most a quarter of the second differences, an eighth an axis, and in the same direction.
    """
    image = np.pad(batch["image"], ((0, 0), (8, 8), (8, 8), (0, 0)))  # scipy cuts off what leaves the image
    image = ndimage.gaussian_filter(image, (0, 2, 2, 0))
    tolerance = max(np.abs(np.diff(image, 2, axis=axis)).max() for axis in (1, 2)) / 4
    config = AugmentConfig(flip=0.0, rotation=30.0, scale=0.0)
    key = jax.random.key(5)
    moved = random_geometry(key, {"image": jnp.asarray(image)}, config)["image"]
    angle_key = jax.random.split(key, 3)[1]
    angles = 30.0 * jax.random.uniform(angle_key, (4,), minval=-1.0)
    assert tolerance < 0.02 and np.abs(moved - image).max() > 5 * tolerance
    for i, angle in enumerate(np.asarray(angles)):
        expected = ndimage.rotate(image[i, ..., 0], -angle, reshape=False, order=1)
        np.testing.assert_allclose(moved[i, ..., 0], expected, atol=tolerance)


@pytest.mark.parametrize("angle, log_scale", [(12.0, 0.12), (-12.0, -0.12), (45.0, 0.5), (-45.0, -0.5), (0.0, 0.3)])
def test_equals_two_passes_of_interp(angle, log_scale, monkeypatch):
    """Noise, so that all that is not the one linear interpolation a pass would show."""
    image = np.pad(RNG.random((31, 31)), 1)
    config = AugmentConfig(flip=0.0, rotation=abs(angle), scale=abs(log_scale))
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, minval: np.sign(angle or 1) * jnp.ones(shape))
    moved = random_geometry(jax.random.key(0), {"image": jnp.asarray(image[None, ..., None])}, config)["image"]
    axis = np.arange(33) - 16
    cos, sin = np.cos(np.radians(angle)) / np.exp(log_scale), np.sin(np.radians(angle)) / np.exp(log_scale)
    for scale, shear in (((cos**2 + sin**2) / cos, sin / cos), (cos, -sin)):
        image = np.stack([np.interp(scale * axis + shear * j, axis, line) for j, line in zip(axis, image)]).T
    np.testing.assert_allclose(moved[0, ..., 0], image, atol=1e-4)


def test_a_bright_lesion_and_its_label_stay_together(monkeypatch):
    y, x = np.mgrid[:64, :64] - 31.5
    lesion = np.hypot(y - 8, x + 10) < 7
    image = np.where(lesion, 0.9, 0.3 * (np.hypot(y, x) < 25))
    batch = {"image": jnp.asarray(image[None, ..., None]), "label": jnp.asarray(3 * lesion[None])}
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, minval: jnp.ones(shape))
    config = AugmentConfig(flip=1.0, rotation=12.0, scale=np.log(1.12))
    moved = jax.tree.map(np.asarray, random_geometry(jax.random.key(0), batch, config))
    bright, label = moved["image"][0, ..., 0] > 0.6, moved["label"][0] == 3
    assert 2 * (bright & label).sum() / (bright.sum() + label.sum()) >= 0.95
    assert (label & lesion).sum() < 0.1 * lesion.sum() and abs(label.sum() / lesion.sum() / 1.12**2 - 1) < 0.05


def test_no_gathers(batch):
    del batch["anatomy"]
    lowered = jax.jit(augment, static_argnums=2).lower(jax.random.key(0), batch, AugmentConfig())
    for program in (lowered.as_text(), lowered.compile().as_text()):
        assert not re.search(r"gather\"?\(", program)


def test_labels_stay_whole_numbers_that_were_there(batch):
    moved = random_geometry(jax.random.key(1), batch, AugmentConfig())
    assert moved["label"].dtype == batch["label"].dtype
    for before, after in zip(batch["label"], moved["label"]):
        assert set(np.unique(after)) <= set(np.unique(before))


def test_scaling_changes_the_area_as_it_should(batch):
    config = AugmentConfig(flip=0.0, rotation=0.0, scale=0.3)
    key = jax.random.key(2)
    moved = random_geometry(key, batch, config)
    scale = np.exp(0.3 * jax.random.uniform(jax.random.split(key, 3)[2], (4,), minval=-1.0))
    areas = (moved["anatomy"] > 0).sum((1, 2)) / (batch["anatomy"] > 0).sum((1, 2))
    np.testing.assert_allclose(areas, scale**2, rtol=0.12)


def test_transplant_pastes_lesions_inside_the_brain_and_keeps_the_background(batch):
    targets = transplant(jax.random.key(0), batch["image"], batch["label"], AugmentConfig(transplant=1.0))
    pasted = targets.label != batch["label"]
    assert pasted.any()
    assert (batch["image"][..., 0][pasted] > 0.04).all()
    np.testing.assert_array_equal(targets.background, batch["image"])
    np.testing.assert_array_equal(targets.background_label, batch["label"])
    far = ndimage.binary_dilation(np.asarray(pasted), iterations=2, structure=np.ones((1, 3, 3)))
    np.testing.assert_array_equal(targets.image[..., 0][~far], batch["image"][..., 0][~far])
    assert float(targets.image.min()) >= 0 and float(targets.image.max()) <= 1


def test_transplant_of_probability_0_changes_nothing(batch):
    targets = transplant(jax.random.key(0), batch["image"], batch["label"], AugmentConfig(transplant=0.0))
    np.testing.assert_array_equal(targets.image, batch["image"])
    np.testing.assert_array_equal(targets.label, batch["label"])


def test_intensity_keeps_background_and_order(batch):
    image = batch["image"]
    changed = random_intensity(jax.random.key(0), image, 0.4)
    assert (changed[image == 0] == 0).all() and not jnp.allclose(changed, image)
    order = np.argsort(np.asarray(image[1]).ravel(), kind="stable")
    assert (np.diff(np.asarray(changed[1]).ravel()[order]) >= -1e-6).all()


SCANNERS = {"contrast": 0.4, "bias": 0.2, "sharpness": 0.5, "noise": 0.1}


@pytest.mark.parametrize("name", SCANNERS)
def test_another_scanner_changes_the_body_alone(batch, name):
    config = dataclasses.replace(STILL, intensity=0.0, **{name: SCANNERS[name]})
    image, targets = augment(jax.random.key(3), {key: batch[key] for key in ("image", "label")}, config)
    body = np.asarray(batch["image"]) > 0
    np.testing.assert_array_equal(targets.image, batch["image"])
    assert (np.asarray(image)[~body] == 0).all() and image.min() >= 0 and image.max() <= 1
    change = np.abs(image - targets.image)
    assert all(change[i][body[i]].mean() > 1e-3 for i in range(len(body)))


def test_contrast_keeps_the_mean_and_scales_the_rest(batch):
    body = np.asarray(batch["image"]) > AugmentConfig().foreground
    image = jnp.where(body, 0.4 + 0.2 * batch["image"], 0)
    changed = np.asarray(random_scanner(jax.random.key(0), image, dataclasses.replace(STILL, contrast=0.4)))
    for before, after, inside in zip(np.asarray(image), changed, body):
        np.testing.assert_allclose(after[inside].mean(), before[inside].mean(), rtol=1e-4)
        factors = (after[inside] - after[inside].mean()) / (before[inside] - before[inside].mean())
        assert abs(np.log(np.median(factors))) <= 0.4
        np.testing.assert_allclose(after[inside], before[inside].mean() + np.median(factors) * (before[inside] - before[inside].mean()), atol=1e-4)


def test_bias_is_smooth_and_sharpness_is_a_mean_of_neighbours(batch):
    flat = jnp.full((4, 32, 32, 1), 0.5)
    bias = np.asarray(random_scanner(jax.random.key(1), flat, dataclasses.replace(STILL, bias=0.2))) / 0.5
    assert np.log(bias).std() > 0.05 and max(np.abs(np.diff(np.log(bias), axis=axis)).max() for axis in (1, 2)) < 0.15
    inner = np.asarray(batch["image"])[:, 8:24, 8:24, 0]
    means = ndimage.uniform_filter(inner, (0, 3, 3))[:, 1:-1, 1:-1]
    changed = np.asarray(random_scanner(jax.random.key(2), jnp.asarray(inner[..., None]), dataclasses.replace(STILL, sharpness=0.5)))[:, 1:-1, 1:-1, 0]
    share = (changed - inner[:, 1:-1, 1:-1]) / (means - inner[:, 1:-1, 1:-1])
    for values in share:
        np.testing.assert_allclose(values, np.median(values), atol=2e-2)
        assert -0.25 <= np.median(values) <= 0.5
    assert np.ptp([np.median(values) for values in share]) > 0.05


def test_a_key_gives_the_same_batch_again(batch):
    del batch["anatomy"]
    one, two, other = (augment(jax.random.key(k), batch, AugmentConfig())[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_the_input_alone_changes_its_intensity(batch):
    still = AugmentConfig(flip=0.0, rotation=0.0, scale=0.0, transplant=0.0, intensity=0.3)
    image, targets = augment(jax.random.key(0), {name: batch[name] for name in ("image", "label")}, still)
    np.testing.assert_array_equal(targets.image, batch["image"])
    inside = np.asarray(batch["image"]) > 0.05
    gamma = np.log(np.asarray(image)[inside]) / np.log(np.asarray(targets.image)[inside])
    of_image = np.broadcast_to(np.arange(4)[:, None, None, None], inside.shape)[inside]
    means = np.array([gamma[of_image == i].mean() for i in range(4)])
    np.testing.assert_allclose(gamma, means[of_image], rtol=1e-2)
    assert np.ptp(means) > 0.05 and (np.abs(np.log(means)) <= 0.3).all()


def kept_channels(image, probability):
    """[n,c], of images whose channels are dropped; those that stay do so as they were."""
    dropped = np.asarray(drop_channels(jax.random.key(0), image, probability))
    kept = dropped.any((1, 2))
    np.testing.assert_array_equal(dropped, np.where(kept[:, None, None], image, 0))
    return kept


def test_channels_are_dropped_as_often_as_asked_and_never_all():
    image = jnp.ones((4000, 2, 2, 4))
    kept = kept_channels(image, 0.5)
    assert kept.any(1).all()
    np.testing.assert_allclose(kept.mean(0), 0.5 + 0.5**4 / 4, atol=0.03)
    assert len(np.unique(kept, axis=0)) == 15
    assert (kept_channels(image, 1.0).sum(1) == 1).all() and kept_channels(image, 0.0).all()


def test_a_channel_without_others_is_never_dropped():
    assert kept_channels(jnp.ones((50, 2, 2, 1)), 1.0).all()
    lacking = jnp.ones((50, 2, 2, 3)).at[..., 0].set(0).at[25:, ..., 2].set(0)
    kept = kept_channels(lacking, 0.9)
    assert kept.any(1).all() and kept[25:, 1].all() and not kept[:25].all(0).any()


def test_the_input_alone_lacks_channels(batch):
    batch = {"image": jnp.tile(batch["image"], 4), "label": batch["label"]}
    image, targets = augment(jax.random.key(0), batch, dataclasses.replace(STILL, intensity=0.0, drop_channel=0.5))
    np.testing.assert_array_equal(targets.image, batch["image"])
    there = np.asarray(image).any((1, 2))
    assert 4 <= there.sum() < 16
    np.testing.assert_array_equal(image, np.where(there[:, None, None], batch["image"], 0))


def test_a_pasted_lesion_has_the_brightness_of_its_new_image(batch):
    image = batch["image"].at[3].multiply(0.5)  # the donor of image 0, which has no lesion of its own
    config = AugmentConfig(transplant=1.0, opacity=1.0)
    one, half = (transplant(jax.random.key(0), x, batch["label"], config) for x in (batch["image"], image))
    pasted = half.label[0] != batch["label"][0]
    assert pasted.any()
    np.testing.assert_allclose(half.image[0][pasted], one.image[0][pasted], rtol=0.1)


def test_small_lesions_are_not_pasted(batch):
    config = AugmentConfig(transplant=1.0, least_pasted=0.5)
    np.testing.assert_array_equal(transplant(jax.random.key(0), batch["image"], batch["label"], config).label, batch["label"])


def test_each_key_flips_other_images(batch):
    config = AugmentConfig(flip=0.5, rotation=0.0, scale=0.0)
    flips = []
    for key in range(8):
        moved = random_geometry(jax.random.key(key), batch, config)["image"]
        flips.append(tuple(bool((moved[i] != batch["image"][i]).any()) for i in range(4)))
    assert len(set(flips)) > 3 and 8 <= np.sum(flips) <= 24
