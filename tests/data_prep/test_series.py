"""DICOM: series and segmentations as cases, single images as pictures."""

import csv
from collections.abc import Callable
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from PIL import Image
from tests.data_prep import same_patients
from tests.data_prep.conftest import SIZE, manifest, prepare, table
from tests.data_prep.same_patients import ED, ET, NCR, save_segmentation, save_series, uid

from data_prep.join import join_parts
from data_prep.series import read_series_table
from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation import dicom
from decomp_jax.preparation.picture import FOREGROUND, load_mask, load_picture, prepare_picture
from decomp_jax.preparation.scan import open_scan
from decomp_jax.preparation.volume import Source, load_labels, load_volume

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("dicom") / "src"
    return folder, same_patients.write_dicom(folder)


def splits_of(data: Path, to: Path) -> Path:
    """The splits of another data set: those of DICOM go by the hidden numbers of patients."""
    lines = dict.fromkeys(f"{row['patient_id']},{row['split']}" for row in table(data))
    to.write_text("\n".join(["patient_id,split", *lines]) + "\n")
    return to


def test_series_give_the_same_bytes_and_keep_who_it_was(tmp_path, as_brats, written, capsys):
    flags = (*written[1], "--splits", splits_of(as_brats, tmp_path / "splits.csv"))
    prepare(*flags, "--out", tmp_path / "out", "--size", SIZE)
    found, expected = manifest(tmp_path / "out"), manifest(as_brats)
    assert found["files"] == expected["files"]
    assert found["settings"] == {**expected["settings"], "source": "volumes"}
    line = capsys.readouterr().err.splitlines()[0]
    assert "DICOM series; 12 cases, 12 labelled; channels t1ce, flair; lesion classes NCR (Necrosis), ED (edema), ET" in line
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            for secret in ("MRN", "Doe"):
                assert secret.encode() not in path.read_bytes() and secret.encode("utf-32-le") not in path.read_bytes()


def test_visits_of_a_patient_stay_together(tmp_path):
    lines = ["case,channel,series"]
    for i in range(16):
        one = same_patients.patient(i)
        series = save_series(tmp_path / "src", f"{i % 4}", uid(), one.t1ce)
        seg = save_segmentation(tmp_path / "src", series, one.classes)
        lines += [f"case-{i},t1ce,{series[0].SeriesInstanceUID}", f"case-{i},label,{seg.SeriesInstanceUID}"]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    prepare("volumes", "--src", tmp_path / "src", "--table", tmp_path / "table.csv", "--out", tmp_path / "out", "--size", 32)
    splits = {row["patient_id"]: row["split"] for row in table(tmp_path / "out")}
    assert len({*splits.values()}) == 4
    assert all(splits[f"case-{i}"] == splits[f"case-{i % 4}"] for i in range(16))


def test_a_part_that_lacks_classes_or_labels(tmp_path, written):
    """Patients without some class, and an archive that no one has segmented, join the others by --lesion_classes."""
    lines = ["case,channel,series"]
    for i, segmented in enumerate((True, False)):
        series = save_series(tmp_path / "src", f"{20 + i}", uid(), same_patients.patient(20 + i).t1ce)
        lines.append(f"new-{i},t1ce,{series[0].SeriesInstanceUID}")
        if segmented:
            one = same_patients.patient(20)
            seg = save_segmentation(tmp_path / "src", series, np.where(one.classes == ED, ED, 0), ("edema",))
            lines.append(f"new-{i},label,{seg.SeriesInstanceUID}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    old = (*written[1], "--modalities=t1ce", "--size", SIZE, "--shard=1/1")
    new = ("volumes", "--src", tmp_path / "src", "--table", tmp_path / "table.csv", "--size", SIZE, "--shard=1/1")
    prepare(*old, "--out", tmp_path / "old")
    prepare(*new, "--out", tmp_path / "alone", "--unlabelled")
    assert manifest(tmp_path / "alone")["settings"]["lesion_classes"] == ["ED"]
    with pytest.raises(UserError, match="alone: prepared with lesion_classes="):
        join_parts(tmp_path / "no", [tmp_path / "old", tmp_path / "alone"])
    prepare(*new, "--out", tmp_path / "new", "--unlabelled", "--lesion_classes=NCR,ED,ET")
    join_parts(tmp_path / "all", [tmp_path / "old", tmp_path / "new"])
    rows = {row["patient_id"]: row for row in table(tmp_path / "all") if row["slice_index"] == 2}
    assert len(rows) == 14 and rows["new-0"]["has_abnormality"] and not rows["new-1"]["labelled"]
    with pytest.raises(UserError, match="--lesion_classes: lacks ED, which .*table.csv has"):
        prepare(*new, "--out", tmp_path / "no", "--lesion_classes=NCR")


def test_the_list_names_no_patient_and_becomes_a_table(tmp_path, written, capsys):
    prepare("volumes", "--src", written[0], "--list")
    printed = capsys.readouterr().out
    assert "MRN" not in printed and "Doe" not in printed
    rows = list(csv.DictReader(printed.splitlines()))
    assert len(rows) == 36 and len({row["case"] for row in rows}) == 12
    assert [row["channel"] for row in rows].count("label") == 12
    assert {row["modality"] for row in rows} == {"CT", "SEG"} and {row["files"] for row in rows} == {"5", "1"}
    filled = printed.replace("case-0001,,", "case-0001,t1,", 1)
    (tmp_path / "table.csv").write_text(filled)
    flags = ("volumes", "--src", written[0], "--out", tmp_path / "out", "--size", 32, "--table", tmp_path / "table.csv")
    with pytest.raises(UserError, match=r"has no t1 file"):  # of the cases whose channel is not filled in
        prepare(*flags)
    with pytest.raises(UserError, match="--out: name the data set"):
        prepare("volumes", "--src", written[0], "--table", tmp_path / "table.csv")
    with pytest.raises(UserError, match="--table: names the channels"):
        prepare(*flags, "--channels=t1=0")


@pytest.mark.parametrize(("change", "reason"), [
    (lambda lines: [*lines, lines[1]], "line 38: case BraTS2021_00000 has t1ce already"),
    (lambda lines: [*lines, "x,t1ce,1.2.3"], "line 38 names no case, or a series that .* does not hold; see --list"),
    (lambda lines: [lines[0], lines[1].replace("t1ce", "label")], "line 2: the channel 'label' is for"),
    (lambda lines: [lines[0], lines[3].replace("label", "t1ce")], "line 2: the channel 'label' is for"),
    (lambda lines: [lines[0], lines[3]], "names no channel of images"),
    (lambda lines: lines[:3], "no label is left for a lesion, of none; .*--lesion_classes"),
    (lambda lines: [*lines[:3], lines[6].replace("BraTS2021_00001", "BraTS2021_00000")], "series are of several patients"),
    (lambda lines: [lines[0].replace("series", "uid"), *lines[1:]], "table.csv: no column series"),
])
def test_tables_that_do_not_fit_are_refused(tmp_path, written, change, reason):
    lines = (written[0] / "table.csv").read_text().splitlines()
    (tmp_path / "table.csv").write_text("\n".join(change(lines)))
    with pytest.raises(UserError, match=reason):
        prepare("volumes", "--src", written[0], "--table", tmp_path / "table.csv", "--out", tmp_path / "out")


# ---------------------------------------------------------------- volumes


@pytest.fixture
def scan(tmp_path: Path) -> tuple[Path, list[pydicom.Dataset]]:
    return tmp_path / "scan", save_series(tmp_path / "scan", "P", uid(), same_patients.patient(0).flair)


def test_a_folder_is_a_scan_to_query_with(scan, as_brats):
    folder, _ = scan
    image = load_volume(folder)
    expected = same_patients.patient(0).flair[::-1, ::-1]  # to the right, front and top
    np.testing.assert_array_equal(image.get_fdata(), expected)
    settings = Settings("volumes", SIZE, modalities=("flair",))
    nifti = as_brats.parent / "src" / "BraTS2021_00000" / "BraTS2021_00000_flair.nii.gz"
    np.testing.assert_array_equal(open_scan(folder, settings).shown(3), open_scan(nifti, settings).shown(3))
    np.testing.assert_allclose(image.affine, load_volume(nifti).affine)


def test_series_that_are_no_volume_are_refused(scan, tmp_path):
    folder, files = scan
    save_series(tmp_path / "two", "P", uid(), same_patients.patient(0).flair)
    save_series(tmp_path / "two", "P", uid(), same_patients.patient(1).flair)
    with pytest.raises(UserError, match="two: holds 2 series of images; name the folder of one"):
        load_volume(tmp_path / "two")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match="none: holds no DICOM series"):
        load_volume(tmp_path / "none")
    (folder / "cut.dcm").write_bytes(next(folder.iterdir()).read_bytes()[:300])
    with pytest.raises(UserError, match="cut.dcm: can't be read as DICOM"):
        load_volume(folder)
    (folder / "cut.dcm").write_text("nothing")
    with pytest.raises(UserError, match="cut.dcm: can't be read as DICOM"):
        load_volume(folder)
    (folder / "cut.dcm").unlink()
    next(path for path in folder.iterdir() if pydicom.dcmread(path).InstanceNumber == 3).unlink()
    with pytest.raises(UserError, match="scan: can't be read as DICOM"):  # a gap
        load_volume(folder)


def changed(folder: Path, files: list[pydicom.Dataset], change: Callable[[int, pydicom.Dataset], None]) -> Path:
    """The files of a series, each changed, in place of those of the folder."""
    for path in folder.iterdir():
        path.unlink()
    for z, one in enumerate(files):
        change(z, one)
        one.save_as(folder / f"{z}.dcm", enforce_file_format=True)
    return folder


def scaled(z: int, one: pydicom.Dataset) -> None:
    """Slices with slopes of their own, as of PET."""
    one.RescaleSlope = f"{2.0 ** -z}"
    one.PixelData = (np.frombuffer(one.PixelData, "<u2") << z).tobytes()


@pytest.mark.parametrize("change", [
    lambda z, one: setattr(one, "PhotometricInterpretation", "MONOCHROME1"),  # how it is shown
    lambda z, one: (setattr(one, "WindowCenter", "40"), setattr(one, "WindowWidth", "80")),
    lambda z, one: one.compress(pydicom.uid.RLELossless),
    lambda z, one: setattr(one.file_meta, "TransferSyntaxUID", pydicom.uid.DeflatedExplicitVRLittleEndian),
    scaled,
])
def test_values_are_those_of_the_modality(scan, change):
    expected = same_patients.patient(0).flair[::-1, ::-1]
    np.testing.assert_array_equal(load_volume(changed(*scan, change)).get_fdata(), expected)


def test_files_that_copies_add_are_passed_over(scan):
    (scan[0] / "._0.dcm").write_bytes(b"\0\5\x16\7")  # of macOS
    (scan[0] / ".DS_Store").write_bytes(b"Bud1")
    np.testing.assert_array_equal(load_volume(scan[0]).get_fdata(), same_patients.patient(0).flair[::-1, ::-1])


def test_two_acquisitions_of_a_series_are_no_volume(scan):
    folder, files = scan
    for z, one in enumerate(files):
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = uid()
        one.AcquisitionNumber = 2
        one.save_as(folder / f"again-{z}.dcm", enforce_file_format=True)
    with pytest.raises(UserError, match="scan: can't be read as DICOM"):
        load_volume(folder)


def test_channels_of_a_table_go_by_any_of_their_names(written, tmp_path):
    text = (written[0] / "table.csv").read_text()
    (tmp_path / "table.csv").write_text(text.replace("t1ce", "T1-Gd", 3))
    assert read_series_table(written[0], tmp_path / "table.csv").channels == {0: "t1ce", 1: "flair"}


def test_segments_overlap_and_may_lie_elsewhere(scan, tmp_path):
    folder, files = scan
    one = same_patients.patient(0)
    nested = [one.classes == ET, np.isin(one.classes, (NCR, ET)), one.classes > 0]
    code = highdicom.sr.CodedConcept("49755003", "SCT", "Morphologically abnormal structure")

    def save(masks: list[np.ndarray], images: list[pydicom.Dataset], name: str) -> Path:
        highdicom.seg.Segmentation(
            source_images=images, pixel_array=np.stack([m.transpose(2, 1, 0) for m in masks], -1).astype(np.uint8),
            segmentation_type="BINARY", segment_descriptions=[
                highdicom.seg.SegmentDescription(i, f"part {i % 2}", code, code, "MANUAL") for i in range(1, len(masks) + 1)
            ], series_instance_uid=uid(), series_number=2, sop_instance_uid=uid(), instance_number=1, manufacturer="m",
            manufacturer_model_name="m", software_versions="1", device_serial_number="1",
        ).save_as(tmp_path / name)
        return tmp_path / name

    path, grid = save(nested, files, "seg.dcm"), load_volume(folder)
    values = load_labels(Source(path), Source(folder), grid)
    np.testing.assert_array_equal(values, np.array([0, 2, 3, 1])[one.classes][::-1, ::-1])
    assert dicom.segment_names(path) == {"part 1": (1, 3), "part 0": (2,)} and ED == 2
    shifted = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    for image in shifted:
        image.ImagePositionPatient[0] += 0.4
    with pytest.raises(UserError, match="moved.dcm: its voxels are not those of the images"):
        load_labels(Source(save(nested, shifted, "moved.dcm")), Source(folder), grid)
    with pytest.raises(UserError, match="can't be read as DICOM"):
        dicom.segment_names(next(folder.iterdir()))


# ---------------------------------------------------------------- single images


def save_single(path: Path, pixels: np.ndarray, **tags) -> Path:
    one = save_series(path.parent / "series", "P", uid(), same_patients.patient(0).flair)[0]
    one.Rows, one.Columns = pixels.shape[:2]
    one.PixelData = pixels.astype("u1" if pixels.ndim == 3 else "<u2").tobytes()
    if pixels.ndim == 3:
        one.SamplesPerPixel, one.PlanarConfiguration, one.PhotometricInterpretation = 3, 0, "RGB"
        one.BitsAllocated = one.BitsStored = 8
        one.HighBit = 7
        del one.RescaleSlope, one.RescaleIntercept
    for name, value in tags.items():
        setattr(one, name, value)
    one.save_as(path, enforce_file_format=True)
    return path


PIXELS = np.random.default_rng(0).integers(0, 4000, (20, 30))


@pytest.mark.parametrize("tags", [
    {}, {"WindowCenter": "300", "WindowWidth": "800"}, {"RescaleSlope": "2.5", "RescaleIntercept": "-7"},
    {"WindowCenter": "900", "WindowWidth": "1000", "RescaleSlope": "0.5"},
    {"PhotometricInterpretation": "MONOCHROME1"},
    {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": "300", "WindowWidth": "800"},
])
def test_single_images_look_as_pydicom_shows_them(tmp_path, tags):
    path = save_single(tmp_path / "one.dcm", PIXELS, **tags)
    one = pydicom.dcmread(path)
    expected = pydicom.pixels.apply_voi_lut(pydicom.pixels.apply_modality_lut(one.pixel_array, one), one)
    expected = expected.astype(float) * (-1 if "PhotometricInterpretation" in tags else 1)
    found = load_picture(path).astype(float)

    def stretched(values: np.ndarray) -> np.ndarray:
        return (values - values.min()) / np.ptp(values)

    np.testing.assert_allclose(stretched(found), stretched(expected), atol=2e-3)


def test_single_images_in_a_table(tmp_path):
    rng = np.random.default_rng(1)
    lines = ["image,mask"]
    for i in range(5):
        pixels = np.zeros((32, 32))
        pixels[4:28, 4:28] = rng.integers(500, 3000, (24, 24))
        save_single(tmp_path / f"{i}.dcm", pixels)
        Image.fromarray((pixels > 2500).astype(np.uint8) * 255).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.dcm,{i}.png")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    prepare("images", "--table", tmp_path / "table.csv", "--out", tmp_path / "out", "--size", 32)
    assert {row["patient_id"] for row in table(tmp_path / "out")} == {f"{i}.dcm" for i in range(5)}
    settings = Settings.from_json(manifest(tmp_path / "out")["settings"])
    assert settings.foreground == FOREGROUND and prepare_picture(tmp_path / "0.dcm", settings).shape == (32, 32, 1)


def test_colours_masks_and_files_that_are_no_image(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(colours).convert("L"))
    np.testing.assert_array_equal(load_picture(save_single(tmp_path / "rgb.dcm", colours)), expected)
    mask = (PIXELS > 2000).astype(int)
    path = save_single(tmp_path / "mask.dcm", mask, WindowCenter="300", WindowWidth="800")
    np.testing.assert_array_equal(load_mask(path), mask)
    deep = pydicom.dcmread(tmp_path / "rgb.dcm")
    deep.BitsAllocated, deep.BitsStored, deep.HighBit = 16, 16, 15
    deep.PixelData = (colours.astype("<u2") * 257).tobytes()
    deep.save_as(tmp_path / "deep.dcm")
    np.testing.assert_allclose(load_picture(tmp_path / "deep.dcm") / 257, expected, atol=1)
    (tmp_path / "no.dcm").write_text("nothing")
    with pytest.raises(UserError, match="no.dcm: can't be read as DICOM"):
        load_picture(tmp_path / "no.dcm")


def test_without_highdicom_the_extra_is_named(scan, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(UserError, match=r"highdicom, which is not installed; pip install .*\[dicom\]"):
        load_volume(scan[0])
