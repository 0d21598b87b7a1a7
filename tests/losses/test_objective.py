"""The objective as a sum of terms, and each term on targets in which a lesion was pasted into another image."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decomp_jax.config import Config, ObjectiveConfig
from decomp_jax.losses.cells import class_fractions, lesion_cells
from decomp_jax.losses.objective import objective
from decomp_jax.losses.terms import TERMS, Context
from decomp_jax.types import Codes, Latents, Outputs, Targets

ALL = Config().replace({"model.codebook_decay": 0.0, **{f"objective.{name}.weight": 1.0 for name in TERMS}}).objective
CONTEXT = {"valid": jnp.ones(2), "lesion_cell": 0.04, "nothing": True}
SIZE = 32


@pytest.fixture(scope="module")
def targets() -> Targets:
    """A lesion of its own in image 0, whose background shows another one; one pasted into image 1."""
    rng = np.random.default_rng(0)
    image, background = jnp.asarray(rng.random((2, 2, SIZE, SIZE, 1)), jnp.float32)
    label = np.zeros((2, SIZE, SIZE), np.int32)
    label[0, 4:12, 4:12], label[1, 16:28, 16:24] = 3, 1
    background_label = np.zeros_like(label)
    background_label[0, 20:30, 2:9] = 2
    return Targets(image, jnp.asarray(label), background, jnp.asarray(background_label))


@pytest.fixture(scope="module")
def outputs() -> Outputs:
    """Random ones: of a grid of 8 x 8 cells and codes of 8 numbers."""
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    z_q = normal(6, 2, 8, 8, 8)
    indices = jnp.zeros((2, 8, 8), jnp.int32)
    return Outputs(
        Latents(normal(2, 8, 8, 8), normal(2, 8, 8, 8)),
        Codes(indices, indices, indices, *z_q[:5]),
        normal(2, SIZE, SIZE, 4), normal(2, SIZE, SIZE, 1), normal(2, SIZE, SIZE, 1),
    )


def value(name: str, outputs: Outputs, targets: Targets, **options) -> np.ndarray:
    return np.asarray(TERMS[name](Context(outputs, targets, **CONTEXT | options), getattr(ALL, name)))


def test_total_is_the_weighted_sum_of_its_terms(outputs, targets):
    weights = {name: float(i + 1) for i, name in enumerate(TERMS)}
    config = Config().replace(
        {"model.codebook_decay": 0.0, **{f"objective.{name}.weight": weight for name, weight in weights.items()}}
    )
    total, terms = objective(outputs, targets, config.objective, nothing=True)
    assert set(terms) == set(TERMS)
    np.testing.assert_allclose(total, sum(weights[name] * terms[name] for name in terms), rtol=1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_weight_0_removes_the_term(outputs, targets, name):
    total, terms = objective(outputs, targets, ALL, nothing=True)
    without = dataclasses.replace(ALL, **{name: dataclasses.replace(getattr(ALL, name), weight=0.0)})
    less, remaining = objective(outputs, targets, without, nothing=True)
    assert set(terms) - set(remaining) == {name}
    np.testing.assert_allclose(total - less, terms[name], atol=1e-3)


@pytest.mark.parametrize("name", TERMS)
def test_the_value_of_each_image_counts_once(outputs, targets, name):
    """Images that fill up a batch change nothing."""
    _, terms = objective(outputs, targets, ALL, nothing=True)
    padded_outputs, padded_targets = (
        jax.tree.map(lambda x: jnp.concatenate([x, x[:1], x[:1]]), tree) for tree in (outputs, targets)
    )
    _, padded = objective(padded_outputs, padded_targets, ALL, nothing=True, valid=jnp.array([True, True, False, False]))
    np.testing.assert_allclose(padded[name], terms[name], rtol=1e-5)


# What each term does not look at: it must not change when that does.
BLIND = {
    "commitment_normal": ("label", "image", "background", "background_label"),
    "commitment_abnormal": ("image", "background", "background_label"),
    "nothing": ("image", "background", "background_label"),
    "layout": ("image", "background", "background_label"),
    "structure": ("image",),
    "discrimination": ("image", "background", "background_label"),
    "generalized_dice": ("image", "background", "background_label"),
    "soft_dice": ("image", "background", "background_label"),
    "cross_entropy": ("image", "background", "background_label"),
    "reconstruction_minus": ("image", "label"),
    "reconstruction_plus": ("background", "background_label"),
    "residual": ("image", "background", "background_label"),
}


@pytest.mark.parametrize("name", BLIND)
def test_each_term_looks_at_its_own_targets(outputs, targets, name):
    before = value(name, outputs, targets)
    for field in ("image", "label", "background", "background_label"):
        changed = jnp.roll(getattr(targets, field), 5, 1)
        changed = changed.at[:, :, :8].set(1) if field.endswith("label") else changed
        after = value(name, outputs, dataclasses.replace(targets, **{field: changed}))
        # Equation 3 asks whether there is a lesion, not where; here both images have one.
        same = field in BLIND[name] or name == "discrimination"
        assert np.allclose(before, after) == same, field


def test_x_minus_is_held_to_the_image_under_the_pasted_lesion(outputs, targets):
    perfect = dataclasses.replace(outputs, x_minus=targets.background, x_plus=targets.image)
    np.testing.assert_allclose(value("reconstruction_minus", perfect, targets), 0, atol=1e-6)
    np.testing.assert_allclose(value("reconstruction_plus", perfect, targets), 0, atol=1e-6)
    inside = targets.background_label[..., None] > 0
    elsewhere = dataclasses.replace(perfect, x_minus=jnp.where(inside, 0.5, targets.background))
    np.testing.assert_allclose(value("reconstruction_minus", elsewhere, targets), 0, atol=1e-6)


def test_paintings_may_differ_in_the_lesion_alone(outputs, targets):
    lesion = targets.label[..., None] > 0
    x_plus = jnp.where(lesion, outputs.x_minus + 1, outputs.x_minus)
    np.testing.assert_allclose(value("residual", dataclasses.replace(outputs, x_plus=x_plus), targets), 0, atol=1e-6)
    x_plus = jnp.where(lesion, outputs.x_minus, outputs.x_minus + 1)
    share = 1 - np.asarray(lesion).mean((1, 2, 3))
    np.testing.assert_allclose(value("residual", dataclasses.replace(outputs, x_plus=x_plus), targets), share, rtol=1e-5)


def test_discrimination_concerns_images_without_a_lesion(outputs, targets):
    one = dataclasses.replace(targets, label=targets.label.at[0].set(0))
    close = dataclasses.replace(outputs, codes=dataclasses.replace(outputs.codes, z_q_lesion=outputs.latents.abnormal))
    np.testing.assert_allclose(value("discrimination", close, one), [10, 0], rtol=1e-6)


def test_structure_weighs_what_a_pasted_lesion_hides(outputs, targets):
    settings = dataclasses.replace(ALL.structure, pasted=1.0)
    context = Context(outputs, targets, **CONTEXT)
    once, five = (np.asarray(TERMS["structure"](context, s)) for s in (settings, ALL.structure))
    assert (five > once).all()
    bare = dataclasses.replace(targets, label=targets.background_label)
    once, five = (np.asarray(TERMS["structure"](Context(outputs, bare, **CONTEXT), s)) for s in (settings, ALL.structure))
    np.testing.assert_allclose(five, once, rtol=1e-6)  # a lesion that is in the background, too, is left out


def test_without_a_nothing_code_all_cells_of_images_with_a_lesion_are_committed(outputs, targets):
    one = dataclasses.replace(targets, label=targets.label.at[1].set(0))
    distance = jnp.sum((outputs.latents.abnormal - outputs.codes.z_q_lesion) ** 2, -1)
    found = value("commitment_abnormal", outputs, one, nothing=False)
    np.testing.assert_allclose(found, [distance[0].mean(), 0], rtol=1e-5)


@pytest.mark.parametrize("size", [64, 256])
def test_a_lesion_cell_is_a_share_of_the_cell_at_every_size(size):
    """A lesion of 5 % of a cell makes a lesion cell, one of 3 % does not."""
    cell = size // 8
    label = np.zeros((1, size, size), np.int32)
    for row, share in ((0, 0.05), (1, 0.03)):
        block = np.zeros(cell**2, np.int32)
        block[: round(share * cell**2)] = 1
        label[0, row * cell : (row + 1) * cell, :cell] = block.reshape(cell, cell)
    fraction = class_fractions(jax.nn.one_hot(label, 2), 8).sum(-1)
    cells = np.asarray(lesion_cells(fraction, ObjectiveConfig().lesion_cell, nothing=True))
    assert cells[0, 0, 0] and cells.sum() == 1
