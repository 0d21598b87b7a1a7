import json
import os
import shutil

import numpy as np
import pytest

from decomp_jax.data import records
from decomp_jax.data.records import SliceDataset, read_manifest, verify
from decomp_jax.data.schema import Settings, content_digest
from decomp_jax.errors import UserError
from tests.conftest import ROOT, run_python


def test_settings_of_older_files_stay_as_they_are():
    """Digests and banks made before a setting came hold no more than they did."""
    meta = json.loads((ROOT / "models" / "phantom64" / "meta.json").read_text())
    assert json.loads(json.dumps(Settings.from_json(meta["settings"]).to_json())) == meta["settings"]
    assert {*Settings("brats", 64).preprocessing} == {"size", "modalities", "foreground", "intensity_clip"}
    other = Settings("volumes", 64, plane="coronal", field_mm=400.0)
    assert Settings.from_json(json.loads(json.dumps(other.to_json()))) == other
    assert other.preprocessing["plane"] == "coronal" and other.preprocessing["field_mm"] == 400


def test_rows_and_records_agree(phantom):
    dataset = SliceDataset(phantom, "train")
    assert len(dataset) == len(dataset.rows) == read_manifest(phantom)["splits"]["train"]["slices"]
    for i in (0, len(dataset) // 2, len(dataset) - 1):
        record = dataset[i]
        assert record.keys() == {"image", "label", "anatomy", "healthy"}
        assert record["label"].any() == dataset.rows["has_abnormality"][i]
        assert record["image"].shape == (64, 64, 1) and record["image"].dtype == np.float16


def test_tensorflow_datasets_reads_the_same(phantom, tmp_path):
    """The oracle reads with TensorFlow, in a process of its own."""
    code = """
import sys, numpy as np, tensorflow_datasets as tfds
split = tfds.builder_from_directory(sys.argv[1]).as_dataset(split="train")
records = [{name: value.numpy() for name, value in record.items()} for record in split]
np.savez(sys.argv[2], **{name: np.stack([record[name] for record in records]) for name in records[0]})
"""
    done = run_python("-c", code, phantom / "slices", tmp_path / "read.npz")
    assert done.returncode == 0, done.stderr
    read, dataset = np.load(tmp_path / "read.npz"), SliceDataset(phantom, "train")
    assert {*read} == {*dataset.settings.fields}
    for names in (("image", "label"), ("healthy",), ("label", "anatomy", "healthy", "image")):
        for name, values in dataset.stack(names).items():
            assert values.dtype == read[name].dtype and np.array_equal(values, read[name]), name


def test_some_rows_in_their_order(phantom):
    dataset = SliceDataset(phantom, "train")
    some = dataset.stack(("anatomy", "image"), [7, 2, 7])
    whole = dataset.stack(("anatomy", "image"))
    assert all(np.array_equal(some[name], whole[name][[7, 2, 7]]) for name in some)
    assert dataset.stack(("image",), [])["image"].shape == (0, 64, 64, 1)


def test_splits_one_after_the_other(phantom):
    splits = [SliceDataset(phantom, split) for split in ("validation", "train")]
    joined, first = SliceDataset(phantom, "validation", "train"), len(splits[0])
    assert np.array_equal(joined.rows, np.concatenate([dataset.rows for dataset in splits]))
    assert np.array_equal(joined[first - 1]["label"], splits[0][first - 1]["label"])
    assert np.array_equal(joined[first]["label"], splits[1][0]["label"])


def test_channels_by_name_are_0_where_they_are_not_stored(phantom):
    dataset = SliceDataset(phantom, "train")
    other = dataset.with_modalities(("flair", "t1ce"))
    some, stored = (each.stack(("healthy", "label", "image"), [5, 1]) for each in (other, dataset))
    for name in ("image", "healthy"):
        assert some[name].shape == (2, *other.settings.fields[name].shape) and some[name].dtype == np.float16
        np.testing.assert_array_equal(some[name][..., 1:], stored[name])
        assert not some[name][..., 0].any()
    np.testing.assert_array_equal(some["label"], stored["label"])
    assert dataset.settings.modalities == ("t1ce",) and dataset[0]["image"].shape == (64, 64, 1)


def test_a_file_stays_open_while_it_is_read(phantom, monkeypatch):
    """Even if the cache of open files drops it at once, as other threads may make it do."""
    monkeypatch.setattr(records, "_OPEN_FILES", 0)
    assert len(SliceDataset(phantom, "train").stack(("label",), [0, 1])["label"]) == 2


def test_reading_needs_no_tensorflow(phantom):
    code = """
import sys
from decomp_jax.data.records import SliceDataset
print(SliceDataset(sys.argv[1], "query")[0]["image"].shape, [name for name in sys.modules if "tensorflow" in name])
"""
    done = run_python("-c", code, phantom)
    assert done.stdout.strip() == "(64, 64, 1) []", done.stderr


@pytest.fixture
def copy(phantom, tmp_path):
    shutil.copytree(phantom, tmp_path / "copy")
    return tmp_path / "copy"


def shard(folder):
    return next(folder.glob("slices/*query.tfrecord*"))


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
    with pytest.raises(UserError, match="cut short"):
        SliceDataset(copy, "query")


def test_shard_cut_while_it_is_read_is_detected(copy):
    dataset = SliceDataset(copy, "query")
    os.truncate(shard(copy), 1000)
    with pytest.raises(UserError, match="cut short"):
        dataset[0]


def test_shards_are_one_sequence(copy):
    """Two shards in place of one, as large data sets have."""
    whole = SliceDataset(copy, "query").stack(("image",))["image"]
    manifest = json.loads((copy / "manifest.json").read_text())
    data, cut = shard(copy).read_bytes(), 3 * manifest["record"]["bytes"]
    del manifest["files"][str(shard(copy).relative_to(copy))]
    shard(copy).unlink()
    for i, part in enumerate((data[:cut], data[cut:])):
        path = copy / "slices" / f"slices-query.tfrecord-{i:05d}-of-00002"
        path.write_bytes(part)
        manifest["files"][f"slices/{path.name}"] = ""
    manifest["digest"] = content_digest(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    dataset = SliceDataset(copy, "query")
    np.testing.assert_array_equal(dataset.stack(("image",))["image"], whole)
    np.testing.assert_array_equal(dataset.stack(("image",), [3, 2, 0])["image"], whole[[3, 2, 0]])


def test_sorted_rows_and_shards_of_other_data_are_refused(copy, phantom):
    rows = np.load(copy / "rows-query.npy")
    np.save(copy / "rows-query.npy", np.sort(rows, order="slice_index"))
    with pytest.raises(UserError, match="rows-query.npy: checksum is not the one in manifest.json.*; copy or prepare"):
        SliceDataset(copy, "query")
    np.save(copy / "rows-query.npy", rows)
    record = read_manifest(copy)["record"]["bytes"]
    other = next(phantom.glob("slices/*train.tfrecord*")).read_bytes()
    shard(copy).write_bytes(other[: len(rows) * record])
    with pytest.raises(UserError, match="slices-query.*: its last record is not the one that was prepared"):
        SliceDataset(copy, "query")


def test_verify_reads_all(copy):
    verify(copy)
    size = read_manifest(copy)["record"]["bytes"]
    data = shard(copy).read_bytes()
    shard(copy).write_bytes(data[size : 2 * size] + data[:size] + data[2 * size :])  # each record is whole
    SliceDataset(copy, "query")
    with pytest.raises(UserError, match="slices-query.*: checksum is not the one in manifest.json"):
        verify(copy)


def test_missing_record_is_detected(copy):
    rows = np.load(copy / "rows-query.npy")
    np.save(copy / "rows-query.npy", rows[:-1])
    with pytest.raises(UserError, match=f"{len(rows)} records, {len(rows) - 1} rows"):
        SliceDataset(copy, "query")


@pytest.mark.parametrize("name", ["rows-query.npy", "slices/slices-query.tfrecord-00000-of-00001"])
def test_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name}: not found"):
        SliceDataset(copy, "query")


@pytest.mark.parametrize("rows", [b"", b"\x93NUMPY", np.zeros(3), np.zeros(3, [("patient_id", "U3")])])
def test_damaged_rows_are_named(copy, rows):
    if isinstance(rows, bytes):
        (copy / "rows-query.npy").write_bytes(rows)
    else:
        np.save(copy / "rows-query.npy", rows)
    with pytest.raises(UserError, match="rows-query.npy: .*prepare the data again"):
        SliceDataset(copy, "query")


@pytest.mark.parametrize(("change", "message"), [
    ({"format_version": 1}, "manifest.json: not of format 2; prepare the data again with this version"),
    ({"files": None}, "manifest.json: damaged or edited"),
    ({"splits": ["query"]}, "manifest.json: damaged or edited"),
    ({"digest": "0"}, "manifest.json: damaged or edited"),
    ({"record": {"bytes": 10}}, "manifest.json: damaged or edited"),
    ({"settings": {"source": "phantom", "size": 32}}, "manifest.json: damaged or edited"),
])
def test_damaged_manifest_is_named(copy, change, message):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        SliceDataset(copy, "query")


@pytest.mark.parametrize("text", ["", "[1]", "{", "\0"])
def test_other_files_named_manifest_are_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json: not .*prepare the data again"):
        SliceDataset(tmp_path, "query")


def test_missing_data_and_split_are_named(phantom, tmp_path):
    with pytest.raises(UserError, match="manifest.json: not found"):
        SliceDataset(tmp_path, "train")
    with pytest.raises(UserError, match="no split 'test'"):
        SliceDataset(phantom, "test")
