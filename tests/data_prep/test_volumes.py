"""Layouts of volumes: the same patients give the same records, whatever the numbers and the files."""

import json
from multiprocessing.pool import ThreadPool
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist
from monai.transforms import LoadImage, Orientation
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities import utils as nnunet_utils
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from tests.data_prep import same_patients
from tests.data_prep.conftest import SIZE, manifest, prepare, records, table
from tests.data_prep.same_patients import AFFINE, ED, ET, NCR, SHAPE, save, write_json

from data_prep.cases import split_cases
from data_prep.layouts import Found, Layout, read_layout
from data_prep.names import channel_name, lesion_names, smallest_regions
from data_prep.volumes import Volumes, name_volumes
from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation.scan import open_scan
from decomp_jax.preparation.volume import Source

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (same_patients.write_nnunet, "nnU-Net v2; 12 cases, 12 labelled; channels t1ce (T1ce), flair (Flair); "
         "lesion classes NCR (tumor core), ED (whole tumor), ET (enhancing tumor)"),
        (same_patients.write_decathlon, "Medical Segmentation Decathlon or nnU-Net v1; 12 cases, 12 labelled; channels "
         "t1ce (t1gd), flair (FLAIR); lesion classes NCR (non-enhancing tumor), ED (edema), ET (enhancing tumour)"),
        (same_patients.write_datalist, "MONAI datalist; 12 cases, 12 labelled; channels t1ce, flair; "
         "lesion classes NCR, ED, ET"),
    ],
)
def test_every_layout_gives_the_same_bytes(tmp_path, as_brats, capsys, write, line):
    prepare(*write(tmp_path / "src"), "--out", tmp_path / "out", "--size", SIZE)
    found, expected = manifest(tmp_path / "out"), manifest(as_brats)
    assert found["files"] == expected["files"] and found["splits"] == expected["splits"]
    assert found["settings"] == {**expected["settings"], "source": "volumes"}
    assert f"src: {line}" in capsys.readouterr().err.splitlines()[0]


def test_records_hold_the_voxels_that_nibabel_reads(as_brats):
    for record in (record for split in manifest(as_brats)["splits"] for record in records(as_brats, split)):
        one = same_patients.patients()[record["patient_id"]]
        z = record["slice_index"]
        label = np.zeros((SIZE, SIZE), np.uint8)  # pixels of 2 mm on a field of 256: its middle is the volume's
        label[54:74, 55:73] = one.classes[1::2, 1::2, z].T
        np.testing.assert_array_equal(record["label"], label)
        values = one.flair[one.flair != 0].astype(float)
        scaled = np.clip((one.flair[..., z] - values.mean()) / values.std(), -3, 5)
        scaled = np.where(one.flair[..., z] != 0, (scaled + 3) / 8, 0).T
        means = scaled.reshape(20, 2, 18, 2).mean((1, 3))
        np.testing.assert_allclose(record["image"][54:74, 55:73, 1], means, atol=1e-3)
        assert record["position_mm"] == nib.affines.apply_affine(AFFINE, (0, 0, z))[2]


def test_monai_reads_the_decathlon_alike(tmp_path):
    """Voxels of both channels, labels and their place, from MONAI's own list and reader."""
    flags = same_patients.write_decathlon(tmp_path / "src")
    meta = json.loads((tmp_path / "src" / "dataset.json").read_text())
    meta["training"].pop()
    write_json(tmp_path / "src" / "dataset.json", meta)
    prepare(*flags, "--out", tmp_path / "out", "--size", 256, "--window=0,1000")
    listed = load_decathlon_datalist(tmp_path / "src" / "dataset.json", True, "training")
    read, turn = LoadImage(image_only=True, ensure_channel_first=True), Orientation("LPS", labels=(("L", "R"), ("P", "A"), ("I", "S")))
    theirs = {Path(item["image"]).name.split(".")[0]: [turn(read(item[key])) for key in ("image", "label")]
              for item in listed}
    assert len(theirs) == 12
    for record in (record for split in manifest(tmp_path / "out")["splits"] for record in records(tmp_path / "out", split)):
        image, label = (np.asarray(part)[..., record["slice_index"]] for part in theirs[record["patient_id"]])
        ours = record["image"][108:148, 110:146]
        np.testing.assert_allclose(ours, image[[1, 0]].transpose(2, 1, 0) / 1000, atol=1e-3)
        np.testing.assert_array_equal(record["label"][108:148, 110:146], np.array([0, ED, NCR, ET])[label[0].astype(int).T])


def test_channels_that_nothing_names_are_told(tmp_path):
    """dataset.json names two; which of a file's three they are is not known, unless --channels says so."""
    flags = same_patients.write_decathlon(tmp_path / "src")
    path = next((tmp_path / "src" / "imagesTr").glob("[!.]*"))
    data = np.asarray(nib.load(path).dataobj)
    save(path, np.concatenate([data, data[..., :1]], -1))
    with pytest.raises(UserError, match=r"3 channels of which 2 have names; .*--channels"):
        prepare(*flags, "--out", tmp_path / "out", "--size", 32)
    prepare(*flags, "--out", tmp_path / "out", "--size", 32, "--channels=flair=0,t1ce=1")


# ---------------------------------------------------------------- a liver, by CT


def ct(seed: int, slices: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """HU and labels 1 liver, 2 tumour of a body on a table, as [right, front, top] voxels of 4 mm."""
    rng = np.random.default_rng(seed)
    data = np.full((90, 60, slices), -1000, np.int16)
    data[10:80, 10:52] = rng.integers(20, 60, (70, 42, slices))
    data[5:85, 4:6] = rng.integers(100, 240, (80, 2, slices))
    labels = np.zeros(data.shape, np.uint8)
    labels[45:75, 20:45] = 1
    x = rng.integers(48, 60)
    labels[x : x + 10, 28:38, slices // 2 :] = 2
    data[labels == 1] += 60
    return data, labels


def write_liver(folder: Path, *, patients: int = 12, labels: dict | None = None) -> Path:
    affine = np.diag([4.0, 4, 4, 1])
    for seed in range(patients):
        for part, data in zip(("imagesTr", "labelsTr"), ct(seed)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, affine), folder / part / f"liver_{seed}.nii.gz")
    paths = [{"image": f"./imagesTr/liver_{n}.nii.gz", "label": f"./labelsTr/liver_{n}.nii.gz"} for n in range(patients)]
    write_json(folder / "dataset.json", {"modality": {"0": "CT"}, "training": paths, "test": [], "labels": labels or {
        "0": "background", "1": "liver", "2": "cancer"}})
    return folder


CT_FLAGS = ("--window=-100,250", "--field_mm=400", "--size", 100, "--anatomy_labels=liver")


def test_a_window_a_field_and_anatomy(tmp_path):
    src = write_liver(tmp_path / "src")
    prepare("volumes", "--src", src, "--out", tmp_path / "out", *CT_FLAGS)
    known = manifest(tmp_path / "out")["settings"]
    assert known["foreground"] == "window" and known["intensity_clip"] == [-100, 250] and known["field_mm"] == 400
    assert known["modalities"] == ["CT"] and known["lesion_classes"] == ["cancer"] and known["anatomy_classes"] == ["liver"]
    for record in records(tmp_path / "out", "train"):
        data, labels = ct(int(record["patient_id"].removeprefix("liver_")))
        z = record["slice_index"]  # pixels are voxels of 4 mm: 90 x 60 in the middle of 100 x 100
        expected = (np.clip(data[::-1, ::-1, z].T, -100, 250) + 100) / 350
        np.testing.assert_allclose(record["image"][20:80, 5:95, 0], expected, atol=1e-3)
        assert record["image"].sum() == pytest.approx(expected.sum(), rel=1e-2)
        np.testing.assert_array_equal(record["label"][20:80, 5:95], labels[::-1, ::-1, z].T == 2)
        np.testing.assert_array_equal(record["anatomy"][20:80, 5:95], labels[::-1, ::-1, z].T == 1)


def test_a_region_reaches_below_the_lesion(tmp_path):
    src = write_liver(tmp_path / "src")
    prepare("volumes", "--src", src, "--out", tmp_path / "out", *CT_FLAGS, "--labels=liver=1+2,cancer=2")
    record = next(record for record in records(tmp_path / "out", "train") if record["has_abnormality"])
    assert (record["anatomy"][record["label"] == 1] == 1).all() and (record["label"] == 1).sum() == 100


@pytest.mark.parametrize(("plane", "axis"), [("coronal", 1), ("sagittal", 0)])
def test_planes(tmp_path, plane, axis):
    """Top up; the patient's right, or the front, to the left; slices forwards, or to the right."""
    src = write_liver(tmp_path / "src", patients=4)
    prepare("volumes", "--src", src, "--out", tmp_path / "out", *CT_FLAGS, "--plane", plane)
    assert manifest(tmp_path / "out")["settings"]["plane"] == plane
    (query,) = {row["patient_id"] for row in table(tmp_path / "out") if row["split"] == "query"}
    data, labels = ct(int(query.removeprefix("liver_")))
    for record in records(tmp_path / "out", "query"):
        i = record["slice_index"]
        image, label = (np.flip(np.take(part, i, axis)).T for part in (data, labels))
        rows, columns = (slice((100 - n) // 2, (100 - n) // 2 + n) for n in image.shape)
        np.testing.assert_allclose(record["image"][rows, columns, 0], (np.clip(image, -100, 250) + 100) / 350, atol=1e-3)
        np.testing.assert_array_equal(record["label"][rows, columns], label == 2)
        assert record["position_mm"] == 4 * i


def test_the_table_may_be_cut_off_and_a_lesion_may_not(tmp_path):
    src = write_liver(tmp_path / "src", patients=4)
    prepare("volumes", "--src", src, "--out", tmp_path / "out", *CT_FLAGS, "--field_mm=290")
    with pytest.raises(UserError, match="liver_.*the lesion reaches beyond 60 mm.*--field_mm"):
        prepare("volumes", "--src", src, "--out", tmp_path / "small", *CT_FLAGS, "--field_mm=60")
    with pytest.raises(UserError, match="no voxel is above 500, where --window begins"):
        prepare("volumes", "--src", src, "--out", tmp_path / "bright", *CT_FLAGS, "--window=500,900")


# ---------------------------------------------------------------- nnU-Net's particulars


@pytest.fixture
def nnunet(tmp_path) -> Path:
    same_patients.write_nnunet(tmp_path / "src")
    return tmp_path / "src"


def change_json(path: Path, **changes) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})


def test_nnunet_reads_its_own_layout_alike(tmp_path, nnunet, monkeypatch):
    """Which file is what, voxels, their place and regions, from nnU-Net's own list, reader and label manager."""
    prepare("volumes", "--src", nnunet, "--out", tmp_path / "out", "--size", 256, "--window=0,1000")
    meta = json.loads((nnunet / "dataset.json").read_text())
    monkeypatch.setattr(nnunet_utils, "Pool", ThreadPool)  # processes can't be forked beside JAX
    theirs = nnunet_utils.get_filenames_of_train_images_and_targets(str(nnunet), meta)
    found = [record for split in manifest(tmp_path / "out")["splits"] for record in records(tmp_path / "out", split)]
    assert {record["patient_id"] for record in found} == {*theirs} and len(theirs) == 12
    regions = LabelManager(meta["labels"], meta["regions_class_order"]).foreground_regions
    for record in found:
        case, z = theirs[record["patient_id"]], record["slice_index"]
        reader = determine_reader_writer_from_dataset_json(meta, case["label"], verbose=False)()
        (images, properties), (labels, _) = reader.read_images(case["images"]), reader.read_seg(case["label"])
        assert properties["spacing"] == [2, 1, 1] and record["position_mm"] == properties["sitk_stuff"]["origin"][2] + 2 * z
        np.testing.assert_allclose(record["image"][108:148, 110:146], images[:, z].transpose(1, 2, 0) / 1000, atol=1e-3)
        for ours, region in zip(((NCR, ED, ET), (NCR, ET), (ET,)), regions, strict=True):  # whole, core, enhancing
            np.testing.assert_array_equal(
                np.isin(record["label"][108:148, 110:146], ours), np.isin(labels[0, z], region)
            )


def test_ignored_slices_are_unlabelled(tmp_path, nnunet):
    change_json(nnunet / "dataset.json", labels={"background": 0, "edema": 1, "necrosis": 2, "ET": 3, "ignore": 4})
    path = nnunet / "labelsTr" / "BraTS2021_00003.nii.gz"
    labels = np.asarray(nib.load(path).dataobj).copy()
    labels[0, 0, 2] = 4  # one voxel: lost between the pixels of a small image
    save(path, labels)
    prepare("volumes", "--src", nnunet, "--out", tmp_path / "out", "--size", 32)
    rows = {row["slice_index"]: row for row in table(tmp_path / "out") if row["patient_id"] == "BraTS2021_00003"}
    assert [rows[i]["labelled"] for i in (1, 2, 3, 4)] == [True, False, True, True]
    assert [rows[i]["has_abnormality"] for i in (1, 2, 3, 4)] == [False, False, True, False]
    assert sum(not row["labelled"] for row in table(tmp_path / "out")) == 1


def test_a_case_that_several_folds_hold_out_is_a_query_of_each(nnunet):
    """As of folds that were drawn with replacement."""
    names = sorted(same_patients.patients())
    write_json(nnunet / "splits_final.json", [{"val": names[:4]}, {"val": names[3:]}])
    layout = read_layout(nnunet, {}, {})
    cases = name_volumes(layout, modalities=None, lesion_classes=(), anatomy_labels=(), unlabelled=False).cases
    for fold, held_out in (("0", names[:4]), ("1", names[3:])):
        splits = split_cases(cases, csv=None, query_fold=fold, seed=0)
        assert [name for name in names if splits[name] == "query"] == held_out


def test_files_that_are_of_no_case_are_named(tmp_path, nnunet, capsys):
    one = same_patients.patient(0)
    others = ["imagesTr/BraTS2021_00001.nii.gz", "imagesTr/BraTS2021_00001_0000.nii", "labelsTr/BraTS2021_00012.NII.GZ"]
    for name in others:
        save(nnunet / name, one.t1ce)
    text = (nnunet / "dataset.json").read_bytes()
    (nnunet / "dataset.json").write_bytes(b"\xef\xbb\xbf" + text)  # as editors of Windows write it
    prepare("volumes", "--src", nnunet, "--out", tmp_path / "out", "--size", 32)
    line = capsys.readouterr().err.splitlines()[0]
    assert line.endswith(f"; 3 files left out, first {nnunet}/imagesTr/BraTS2021_00001.nii.gz")
    assert manifest(tmp_path / "out")["source"]["left_out"] == others and manifest(tmp_path / "out")["patients"] == 12


def test_folds_are_queries(tmp_path, nnunet):
    prepare("volumes", "--src", nnunet, "--out", tmp_path / "out", "--size", 32, "--query_fold=1")
    splits = {row["patient_id"]: row["split"] for row in table(tmp_path / "out")}
    assert sorted(name for name in splits if splits[name] == "query") == [f"BraTS2021_{n:05d}" for n in (1, 6, 11)]
    assert {*splits.values()} == {"train", "validation", "query"}
    with pytest.raises(UserError, match="--query_fold=7: no case is in it; the source names the folds 0, 1, 2, 3, 4"):
        prepare("volumes", "--src", nnunet, "--out", tmp_path / "no", "--query_fold=7")


def test_a_dataset_dictionary_names_the_files(tmp_path, nnunet, as_brats):
    (nnunet / "imagesTr").rename(nnunet.parent / "elsewhere")
    cases = {
        name: {"images": [f"../elsewhere/{name}_{k:04d}.nii.gz" for k in range(2)], "label": f"labelsTr/{name}.nii.gz"}
        for name in same_patients.patients()
    }
    change_json(nnunet / "dataset.json", dataset=cases)
    prepare("volumes", "--src", nnunet, "--out", tmp_path / "out", "--size", SIZE)
    assert manifest(tmp_path / "out")["files"] == manifest(as_brats)["files"]


def test_the_first_nnunet_and_cases_without_labels(tmp_path, nnunet):
    (nnunet / "imagesTs").mkdir()
    for part in (nnunet / "imagesTr").glob("BraTS2021_00011_*"):
        part.rename(nnunet / "imagesTs" / part.name)
    (nnunet / "labelsTr" / "BraTS2021_00011.nii.gz").unlink()
    names = [name for name in same_patients.patients() if not name.endswith("11")]
    first = {
        "modality": {"0": "T1ce", "1": "Flair"}, "labels": {"0": "background", "1": "ED", "2": "NET", "3": "ET"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": ["./imagesTs/BraTS2021_00011.nii.gz"],
    }
    for name, content in (("v2", None), ("v1", first)):
        if content:
            write_json(nnunet / "dataset.json", content)
        prepare("volumes", "--src", nnunet, "--out", tmp_path / name, "--size", 32, "--unlabelled")
        rows = [row for row in table(tmp_path / name) if not row["labelled"]]
        assert {row["patient_id"] for row in rows} == {"BraTS2021_00011"} and rows[0]["split"] == "reference"
    assert manifest(tmp_path / "v1")["files"] == manifest(tmp_path / "v2")["files"]


# ---------------------------------------------------------------- names


def test_names_of_gliomas_and_of_others():
    assert lesion_names({"edema": (1,), "Non-enhancing tumour": (2,), "AT": (3,)}) == {
        "edema": "ED", "Non-enhancing tumour": "NCR", "AT": "ET"}
    assert lesion_names({"necrosis": (1,), "cyst": (2,)}) == {"necrosis": "necrosis", "cyst": "cyst"}
    assert lesion_names({"whole tumor": (1,)}) == {"whole tumor": "whole tumor"}  # no region
    kits = {"kidney": (1, 2, 3), "masses": (2, 3), "tumor": (2,)}
    assert smallest_regions(kits, "") == {1: "kidney", 2: "tumor", 3: "masses"}
    with pytest.raises(UserError, match="'a' and 'b' both hold 2"):
        smallest_regions({"a": (1, 2), "b": (2, 3)}, "dataset.json")


def test_what_is_left_of_regions_is_known_where_all_are_there():
    """Of the whole tumour without its core, or of the core without what enhances, something else is left."""
    whole, core, enhancing = {"whole tumor": (1, 2, 3)}, {"tumor core": (2, 3)}, {"enhancing tumor": (3,)}
    assert lesion_names(whole | core | enhancing) == {"whole tumor": "ED", "tumor core": "NCR", "enhancing tumor": "ET"}
    for some in (whole, core, whole | core, whole | enhancing, core | enhancing):
        assert lesion_names(some) == {name: name for name in some}


def test_signs_that_tell_sequences_apart_stay():
    names = {"T1-Gd": "t1ce", "t1_ce": "t1ce", "T2 FLAIR": "flair", "T2w": "t2", "T2*": "T2*", "T1+": "T1+"}
    assert {name: channel_name(name) for name in names} == names


def named(*of_cases: dict[str, tuple[int, ...]], regions: dict[str, tuple[int, ...]] | None = None) -> Volumes:
    """A set whose cases name their labels themselves, or not."""
    image, label = {0: Source(Path("image"))}, Source(Path("label"))
    cases = [Found(f"case {i}", image, label, regions=one) for i, one in enumerate(of_cases)]
    layout = Layout("a set", Path("set.json"), {0: "t1ce"}, regions or {}, cases or [Found("case", {}, None)])
    return name_volumes(layout, modalities=None, lesion_classes=(), anatomy_labels=(), unlabelled=True)


def test_a_segment_is_called_alike_in_all_cases():
    """Whatever others its case has: here edema is no part of a glioma's three."""
    found = named({"edema": (1,)}, {"cyst": (1,), "edema": (2,)})
    assert found.lesion_classes == ("cyst", "edema")
    assert found.called == {"cyst": "cyst", "edema": "edema", "t1ce": "t1ce"}
    assert [case.values.lesion for case in found.cases.values()] == [{1: 2}, {1: 1, 2: 2}]
    assert named({"edema": (1,)}, {"ET": (1,)}).lesion_classes == ("ED", "ET")


def test_0_is_background_and_ignore_is_ignore_however_they_are_called():
    found = named(regions={"Clear Label": (0,), "cancer": (1,), "Ignore": (2,)})
    (case,) = found.cases.values()
    assert found.lesion_classes == ("cancer",) and case.values.lesion == {0: 0, 1: 1} and case.values.ignore == 2
    with pytest.raises(UserError, match="set.json: label 'cancer' holds 0, which is the background"):
        named(regions={"cancer": (0, 1)})
    with pytest.raises(UserError, match="set.json: label ignore has several values"):
        named(regions={"cancer": (1,), "ignore": (2, 3)})


@pytest.mark.parametrize(("flags", "reason"), [
    (["--modalities=t1ce,T1c"], "--modalities=t1ce,t1ce: has a channel twice"),
    (["--modalities=t2"], "dataset.json: has no channel t2, but T1ce, Flair; .*--channels=t2=0"),
    (["--anatomy_labels=liver"], "--anatomy_labels: no label is called liver; .*enhancing tumor, tumor core, whole"),
    (["--channels=t1ce=4"], "BraTS2021_00000 has no t1ce file"),
    (["--labels=ED=1"], r"labelsTr/BraTS2021_0\d+.nii.gz: has label [23], which nothing names; name it with --labels"),
    (["--labels=a=1,b=2,c=3", "--anatomy_labels=a,b,c"], "no label is left for a lesion"),
    (["--labels=a=1+2,b=2+3"], "both hold 2"),
    (["--channels=t1=0,T1w=1"], "channels 0 and 1 are both t1"),
    (["--anatomy=x", "--anatomy_scheme=six"], "--anatomy x: does not exist"),
    (["--mask=x"], "--mask x: does not exist"),
    (["--splits=x.csv", "--query_fold=0"], "--splits and --query_fold both say"),
    (["--anatomy=.", "--anatomy_scheme=six", "--anatomy_labels=tumor core"], "give one of the two"),
])
def test_unknown_names_are_refused(tmp_path, nnunet, flags, reason):
    with pytest.raises(UserError, match=reason):
        prepare("volumes", "--src", nnunet, "--out", tmp_path / "out", "--size", 32, *flags)
    assert not (tmp_path / "out").exists()


def spoil_json(**changes):
    return lambda src: change_json(src / "dataset.json", **changes)


def spoil_volume(part: str, change) -> object:
    def spoil(src: Path) -> None:
        path = src / part
        save(path, change(np.asarray(nib.load(path).dataobj)))

    return spoil


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda src: (src / "imagesTr" / "BraTS2021_00004_0001.nii.gz").unlink(), "BraTS2021_00004 has no flair file"),
    (lambda src: (src / "labelsTr" / "BraTS2021_00004.nii.gz").unlink(), "BraTS2021_00004 has no segmentation"),
    (lambda src: [path.unlink() for path in src.glob("*/BraTS2021_00004_*")], "BraTS2021_00004 has no t1ce file"),
    (spoil_volume("imagesTr/BraTS2021_00004_0001.nii.gz", lambda d: d[:-1]), "_0001.nii.gz: has shape .*one grid"),
    (spoil_volume("labelsTr/BraTS2021_00004.nii.gz", lambda d: d[:-1]), "00004.nii.gz: has shape .*one grid"),
    (spoil_volume("labelsTr/BraTS2021_00004.nii.gz", lambda d: d + 9), "has label 9, which nothing names.*whole tumor"),
    (lambda src: [(src / "imagesTr" / f"BraTS2021_00004_{k:04d}.nii.gz").write_bytes(
        (src / "imagesTr" / f"BraTS2021_00005_{k:04d}.nii.gz").read_bytes()) for k in range(2)], "has the same images as"),
    (spoil_json(file_ending=".mha"), "its files are .mha; convert"),
    (spoil_json(channel_names=["T1ce"]), "dataset.json: not of the form that its layout has"),
    (spoil_json(labels={"whole": "many"}), "dataset.json: not of the form that its layout has"),
    (spoil_json(channel_names={}), "dataset.json: names no channels; .*--channels=t1ce=0"),
    (spoil_json(labels={}), "dataset.json: names no labels; .*--labels="),
    (spoil_json(dataset={"a": {"label": "a.nii.gz"}}), "dataset.json: not of the form .*no 'images'"),
    (lambda src: (src / "dataset.json").write_text("{"), "dataset.json: not of the form"),
    (lambda src: (src / "dataset.json").write_text("{}"), "neither channel_names .* nor a list training"),
    (lambda src: (src / "dataset.json").unlink(), "--src .*src: holds no dataset.json"),
    (lambda src: (src / "splits_final.json").write_text("[{}]"), "splits_final.json: not of the form .*no 'val'"),
])
def test_bad_sets_are_refused(tmp_path, nnunet, spoil, reason):
    spoil(nnunet)
    with pytest.raises(UserError, match=reason):
        prepare("volumes", "--src", nnunet, "--out", tmp_path / "out", "--size", 32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "reason"), [
    ({"training": [{"image": "a.nii.gz", "label": 1}]}, "label 1 is a number"),
    ({"training": [{"label": "a.nii.gz"}]}, "not of the form .*no 'image'"),
    ({"training": [{"image": "a/x.nii.gz"}, {"image": "a/x.nii.gz"}]}, "case x is there twice"),
    ({"training": [{"image": "a/x.nii.gz", "label": ""}]}, "x has no segmentation"),
    ({"training": [{"image": f"{name}.nii.gz", "label": "one.nii.gz"} for name in "ab"]}, "names .*one.nii.gz twice"),
    ({"training": [{"image": ["x_0.nii.gz", "x_0.nii.gz"], "label": "y.nii.gz"}]}, "names .*x_0.nii.gz twice"),
    ({"training": []}, "names no cases"),
])
def test_bad_datalists_are_refused(tmp_path, content, reason):
    with pytest.raises(UserError, match=f"list.json.*{reason}|{reason}"):
        prepare("volumes", "--src", write_json(tmp_path / "list.json", content), "--out", tmp_path / "out",
                "--channels=t1=0", "--labels=a=1")


def test_folds_and_lists_of_a_datalist_are_queries(tmp_path):
    def item(name: str, **more: int) -> dict:
        return {"image": f"{name}.nii.gz", "label": f"{name}-label.nii.gz", **more}

    content = {"training": [item("a", fold=0), item("b", fold=1), item("c")], "validation": [item("d")],
               "testing": [item("e"), "f.nii.gz"]}
    layout = read_layout(write_json(tmp_path / "list.json", content), {0: "t1"}, {"a": (1,)})
    cases = name_volumes(layout, modalities=None, lesion_classes=(), anatomy_labels=(), unlabelled=False).cases
    assert [*cases] == [*"abcde"]
    for fold, query in (("0", "a"), ("1", "b"), ("validation", "d"), ("test", "e")):
        splits = split_cases(cases, csv=None, query_fold=fold, seed=0)
        assert [name for name in splits if splits[name] == "query"] == [query]


def test_ids_are_what_file_names_have_in_common(tmp_path):
    names = {
        "a/pre_t1.nii.gz": "pre", "case7/t1.nii.gz": "case7", "x-1_flair.nii.gz": "x-1",
    }
    content = {"training": [{"image": [name, name.replace("t1", "t2").replace("flair", "ct")]} for name in names]}
    cases = read_layout(write_json(tmp_path / "list.json", content), {0: "t1"}, {"a": (1,)}).cases
    assert [case.case_id for case in cases] == [*names.values()]
    content = {"training": [{"image": "c1/image.nii.gz"}, {"image": "c2/image.nii.gz"}]}
    path = write_json(tmp_path / "list.json", content)
    assert [case.case_id for case in read_layout(path, {0: "t1"}, {"a": (1,)}).cases] == ["c1", "c2"]
    with pytest.raises(UserError, match="names no channels"):
        read_layout(path, {}, {"a": (1,)})


# ---------------------------------------------------------------- whole heads


def test_a_mask_beside_the_scan_strips_the_skull(tmp_path, as_brats):
    flags = same_patients.write_brats(tmp_path / "src")
    for name, one in same_patients.patients().items():
        brain = (one.t1ce != 0) | (one.flair != 0)
        for kind, data in (("t1ce", one.t1ce), ("flair", one.flair)):
            save(tmp_path / "src" / name / f"{name}_{kind}.nii.gz", np.where(brain, data, 777).astype(np.int16))
        save(tmp_path / "src" / name / "brain_mask.nii.gz", brain.astype(np.uint8))
    with pytest.raises(UserError, match="has no background of 0; strip the skull first, or .*--mask"):
        prepare(*flags, "--out", tmp_path / "out", "--size", SIZE)
    prepare(*flags, "--out", tmp_path / "out", "--size", SIZE, "--mask", tmp_path / "src")
    assert manifest(tmp_path / "out")["digest"] == manifest(as_brats)["digest"]
    record, settings = records(as_brats, "query")[0], Settings.from_json(manifest(as_brats)["settings"])
    asked = tmp_path / "src" / record["patient_id"]
    scan = open_scan(next(asked.glob("*_t1ce.nii.gz")), settings, asked / "brain_mask.nii.gz")
    np.testing.assert_array_equal(scan.shown(record["slice_index"]), record["image"])
    save(tmp_path / "src" / "BraTS2021_00000" / "brain_mask.nii.gz", np.ones(SHAPE, np.uint8))
    with pytest.raises(UserError, match="brain_mask.nii.gz: is no mask of the body"):
        prepare(*flags, "--out", tmp_path / "no", "--size", SIZE, "--mask", tmp_path / "src")
    (tmp_path / "src" / "BraTS2021_00000" / "brain_mask.nii.gz").rename(tmp_path / "mask.nii.gz")
    with pytest.raises(UserError, match="holds 3 masks of BraTS2021_00000"):
        prepare(*flags, "--out", tmp_path / "no", "--size", SIZE, "--mask", tmp_path / "src")
