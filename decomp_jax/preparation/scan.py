"""Scans: the volumes of one visit, normalised, and their axial slices on the field."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation.field import FIELD_MM, axial, field_mean, field_nearest, voxel_edges
from decomp_jax.preparation.intensity import normalise
from decomp_jax.preparation.releases import find_patients, match_name
from decomp_jax.preparation.volume import check_same_grid, load_volume


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
    return make_scan(paths, [load_volume(path) for path in paths], settings)


def make_scan(paths: Sequence[Path], volumes: Sequence[nib.Nifti1Image], settings: Settings) -> Scan:
    """`load_scan` of volumes that are loaded; `paths` name them in errors."""
    for path, volume in zip(paths[1:], volumes[1:]):
        check_same_grid(path, volume, paths[0], volumes[0])
    images, brains = zip(*(normalise(path, np.asarray(v.dataobj), settings) for path, v in zip(paths, volumes)))
    scan = Scan(volumes[0], list(images), functools.reduce(np.logical_or, brains))
    for cut, mm in zip((scan.brain.any(axis=(0, 2)), scan.brain.any(axis=(1, 2))), _pixel_spacing(scan.volume)):
        edges = voxel_edges(len(cut), mm)
        if (cut & ((edges[1:] <= 0) | (edges[:-1] >= FIELD_MM))).any():
            raise UserError(f"{paths[0]}: the brain reaches beyond {FIELD_MM:g} mm; centre it or mend the voxel size")
    return scan


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


def _pixel_spacing(volume: nib.Nifti1Image) -> tuple[float, float]:
    """Height and width of an axial slice's pixels in mm, rounded so that 1 mm survives float32 headers."""
    x, y, _ = nib.affines.voxel_sizes(volume.affine).round(4).tolist()
    return y, x
