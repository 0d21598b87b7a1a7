"""Data sets in parts: prepared apart, joined, grown."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import slow_source
from tests.data_prep.conftest import manifest, prepare, table

from data_prep import phantom
from data_prep.join import join_parts
from data_prep.slices import write_manifest
from decomp_jax.config import DataConfig
from decomp_jax.data.pipeline import split_batches, train_batches
from decomp_jax.data.records import SliceDataset, verify
from decomp_jax.data.schema import SPLITS, Settings, content_digest
from decomp_jax.errors import UserError
from decomp_jax.mesh import data_mesh

PATIENTS = 60


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def quick(in_this_process: None) -> Iterator[None]:
    """Phantom patients that take no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "settings", slow_source.settings)
        patch.setattr(phantom, "prepare", slow_source.patient)
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:
    """`whole`, and the same patients as `part-1` to `part-5`."""
    folder = tmp_path_factory.mktemp("parts")
    prepare("phantom", "--patients", PATIENTS, "--out", folder / "whole", "--shard=1/1")
    for i in range(1, 6):
        prepare("phantom", "--patients", PATIENTS, "--out", folder / f"part-{i}", f"--shard={i}/5")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def five(folder: Path) -> list[Path]:
    return [folder / f"part-{i}" for i in range(1, 6)]


@pytest.fixture
def copies(tmp_path: Path, parts: Path) -> Path:
    shutil.copytree(parts, tmp_path / "copies")
    return tmp_path / "copies"


def test_five_parts_are_one_preparation(tmp_path, parts):
    join_parts(tmp_path / "all", five(parts))
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
        "manifest.json", *sorted(f"rows-{split}.npy" for split in SPLITS)
    ]
    assert table(tmp_path / "all") == table(parts / "whole")
    joined, whole = (manifest(folder) for folder in (tmp_path / "all", parts / "whole"))
    assert all(joined[name] == whole[name] for name in ("patients", "slices", "splits", "settings"))
    assert joined["record"] == {name: whole["record"][name] for name in ("bytes", "offsets")}
    assert joined["source"] == {"parts": 5, "seed": 0, "domain": "plain"}
    for split in SPLITS:
        sets = [SliceDataset(folder, split) for folder in (tmp_path / "all", parts / "whole")]
        np.testing.assert_array_equal(sets[0].rows, sets[1].rows)
        for name in sets[0].settings.fields:
            np.testing.assert_array_equal(*(one.stack((name,))[name] for one in sets))


def test_training_and_encoding_see_the_same_batches(tmp_path, parts):
    join_parts(tmp_path / "all", five(parts))
    mesh, config = data_mesh(), DataConfig()
    for read in (
        lambda data: zip(range(20), train_batches(data, config, mesh, batch_size=8, seed=1)),
        lambda data: enumerate(batch for batch, _ in split_batches(data, ("image", "label"), mesh, batch_size=8)),
    ):
        ours, theirs = (list(read(SliceDataset(folder, "train"))) for folder in (tmp_path / "all", parts / "whole"))
        assert len(ours) == len(theirs) > 5
        for (_, a), (_, b) in zip(ours, theirs):
            assert all(np.array_equal(a[name], b[name]) for name in ("image", "label"))


def test_a_part_more_keeps_the_splits_of_what_was_there(tmp_path, parts):
    join_parts(tmp_path / "four", five(parts)[:4])
    join_parts(tmp_path / "all", [tmp_path / "four", five(parts)[4]])
    splits = [{row["patient_id"]: row["split"] for row in table(tmp_path / name)} for name in ("four", "all")]
    assert splits[0].items() < splits[1].items() and len(splits[1]) == PATIENTS
    assert table(tmp_path / "all") == table(parts / "whole")
    join_parts(tmp_path / "at once", five(parts))
    assert manifest(tmp_path / "at once")["digest"] == manifest(tmp_path / "all")["digest"]
    assert manifest(tmp_path / "four")["digest"] != manifest(tmp_path / "all")["digest"]


def test_a_joined_set_moves_with_its_parts(tmp_path, copies):
    join_parts(copies / "all", five(copies))
    copies.rename(tmp_path / "moved")
    assert len(SliceDataset(tmp_path / "moved" / "all", "train").stack(("image",))["image"]) > 0
    (tmp_path / "moved" / "part-3").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="part-3: not found, a part of .*all; join the parts again"):
        SliceDataset(tmp_path / "moved" / "all", "train")
    shutil.copytree(tmp_path / "moved" / "part-2", tmp_path / "moved" / "part-3")
    with pytest.raises(UserError, match="part-3: is not what was joined as .*all; join again"):
        SliceDataset(tmp_path / "moved" / "all", "train")


@pytest.mark.parametrize("file", ["rows-train.npy", "fingerprints.npy", "slices/slices-train.tfrecord-*"])
def test_verify_names_the_file_of_a_part_in_which_a_byte_was_flipped(copies, file):
    join_parts(copies / "all", five(copies))
    verify(copies / "all")
    (path,) = (copies / "part-4").glob(file)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    SliceDataset(copies / "all", "train")  # rows are the joined set's own, and records are looked at when they are read
    with pytest.raises(UserError, match=f"/part-4/.*{path.name}: checksum is not the one in manifest.json"):
        verify(copies / "all")


def rename(folder: Path, change) -> None:
    """Rewrites a part's rows as a preparation of others would have them."""
    known = manifest(folder)
    for split in known["splits"]:
        rows = np.load(folder / f"rows-{split}.npy")
        rows["patient_id"] = [change(name) for name in rows["patient_id"]]
        np.save(folder / f"rows-{split}.npy", rows)
    write_manifest(folder, Settings.from_json(known["settings"]), known["record"], known["splits"],
                   {name: value for name, value in known["files"].items() if name.startswith("slices")},
                   skipped=[], source={})


def spoil_rows(folder: Path) -> None:
    path = folder / "rows-train.npy"
    path.write_bytes(path.read_bytes().replace("phantom".encode("utf-32-le"), "phantum".encode("utf-32-le")))


def in_manifest(section: str, without: str | None = None, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        known = manifest(folder)
        known[section] |= changes
        known[section].pop(without, None)
        known["digest"] = content_digest(known)
        (folder / "manifest.json").write_text(json.dumps(known))

    return change


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.with_name("part-1"), folder)),
     r"part-4: patient phantom-0001 \(12 in all\) is in .*part-1, too"),
    (lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.with_name("part-1"), folder),
                     rename(folder, lambda name: name.replace("phantom", "other"))),
     "part-4: other-00.. has the same images as a patient of another part"),
    (in_manifest("record", offsets={"image": 3, "label": 200}), "part-4: its records are laid out otherwise than"),
    (in_manifest("settings", foreground="window"), "part-4: prepared with foreground=window, but .*part-1 with nonzero"),
    (spoil_rows, "part-4/rows-train.npy: checksum is not the one in manifest.json"),
    (lambda folder: next(folder.glob("slices/*train*")).unlink(), "part-4/slices/.*: not found"),
    (lambda folder: (folder / "manifest.json").unlink(), "part-4/manifest.json: not found"),
    (lambda folder: np.save(folder / "fingerprints.npy", np.load(folder / "fingerprints.npy") ^ np.uint64(1)),
     "part-4/fingerprints.npy: checksum is not the one in manifest.json"),
    (lambda folder: (folder / "fingerprints.npy").unlink(), "part-4/fingerprints.npy: not found"),
    (in_manifest("files", without="fingerprints.npy"),
     "part-4: an older version prepared it, without a checksum of the fingerprints .*; prepare it again"),
])
def test_parts_that_do_not_fit_are_refused(tmp_path, copies, spoil, reason):
    spoil(copies / "part-4")
    with pytest.raises(UserError, match=reason):
        join_parts(tmp_path / "all", five(copies))
    assert not (tmp_path / "all").exists()


def test_a_killed_part_leaves_the_others(tmp_path):
    flags = ("phantom", "--patients", 4)
    prepare(*flags, "--out", tmp_path / "part-1", "--shard=1/2")
    before = contents(tmp_path / "part-1")
    command = [sys.executable, slow_source.__file__, *map(str, flags), "--workers=1", "--shard=2/2", "--out"]
    killed = subprocess.Popen([*command, str(tmp_path / "part-2")], stderr=subprocess.DEVNULL, env=os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "FAULT": "linger"})
    while not list(tmp_path.glob(".part-2.partial-*/slices")):
        assert killed.poll() is None
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait(300)
    assert not (tmp_path / "part-2").exists() and contents(tmp_path / "part-1") == before
    with pytest.raises(UserError, match="part-2/manifest.json: not found"):
        join_parts(tmp_path / "all", [tmp_path / "part-1", tmp_path / "part-2"])
    with pytest.raises(UserError, match="part-1: exists already"):
        prepare(*flags, "--out", tmp_path / "part-1", "--shard=1/2")
    prepare(*flags, "--out", tmp_path / "part-2", "--shard=2/2")
    join_parts(tmp_path / "all", [tmp_path / "part-1", tmp_path / "part-2"])
    assert {row["patient_id"] for row in table(tmp_path / "all")} == {*phantom.patient_ids(4)}


def test_a_part_may_lack_splits_and_patients_that_cannot_be_used(tmp_path, brats):
    flags = ("brats", "--src", brats, "--size", 32)
    prepare(*flags, "--out", tmp_path / "one", "--shard=5/5")
    assert manifest(tmp_path / "one")["patients"] == 1 and len(manifest(tmp_path / "one")["splits"]) == 1
    (brats / "BraTS2021_00004" / "BraTS2021_00004_seg.nii.gz").unlink()
    prepare(*flags, "--out", tmp_path / "two", "--shard=2/2", "--on_error=skip")
    assert [entry["patient_id"] for entry in manifest(tmp_path / "two")["skipped"]] == ["BraTS2021_00004"]
    join_parts(tmp_path / "all", [tmp_path / "two"])
    assert manifest(tmp_path / "all")["skipped"] == manifest(tmp_path / "two")["skipped"]
    for number, reason in (("3/3", "every patient was skipped"), ("6/6", "--shard=6/6: there are 5 patients")):
        with pytest.raises(UserError, match=reason):
            prepare(*flags, "--out", tmp_path / "none", "--shard", number, "--on_error=skip")
    with pytest.raises(SystemExit):
        prepare(*flags, "--out", tmp_path / "none", "--shard=0/5")
