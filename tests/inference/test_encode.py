"""Encoding a split into a bank, piece by piece."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import Mesh

from decomp_jax.inference import encode
from decomp_jax.inference.slab import latents_of, over_scan
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


@pytest.mark.parametrize("slab_mm", [0.0, 6.0, None])
def test_bank_has_the_codes_of_all_images(
    tmp_path: Path, pieces: list[slice], heads: dict[str, Heads], decomposer: FakeDecomposer, slab_mm: float | None,
) -> None:
    """The abnormal ones of slabs: 8 mm for cells of a quarter of the field."""
    pieces += [slice(0, 24), slice(24, 48)]
    encode.encode_split("run", "data", "reference", tmp_path / "bank", slab_mm)
    bank = CodeBank.load(tmp_path / "bank", verify=True)
    assert bank.slab_mm == (8.0 if slab_mm is None else slab_mm)
    images, heights = heads["reference"].fields["image"], 4.0 * np.arange(6)
    parts = [over_scan(latents_of(decomposer, images[i : i + 6]), heights, bank.slab_mm) for i in range(0, 48, 6)]
    codes = [decomposer.quantize(part.normal, part.abnormal) for part in parts]
    for path in ("normal", "abnormal"):
        indices = np.concatenate([getattr(one, f"{path}_indices") for one in codes])
        np.testing.assert_array_equal(getattr(bank, f"{path}_indices"), indices)
    by_themselves = decomposer.encode(images)
    np.testing.assert_array_equal(bank.normal_indices, by_themselves.normal_indices)
    assert np.array_equal(bank.abnormal_indices, by_themselves.abnormal_indices) == (slab_mm == 0)
    assert bank.meta["split"] == "reference" and bank.rows["patient_id"][0] == "r0"


def test_interrupted_leaves_nothing(tmp_path: Path, pieces: list[slice]) -> None:
    pieces += [slice(0, 30)]
    with pytest.raises(KeyboardInterrupt):
        encode.encode_split("run", "data", "reference", tmp_path / "bank")
    assert not list(tmp_path.iterdir())
