import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decomp_jax.models.convolution import convolve


@pytest.mark.parametrize("size,inputs,outputs", [(3, 8, 8), (3, 3, 16), (5, 8, 4), (5, 1, 8), (3, 16, 40)])
def test_narrow_convolutions_equal_xla(size, inputs, outputs):
    """Values and both gradients; the last is too wide to be folded."""
    rng = np.random.default_rng(0)
    x, kernel, weight = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 12, 32, inputs), (size, size, inputs, outputs), (2, 12, 32, outputs))
    )

    def oracle(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def gradients(convolution):
        return jax.grad(lambda x, kernel: (weight * convolution(x, kernel)).sum(), (0, 1))(x, kernel)

    np.testing.assert_allclose(convolve(x, kernel), oracle(x, kernel), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients(convolve), gradients(oracle)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_width_that_no_fold_divides():
    x, kernel = jnp.ones((1, 6, 7, 8)), jnp.ones((3, 3, 8, 8))
    assert convolve(x, kernel)[0, 3, 3, 0] == 72
