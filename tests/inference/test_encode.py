"""Encoding a split into a bank, piece by piece."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import Mesh

from decomp_jax.inference import encode
from decomp_jax.retrieval import CodeBank
from tests.evaluation.fakes import FakeDecomposer, Heads


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch, heads: dict[str, Heads], decomposer: FakeDecomposer) -> list[slice]:
    """Batches that `encode_split` is given of the reference images: those in the list, then an interrupt."""
    batches = []

    def split_batches(dataset: Heads, names: tuple[str, ...], mesh: Mesh) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        for some in batches:
            yield {name: dataset.fields[name][some] for name in names}, some.stop - some.start
        if batches[-1].stop < len(dataset):
            raise KeyboardInterrupt

    monkeypatch.setattr(encode.Decomposer, "restore", lambda workdir: decomposer)
    monkeypatch.setattr(encode, "SliceDataset", lambda data, split: heads[split])
    monkeypatch.setattr(encode, "split_batches", split_batches)
    return batches


def test_bank_has_the_codes_of_all_images(
    tmp_path: Path, pieces: list[slice], heads: dict[str, Heads], decomposer: FakeDecomposer,
) -> None:
    pieces += [slice(0, 30), slice(30, 48)]
    encode.encode_split("run", "data", "reference", tmp_path / "bank")
    bank = CodeBank.load(tmp_path / "bank", verify=True)
    codes = decomposer.encode(heads["reference"].fields["image"])
    np.testing.assert_array_equal(bank.normal_indices, codes.normal_indices)
    np.testing.assert_array_equal(bank.abnormal_indices, codes.abnormal_indices)
    assert bank.meta["split"] == "reference" and bank.rows["patient_id"][0] == "r0"


def test_interrupted_leaves_nothing(tmp_path: Path, pieces: list[slice]) -> None:
    pieces += [slice(0, 30)]
    with pytest.raises(KeyboardInterrupt):
        encode.encode_split("run", "data", "reference", tmp_path / "bank")
    assert not list(tmp_path.iterdir())
