"""Tables A.1 and A.2 shape by shape, and the savings that must not change what is computed."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy.cluster.vq import vq as scipy_vq

from decomp_jax.config import ModelConfig
from decomp_jax.models import convolution
from decomp_jax.models.blocks import BatchNorm
from decomp_jax.models.convolution import fold_rows, unfold_rows
from decomp_jax.models.network import DecompositionNet
from decomp_jax.models.spade import masked_logits, resize_nearest

PAPER = ModelConfig(own_blocks=0, dtype="float32")
SMALL = ModelConfig(widths=(4, 8), code_dim=4, codebook_size=6, own_blocks=1, spade_width=4, dtype="float32")
TABLE_A1 = [(32, 256), (64, 128), (128, 64), (256, 32), (512, 16)]  # channels, size before the average pool, which is one with the convolution before it
TABLE_A2 = [(512, 8), (256, 16), (128, 32), (64, 64), (32, 128), (16, 256)]


def build(config: ModelConfig, size: int, **options) -> DecompositionNet:
    return DecompositionNet(config, size=size, **{"channels": 1, "lesion_classes": 3} | options)


@pytest.fixture(scope="module")
def paper_shapes():
    """Parameters and the output shape of every module, without computing anything."""
    model = build(PAPER, 256)
    image = jnp.zeros((2, 256, 256, 1))

    def outputs(key):
        return model.init_with_output(
            key, image, quantised=1.0, train=False, capture_intermediates=True, mutable=True
        )

    result, variables = jax.eval_shape(outputs, jax.random.key(0))
    return result, variables


def shape_of(variables, *path):
    node = variables["intermediates"]
    for name in path:
        node = node[name]
    return node["__call__"][0].shape


def test_encoder_follows_table_a1(paper_shapes):
    outputs, variables = paper_shapes
    for name, (channels, size) in zip(("conv", "block_0", "block_1", "block_2", "block_3"), TABLE_A1, strict=True):
        assert shape_of(variables, "encoder", name) == (2, size // 2, size // 2, channels)
    assert outputs.latents.normal.shape == outputs.latents.abnormal.shape == (2, 8, 8, 64)


def test_decoders_follow_table_a2(paper_shapes):
    outputs, variables = paper_shapes
    for decoder, block in (("segmentation_decoder", "ResBlock"), ("image_decoder", "res_blocks")):
        for i, (channels, size) in enumerate(TABLE_A2[1:]):
            assert shape_of(variables, decoder, f"{block}_{i}") == (2, size, size, channels)
    assert outputs.seg_logits.shape == (2, 256, 256, 4)
    assert outputs.x_plus.shape == outputs.x_minus.shape == (2, 256, 256, 1)


def test_codebooks_are_512_by_64(paper_shapes):
    _, variables = paper_shapes
    assert variables["params"]["normal_codebook"].shape == variables["params"]["abnormal_codebook"].shape == (512, 64)


def test_parameter_counts(paper_shapes):
    """5.5 M encoder, 5.8 M each decoder, 2.0 M SPADE at width min(128, C)."""
    _, variables = paper_shapes
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    count = lambda name: sum(leaf.size for path, leaf in leaves if name in jax.tree_util.keystr(path)) / 1e6
    assert round(count("encoder"), 1) == 5.5
    assert round(count("segmentation_decoder"), 1) == 5.8
    assert round(count("Spade"), 1) == 2.0
    assert round(count("image_decoder") - count("Spade"), 1) == 5.8


@pytest.mark.parametrize("widths, size", [((8, 8, 8), 64), ((4, 4, 8, 8), 128), ((4, 4, 4, 8, 8), 256)])
def test_depth_and_widths_follow_the_config(widths, size):
    model = build(dataclasses.replace(SMALL, widths=widths), size, channels=2, lesion_classes=1)
    image = jnp.zeros((1, size, size, 2))
    outputs = jax.eval_shape(
        lambda key: model.init_with_output(key, image, quantised=1.0, train=False)[0], jax.random.key(0)
    )
    assert model.grid == 8 and outputs.codes.normal_indices.shape == (1, 8, 8)
    assert outputs.seg_logits.shape == (1, size, size, 2) and outputs.x_minus.shape == image.shape


def test_only_the_encoder_is_widened_and_looks_at_full_resolution():
    """Twice the channels are four times the weights; the decoders stay as they are."""

    def sizes(**options):
        model = build(dataclasses.replace(SMALL, **options), 32)
        image = jnp.zeros((1, 32, 32, 1))
        params = jax.eval_shape(
            lambda key: model.init(key, image, quantised=1.0, train=False)["params"], jax.random.key(0)
        )
        return {
            name: {"/".join(path): leaf.size for path, leaf in flatten_dict(part).items()}
            for name, part in params.items() if isinstance(part, dict)
        }

    plain, wide = sizes(), sizes(encoder_widening=2, full_resolution_block=True)
    for decoder in ("segmentation_decoder", "image_decoder"):
        assert wide[decoder] == plain[decoder]
    name = "abnormal_block_0/Conv_1/kernel"
    assert wide["encoder"][name] == 4 * plain["encoder"][name]
    assert wide["encoder"]["full_block/Conv_0/kernel"] == 9 * 8 * 8
    assert not any(name.startswith("full_block") for name in plain["encoder"])


@pytest.fixture(scope="module")
def small():
    model = build(SMALL, 32)
    image = jnp.asarray(np.random.default_rng(0).random((3, 32, 32, 1)), jnp.float32)
    variables = jax.jit(functools.partial(model.init, quantised=1.0, train=False))(jax.random.key(0), image)
    return model, variables, image


def test_null_condition_of_batch_1_equals_zeros_for_every_image(small):
    model, variables, image = small
    normal = model.apply(variables, image, train=False, method="encode").normal
    background = jnp.zeros((3, 32, 32, 4)).at[..., 0].set(1.0)
    by_zeros = model.apply(variables, normal, background, train=False, method="render")
    by_null = model.apply(variables, normal, None, train=False, method="render")
    np.testing.assert_allclose(by_null, by_zeros, atol=1e-6)


def test_shared_stem_equals_two_renderings(small):
    model, variables, image = small
    outputs = model.apply(variables, image, quantised=1.0, train=False)
    codes = outputs.codes
    for painted, logits in ((outputs.x_plus, outputs.seg_logits), (outputs.x_minus, None)):
        alone = model.apply(variables, codes.z_q_normal, logits, train=False, method="render")
        np.testing.assert_allclose(painted, alone, atol=1e-5)


def test_warm_up_passes_latents_unquantised(small):
    model, variables, image = small
    outputs = model.apply(variables, image, quantised=0.0, train=False)
    logits = model.apply(variables, outputs.latents.abnormal, train=False, method="segment")
    np.testing.assert_allclose(outputs.seg_logits, logits, atol=1e-5)


def test_cells_without_a_finding_take_the_nothing_code(small):
    model, variables, image = small
    latents = model.apply(variables, image, train=False, method="encode")
    norms = jnp.sum(latents.abnormal**2, -1)
    threshold = float(jnp.median(norms))
    cautious = build(dataclasses.replace(SMALL, nothing_threshold=threshold), 32)
    codes = cautious.apply(variables, latents, method="quantize")
    found = norms > threshold
    np.testing.assert_array_equal(codes.abnormal_indices > 0, found)
    assert (codes.z_q_abnormal[~found] == 0).all() and (codes.lesion_indices > 0).all()
    np.testing.assert_array_equal(codes.abnormal_indices[found], codes.lesion_indices[found])
    _, codebook = cautious.apply(variables, method="codebooks")
    expected, _ = scipy_vq(np.asarray(latents.abnormal).reshape(-1, 4), np.asarray(codebook[1:]))
    np.testing.assert_array_equal(codes.lesion_indices.reshape(-1), 1 + expected)


def test_spade_stop_gradient_keeps_the_image_loss_from_the_segmentation(small):
    _, variables, image = small

    def gradient(stop: bool) -> float:
        model = build(dataclasses.replace(SMALL, spade_stop_gradient=stop, nothing_threshold=0.0), 32)
        shifted = jax.tree_util.tree_map_with_path(
            lambda path, x: x + 1 if "segmentation_decoder" in str(path) and "'conv'" in str(path) else x,
            variables["params"],
        )

        def loss(params):
            outputs, _ = model.apply(
                {**variables, "params": params}, image, quantised=1.0, train=True, mutable=["batch_stats"]
            )
            return (outputs.x_plus**2).sum()

        gradients = jax.jit(jax.grad(loss))(shifted)["segmentation_decoder"]
        return sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(gradients))

    assert gradient(stop=True) == 0 and gradient(stop=False) > 0


def test_masked_logits_show_the_winning_lesion_class_only():
    logits = jnp.array([[[[2.0, 1, 0, 0], [0, 3, 4, 1]]]])
    np.testing.assert_array_equal(masked_logits(logits), [[[[0, 0, 0], [0, 4, 0]]]])


def test_resize_nearest_takes_every_nth_pixel():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(resize_nearest(x, 2)[0, ..., 0], [[5, 7], [13, 15]])
    np.testing.assert_array_equal(resize_nearest(x, 4), x)


def test_batch_statistics_do_not_change_outside_training(small):
    model, variables, image = small
    _, updates = model.apply(variables, image, quantised=1.0, train=False, mutable=["batch_stats"])
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), updates["batch_stats"], variables["batch_stats"]))


@pytest.mark.parametrize("options", [{}, {"encoder_widening": 2, "full_resolution_block": True}])
def test_rows_folded_as_on_tpus_change_nothing(monkeypatch, options):
    """Parameters, outputs, statistics and gradients of a network whose levels fold by 8, 4 and 2 rows, and by none."""
    config = dataclasses.replace(SMALL, widths=(4, 8, 16), nothing_threshold=0.0, **options)
    model = build(config, 64, channels=2)
    image = jax.random.normal(jax.random.key(1), (3, 64, 64, 2))

    def everything():
        variables = model.init(jax.random.key(0), image, quantised=1.0, train=False)

        def loss(params):
            outputs, updates = model.apply(
                {**variables, "params": params}, image, quantised=0.0, train=True, mutable=["batch_stats"]
            )
            seen = (outputs.latents.normal, outputs.seg_logits, outputs.x_plus, outputs.x_minus)
            return sum((values**2).mean() for values in seen), (outputs.latents, *seen, updates)

        gradients, rest = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
        return variables, gradients, rest

    expected = everything()
    monkeypatch.setattr(convolution, "LANES", {"cpu": 16})
    folded = everything()
    for ours, theirs in zip(jax.tree.leaves(folded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_batch_norm_is_flaxs():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 6, 8, 5))
    theirs = nn.BatchNorm(momentum=0.9)
    for fold in (1, 4):
        ours = BatchNorm(jnp.dtype("float32"), 0.9, fold)
        rows = fold_rows(x, fold)
        variables = ours.init(jax.random.key(0), rows, train=False)
        trained = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.arange(5), variables)
        inner = {kind: tree["BatchNorm_0"] for kind, tree in trained.items()}
        for train in (True, False):
            found, updates = ours.apply(trained, rows, train=train, mutable=["batch_stats"])
            expected, expected_updates = theirs.apply(inner, x, use_running_average=not train, mutable=["batch_stats"])
            np.testing.assert_allclose(unfold_rows(found, fold), expected, rtol=1e-5, atol=1e-5)
            for name, value in expected_updates["batch_stats"].items():
                np.testing.assert_allclose(updates["batch_stats"]["BatchNorm_0"][name], value, rtol=1e-5)
