import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.data_prep.conftest import labels, manifest, prepare, records, save, save_patient, table, volume

from data_prep.brats import brats_cases
from data_prep.cases import split_cases
from decomp_jax.errors import UserError
from decomp_jax.preparation.releases import find_patients, survey
from decomp_jax.preparation.volume import load_volume

MODERN = {"t1c": 0, "t1n": 1, "t2w": 2, "t2f": 3}


def save_modern(folder: Path, patient_id: str, seed: int, values: tuple[int, ...] = (1, 2, 3)) -> None:
    """A patient as BraTS 2023 releases it."""
    for kind, offset in MODERN.items():
        save(folder / patient_id / f"{patient_id}-{kind}.nii.gz", volume(10 * seed + offset))
    save(folder / patient_id / f"{patient_id}-seg.nii.gz", labels(values).astype(np.float32))


def test_releases_mixed_in_one_folder(tmp_path):
    src = tmp_path / "src"
    save_patient(src / "HGG", "BraTS19_A_1", 1)
    save_patient(src / "LGG", "BraTS19_B_1", 2)
    save_patient(src, "BraTS20_Training_001", 3, suffix=".nii")
    save_patient(src, "BraTS2021_00000", 4)
    save_modern(src, "BraTS-GLI-00000-000", 5)
    prepare("brats", "--src", src, "--out", tmp_path / "out", "--size", 64)

    splits = {row["patient_id"]: row["split"] for row in table(tmp_path / "out")}
    assert splits.keys() == find_patients(src).keys() and len(splits) == 5
    found = [record for split in set(splits.values()) for record in records(tmp_path / "out", split)]
    assert len(found) == 5 * 5 and all(set(np.unique(r["label"])) <= {0, 1, 2, 3} for r in found)
    of_one = {r["patient_id"]: r["label"] for r in found if r["slice_index"] == 3}
    for label in of_one.values():  # enhancing tumour is 4 in old releases, 3 in new ones
        np.testing.assert_array_equal(label, of_one["BraTS2021_00000"])
        assert (label == 3).any()
    assert manifest(tmp_path / "out")["source"]["label_maps"] == {"0:0,1:1,2:2,3:3": 1, "0:0,1:1,2:2,4:3": 4}


def test_names_of_modalities(tmp_path):
    save_modern(tmp_path, "BraTS-GLI-00000-000", 1)
    (patient,) = find_patients(tmp_path).values()
    names = [patient.files[name].name[-10:] for name in ("t1ce", "t1", "t2", "flair")]
    assert names == ["t1c.nii.gz", "t1n.nii.gz", "t2w.nii.gz", "t2f.nii.gz"]


def test_the_resection_cavity_is_refused_unless_mapped(tmp_path):
    src = tmp_path / "src"
    for seed in range(4):
        save_modern(src, f"BraTS-GLI-{seed:05d}-100", seed, (2, 3, 4))
    save_patient(src, "BraTS2021_00000", 9)  # here 4 stays enhancing tumour
    with pytest.raises(UserError, match=r"-seg.nii.gz: has label 4, which nothing names; .*--label_map=4:0 .*resection cavity"):
        prepare("brats", "--src", src, "--out", tmp_path / "out", "--size", 64)
    prepare("brats", "--src", src, "--out", tmp_path / "out", "--size", 64, "--label_map=4:0")
    splits = manifest(tmp_path / "out")["splits"]
    for record in (record for split in splits for record in records(tmp_path / "out", split)):
        if record["slice_index"] == 3:
            present = set(np.unique(record["label"]))
            assert present == ({0, 1, 2, 3} if record["patient_id"] == "BraTS2021_00000" else {0, 2, 3})


def test_paediatric_labels_are_not_guessed(tmp_path):
    save_modern(tmp_path, "BraTS-PED-00001-000", 1)
    (patient,) = find_patients(tmp_path).values()
    assert patient.label_map({}) == {0: 0} and patient.label_map({1: 3, 2: 1}) == {0: 0, 1: 3, 2: 1}


def test_visits_of_a_person_stay_together(tmp_path):
    for person in range(6):
        for visit in ("000", "001"):
            save(tmp_path / "src" / f"BraTS-GLI-{person:05d}-{visit}-t1c.nii.gz", volume(person))
            save(tmp_path / "src" / f"BraTS-GLI-{person:05d}-{visit}-seg.nii.gz", labels())
    patients = brats_cases(find_patients(tmp_path / "src"), {})
    splits = split_cases(patients, csv=None, seed=0)
    assert len(splits) == 12 and set(splits.values()) == {"train", "validation", "query", "reference"}
    assert all(splits[name] == splits[name[:-1] + "0"] for name in splits)
    csv = tmp_path / "splits.csv"
    csv.write_text("patient_id,split\n" + "".join(f"{n},{'train' if n[-1] == '0' else 'query'}\n" for n in patients))
    with pytest.raises(UserError, match="BraTS-GLI-00000 is in train and in query"):
        split_cases(patients, csv=csv, seed=0)


def test_unlabelled_patients_are_for_reference(tmp_path, brats):
    (brats / "BraTS2021_00002" / "BraTS2021_00002_seg.nii.gz").unlink()
    assert split_cases(brats_cases(find_patients(brats), {}), csv=None, seed=0)["BraTS2021_00002"] == "reference"
    prepare("brats", "--src", brats, "--out", tmp_path / "out", "--size", 64, "--unlabelled")
    assert {row["patient_id"] for row in table(tmp_path / "out") if not row["labelled"]} == {"BraTS2021_00002"}


def test_a_patient_found_twice_is_refused(tmp_path):
    save_patient(tmp_path / "HGG", "P")
    save_patient(tmp_path / "LGG", "P")
    with pytest.raises(UserError, match="P is there twice"):
        find_patients(tmp_path)
    with pytest.raises(UserError, match="--src .* holds no files"):
        find_patients(save(tmp_path / "other" / "brain.nii.gz", volume()).parent)
    with pytest.raises(UserError, match="--src .* is no folder"):
        find_patients(tmp_path / "nowhere")


def test_names_in_any_case_and_links_are_followed(tmp_path):
    save_patient(tmp_path / "elsewhere", "P", 1)
    save(tmp_path / "src" / "Q" / "Q_T1CE.NII.GZ", volume(2))
    save(tmp_path / "src" / "Q" / "Q_Seg.nii.gz", labels())
    (tmp_path / "src" / "P").symlink_to(tmp_path / "elsewhere" / "P")
    (tmp_path / "src" / "back").symlink_to(tmp_path / "src")
    patients = find_patients(tmp_path / "src")
    assert {name: {*patient.files} for name, patient in patients.items()} == dict.fromkeys("PQ", {"t1ce", "seg"})
    np.testing.assert_array_equal(load_volume(patients["Q"].files["t1ce"]).shape, (40, 40, 6))


def test_what_copies_add_is_passed_over(tmp_path):
    """macOS' ghosts; Kaggle's folders that are named as the file within; pictures and labels in folders of their own."""
    save_patient(tmp_path, "P", 1)
    for name in ("P/._P_t1ce.nii.gz", "P/._Z_t1ce.nii.gz", "__MACOSX/P/P_t1ce.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    for patient in "AB":
        for kind, inner in (("t1ce", "00000377_brain_t1ce.nii"), ("seg", "00000377_final_seg.nii")):
            save(tmp_path / patient / f"{patient}_{kind}.nii" / inner, volume(2))
    save(tmp_path / "images" / "C_t1ce.nii.gz", volume(3))
    save(tmp_path / "labels" / "C_seg.nii.gz", labels())
    found = survey(tmp_path)
    assert {name: {*patient.files} for name, patient in found.patients.items()} == dict.fromkeys("PABC", {"t1ce", "seg"})
    assert found.patients["A"].files["seg"].name == "00000377_final_seg.nii" and not found.left_out


@pytest.mark.parametrize("flags", [[], ["--unlabelled"]])
def test_a_segmentation_of_another_name_is_taken_and_the_rest_named(tmp_path, capsys, flags):
    for seed in range(4):
        save_patient(tmp_path / "src", f"BraTS20_Training_{seed:03d}", seed)
    folder = tmp_path / "src" / "BraTS20_Training_003"
    (folder / "BraTS20_Training_003_seg.nii.gz").rename(folder / "W39_1998.09.19_Segm.nii.gz")
    save(tmp_path / "src" / "atlas.nii", volume())
    prepare("brats", "--src", tmp_path / "src", "--out", tmp_path / "out", "--size", 16, *flags)
    line = capsys.readouterr().err.splitlines()[0]
    assert "4 patients, 4 with a segmentation; 1 segmentations of other names taken, first " in line
    assert "W39_1998.09.19_Segm.nii.gz; 1 NIfTI files left out, first " in line and line.endswith("atlas.nii")
    source = manifest(tmp_path / "out")["source"]
    assert source["left_out"] == ["atlas.nii"] and all(row["labelled"] for row in table(tmp_path / "out"))
    assert source["renamed_segmentations"] == ["BraTS20_Training_003/W39_1998.09.19_Segm.nii.gz"]
    with pytest.raises(UserError, match=r"holds no files like .*\(1 other NIfTI files, first .*brain.nii"):
        find_patients(save(tmp_path / "other" / "brain.nii.gz", volume()).parent)


def test_only_names_of_releases_end_with_a_visit(tmp_path):
    for name in ("SITE-001", "SITE-002", "BraTS-MET-00007-000", "BraTS-MET-00007-001"):
        save_modern(tmp_path, name, 0)
    subjects = {name: patient.subject for name, patient in find_patients(tmp_path).items()}
    assert subjects == {"SITE-001": "SITE-001", "SITE-002": "SITE-002", "BraTS-MET-00007-000": "BraTS-MET-00007",
                        "BraTS-MET-00007-001": "BraTS-MET-00007"}


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_label_map_that_nobody_needs_is_refused(tmp_path, brats, on_error):
    for flag in ("1:2,2:1", "4:0"):
        with pytest.raises(UserError, match="--label_map=.:.: the releases found here name label . themselves"):
            prepare("brats", "--src", brats, "--out", tmp_path / "out", f"--label_map={flag}", f"--on_error={on_error}")


def test_the_cures_of_messages_keep_the_labels(tmp_path, brats):
    """Label 3 in names of until 2021 is enhancing tumour renumbered; a missing segmentation is told by name."""
    for seed in range(5):
        save(brats / f"BraTS2021_{seed:05d}" / f"BraTS2021_{seed:05d}_seg.nii.gz", labels((1, 2, 3)))
    flags = ["brats", "--src", brats, "--out", tmp_path / "out", "--size", 64]
    with pytest.raises(UserError, match=r"label 3, which nothing names; .*--label_map=3:3 .*enhancing") as refused:
        prepare(*flags)
    prepare(*flags, re.search(r"--label_map=\d:\d", str(refused.value))[0])
    for split in manifest(tmp_path / "out")["splits"]:
        assert all({*np.unique(record["label"])} in ({0}, {0, 1, 2, 3}) for record in records(tmp_path / "out", split))
    shutil.rmtree(brats / "BraTS2021_00004")
    (brats / "BraTS2021_00002" / "BraTS2021_00002_seg.nii.gz").unlink()
    with pytest.raises(UserError, match="BraTS2021_00002: BraTS2021_00002 has no seg file"):
        prepare(*flags)
    with pytest.raises(UserError, match="3 labelled patients of 4, BraTS2021_00002 not being one: too few"):
        split_cases(brats_cases(find_patients(brats), {}), csv=None, seed=0)
