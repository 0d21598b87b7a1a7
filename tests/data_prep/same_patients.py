"""The same twelve tiny patients, written in every layout that `data_prep` reads."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import highdicom
import highdicom.seg
import nibabel as nib
import numpy as np
import pydicom

AFFINE = np.array([[-1.0, 0, 0, 12], [0, -1, 0, 39], [0, 0, 2, -7], [0, 0, 0, 1]])  # axes to the left, back and top
SHAPE = (36, 40, 5)
NCR, ED, ET = 1, 2, 3


class Patient(NamedTuple):
    """Channels and classes (0, NCR, ED, ET) as [left, back, top] voxels."""

    t1ce: np.ndarray
    flair: np.ndarray
    classes: np.ndarray


def patients() -> dict[str, Patient]:
    return {f"BraTS2021_{seed:05d}": patient(seed) for seed in range(12)}


def patient(seed: int) -> Patient:
    """Noise in a box, so that no flip or turn goes unseen."""
    rng = np.random.default_rng(seed)
    images = np.zeros((2, *SHAPE), np.int16)
    images[:, 6:30, 8:31, 1:] = rng.integers(50, 1000, (2, 24, 23, 4))
    classes = np.zeros(SHAPE, np.uint8)
    x, y = rng.integers(8, 12, 2)
    classes[x : x + 10, y : y + 9, 2:4] = ED
    classes[x + 2 : x + 8, y + 2 : y + 7, 2:4] = ET
    classes[x + 4 : x + 6, y + 4 : y + 5, 2:4] = NCR
    return Patient(*images, classes)


def save(path: Path, data: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, AFFINE), path)
    return path


def numbered(classes: np.ndarray, *, ncr: int, ed: int, et: int) -> np.ndarray:
    """The classes under the numbers of a layout."""
    return np.array([0, ncr, ed, et], np.uint8)[classes]


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


# Each writes the patients below a folder and returns the flags that `data_prep` reads them with.


def write_brats(folder: Path) -> list[str]:
    for name, one in patients().items():
        for kind, data in (("t1ce", one.t1ce), ("flair", one.flair), ("seg", numbered(one.classes, ncr=1, ed=2, et=4))):
            save(folder / name / f"{name}_{kind}.nii.gz", data)
    return ["brats", "--src", str(folder), "--modalities=t1ce,flair"]


def write_nnunet(folder: Path) -> list[str]:
    """nnU-Net v2, with the regions and numbers of its own conversion of BraTS."""
    for name, one in patients().items():
        save(folder / "imagesTr" / f"{name}_0000.nii.gz", one.t1ce)
        save(folder / "imagesTr" / f"{name}_0001.nii.gz", one.flair)
        save(folder / "labelsTr" / f"{name}.nii.gz", numbered(one.classes, ed=1, ncr=2, et=3))
    write_json(folder / "dataset.json", {
        "channel_names": {"0": "T1ce", "1": "Flair"},
        "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]},
        "regions_class_order": [1, 2, 3], "numTraining": 12, "file_ending": ".nii.gz",
    })
    names = sorted(patients())
    folds = [{"train": [n for n in names if n not in names[k::5]], "val": names[k::5]} for k in range(5)]
    write_json(folder / "splits_final.json", folds)
    return ["volumes", "--src", str(folder)]


def write_decathlon(folder: Path) -> list[str]:
    """Medical Segmentation Decathlon: 4-D, other orders of channels and labels, and files that macOS leaves."""
    for name, one in patients().items():
        save(folder / "imagesTr" / f"{name}.nii.gz", np.stack([one.flair, one.t1ce], -1))
        save(folder / "labelsTr" / f"{name}.nii.gz", numbered(one.classes, ed=1, ncr=2, et=3))
        (folder / "imagesTr" / f"._{name}.nii.gz").write_bytes(b"Mac OS X")
    paths = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in patients()]
    write_json(folder / "dataset.json", {
        "modality": {"0": "FLAIR", "1": "t1gd"},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        "training": [*paths, {"image": "./imagesTr/._a.nii.gz", "label": "./labelsTr/._a.nii.gz"}], "test": [],
    })
    return ["volumes", "--src", str(folder), "--modalities=t1ce,flair"]


def write_datalist(folder: Path) -> list[str]:
    """A MONAI datalist that names nothing."""
    items = []
    for i, (name, one) in enumerate(patients().items()):
        for kind, data in (("t1ce", one.t1ce), ("flair", one.flair), ("seg", one.classes)):
            save(folder / name / f"{name}_{kind}.nii.gz", data)
        kinds = [f"{name}/{name}_{kind}.nii.gz" for kind in ("flair", "t1ce", "seg")]
        items.append({"image": kinds[:2], "label": kinds[2], "fold": i % 5})
    write_json(folder / "list.json", {"training": items})
    return ["volumes", "--src", str(folder / "list.json"), "--channels=t1ce=1,flair=0", "--labels=NCR=1,ED=2,ET=3",
            "--modalities=t1ce,flair"]


def write_dicom(folder: Path) -> list[str]:
    """Series of slices and DICOM SEG, all files in one folder, and the table that names them."""
    lines = ["case,channel,series"]
    for name, one in patients().items():
        study = uid()
        series = {kind: save_series(folder, name, study, getattr(one, kind)) for kind in ("t1ce", "flair")}
        series["label"] = [save_segmentation(folder, series["t1ce"], one.classes)]
        lines += [f"{name},{kind},{files[0].SeriesInstanceUID}" for kind, files in series.items()]
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return ["volumes", "--src", str(folder), "--table", str(folder / "table.csv")]


def uid() -> str:
    return highdicom.UID()[:64]


def save_series(folder: Path, patient_id: str, study: str, data: np.ndarray) -> list[pydicom.Dataset]:
    """One file a slice, named so that their order tells nothing; stored as value + 1000, as in CT."""
    folder.mkdir(parents=True, exist_ok=True)
    series, frame_of_reference, files = uid(), uid(), []
    for z in range(data.shape[2]):
        one = pydicom.Dataset()
        one.file_meta = pydicom.dataset.FileMetaDataset()
        one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = uid()
        one.PatientID, one.PatientName, one.PatientBirthDate, one.PatientSex = f"MRN-{patient_id}", "Doe^Jane", "", ""
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame_of_reference
        one.StudyID = one.StudyDate = one.StudyTime = one.AccessionNumber = one.ReferringPhysicianName = ""
        one.Modality, one.SeriesDescription, one.Manufacturer, one.SeriesNumber = "CT", "AX T2 FLAIR", "", 1
        one.ImageType, one.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], data.shape[2] - z
        one.ImagePositionPatient = [-AFFINE[0, 3], -AFFINE[1, 3], AFFINE[2, 3] + AFFINE[2, 2] * z]  # left, back, top
        one.ImageOrientationPatient, one.PixelSpacing, one.SliceThickness = [1, 0, 0, 0, 1, 0], [1, 1], AFFINE[2, 2]
        one.Rows, one.Columns, one.SamplesPerPixel = data.shape[1], data.shape[0], 1
        one.BitsAllocated = one.BitsStored = 16
        one.HighBit, one.PixelRepresentation, one.PhotometricInterpretation = 15, 0, "MONOCHROME2"
        one.RescaleSlope, one.RescaleIntercept = "1", "-1000"
        one.PixelData = (data[..., z].T.astype(np.int32) + 1000).astype("<u2").tobytes()
        one.save_as(folder / f"{uid()}.dcm", enforce_file_format=True)
        files.append(one)
    return files


SEGMENTS = {"enhancing tumor": ET, "edema": ED, "Necrosis": NCR}


def save_segmentation(
    folder: Path, images: list[pydicom.Dataset], classes: np.ndarray, names: Iterable[str] = SEGMENTS
) -> pydicom.Dataset:
    """Segments in an order of their own."""
    masks = {name: classes == SEGMENTS[name] for name in names}
    code = highdicom.sr.CodedConcept("49755003", "SCT", "Morphologically abnormal structure")
    segmentation = highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=np.stack([mask.transpose(2, 1, 0) for mask in masks.values()], -1).astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=[
            highdicom.seg.SegmentDescription(i, name, code, code, "MANUAL") for i, name in enumerate(masks, 1)
        ],
        series_instance_uid=uid(), series_number=2, sop_instance_uid=uid(), instance_number=1, manufacturer="m",
        manufacturer_model_name="m", software_versions="1", device_serial_number="1",
    )
    segmentation.save_as(folder / f"{uid()}.dcm")
    return segmentation
