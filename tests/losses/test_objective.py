import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decomp_jax.config import LossWeights, ModelConfig
from decomp_jax.losses.objective import objective
from decomp_jax.models.network import DecompositionNet
from decomp_jax.types import Targets

TINY = ModelConfig(widths=(4, 8), code_dim=4, codebook_size=6, own_blocks=1, spade_width=4, dtype="float32")


@pytest.fixture(scope="module")
def forward():
    model = DecompositionNet(TINY, size=32, channels=1, lesion_classes=3)
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.random((2, 32, 32, 1)), jnp.float32)
    label = jnp.zeros((2, 32, 32), jnp.int32).at[0, 4:12, 4:12].set(3)
    variables = model.init(jax.random.key(0), image, quantised=1.0, train=False)
    return model.apply(variables, image, quantised=1.0, train=False), Targets(image, label, image, label)


def run(forward, weights, **options):
    return objective(*forward, weights, **{"margin": 10.0, "nothing": True} | options)


def test_total_is_the_weighted_sum_of_its_terms(forward):
    weights = LossWeights(codebook_normal=1.0, codebook_abnormal=2.0, discrimination=3.0, generalized_dice=4.0)
    total, terms = run(forward, weights)
    assert set(terms) == {field.name for field in dataclasses.fields(weights)}
    np.testing.assert_allclose(total, sum(getattr(weights, name) * terms[name] for name in terms), rtol=1e-6)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LossWeights)])
def test_weight_0_removes_the_term(forward, name):
    ones = LossWeights(**{field.name: 1.0 for field in dataclasses.fields(LossWeights)})
    total, terms = run(forward, ones)
    less, remaining = run(forward, dataclasses.replace(ones, **{name: 0.0}))
    assert set(terms) - set(remaining) == {name}
    np.testing.assert_allclose(total - less, terms[name], atol=1e-4)


def test_paper_commits_all_cells_of_images_with_a_lesion(forward):
    outputs, targets = forward
    _, terms = run(forward, LossWeights(), nothing=False)
    distance = jnp.sum((outputs.latents.abnormal - outputs.codes.z_q_lesion) ** 2, -1)
    np.testing.assert_allclose(terms["commitment_abnormal"], distance[0].mean() / 2, rtol=1e-5)
