import csv
import json
import shutil

import numpy as np
import pytest

from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError
from tests.conftest import run_python


def test_rows_and_records_agree(phantom):
    dataset = SliceDataset(phantom, "train")
    assert len(dataset) == len(dataset.rows) == json.loads((phantom / "manifest.json").read_text())["splits"]["train"]["slices"]
    for i in (0, len(dataset) // 2, len(dataset) - 1):
        record = dataset[i]
        assert record["patient_id"].decode() == dataset.rows["patient_id"][i]
        assert record["slice_index"] == dataset.rows["slice_index"][i]
        assert (record["label"].any()) == dataset.rows["has_abnormality"][i]
        assert record["image"].shape == (64, 64, 1) and record["image"].dtype == np.float16


def test_records_equal_tensorflow_datasets(phantom):
    """The oracle reads with TensorFlow, in a process of its own."""
    code = """
import sys, numpy as np, tensorflow_datasets as tfds
split = tfds.builder_from_directory(sys.argv[1]).as_dataset(split="query")
total = sum(np.asarray(r["image"], np.float64).sum() + int(r["label"].numpy().sum()) for r in split)
print(total)
"""
    done = run_python("-c", code, next(phantom.glob("slices/*")))
    dataset = SliceDataset(phantom, "query")
    arrays = dataset.stack(("image", "label"))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(
        arrays["image"].astype(np.float64).sum() + arrays["label"].astype(int).sum()
    )


def test_reading_needs_no_tensorflow(phantom):
    code = """
import sys
from decomp_jax.data.records import SliceDataset
print(SliceDataset(sys.argv[1], "query")[0]["image"].shape, "tensorflow" in sys.modules)
"""
    done = run_python("-c", code, phantom)
    assert done.stdout.strip() == "(64, 64, 1) False", done.stderr


@pytest.fixture
def copy(phantom, tmp_path):
    shutil.copytree(phantom, tmp_path / "copy")
    return tmp_path / "copy"


def shard(folder):
    return next(folder.glob("slices/*/*query.tfrecord*"))


def test_flipped_byte_is_detected(copy):
    data = bytearray(shard(copy).read_bytes())
    data[1000] ^= 4
    shard(copy).write_bytes(data)
    with pytest.raises(UserError, match="record 0 is damaged"):
        SliceDataset(copy, "query")[0]


@pytest.mark.parametrize("missing", [1, 5, 1000])
def test_cut_shard_is_detected(copy, missing):
    data = shard(copy).read_bytes()
    shard(copy).write_bytes(data[:-missing])
    with pytest.raises(UserError, match="cut short|damaged"):
        SliceDataset(copy, "query")


def test_missing_record_is_detected(copy):
    lines = (copy / "slices.csv").read_text().splitlines(keepends=True)
    (copy / "slices.csv").write_text("".join(lines) + next(line for line in lines if line.startswith("query")))
    with pytest.raises(UserError, match="prepare it again"):
        SliceDataset(copy, "query")


def test_missing_data_and_split_are_named(phantom, tmp_path):
    with pytest.raises(UserError, match="manifest.json: not found"):
        SliceDataset(tmp_path, "train")
    with pytest.raises(UserError, match="no split 'test'"):
        SliceDataset(phantom, "test")


def test_extra_columns_travel_as_numbers_or_text(copy):
    with (copy / "slices.csv").open() as file:
        lines = list(csv.DictReader(file))
    for i, line in enumerate(lines):
        line |= {"grade": str(i % 3), "tumour": f"type {i % 2}"}
    with (copy / "slices.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    rows = SliceDataset(copy, "query").rows
    assert rows["grade"].dtype == np.float64 and set(rows["tumour"]) == {"type 0", "type 1"}
