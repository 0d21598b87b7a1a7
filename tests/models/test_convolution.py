"""Our convolutions beside XLA's own of what they are by definition."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decomp_jax.models import convolution as module
from decomp_jax.models.convolution import (
    average_pool, convolve, convolve_and_pool, fold_of, fold_rows, per_channel, unfold_rows, upsample_and_convolve,
)


def by_xla(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pooled_by_xla(x, kernel):
    return nn.avg_pool(by_xla(x, kernel), (2, 2), (2, 2))


def upsampled_by_xla(x, kernel):
    return by_xla(x.repeat(2, 1).repeat(2, 2), kernel)


# And the fold of rows before and after, where that at the higher resolution is 4.
ORACLES = {
    convolve: (by_xla, 4, 4), convolve_and_pool: (pooled_by_xla, 4, 2), upsample_and_convolve: (upsampled_by_xla, 2, 4),
}


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("fold", [1, 4])
@pytest.mark.parametrize("convolution", ORACLES, ids=lambda convolution: convolution.__name__)
@pytest.mark.parametrize("size,inputs,outputs", [(1, 4, 8), (3, 8, 8), (3, 3, 16), (5, 8, 4), (5, 1, 8), (3, 16, 40)])
def test_equal_to_its_definition(convolution, size, inputs, outputs, fold):
    """Values and both gradients; the last is too wide to be folded of itself."""
    oracle, before, after = ORACLES[convolution]

    def ours(x, kernel):
        if fold == 1:
            return convolution(x, kernel)
        return unfold_rows(convolution(fold_rows(x, before), kernel, fold), after)

    x, kernel = random(2, 12, 32, inputs), random(size, size, inputs, outputs)
    expected, backward = jax.vjp(oracle, x, kernel)
    found, our_backward = jax.vjp(ours, x, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    weight = random(*expected.shape)
    for ours, theirs in zip(our_backward(weight), backward(weight), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_width_that_no_fold_divides():
    x, kernel = jnp.ones((1, 6, 7, 8)), jnp.ones((3, 3, 8, 8))
    assert convolve(x, kernel)[0, 3, 3, 0] == 72


def test_parts_lie_side_by_side():
    """And values of channels beside them."""
    x, kernel = random(1, 4, 8, 3), random(3, 3, 3, 10)
    values = jnp.arange(10.0)
    result = convolve(fold_rows(x, 4), kernel, 4, 2) + per_channel(values, 4, 2)
    for part, outputs in zip(jnp.split(result, 2, axis=-1), (slice(5), slice(5, 10)), strict=True):
        expected = by_xla(x, kernel[..., outputs]) + values[outputs]
        np.testing.assert_allclose(unfold_rows(part, 4), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fold, after", [(1, 1), (2, 1), (4, 2)])
def test_average_pool(fold, after):
    x = random(2, 6, 16, 5)
    found = unfold_rows(average_pool(fold_rows(x, fold), fold), after)
    np.testing.assert_allclose(found, nn.avg_pool(x, (2, 2), (2, 2)), rtol=1e-5, atol=1e-6)


def test_rows_are_folded_as_far_as_lanes_and_width_go(monkeypatch):
    assert fold_of(16, 256) == 1
    monkeypatch.setattr(module, "LANES", {"cpu": 128})
    assert [fold_of(features, 256) for features in (1, 16, 24, 32, 100, 512)] == [128, 8, 4, 4, 1, 1]
    assert fold_of(16, 36) == 4
