"""Volumes on disk: read whole, checked, and turned to the body's axes."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np

from decomp_jax.errors import UserError
from decomp_jax.preparation import dicom

SPACING_MM = (0.2, 10.0)  # voxel widths outside this range are another unit, not millimetres
MAX_TILT_DEGREES = 10.0
FORMS_DIFFER = 0.2  # log of the ratio of voxel widths by sform and qform
GZIP = b"\x1f\x8b"
CURE = "copy or download it again"
DAMAGED = (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, nib.wrapstruct.WrapStructError,
           ValueError, OverflowError)


class Source(NamedTuple):
    """Where a volume lies.

    Attributes:
        path: a NIfTI or DICOM file, or the folder of a DICOM series; messages name it.
        channel: place along the fourth axis of a file that may have one.
        files: of the series, where the folder holds others, too.
        named: how many places of the fourth axis have names, where all must have one.
    """

    path: Path
    channel: int | None = None
    files: tuple[Path, ...] = ()
    named: int | None = None


def load_volume(
    path: Path, channel: int | None = None, files: tuple[Path, ...] = (), named: int | None = None
) -> nib.Nifti1Image:
    """A 3-D volume, float32, its axes ordered and flipped to right, anterior, superior; 2-D is one slice.

    Args: see `Source`.

    Raises:
        UserError: the file is damaged or is no volume with finite values and a usable affine.
    """
    if path.suffix.lower() == dicom.SUFFIX:
        files = (path,)
    image = dicom.read_series(path, files) if files or path.is_dir() else _parse(path, _unpacked(path))
    if channel is not None:
        channels = image.shape[3] if image.ndim == 4 else 1
        if channel >= channels:
            raise UserError(f"{path}: has shape {image.shape} and so no channel {channel}; add it or name others")
        if named is not None and channels > named:
            raise UserError(f"{path}: has shape {image.shape}, {channels} channels of which {named} have names; name "
                            "all, or in --channels those to take")
        image = image.slicer[..., channel] if image.ndim == 4 else image
    return _checked(path, image)


def parse_volume(path: Path, data: bytes) -> nib.Nifti1Image:
    """`load_volume` of the bytes of a NIfTI file, no longer compressed; `path` names it in errors."""
    return _checked(path, _parse(path, data))


def parse_series(path: Path, files: Sequence[BinaryIO]) -> nib.Nifti1Image:
    """`load_volume` of the files of a DICOM series; `path` names them in errors."""
    return _checked(path, dicom.read_series(path, files))


def declared_bytes(path: Path, head: bytes) -> tuple[int, int]:
    """How many bytes a NIfTI file has, and how many voxels, by the header that it begins with.

    Raises UserError if there is no such header.
    """
    if not (image_class := _is_nifti(head)):
        raise UserError(f"{path}: is no NIfTI file; {CURE}")
    try:
        # The header alone, not what may follow it, extensions.
        header = image_class.header_class(head[:image_class.header_class.sizeof_hdr])
        voxels = int(np.prod(header.get_data_shape(), dtype=object))
        return int(header.get_data_offset()) + voxels * header.get_data_dtype().itemsize, voxels
    except DAMAGED as error:
        raise UserError(f"{path}: has a damaged header ({error}); {CURE}") from error


def _checked(path: Path, image: nib.Nifti1Image) -> nib.Nifti1Image:
    shape = image.shape[:3]
    if image.ndim < 2 or min(shape) < 1 or any(n != 1 for n in image.shape[3:]):  # a fourth axis of one volume is none
        raise UserError(f"{path}: has shape {image.shape}, not three dimensions; give one 3-D volume a file")
    if image.get_data_dtype().kind not in "iuf":
        raise UserError(f"{path}: has voxels of type {image.get_data_dtype()}; export it with one number a voxel")
    data = np.asarray(image.dataobj, dtype=np.float32)
    if not np.isfinite(data).all():
        raise UserError(f"{path}: has voxels that are NaN or infinite; replace them or export the file again")
    _check_affine(path, image)
    return nib.as_closest_canonical(type(image)(np.atleast_3d(data.reshape(shape)), image.affine))


def _unpacked(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        if data.startswith(GZIP) or path.suffix.lower() == ".gz" and not _is_nifti(data):
            data = gzip.decompress(data)  # whole, since the checksum stands at its end
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: is a damaged or no gzip file ({error}); {CURE}") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check the path") from error
    return data


def _parse(path: Path, data: bytes) -> nib.Nifti1Image:
    if not (image_class := _is_nifti(data)):
        raise UserError(f"{path}: is no NIfTI file ({len(data)} bytes); {CURE}")
    try:
        image = image_class.from_bytes(data)
        needed = image.dataobj.offset + int(np.prod(image.shape, dtype=object)) * image.get_data_dtype().itemsize
    except DAMAGED as error:
        raise UserError(f"{path}: has a damaged header ({error}); {CURE}") from error
    if not 0 < needed <= len(data):
        raise UserError(f"{path}: is truncated ({len(data)} of {needed} bytes); {CURE}")
    return image


def _is_nifti(data: bytes) -> type[nib.Nifti1Image] | None:
    classes = (nib.Nifti1Image, nib.Nifti2Image)
    return next((kind for kind in classes if kind.header_class.may_contain_header(data)), None)


def _check_affine(path: Path, image: nib.Nifti1Image) -> None:
    header, affine = image.header, image.affine
    if not (header["qform_code"] or header["sform_code"]):
        raise UserError(f"{path}: names no orientation (qform and sform code 0); set its affine")
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise UserError(f"{path}: its affine is no map to space; mend its sform")
    spacing = nib.affines.voxel_sizes(affine)
    if spacing.min() < SPACING_MM[0] or spacing.max() > SPACING_MM[1]:
        raise UserError(f"{path}: voxels of {spacing.round(4).tolist()} can't be mm; mend its affine")
    _check_forms(path, image, spacing)
    cosines = np.abs(affine[:3, :3] / spacing).max(axis=0)
    if cosines.min() < np.cos(np.radians(MAX_TILT_DEGREES)):
        raise UserError(f"{path}: lies more than {MAX_TILT_DEGREES:g} degrees off the body's axes; register it first")


def _check_forms(path: Path, image: nib.Nifti1Image, spacing: np.ndarray) -> None:
    """An sform may map to a template and the qform to the scanner, but left stays left and a millimetre one."""
    if not (image.header["qform_code"] and image.header["sform_code"]):
        return
    try:
        qform = image.get_qform()
        axes = ["".join(map(str, nib.aff2axcodes(affine))) for affine in (image.affine, qform)]
        scale = nib.affines.voxel_sizes(qform) / spacing
    except (ValueError, nib.spatialimages.HeaderDataError) as error:
        raise UserError(f"{path}: has a damaged qform ({error}); mend its header") from error
    if axes[0] != axes[1] or not np.all(np.abs(np.log(scale)) < FORMS_DIFFER):
        raise UserError(f"{path}: its sform ({axes[0]}) and qform ({axes[1]}) contradict each other; set both to the one "
                        "that is true")


def check_same_grid(path: Path, volume: nib.Nifti1Image, like_path: Path, like: nib.Nifti1Image) -> None:
    """Refuses a volume whose voxels do not lie where the other's do."""
    if volume.shape != like.shape:
        raise UserError(f"{path}: has shape {volume.shape} but {like_path.name} {like.shape}; give files of one grid")
    shift = (np.abs(volume.affine - like.affine) @ (*like.shape, 1)).max()
    if shift > 0.5:
        raise UserError(f"{path}: its affine disagrees with {like_path.name} by up to {shift:.1f} mm; mend its header")


def load_labels(source: Source, like: Source, grid: nib.Nifti1Image) -> np.ndarray:
    """Label values int32 [x,y,z], as stored, on the grid of the volume `grid`, which was read from `like`.

    Raises:
        UserError: the file is damaged, has another grid, or has values that are no whole numbers.
    """
    if source.path.suffix.lower() == dicom.SUFFIX:
        return dicom.read_segments(source.path, grid)
    volume = load_volume(*source)
    check_same_grid(source.path, volume, like.path, grid)
    data = np.asarray(volume.dataobj)
    values = data.round().astype(np.int32)
    if (fractional := np.abs(data - values) > 1e-3).any():
        raise UserError(
            f"{source.path}: has label {data[fractional][0]:g}, no whole number; resample labels with nearest neighbour"
        )
    return values
