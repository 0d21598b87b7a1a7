"""The template's regions against what any anatomy book says of them."""

import numpy as np
import pytest

from data_prep.template import PULL_MM, load_template
from decomp_jax.data.schema import ANATOMY_CLASSES

REGIONS = {name: 1 + i for i, name in enumerate(ANATOMY_CLASSES)}


def _region(name: str) -> np.ndarray:
    return load_template().anatomy == REGIONS[name]


def _points(mask: np.ndarray) -> np.ndarray:
    """z up, y backwards, x to the left, mm [n,3]"""
    return np.argwhere(mask) + load_template().origin


@pytest.mark.parametrize("name", REGIONS)
def test_regions_keep_to_their_side(name: str) -> None:
    x = _points(_region(name))[:, 2]
    assert (x >= 0).all() if name.startswith("left") else (x < 0).all()


@pytest.mark.parametrize("name, low, high", [("cerebrum", 600, 900), ("cerebellum", 70, 130), ("ventricle", 8, 30)])
def test_volumes_are_plausible_and_even(name: str, low: float, high: float) -> None:
    left, right = (np.count_nonzero(_region(f"{side} {name}")) / 1000 for side in ("left", "right"))
    assert low < left < high
    assert abs(left - right) < 0.05 * left


def test_cerebellum_lies_low_and_behind() -> None:
    cerebellum, cerebrum = _points(_region("left cerebellum")), _points(_region("left cerebrum"))
    assert cerebellum[:, 0].mean() < cerebrum[:, 0].mean() - 40
    assert cerebellum[:, 1].mean() > cerebrum[:, 1].mean() + 30
    assert np.percentile(cerebellum[:, 0], 99) < 0


def test_ventricles_are_dark_and_inside() -> None:
    template = load_template()
    ventricles = _region("left ventricle") | _region("right ventricle")
    assert np.median(template.t1[ventricles]) < 0.5 < np.median(template.t1[_region("left cerebrum")])
    assert template.depth[ventricles].min() > 5


def test_depth_is_positive_inside_alone() -> None:
    template = load_template()
    assert (template.depth[template.anatomy > 0] > 0).all()
    assert (template.white[template.depth < -3] < 0.05).all()


@pytest.mark.parametrize("side, outwards", [("left", 1), ("right", -1)])
def test_pull_leads_to_the_ventricles(side: str, outwards: int) -> None:
    pull = load_template().ventricle_pull
    beside = np.argwhere(_region(f"{side} ventricle")).mean(axis=0) + (0, 0, outwards * 24)
    z, y, x = (beside / PULL_MM).round().astype(int)
    assert pull[2, z, y, x] * outwards < -0.02
    assert np.linalg.norm(pull, axis=0).max() <= 1.001
