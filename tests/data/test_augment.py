import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from decomp_jax.config import AugmentConfig
from decomp_jax.data.augment import augment, random_geometry, random_intensity, transplant

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
    config = AugmentConfig(flip=0.0, rotation=30.0, scale=0.0)
    key = jax.random.key(5)
    moved = random_geometry(key, batch, config)
    angle_key = jax.random.split(key, 3)[1]
    angles = 30.0 * jax.random.uniform(angle_key, (4,), minval=-1.0)
    for i, angle in enumerate(np.asarray(angles)):
        expected = ndimage.rotate(np.asarray(batch["image"][i, ..., 0]), -angle, reshape=False, order=1)
        np.testing.assert_allclose(moved["image"][i, ..., 0], expected, atol=1e-4)


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
