"""Networks for images of twice the size."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from decomp_jax.config import ModelConfig
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training import grow

SMALL = ModelConfig(
    widths=(4, 8, 12), encoder_widening=2, full_resolution_block=True, own_blocks=1, code_dim=8, codebook_size=16,
    spade_width=4, dtype="float32",
)
LARGE = dataclasses.replace(SMALL, widths=(4, 4, 8, 12))


def variables(config: ModelConfig, size: int, seed: int) -> tuple[DecompositionNet, dict]:
    model = DecompositionNet(config, size=size, channels=1, lesion_classes=2)
    return model, model.init(jax.random.key(seed), jnp.zeros((1, size, size, 1)), quantised=1.0, train=False)


@pytest.fixture(scope="module")
def networks() -> tuple[DecompositionNet, dict, dict]:
    """The larger network, what the smaller one learnt, and what the larger one makes of it."""
    _, small = variables(SMALL, 16, 1)
    model, fresh = variables(LARGE, 32, 2)
    small = jax.tree.map(lambda leaf: leaf + 0.01, small)  # so that biases and statistics are told from fresh ones
    return model, small, {name: grow.grown(small[name], fresh[name], 3) for name in small}


def test_only_a_level_more_as_wide_as_the_outermost_grows() -> None:
    assert grow.grows(SMALL, LARGE)
    others = ({"widths": (2, 4, 8, 12)}, {"widths": SMALL.widths}, {"code_dim": 4})
    assert not any(grow.grows(SMALL, dataclasses.replace(LARGE, **other)) for other in others)
    one = dataclasses.replace(SMALL, widths=(4,), own_blocks=0)
    assert not grow.grows(one, dataclasses.replace(one, widths=(4, 4)))
    plain = {"full_resolution_block": False}
    assert not grow.grows(dataclasses.replace(SMALL, **plain), dataclasses.replace(LARGE, **plain))


def test_all_that_was_learnt_is_taken_once(networks) -> None:
    _, small, large = networks
    learnt = [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(small))]
    taken = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(large)]
    assert all(taken.count(leaf) >= learnt.count(leaf) for leaf in learnt)
    first, full = (flatten_dict(tree["params"]["encoder"], sep="/") for tree in (large, small))
    np.testing.assert_array_equal(first["block_0/Conv_0/kernel"], full["full_block/Conv_0/kernel"])
    np.testing.assert_array_equal(first["block_1/Conv_1/kernel"], full["block_0/Conv_1/kernel"])


def test_the_level_between_leaves_its_input_as_it_is(networks) -> None:
    model, _, large = networks
    image = jax.random.uniform(jax.random.key(0), (2, 32, 32, 1))
    _, inside = model.apply(large, image, quantised=1.0, train=False, capture_intermediates=True, mutable="intermediates")
    seen = flatten_dict(inside["intermediates"], sep="/")

    def output(name: str, call: int = 0) -> jax.Array:
        return seen[f"{name}/__call__"][call]

    halves = nn.avg_pool(output("encoder/conv"), (2, 2), (2, 2))
    np.testing.assert_allclose(output("encoder/full_block"), halves, atol=1e-6)
    for up, block, before in (
        ("segmentation_decoder/UpBlock_1", "segmentation_decoder/ResBlock_2", "segmentation_decoder/ResBlock_1"),
        ("image_decoder/up_blocks_1", "image_decoder/res_blocks_2", "image_decoder/res_blocks_1"),
    ):
        doubled = output(before).repeat(2, axis=1).repeat(2, axis=2)
        np.testing.assert_allclose(output(up), doubled, atol=1e-6)
        np.testing.assert_allclose(output(block), doubled, atol=1e-6)
