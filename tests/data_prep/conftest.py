"""Tiny NIfTI patients and a way to run `python -m data_prep` in this process."""

import gzip
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tests.data_prep import same_patients

from data_prep import slices
from data_prep.__main__ import parser
from decomp_jax.data.schema import SPLITS
from decomp_jax.errors import UserError

LPS = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 39], [0, 0, 1, 0], [0, 0, 0, 1]])  # of BraTS, on a grid of 40
SHAPE = (40, 40, 6)
SIZE = 128  # of `as_brats`


def volume(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A box of noise in the middle of a field of zeros; the first slice is empty."""
    data = np.zeros(shape, np.int16)
    inside = tuple(slice(n // 4, n - n // 4) for n in shape[:2]) + (slice(1, None),)
    data[inside] = np.random.default_rng(seed).integers(50, 1000, data[inside].shape)
    return data


def labels(values: tuple[float, ...] = (1, 2, 4), shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    data = np.zeros(shape, np.uint8)
    for i, value in enumerate(values):
        data[12 + 4 * i : 16 + 4 * i, 14:22, 2:5] = value
    return data


def save(path: Path, data: np.ndarray, affine: np.ndarray = LPS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def save_patient(folder: Path, patient_id: str, seed: int = 0, suffix: str = ".nii.gz") -> Path:
    """A patient as BraTS 2021 releases it: t1ce and seg. Returns its folder."""
    folder = folder / patient_id
    save(folder / f"{patient_id}_t1ce{suffix}", volume(seed))
    save(folder / f"{patient_id}_seg{suffix}", labels())
    return folder


def damage(path: Path) -> None:
    """Flips a byte in the middle of a gzip whose deflate blocks are stored, so that only the checksum can tell."""
    packed = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), 0))
    packed[len(packed) // 2] ^= 0xFF
    path.write_bytes(packed)


def prepare(*flags: Any) -> None:
    """`python -m data_prep FLAGS` with one worker unless told."""
    parsed = parser().parse_args([*map(str, flags), *([] if "--workers" in flags else ["--workers", "1"])])
    parsed.make(parsed)


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def table(out: Path) -> list[dict[str, Any]]:
    """The rows of all splits, each with its split."""
    splits = {split: np.load(out / f"rows-{split}.npy") for split in SPLITS if (out / f"rows-{split}.npy").exists()}
    return [
        {"split": split, **dict(zip(rows.dtype.names, row))} for split, rows in splits.items() for row in rows.tolist()
    ]


def records(out: Path, split: str) -> list[dict[str, Any]]:
    """The records of a split as TensorFlow Datasets reads them, each with its row."""
    rows = np.load(out / f"rows-{split}.npy")
    features = tfds.features.FeaturesDict.from_config(str(out / "slices"))
    records = []
    for path in sorted((out / "slices").glob(f"slices-{split}.tfrecord-*")):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            records.append(features.deserialize_example_np(data[start + 12 : start + 12 + length]))
            start += length + 16
    return [
        {**dict(zip(rows.dtype.names, row)), **record} for row, record in zip(rows.tolist(), records, strict=True)
    ]


@pytest.fixture
def brats(tmp_path: Path) -> Path:
    """Five patients of BraTS 2021."""
    for seed in range(5):
        save_patient(tmp_path / "brats", f"BraTS2021_{seed:05d}", seed)
    return tmp_path / "brats"


@pytest.fixture(scope="session")
def as_brats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of `same_patients`, prepared from a BraTS release."""
    folder = tmp_path_factory.mktemp("brats")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "map_in_order", one_by_one)
        prepare(*same_patients.write_brats(folder / "src"), "--out", folder / "out", "--size", SIZE)
    return folder / "out"


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[None]:
    """Prepares without workers: starting them takes longer than what they do here; `test_workers.py` has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "map_in_order", one_by_one)
        yield


def one_by_one(function: Callable, items: Iterable, *, workers: int, unit: str) -> Iterator[tuple]:
    for item in items:
        try:
            yield item, function(item)
        except UserError as error:
            yield item, error
