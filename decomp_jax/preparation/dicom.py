"""DICOM: series as volumes, segmentations on their grid, single images. Needs the extra `dicom` (highdicom)."""

import contextlib
import dataclasses
import io
import logging
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from decomp_jax.errors import UserError

SUFFIX = ".dcm"
MARK, MARK_AT = b"DICM", 128  # which files begin with, after that many bytes
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_SIZES = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "TotalPixelMatrixRows")
# Values of the modality, as HU: not as they would be shown, where MONOCHROME1 turns them round.
_STORED = {"dtype": np.float32, "apply_real_world_transform": False, "apply_presentation_lut": False}
_HEADER = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "Rows", "Columns")


@dataclasses.dataclass(frozen=True)
class Series:
    """A series found on disk; identifiers in it are for the caller to keep to itself.

    Attributes:
        files: in the order of their names.
        header: of the first file.
    """

    uid: str
    files: tuple[Path, ...]
    header: Any

    @property
    def modality(self) -> str:
        return self.header.get("Modality", "")


def _highdicom() -> types.ModuleType:
    try:
        import highdicom
        import highdicom.seg
    except ImportError as error:
        raise UserError('DICOM needs highdicom, which is not installed; pip install -e ".[dicom]"') from error
    return highdicom


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[types.ModuleType]:
    """highdicom; what it says of a file is told in one line. No warnings: these hold values of the file."""
    highdicom = _highdicom()
    log = logging.getLogger("pydicom")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield highdicom
    except UserError:
        raise
    except Exception as error:  # pydicom and its decoders raise whatever they come across
        raise UserError(f"{path}: can't be read as DICOM ({error}); export it again") from error
    finally:
        log.setLevel(level)


def find_series(folder: Path) -> list[Series]:
    """All series below a folder, in the order of their first files; hidden and other files are passed over.

    Raises:
        UserError: there are none, or a DICOM file is damaged.
    """
    _highdicom()
    import pydicom

    headers: dict[str, Any] = {}
    files: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        with _reading(path):
            try:
                header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER)
            except pydicom.errors.InvalidDicomError:
                if path.suffix.lower() == SUFFIX:
                    raise
                continue
        if uid := header.get("SeriesInstanceUID"):
            headers.setdefault(uid, header)
            files.setdefault(uid, []).append(path)
        elif path.suffix.lower() == SUFFIX:
            raise UserError(f"{path}: can't be read as DICOM (names no series); copy it again or remove it")
    if not files:
        raise UserError(f"{folder}: holds no DICOM series; name another folder")
    return [Series(str(uid), tuple(of_series), headers[uid]) for uid, of_series in files.items()]


def declared_bytes(path: Path, data: bytes) -> tuple[int, int]:
    """How many bytes a file's pixels take, and how many they are, before any is unpacked; `path` names it in errors.

    Raises:
        UserError: it is compressed, has fewer bytes than it declares, or is no image of whole slices.
    """
    if _DEFLATED in data:  # pydicom would unpack it whole
        raise UserError(f"{path}: is compressed; export it uncompressed")
    with _reading(path):
        import pydicom

        header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=_SIZES)
        if header.file_meta.TransferSyntaxUID.is_compressed:
            syntax = header.file_meta.TransferSyntaxUID.name
            raise UserError(f"{path}: is compressed ({syntax}); export it uncompressed")
        sizes = [int(header.get(name) or 1) for name in _SIZES[:4]]
        bits = int(header.get("BitsAllocated") or 0)
    if not all(name in header for name in ("Rows", "Columns", "BitsAllocated")) or "TotalPixelMatrixRows" in header:
        raise UserError(f"{path}: is no DICOM image of whole slices; bring those of the scan")
    pixels = int(np.prod(sizes, dtype=object))
    if min(sizes) < 1 or bits < 8 or pixels * bits // 8 > len(data):
        raise UserError(f"{path}: is not what its header declares; copy or export it again")
    return pixels * bits // 8, pixels


def read_series(path: Path, files: Sequence[Path | BinaryIO] = ()) -> nib.Nifti1Image:
    """A volume, float32, of the series' files, or of the only series of images in the folder `path`.

    Slices are in the order of their places; values are those of the modality, as HU.

    Raises:
        UserError: the files can't be read, are of several series, or are no stack of slices at equal distances.
    """
    if not files:
        images = [series for series in find_series(path) if series.modality != "SEG"]
        if len(images) != 1:
            raise UserError(f"{path}: holds {len(images)} series of images; name the folder of one")
        files = images[0].files
    with _reading(path) as highdicom:
        if len(files) == 1:
            volume = highdicom.imread(files[0]).get_volume(**_STORED)
        else:
            import pydicom

            datasets = [pydicom.dcmread(file) for file in files]
            volume = highdicom.get_volume_from_series(datasets, **_STORED)
        image = volume.to_nibabel()
    image.set_sform(image.affine, code="scanner")
    return image


def segment_names(path: Path) -> dict[str, tuple[int, ...]]:
    """Label of the segments of a DICOM SEG -> their numbers. Raises UserError if it is none."""
    with _reading(path) as highdicom:
        segmentation = highdicom.seg.segread(path)
        names: dict[str, tuple[int, ...]] = {}
        for number in segmentation.segment_numbers:
            label = segmentation.get_segment_description(number).segment_label
            names[label] = (*names.get(label, ()), int(number))
        return names


def read_segments(path: Path, grid: nib.Nifti1Image) -> np.ndarray:
    """Segment numbers, int32 [x,y,z], of a DICOM SEG on the grid of a volume; where some overlap, the smallest.

    Raises:
        UserError: the file is no DICOM SEG, or its voxels are not those of the volume.
    """
    with _reading(path) as highdicom:
        segmentation = highdicom.seg.segread(path)
        volume = segmentation.get_volume(skip_overlap_checks=True)
    try:
        placed = volume.match_geometry(highdicom.Volume.from_nibabel(grid), tol=1e-3)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{path}: its voxels are not those of the images ({error}); give the SEG of this series"
        ) from error
    segments = np.asarray(placed.array) > 0.5
    values = np.zeros(segments.shape[:3], np.int32)
    numbers = list(segmentation.segment_numbers)
    for i in np.argsort(-segments.sum((0, 1, 2)), kind="stable"):
        values[segments[..., i]] = numbers[i]
    return values


def read_single(path: Path, *, display: bool, file: BinaryIO | None = None) -> np.ndarray:
    """The only frame of a file, [rows,columns] or with colours last; rescaled, windowed and white on black to display.

    `file` is read in place of `path`, which names it in errors.

    Raises:
        UserError: the file can't be read, or holds several frames.
    """
    with _reading(path) as highdicom:
        image = highdicom.imread(file or path)
        if image.number_of_frames != 1:
            raise UserError(f"{path}: has {image.number_of_frames} frames, not one; give its folder and --slice")
        return image.get_frame(
            1,
            apply_real_world_transform=False,
            apply_modality_transform=None if display else False,
            apply_voi_transform=None if display else False,
            apply_presentation_lut=display,
        )
