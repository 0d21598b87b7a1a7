"""Each term against hand-worked values or another's implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from sklearn.metrics import log_loss

from decomp_jax.losses import image, latent, segmentation


@pytest.fixture
def cells():
    z_e = jnp.array([[[[3.0, 4.0], [0.0, 0.0]]], [[[1.0, 0.0], [0.0, 2.0]]]])  # [2,1,2,2], squared norms 25 0 1 4
    return z_e, jnp.zeros_like(z_e)


def test_commitment_is_the_mean_squared_norm_over_cells(cells):
    z_e, z_q = cells
    np.testing.assert_allclose(latent.commitment_loss(z_e, z_q, jnp.ones((2, 1, 2))), [12.5, 2.5])
    np.testing.assert_allclose(latent.commitment_loss(z_e, z_q, jnp.array([[[0.0, 1]], [[1, 0]]])), [0.0, 0.5])


def test_codebook_and_commitment_pull_on_opposite_sides(cells):
    z_e, z_q = cells
    ones = jnp.ones((2, 1, 2))
    of = lambda loss: jax.grad(lambda a, b: loss(a, b, ones).sum(), argnums=(0, 1))(z_e, z_q + 1)
    on_encoder, on_codes = of(latent.commitment_loss)
    assert jnp.abs(on_encoder).sum() > 0 and jnp.abs(on_codes).sum() == 0
    on_encoder, on_codes = of(latent.codebook_loss)
    assert jnp.abs(on_encoder).sum() == 0 and jnp.abs(on_codes).sum() > 0


def test_nothing_counts_lesion_free_cells_only(cells):
    z_e, _ = cells
    fraction = jnp.array([[[0.5, 0.0]], [[0.0, 0.0]]])
    np.testing.assert_allclose(latent.nothing_loss(z_e, fraction), [0.0, 2.5])


def test_layout_by_hand(cells):
    z_e, _ = cells
    shares = jnp.full((2, 1, 2, 1), 0.25).at[:, :, 1].set(0.0)
    z_e = jnp.pad(z_e, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=2.0)  # should be 4 3 0; is 3 4 2 and 1 0 2
    target = latent.layout_target(shares, 3, scale=10.0, whole=0.64)
    loss = latent.layout_loss(z_e, target, shares.sum(-1))
    np.testing.assert_allclose(loss, [(1 + 1 + 4) / 2, (9 + 9 + 4) / 2], rtol=1e-6)


def test_structure_by_hand(cells):
    z_e, _ = cells
    structure = jnp.array([[[[1.0, 2.0], [0.0, 1.0]]], [[[0.5, 0.0], [1.0, 1.0]]]])  # times 2: squared errors 1 0 0 4, 0 0 4 0
    weight = jnp.array([[[[1.0, 1.0], [1.0, 0.5]]], [[[1.0, 1.0], [0.25, 1.0]]]])
    np.testing.assert_allclose(latent.structure_loss(z_e, structure, weight, scale=2.0), [3 / 2, 1 / 2])


def test_discrimination_by_hand(cells):
    z_e, z_q = cells
    loss = latent.discrimination_loss(z_e, z_q, margin=10.0, is_normal=jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(loss, [0.0, 7.5])
    assert latent.discrimination_loss(z_e, z_q, margin=10.0, is_normal=jnp.zeros(2)).sum() == 0


@pytest.fixture
def segmented():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    label = rng.integers(0, 4, (2, 8, 8))
    return jnp.asarray(logits), label, jax.nn.one_hot(label, 4)


def test_cross_entropy_equals_scikit_learn(segmented):
    logits, label, onehot = segmented
    probs = scipy.special.softmax(np.asarray(logits, np.float64), -1)
    expected = [log_loss(y.ravel(), p.reshape(-1, 4), labels=range(4)) for y, p in zip(label, probs)]
    np.testing.assert_allclose(segmentation.cross_entropy(logits, onehot), expected, rtol=1e-5)


def test_generalized_dice_by_hand():
    label = np.zeros((1, 2, 4), int)
    label[0, 0] = [1, 1, 2, 0]
    onehot = jax.nn.one_hot(label, 4)
    probs = jnp.full((1, 2, 4, 4), 0.25)
    # class 1: n=2, w=1/4, intersection .5, sizes 2+2; class 2: n=1, w=1, .25, 2+1; class 3 is absent: weight 0
    expected = 1 - 2 * (0.5 / 4 + 0.25) / (4 / 4 + 3)
    np.testing.assert_allclose(segmentation.generalized_dice(probs, onehot, jnp.ones(1)).mean(), expected, rtol=1e-5)


@pytest.mark.parametrize("repeats", [1, 1 << 20])
def test_generalized_dice_of_the_truth_is_0_however_large_the_lesion(repeats):
    """As in a batch of thousands of images: the constant that keeps the quotient finite is small beside it."""
    onehot = jnp.zeros((1, 8, 8, 4)).at[..., 1].set(float(repeats))
    np.testing.assert_allclose(segmentation.generalized_dice(onehot / repeats, onehot, jnp.ones(1)), 1 - 2 * repeats / (1 + repeats), atol=1e-4)


def test_soft_dice_of_hard_masks_is_one_minus_f1(segmented):
    from sklearn.metrics import f1_score

    logits, label, onehot = segmented
    predicted = np.asarray(logits.argmax(-1))
    expected = 1 - f1_score(label.ravel(), predicted.ravel(), labels=[1, 2, 3], average="macro")
    dice = segmentation.soft_dice(jax.nn.one_hot(predicted, 4), onehot, jnp.ones(2))
    np.testing.assert_allclose(dice.mean(), expected, rtol=1e-5)


@pytest.mark.parametrize("label", [0, 2])
@pytest.mark.parametrize("loss", [segmentation.generalized_dice, segmentation.soft_dice])
def test_dice_gradients_are_finite_on_constant_labels(loss, label):
    onehot = jax.nn.one_hot(jnp.full((2, 8, 8), label), 4)
    gradient = jax.grad(lambda logits: loss(jax.nn.softmax(logits), onehot, jnp.ones(2)).sum())(jnp.zeros((2, 8, 8, 4)))
    assert jnp.isfinite(gradient).all()


@pytest.fixture
def painted():
    rng = np.random.default_rng(2)
    a, b = rng.random((2, 2, 16, 16, 1)).astype(np.float32)
    mask = np.zeros((2, 16, 16, 1), np.float32)
    mask[0, 4:12, 4:12] = 1
    return jnp.asarray(a), jnp.asarray(b), jnp.asarray(mask)


def test_pixel_terms_equal_numpy(painted):
    a, b, mask = (np.asarray(x, np.float64) for x in painted)
    np.testing.assert_allclose(image.masked_l2(*painted, "mean"), (mask * (a - b) ** 2).mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(image.residual_l1(*painted), (mask * abs(a - b)).mean((1, 2, 3)), rtol=1e-5)


def test_terms_vanish_on_equal_images_and_empty_masks(painted):
    a, b, mask = painted
    np.testing.assert_allclose(image.reconstruction_plus(a, a, mask), 0, atol=1e-6)
    np.testing.assert_allclose(image.reconstruction_minus(a, b, jnp.zeros_like(mask)), 0, atol=1e-6)
    assert (image.reconstruction_minus(a, b, 1 - mask) > 0).all()


def test_plus_counts_the_lesion_twice(painted):
    a, b, mask = painted
    whole, inside = (image.masked_l2(a, b, m, "mean") + image.masked_dssim(a, b, m) for m in (jnp.ones_like(mask), mask))
    np.testing.assert_allclose(image.reconstruction_plus(a, b, mask), whole + inside, rtol=1e-6)


@pytest.mark.parametrize("fill", [0.0, 1.0])
@pytest.mark.parametrize("loss", [image.reconstruction_minus, image.reconstruction_plus, image.residual_l1])
def test_image_gradients_are_finite_on_empty_and_full_masks(painted, loss, fill):
    a, b, mask = painted
    gradient = jax.grad(lambda x: loss(x, b, jnp.full_like(mask, fill)).sum())(a)
    assert jnp.isfinite(gradient).all()
