"""BraTS-like scans: checks the volumes and turns them into axial slices.

Stored slices are [row, column] with row 0 anterior and column 0 the patient's right, as a radiologist reads them.
They show a square field of 256 mm around the centre of the volume, so that a volume of 240 x 240 voxels of 1 mm is
padded by 8 to 256 x 256 and nothing is resampled.
"""

import dataclasses
import functools
import gzip
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import sparse

from data_prep.anatomy import AnatomySource, six_regions
from data_prep.releases import Patient, find_patients, match_name
from data_prep.slices import PatientSlices
from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError

FIELD_MM = 256.0
SPACING_MM = (0.2, 10.0)  # voxel widths outside this range are another unit, not millimetres
MAX_TILT_DEGREES = 10.0
# Resampling leaves values about 0 around a skull-stripped brain; below this share of the 99th percentile they are 0.
RESIDUE = 1e-4
MAX_FOREGROUND = 0.9  # a volume with more voxels other than 0 has no background


# ---------------------------------------------------------------- volumes


def load_volume(path: Path) -> nib.Nifti1Image:
    """A 3-D NIfTI volume, float32, its axes ordered and flipped to right, anterior, superior; 2-D is one slice.

    Raises:
        UserError: the file is damaged or is no volume with finite values and a usable affine.
    """
    image = _parse(path)
    if image.ndim not in (2, 3):
        raise UserError(f"{path}: has shape {image.shape}, not three dimensions; give one 3-D volume a file")
    if image.get_data_dtype().kind not in "iuf":
        raise UserError(f"{path}: has voxels of type {image.get_data_dtype()}; export it with one number a voxel")
    data = np.asarray(image.dataobj, dtype=np.float32)
    if not np.isfinite(data).all():
        raise UserError(f"{path}: has voxels that are NaN or infinite; replace them or export the file again")
    _check_affine(path, image)
    return nib.as_closest_canonical(type(image)(np.atleast_3d(data), image.affine))


def _parse(path: Path) -> nib.Nifti1Image:
    cure = "copy or download it again"
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)  # whole, since the checksum stands at its end
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: is a damaged or no gzip file ({error}); {cure}") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check the path") from error
    for image_class in (nib.Nifti1Image, nib.Nifti2Image):
        if image_class.header_class.may_contain_header(data):
            break
    else:
        raise UserError(f"{path}: is no NIfTI file ({len(data)} bytes); {cure}")
    try:
        image = image_class.from_bytes(data)
        needed = image.dataobj.offset + int(np.prod(image.shape, dtype=object)) * image.get_data_dtype().itemsize
    except (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, ValueError) as error:
        raise UserError(f"{path}: has a damaged header ({error}); {cure}") from error
    if not 0 < needed <= len(data):
        raise UserError(f"{path}: is truncated ({len(data)} of {needed} bytes); {cure}")
    return image


def _check_affine(path: Path, image: nib.Nifti1Image) -> None:
    header, affine = image.header, image.affine
    if not (header["qform_code"] or header["sform_code"]):
        raise UserError(f"{path}: names no orientation (qform and sform code 0); set its affine")
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise UserError(f"{path}: its affine is no map to space; mend its sform")
    spacing = nib.affines.voxel_sizes(affine)
    if spacing.min() < SPACING_MM[0] or spacing.max() > SPACING_MM[1]:
        raise UserError(f"{path}: voxels of {spacing.round(4).tolist()} can't be mm; mend its affine")
    cosines = np.abs(affine[:3, :3] / spacing).max(axis=0)
    if cosines.min() < np.cos(np.radians(MAX_TILT_DEGREES)):
        raise UserError(f"{path}: lies more than {MAX_TILT_DEGREES:g} degrees off the body's axes; register it first")


def check_same_grid(path: Path, volume: nib.Nifti1Image, like_path: Path, like: nib.Nifti1Image) -> None:
    """Refuses a volume whose voxels do not lie where the other's do."""
    if volume.shape != like.shape:
        raise UserError(f"{path}: has shape {volume.shape} but {like_path.name} {like.shape}; give files of one grid")
    shift = (np.abs(volume.affine - like.affine) @ (*like.shape, 1)).max()
    if shift > 0.5:
        raise UserError(f"{path}: its affine disagrees with {like_path.name} by up to {shift:.1f} mm; mend its header")


def load_labels(path: Path, like_path: Path, like: nib.Nifti1Image, label_map: Mapping[int, int]) -> np.ndarray:
    """Lesion labels uint8 [x,y,z] on the grid of the volume `like`.

    Raises:
        UserError: the file is damaged, has another grid, or has labels that `label_map` lacks.
    """
    volume = load_volume(path)
    check_same_grid(path, volume, like_path, like)
    values = np.unique(volume.dataobj)
    if fractional := [value for value in values if abs(value - round(float(value))) > 1e-3]:
        raise UserError(f"{path}: has label {fractional[0]:g}, no whole number; resample labels with nearest neighbour")
    if unknown := [round(float(value)) for value in values if round(float(value)) not in label_map]:
        meaning = " (the resection cavity, in releases from 2024)" if unknown[0] == 4 else ""
        raise UserError(
            f"{path}: has label {unknown[0]}{meaning}, which its release does not name; "
            f"map it to 0, 1 NCR, 2 ED or 3 ET, as with --label_map={unknown[0]}:0"
        )
    labels = np.zeros(volume.shape, np.uint8)
    for value in values:
        labels[volume.dataobj == value] = label_map[round(float(value))]
    return labels


# ---------------------------------------------------------------- intensity


def normalise(path: Path, data: np.ndarray, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """z-score over the brain, clipped and mapped to [0,1], 0 outside; and the brain, as bool.

    The brain is every voxel other than 0, but for residue of resampling (`RESIDUE`).

    Raises:
        UserError: the volume is all zero, constant, or not skull-stripped.
    """
    magnitude = np.abs(data)
    if not magnitude.any():
        raise UserError(f"{path}: every voxel is 0; export the scan again")
    brain = magnitude > RESIDUE * np.percentile(magnitude[magnitude > 0], 99)
    if brain.mean() > MAX_FOREGROUND:
        raise UserError(f"{path}: has no background of 0; strip the skull first")
    return scale_intensity(path, data, brain, settings), brain


def scale_intensity(path: Path, data: np.ndarray, foreground: np.ndarray, settings: Settings) -> np.ndarray:
    """z-scores over the foreground, clipped to `settings.intensity_clip` and mapped to [0,1]; 0 elsewhere."""
    values = data[foreground].astype(np.float64)
    if values.size == 0 or values.std() == 0:
        raise UserError(f"{path}: has the same value everywhere; export the image again")
    low, high = settings.intensity_clip
    scaled = np.zeros(data.shape, np.float32)
    scaled[foreground] = (np.clip((values - values.mean()) / values.std(), low, high) - low) / (high - low)
    return scaled


# ---------------------------------------------------------------- the 256 mm field


def _edges(n: int, spacing: float) -> np.ndarray:
    """Edges [n+1] of n voxels centred in the field, in mm; shifted by up to half a voxel so that 1 mm stays on 1 mm."""
    margin = np.floor((FIELD_MM / spacing - n) / 2 + 1e-3)  # in voxels; not one less by a rounding error
    return (margin + np.arange(n + 1)) * spacing


def _mean_weights(n: int, spacing: float, size: int) -> sparse.csr_array:
    """Weights [size,n] of voxels in pixels: means over a pixel's width, linear interpolation where voxels are wider."""
    pixel = FIELD_MM / size
    width = max(pixel, spacing)
    centres = (np.arange(size)[:, None] + 0.5) * pixel
    edges = _edges(n, spacing)
    overlap = np.minimum(centres + width / 2, edges[1:]) - np.maximum(centres - width / 2, edges[:-1])
    return sparse.csr_array(np.where(overlap > 1e-6, overlap / width, 0).astype(np.float32))


def field_mean(slices: np.ndarray, spacing: tuple[float, float], size: int) -> np.ndarray:
    """Images [n,rows,columns] with pixels of `spacing` mm on the field [n,size,size], averaged without aliasing."""
    rows, columns = (_mean_weights(n, mm, size) for n, mm in zip(slices.shape[1:], spacing))
    return np.stack([rows @ (image @ columns.T) for image in slices])


def field_nearest(slices: np.ndarray, spacing: tuple[float, float], size: int) -> np.ndarray:
    """Labels [n,rows,columns] on the field [n,size,size]: the voxel at each pixel's centre, 0 outside."""
    centres = (np.arange(size) + 0.5) * FIELD_MM / size
    for axis, (n, mm) in enumerate(zip(slices.shape[1:], spacing), 1):
        index = np.searchsorted(_edges(n, mm), centres + 1e-6, side="right") - 1
        inside = ((index >= 0) & (index < n)).reshape(-1, *[1] * (2 - axis))
        slices = np.where(inside, slices.take(index.clip(0, n - 1), axis), 0).astype(slices.dtype)
    return slices


def axial(array: np.ndarray) -> np.ndarray:
    """[right, anterior, superior] voxels as [slice, row, column]: slices upwards, rows backwards, columns leftwards."""
    return array[::-1, ::-1].transpose(2, 1, 0)


def _pixel_spacing(volume: nib.Nifti1Image) -> tuple[float, float]:
    """Height and width of an axial slice's pixels in mm, rounded so that 1 mm survives float32 headers."""
    x, y, _ = nib.affines.voxel_sizes(volume.affine).round(4).tolist()
    return y, x


# ---------------------------------------------------------------- scans


@dataclasses.dataclass(frozen=True)
class Scan:
    """The volumes of one visit on their common grid.

    Attributes:
        volume: the first modality, for its grid.
        images: float32 [x,y,z] in [0,1], one a modality.
        brain: bool [x,y,z], brain in any modality.
    """

    volume: nib.Nifti1Image
    images: list[np.ndarray]
    brain: np.ndarray

    @property
    def slices_with_brain(self) -> np.ndarray:
        return np.flatnonzero(self.brain.any(axis=(0, 1))).astype(np.int32)

    def image(self, slice_index: np.ndarray, size: int) -> np.ndarray:
        """float16 [n,S,S,C]"""
        spacing = _pixel_spacing(self.volume)
        channels = [field_mean(axial(image)[slice_index], spacing, size) for image in self.images]
        return np.stack(channels, axis=-1).astype(np.float16)

    def labels(self, labels: np.ndarray, slice_index: np.ndarray, size: int) -> np.ndarray:
        """uint8 [n,S,S] from labels [x,y,z]"""
        return field_nearest(axial(labels)[slice_index], _pixel_spacing(self.volume), size)

    def position_mm(self, slice_index: np.ndarray) -> np.ndarray:
        """Height of the slices' centres in the scanner's or atlas's space, float32 [n]."""
        x, y, _ = (np.asarray(self.volume.shape) - 1) / 2
        heights = [nib.affines.apply_affine(self.volume.affine, (x, y, z))[2] for z in slice_index]
        return np.asarray(heights, np.float32)


def load_scan(paths: Sequence[Path], settings: Settings) -> Scan:
    """Loads and normalises one file a modality.

    Raises:
        UserError: a file can't be used, their grids differ, or the brain does not fit the field.
    """
    volumes = [load_volume(path) for path in paths]
    for path, volume in zip(paths[1:], volumes[1:]):
        check_same_grid(path, volume, paths[0], volumes[0])
    images, brains = zip(*(normalise(path, np.asarray(v.dataobj), settings) for path, v in zip(paths, volumes)))
    scan = Scan(volumes[0], list(images), functools.reduce(np.logical_or, brains))
    for cut, mm in zip((scan.brain.any(axis=(0, 2)), scan.brain.any(axis=(1, 2))), _pixel_spacing(scan.volume)):
        edges = _edges(len(cut), mm)
        if (cut & ((edges[1:] <= 0) | (edges[:-1] >= FIELD_MM))).any():
            raise UserError(f"{paths[0]}: the brain reaches beyond {FIELD_MM:g} mm; centre it or mend the voxel size")
    return scan


def prepare_patient(
    patient_id: str,
    *,
    patients: Mapping[str, Patient],
    settings: Settings,
    label_map: Mapping[int, int],
    unlabelled: bool,
    anatomy: AnatomySource | None,
) -> PatientSlices:
    """All axial slices of a patient that show brain.

    Args:
        patient_id: key of `patients`.
        patients: from `find_patients`.
        settings: size, modalities and intensity range.
        label_map: label -> 0..3, for labels that the patient's release does not name.
        unlabelled: take a patient without a segmentation.
        anatomy: where the anatomy labels come from.

    Raises:
        UserError: a file is missing or can't be used.
    """
    patient = patients[patient_id]
    paths = patient.paths(settings.modalities)
    segmentation = patient.files.get("seg")
    if segmentation is None and not unlabelled:
        raise UserError(f"{patient.folder}: {patient_id} has no seg file; add it (so named), or use --unlabelled")
    scan = load_scan(paths, settings)
    labels = np.zeros(scan.brain.shape, np.uint8)
    if segmentation is not None:
        labels = load_labels(segmentation, paths[0], scan.volume, patient.label_map(label_map))
    slice_index = scan.slices_with_brain
    regions = None
    if anatomy:
        path = anatomy.file(patient_id)
        regions = six_regions(path, load_volume(path), anatomy.scheme, scan.volume, scan.brain)
    return PatientSlices(
        patient_id=patient_id,
        image=scan.image(slice_index, settings.size),
        label=scan.labels(labels, slice_index, settings.size),
        slice_index=slice_index,
        position_mm=scan.position_mm(slice_index),
        anatomy=None if regions is None else scan.labels(regions, slice_index, settings.size),
        labelled=segmentation is not None,
    )


def prepare_scan(path: Path, settings: Settings, slice_index: int) -> np.ndarray:
    """One slice of a new scan, float16 [S,S,C], prepared as the records with these settings were.

    Args:
        path: the scan; with several modalities, any of the patient's files, named as in a BraTS release.
        settings: of the data that a network was trained on.
        slice_index: axial position, counted from the feet.

    Raises:
        UserError: the file can't be used, the settings are not those of scans, or the slice shows no brain.
    """
    if settings.foreground != "nonzero":
        raise UserError(f"{path}: the model was trained on pictures, not on scans; give a picture of the slice")
    if not path.is_file():
        raise UserError(f"{path}: does not exist; check the path")
    paths, match = [path], match_name(path)
    if match and match[2] not in settings.modalities:
        raise UserError(f"{path}: is {match[2]}, the model reads {', '.join(settings.modalities)}; give that file")
    if len(settings.modalities) > 1:
        if not match:
            raise UserError(f"{path}: the model reads {', '.join(settings.modalities)}; name the files as BraTS does")
        paths = find_patients(path.parent)[match[1]].paths(settings.modalities)
    scan = load_scan(paths, settings)
    if slice_index not in (with_brain := scan.slices_with_brain):
        raise UserError(f"{path}: slice {slice_index} shows no brain; take one from {with_brain[0]} to {with_brain[-1]}")
    return scan.image(np.asarray([slice_index]), settings.size)[0]
