"""A tiny network of random parameters, in use."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest

from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.inference.decomposer import Decomposer
from tests.inference.networks import CONFIG, random_network

SETTINGS = Settings(source="phantom", size=16)


class Images(NamedTuple):
    """Stands in for a data set or a scan."""

    settings: Settings

    def with_modalities(self, names: tuple[str, ...]) -> "Images":
        return Images(dataclasses.replace(self.settings, modalities=names))


@pytest.fixture(scope="module")
def decomposer() -> Decomposer:
    return random_network(SETTINGS)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).random((3, 16, 16, 1)).astype(np.float32)


def test_abnormality_is_that_of_the_most_abnormal_cell(decomposer, images):
    output = decomposer.decompose(images)
    norms = (output.z_e_abnormal**2).sum(-1).reshape(3, -1)
    np.testing.assert_allclose(output.abnormality, norms.max(1), rtol=1e-5)


def test_vectors_of_an_image_in_which_no_cell_is_abnormal_are_0(decomposer, images):
    plain = decomposer.decompose(images)
    threshold = float(np.sort(plain.abnormality)[:2].mean())
    config = CONFIG.replace({"model.nothing_threshold": threshold})
    output = Decomposer(decomposer._variables, config, SETTINGS, data_digest="", step=1).decompose(images)
    empty = plain.abnormality <= threshold
    assert empty.sum() == 1 and (output.abnormal_indices[empty] == 0).all()
    np.testing.assert_array_equal(output.z_e_abnormal, np.where(empty[:, None, None, None], 0, plain.z_e_abnormal))
    np.testing.assert_allclose(output.abnormality, plain.abnormality, rtol=1e-6)


def test_codes_are_the_nearest_and_the_same_by_either_way(decomposer, images):
    codes, output = decomposer.encode(images), decomposer.decompose(images)
    for path in ("normal", "abnormal"):
        indices = getattr(codes, f"{path}_indices")
        np.testing.assert_array_equal(indices, getattr(output, f"{path}_indices"))
        book, z_e = getattr(decomposer, f"{path}_codebook"), getattr(output, f"z_e_{path}")
        distances = ((z_e[..., None, :] - book) ** 2).sum(-1)
        nothing = (z_e**2).sum(-1) <= CONFIG.model.nothing_threshold
        if path == "abnormal":
            distances[..., 0] = np.where(nothing, -1, np.inf)
        np.testing.assert_array_equal(indices, distances.argmin(-1))


def test_painting_the_codes_of_an_image_gives_its_x_plus(decomposer, images):
    output = decomposer.decompose(images)
    painted = decomposer.paint(output.normal_indices, output.abnormal_indices)
    np.testing.assert_allclose(painted, output.x_plus, rtol=1e-3, atol=1e-3)
    decoded = decomposer.decode(output.normal_indices, output.abnormal_indices)
    for name in ("x_plus", "x_minus", "segmentation"):
        np.testing.assert_allclose(getattr(decoded, name), getattr(output, name), rtol=1e-3, atol=1e-3)
    other = decomposer.paint(output.normal_indices[::-1], output.abnormal_indices)
    assert not np.allclose(other, output.x_plus, atol=1e-3)


@pytest.mark.parametrize("change, says", [
    ({"size": 32}, "data: prepared with size=32, the network was trained on 16"),
    ({"modalities": ("t1",)}, "modalities"), ({"field_mm": 400.0}, "field_mm=400.0"), ({"plane": "coronal"}, "plane"),
    ({"foreground": "window"}, "foreground=window"), ({"intensity_clip": (-100.0, 250.0)}, "intensity_clip="),
])
def test_images_prepared_otherwise_are_refused(decomposer, change, says):
    same = Images(SETTINGS)
    assert decomposer.take_images(same, "data") is same
    with pytest.raises(UserError, match=says):
        decomposer.take_images(Images(dataclasses.replace(SETTINGS, **change)), "data")


def test_modalities_may_be_missing_where_training_dropped_some(capsys):
    settings = dataclasses.replace(SETTINGS, modalities=("t1ce", "t1", "flair"))
    some = Images(dataclasses.replace(SETTINGS, modalities=("flair", "t1ce")))
    with pytest.raises(UserError, match=r"data: prepared with modalities.*train with --config.augment.drop_channel"):
        random_network(settings).take_images(some, "data")
    network = random_network(settings, {"augment.drop_channel": 0.4})
    assert network.take_images(some, "data").settings == settings
    assert network.take_images(some, "data").settings == settings
    assert capsys.readouterr().err == "data: has flair, t1ce alone; t1 of the network's modalities read as 0\n"
    others = ({"modalities": ("t1ce", "t2")}, "modalities"), ({"size": 32, "modalities": ("t1",)}, "size")
    for change, says in others:
        with pytest.raises(UserError, match=says):
            network.take_images(Images(dataclasses.replace(settings, **change)), "data")


def test_other_classes_are_refused(decomposer):
    with pytest.raises(UserError, match="its lesion classes are ED"):
        decomposer.check_classes(dataclasses.replace(SETTINGS, lesion_classes=("ED",)), "data")
