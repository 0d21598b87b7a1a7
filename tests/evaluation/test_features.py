"""Vectors given to the report: read in order, or refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from decomp_jax.errors import UserError
from decomp_jax.evaluation.features import read_features
from tests.evaluation.fakes import Heads

HEADS = {"query": Heads(2, 3, seed=0, prefix="q"), "reference": Heads(3, 3, seed=1, prefix="r")}
SOURCE = {"data_digest": Heads.digest, "splits": ["query", "reference"]}


def write(folder: Path, vectors: np.ndarray, source: object = SOURCE) -> Path:
    np.save(folder / "vectors.npy", vectors)
    (folder / "vectors.json").write_text(json.dumps(source))
    return folder / "vectors.npy"


def test_rows_go_to_their_splits(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).random((15, 4), np.float32)
    features = read_features([("mine", write(tmp_path, vectors))], HEADS)
    np.testing.assert_array_equal(features["query"]["mine"], vectors[:6])
    np.testing.assert_array_equal(features["reference"]["mine"], vectors[6:])


@pytest.mark.parametrize("vectors, source, message", [
    (np.zeros((14, 4)), SOURCE, r"vectors.npy: is float64 \[14, 4\]; needs a vector a slice, float \[15,F\]"),
    (np.zeros((15, 4), int), SOURCE, "vectors.npy: is int64"),
    (np.zeros(15), SOURCE, "vectors.npy: is float64"),
    (np.full((15, 4), np.nan), SOURCE, "vectors.npy: rows 0 to 14 hold NaN or infinity"),
    (np.zeros((15, 4)), SOURCE | {"data_digest": "0" * 64}, "vectors.json: data_digest is not that of the data set"),
    (np.zeros((15, 4)), SOURCE | {"splits": ["reference", "query"]}, "vectors.json: splits are"),
    (np.zeros((15, 4)), [], "vectors.json: can't be read"),
    (np.array([None] * 15), SOURCE, "vectors.npy: no .npy file that can be read"),
])
def test_what_does_not_fit_is_refused(tmp_path: Path, vectors: np.ndarray, source: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        read_features([("mine", write(tmp_path, vectors, source))], HEADS)
    assert "\n" not in str(refused.value)


def test_names_are_of_one_method_each(tmp_path: Path) -> None:
    path = write(tmp_path, np.zeros((15, 4)))
    for files in ([("mine", path), ("mine", path)], [("pixel_l2", path)]):
        with pytest.raises(UserError, match="is the name of another method"):
            read_features(files, HEADS)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vectors.npy"
    with pytest.raises(UserError, match="vectors.npy: no .npy file that can be read"):
        read_features([("mine", path)], HEADS)
    np.save(path, np.zeros((15, 4)))
    with pytest.raises(UserError, match="vectors.json: can't be read"):
        read_features([("mine", path)], HEADS)
