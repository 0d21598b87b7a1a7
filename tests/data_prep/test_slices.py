import dataclasses
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import slow_source
from tests.data_prep.conftest import damage, manifest, one_by_one, prepare, records, save_patient, table

from data_prep import phantom, shards, slices
from data_prep.slices import PatientSlices, write_dataset
from data_prep.splits import PATIENT_SHARES, PHANTOM_SHARES, split_by_hash
from decomp_jax.data.schema import ROW_COLUMNS, SPLITS
from decomp_jax.errors import UserError


def write(out: Path, **options) -> None:
    ids = [f"patient-{i:04d}" for i in range(9)]
    write_dataset(out, **{
        "settings": slow_source.settings(8),
        "splits": split_by_hash(ids, PATIENT_SHARES, seed=0),
        "prepare": functools.partial(slow_source.patient, seed=0, size=8),
        "workers": 1,
        "on_error": "stop",
        **options,
    })


def with_columns(patient_id: str, *, grades: dict[str, list[str]]) -> PatientSlices:
    patient = slow_source.patient(patient_id, seed=0, size=8)
    return dataclasses.replace(patient, columns={"grade": np.array(grades[patient_id]), "age": np.full(3, 40.5)})


def contents(folder: Path) -> dict[str, str]:
    """File -> checksum."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_records_follow_the_rows(tmp_path):
    write(tmp_path / "out")
    rows = table(tmp_path / "out")
    assert tuple(rows[0]) == ("split", *ROW_COLUMNS)
    assert [row["split"] for row in rows] == sorted((row["split"] for row in rows), key=SPLITS.index)
    for split in SPLITS:
        for record in records(tmp_path / "out", split):
            stack = slow_source.patient(record["patient_id"], seed=0, size=8).image
            np.testing.assert_array_equal(record["image"], stack[record["slice_index"]])
            assert record["image"].dtype == np.float16 and record["label"].dtype == np.uint8


def test_the_manifest_counts(tmp_path):
    write(tmp_path / "out", source={"from": "nowhere"})
    known = manifest(tmp_path / "out")
    assert known["patients"] == 9 and known["slices"] == 27 and known["source"] == {"from": "nowhere"}
    assert known["splits"] == {
        "train": {"patients": 5, "slices": 15}, "validation": {"patients": 1, "slices": 3},
        "query": {"patients": 1, "slices": 3}, "reference": {"patients": 2, "slices": 6},
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "fingerprints.npy", "manifest.json", *sorted(f"rows-{split}.npy" for split in SPLITS), "slices"
    ]


def test_bytes_depend_neither_on_the_workers_nor_on_the_process(tmp_path):
    splits = split_by_hash(phantom.patient_ids(8), PHANTOM_SHARES, seed=0)
    write(tmp_path / "a", splits=splits, workers=1, source={"seed": 0, "domain": "plain"})
    write(tmp_path / "b", splits=splits, workers=3, source={"seed": 0, "domain": "plain"})
    stdout, _ = (run := start_run(tmp_path / "c")).communicate(timeout=500)
    assert run.returncode == 0 and not stdout
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_classes_that_no_slice_shows_are_told(tmp_path, capsys):
    """As where every mask is black, or the wrong channel was saved as one."""
    def patient(patient_id: str) -> PatientSlices:
        return dataclasses.replace(slow_source.patient(patient_id), label=np.full((3, 8, 8), 2, np.uint8))

    for name, prepare, told in (("none", slow_source.patient, "NCR, ED, ET"), ("some", patient, "NCR, ET")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slices, "map_in_order", one_by_one)
            write(tmp_path / name, prepare=prepare)
        assert f"{name}: no slice shows {told}\n" in capsys.readouterr().err


def test_the_digest_depends_on_every_byte(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", splits=split_by_hash([f"patient-{i:04d}" for i in range(1, 10)], PATIENT_SHARES, seed=0))
    assert manifest(tmp_path / "a")["digest"] != manifest(tmp_path / "b")["digest"]


def test_shards_of_equal_length_and_a_rest(tmp_path, monkeypatch):
    write(tmp_path / "one")
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    write(tmp_path / "many")
    one, many = (records(tmp_path / name, "train") for name in ("one", "many"))
    sizes = [path.stat().st_size for path in sorted((tmp_path / "many" / "slices").glob("slices-train.tfrecord-*"))]
    assert len(sizes) > 2 and {*sizes[:-1]} == {max(sizes)} and max(sizes) <= 1000
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    assert manifest(tmp_path / "many")["files"].keys() == contents(tmp_path / "many").keys() - {
        "manifest.json", "slices/features.json", "slices/dataset_info.json"
    }


def test_columns_keep_their_type(tmp_path):
    grades = {f"patient-{i:04d}": ["1", "2", "03"] if i < 8 else ["a", "b", "a long name"] for i in range(9)}
    prepare = functools.partial(with_columns, grades=grades)
    write(tmp_path / "out", prepare=prepare, columns={"grade": "U11", "age": "f4"})
    for split in SPLITS:
        rows = np.load(tmp_path / "out" / f"rows-{split}.npy")
        assert rows.dtype["grade"] == "U11" and rows.dtype["age"] == np.float32
        assert rows["grade"].tolist() == [grades[row["patient_id"]][row["slice_index"]] for row in rows]
        assert rows["age"].tolist() == [40.5] * len(rows)


def test_records_can_be_read_without_tensorflow(tmp_path):
    write(tmp_path / "out")
    code = (
        "import sys; from pathlib import Path; import data_prep.brats, data_prep.images; from tests.data_prep.conftest import records\n"
        f"assert len(records(Path({str(tmp_path / 'out')!r}), 'train')) == 15\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: exists already"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_two_runs_into_one_folder_leave_each_other_alone(tmp_path):
    first, second = runs = [start_run(tmp_path / "out") for _ in range(2)]
    errors = [run.communicate(timeout=500)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], errors
    refusal = errors[first.returncode == 0]
    assert "out: exists already" in refusal.splitlines()[-1] and "Traceback" not in refusal
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and manifest(tmp_path / "out")["patients"] == 8


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    _, errors = (run := start_run(tmp_path / "file" / "out")).communicate(timeout=500)
    assert run.returncode == 2 and "Traceback" not in errors and errors.splitlines()[-1].endswith("name another path")


def test_a_broken_patient_stops_and_leaves_nothing(tmp_path, brats):
    damage(brats / "BraTS2021_00003" / "BraTS2021_00003_t1ce.nii.gz")
    with pytest.raises(UserError, match="BraTS2021_00003_t1ce.nii.gz"):
        prepare("brats", "--src", brats, "--out", tmp_path / "out", "--size", 32)
    assert list(tmp_path.iterdir()) == [brats]


def test_broken_patients_are_skipped_and_listed(tmp_path, brats):
    for seed in range(5, 12):
        save_patient(brats, f"BraTS2021_{seed:05d}", seed)
    damage(brats / "BraTS2021_00003" / "BraTS2021_00003_t1ce.nii.gz")
    (brats / "BraTS2021_00004" / "BraTS2021_00004_seg.nii.gz").unlink()
    splits = tmp_path / "splits.csv"
    names = sorted(path.name for path in brats.iterdir())
    splits.write_text("patient_id,split\n" + "".join(f"{n},{'query' if n[-1] == '7' else 'train'}\n" for n in names))
    prepare("brats", "--src", brats, "--out", tmp_path / "out", "--size", 32, "--splits", splits, "--on_error", "skip")
    known = manifest(tmp_path / "out")
    assert known["patients"] == 10 and known["splits"].keys() == {"train", "query"}
    assert [entry["patient_id"] for entry in known["skipped"]] == ["BraTS2021_00003", "BraTS2021_00004"]
    assert "CRC" in known["skipped"][0]["error"] and "--unlabelled" in known["skipped"][1]["error"]
    assert {row["patient_id"] for row in table(tmp_path / "out")} == {*names} - {"BraTS2021_00003", "BraTS2021_00004"}


def test_a_split_without_patients_is_refused(tmp_path, brats):
    splits = tmp_path / "splits.csv"
    names = sorted(path.name for path in brats.iterdir())
    splits.write_text("patient_id,split\n" + "".join(f"{n},{'query' if n[-1] == '3' else 'train'}\n" for n in names))
    damage(brats / "BraTS2021_00003" / "BraTS2021_00003_t1ce.nii.gz")
    with pytest.raises(UserError, match="split query: every patient was skipped, first because of .*CRC"):
        prepare("brats", "--src", brats, "--out", tmp_path / "out", "--splits", splits, "--on-error", "skip")
    assert not (tmp_path / "out").exists()


def test_twins_are_refused(tmp_path, brats):
    shutil.rmtree(brats / "BraTS2021_00003")
    save_patient(brats, "BraTS20_Training_007", 1, suffix=".nii")
    with pytest.raises(UserError, match="has the same images as"):
        prepare("brats", "--src", brats, "--out", tmp_path / "out", "--size", 32)


@pytest.mark.parametrize("flags", [
    ["brats", "--src", "x"],
    ["brats", "--src", "x", "--out", "y", "--modalities", "t1ce,t3"],
    ["brats", "--src", "x", "--out", "y", "--label_map", "4=0"],
    ["brats", "--src", "x", "--out", "y", "--label_map", "4:9"],
    ["phantom", "--out", "y", "--workers", "0"],
])
def test_wrong_flags_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare(*flags)
    assert stop.value.code == 2 and capsys.readouterr().err


def start_run(out: Path, **environment: str) -> subprocess.Popen:
    command = [sys.executable, slow_source.__file__, "phantom", "--out", str(out), "--patients", "8", "--workers", "2"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), **environment})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tmp_path, number):
    run = start_run(tmp_path / "out", FAULT="linger")
    while not list(tmp_path.glob(".out.partial-*/slices")):
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(number)
    stdout, stderr = run.communicate(timeout=300)  # patients would take ten minutes
    assert run.returncode == 128 + number and "Traceback" not in stderr and not stdout
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_ends_the_run(tmp_path):
    _, stderr = (run := start_run(tmp_path / "out", FAULT="die")).communicate(timeout=500)
    assert run.returncode == 2 and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("error: --workers: a worker process died")
    assert list(tmp_path.iterdir()) == []
