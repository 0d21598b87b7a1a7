"""A network of two modalities, trained with channels dropped, on data that have one of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError
from decomp_jax.inference import encode
from decomp_jax.inference.asking import Question, read_scan, read_slice
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.sheet import pixels_of
from decomp_jax.retrieval import CodeBank
from tests.inference.networks import random_network
from tests.inference.test_asking import write_scan

MODALITIES = ("flair", "t1ce")


def network(phantom: Path, probability: float) -> Decomposer:
    settings = dataclasses.replace(SliceDataset(phantom, "query").settings, modalities=MODALITIES)
    return random_network(settings, {"augment.drop_channel": probability})


@pytest.fixture(scope="module")
def decomposer(phantom: Path) -> Decomposer:
    return network(phantom, 0.4)


@pytest.fixture(scope="module")
def bank(phantom: Path, decomposer: Decomposer, tmp_path_factory: pytest.TempPathFactory) -> CodeBank:
    out = tmp_path_factory.mktemp("banks") / "query"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode.Decomposer, "restore", lambda workdir: decomposer)
        encode.encode_split("run", phantom, "query", out)
    return CodeBank.load(out)


def test_a_bank_has_the_codes_of_images_with_zeros(phantom: Path, decomposer: Decomposer, bank: CodeBank) -> None:
    stored = SliceDataset(phantom, "query").stack(("image",))["image"]
    codes = decomposer.encode(np.concatenate([np.zeros_like(stored), stored], -1))
    np.testing.assert_array_equal(bank.normal_indices, codes.normal_indices)
    np.testing.assert_array_equal(bank.abnormal_indices, codes.abnormal_indices)
    whole = json.loads(json.dumps(decomposer.settings.preprocessing))
    assert bank.meta["preprocessing"] == whole  # so that it joins banks of all modalities
    shown = pixels_of(decomposer, bank, np.array([4]))
    np.testing.assert_array_equal(shown.images[0][..., 1:], stored[4])
    assert not shown.images[..., 0].any()


def test_a_scan_is_asked_with_as_it_is(
    phantom: Path, decomposer: Decomposer, bank: CodeBank, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    image = SliceDataset(phantom, "query").stack(("image",), [4])["image"]
    write_scan(tmp_path / "t1ce.nii.gz", 1000 * np.repeat(image[..., 0], 4, 0))
    asked = read_slice(Question(image=tmp_path, slice_index=2), decomposer, bank)
    assert f"{tmp_path}: has t1ce alone; flair of the network's modalities read as 0\n" in capsys.readouterr().err
    assert not asked.images[..., 0].any() and asked.images[..., 1].any()
    whole = read_scan(Question(image=tmp_path, level="patient"), decomposer, bank)
    np.testing.assert_array_equal(whole.images[2], asked.images[0])
    with pytest.raises(UserError, match="prepare all of them, or train with --config.augment.drop_channel"):
        read_slice(Question(image=tmp_path, slice_index=2), network(phantom, 0.0), bank)
