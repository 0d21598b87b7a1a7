import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decomp_jax.models.convolution import convolve, convolve_and_pool, upsample_and_convolve


def by_xla(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pooled_by_xla(x, kernel):
    return nn.avg_pool(by_xla(x, kernel), (2, 2), (2, 2))


def upsampled_by_xla(x, kernel):
    return by_xla(x.repeat(2, 1).repeat(2, 2), kernel)


ORACLES = {convolve: by_xla, convolve_and_pool: pooled_by_xla, upsample_and_convolve: upsampled_by_xla}


@pytest.mark.parametrize("convolution", ORACLES, ids=lambda convolution: convolution.__name__)
@pytest.mark.parametrize("size,inputs,outputs", [(1, 4, 8), (3, 8, 8), (3, 3, 16), (5, 8, 4), (5, 1, 8), (3, 16, 40)])
def test_equal_to_its_definition(convolution, size, inputs, outputs):
    """Values and both gradients; the last is too wide to be folded."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 12, 32, inputs)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, inputs, outputs)), jnp.float32)
    expected, backward = jax.vjp(ORACLES[convolution], x, kernel)
    found, our_backward = jax.vjp(convolution, x, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    weight = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    for ours, theirs in zip(our_backward(weight), backward(weight), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_width_that_no_fold_divides():
    x, kernel = jnp.ones((1, 6, 7, 8)), jnp.ones((3, 3, 8, 8))
    assert convolve(x, kernel)[0, 3, 3, 0] == 72


@pytest.mark.parametrize("convolution", ORACLES, ids=lambda convolution: convolution.__name__)
@pytest.mark.parametrize(
    "option", [{"strides": (2, 2)}, {"padding": "VALID"}, {"kernel_dilation": 2}, {"precision": jax.lax.Precision.HIGHEST}]
)
def test_what_would_not_be_heeded_is_refused(convolution, option):
    module = nn.Conv(4, (3, 3), conv_general_dilated=convolution, **option)
    with pytest.raises(ValueError, match="heeds none of"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 4)))
