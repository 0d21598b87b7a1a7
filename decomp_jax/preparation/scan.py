"""Scans: the volumes of one visit, normalised, and their slices on the field."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import nibabel as nib
import numpy as np

from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation.field import PLANES, field_mean, field_nearest, planar, voxel_edges
from decomp_jax.preparation.intensity import normalise
from decomp_jax.preparation.releases import find_patients, match_name
from decomp_jax.preparation.volume import Source, check_same_grid, load_volume


@dataclasses.dataclass(frozen=True)
class Scan:
    """The volumes of one visit on their common grid.

    Attributes:
        source: the first modality.
        volume: that modality, for its grid.
        images: float32 [x,y,z] in [0,1], one a modality.
        foreground: bool [x,y,z], what shows the body in any modality.
        settings: size, field and plane of the slices.
    """

    source: Source
    volume: nib.Nifti1Image
    images: list[np.ndarray]
    foreground: np.ndarray
    settings: Settings

    def with_modalities(self, names: tuple[str, ...]) -> Self:
        """The same scan with these channels; those that it lacks are 0."""
        images, missing = dict(zip(self.settings.modalities, self.images)), np.zeros_like(self.images[0])
        return dataclasses.replace(
            self, images=[images.get(name, missing) for name in names],
            settings=dataclasses.replace(self.settings, modalities=names),
        )

    @property
    def filled_slices(self) -> np.ndarray:
        """Those that show foreground, int32 [n]."""
        return np.flatnonzero(planar(self.foreground, self.settings.plane).any(axis=(1, 2))).astype(np.int32)

    def image(self, slice_index: np.ndarray) -> np.ndarray:
        """float16 [n,S,S,C]"""
        plane, size, field_mm = self.settings.plane, self.settings.size, self.settings.field_mm
        slices = (planar(image, plane)[slice_index] for image in self.images)
        channels = [field_mean(channel, self._pixel_spacing, size, field_mm) for channel in slices]
        return np.stack(channels, axis=-1).astype(np.float16)

    def shown(self, slice_index: int) -> np.ndarray:
        """One slice, float16 [S,S,C]. Raises UserError if it shows no foreground."""
        if slice_index not in (filled := self.filled_slices):
            raise UserError(f"{self.source.path}: slice {slice_index} shows nothing; take one from {filled[0]} to "
                            f"{filled[-1]}")
        return self.image(np.asarray([slice_index]))[0]

    @property
    def slice_shape(self) -> tuple[int, int]:
        """Rows and columns of voxels."""
        _, rows, columns = PLANES[self.settings.plane]
        return self.volume.shape[rows], self.volume.shape[columns]

    def labels(self, labels: np.ndarray, slice_index: np.ndarray) -> np.ndarray:
        """uint8 [n,S,S] from labels [x,y,z]"""
        return self.on_field(planar(labels, self.settings.plane)[slice_index])

    def on_field(self, slices: np.ndarray) -> np.ndarray:
        """Labels [n,S,S] from those of slices' voxels [n,rows,columns]."""
        return field_nearest(slices, self._pixel_spacing, self.settings.size, self.settings.field_mm)

    def position_mm(self, slice_index: np.ndarray) -> np.ndarray:
        """Height of the slices' centres along the plane's axis, in the scanner's or atlas's space, float32 [n]."""
        axis = PLANES[self.settings.plane][0]
        points = np.tile((np.asarray(self.volume.shape) - 1) / 2, (len(slice_index), 1))
        points[:, axis] = slice_index
        return nib.affines.apply_affine(self.volume.affine, points)[:, axis].astype(np.float32)

    def require_in_field(self, voxels: np.ndarray, what: str) -> None:
        """Raises UserError if any of the voxels [x,y,z] would be cut off."""
        voxels, field_mm = planar(voxels, self.settings.plane), self.settings.field_mm
        for cut, mm in zip((voxels.any(axis=(0, 2)), voxels.any(axis=(0, 1))), self._pixel_spacing):
            edges = voxel_edges(len(cut), mm, field_mm)
            if (cut & ((edges[1:] <= 0) | (edges[:-1] >= field_mm))).any():
                raise UserError(
                    f"{self.source.path}: {what} reaches beyond {field_mm:g} mm; centre it, mend the voxel size, or "
                    "prepare with a larger --field_mm"
                )

    @property
    def _pixel_spacing(self) -> tuple[float, float]:
        """Height and width of a slice's pixels in mm, rounded so that 1 mm survives float32 headers."""
        spacing = nib.affines.voxel_sizes(self.volume.affine).round(4).tolist()
        _, rows, columns = PLANES[self.settings.plane]
        return spacing[rows], spacing[columns]


def load_scan(sources: Sequence[Source], settings: Settings, mask: Source | None = None) -> Scan:
    """Loads and normalises one source a modality, within a mask if there is one.

    Raises:
        UserError: a file can't be used, their grids differ, or the brain does not fit the field. What a window shows
            may be cut off: a table, arms.
    """
    return make_scan(sources, [load_volume(*source) for source in sources], settings, mask)


def make_scan(
    sources: Sequence[Source], volumes: Sequence[nib.Nifti1Image], settings: Settings, mask: Source | None = None
) -> Scan:
    """`load_scan` of volumes that are loaded; `sources` name them in errors."""
    for source, volume in zip(sources[1:], volumes[1:]):
        check_same_grid(source.path, volume, sources[0].path, volumes[0])
    inside = None if mask is None else _load_mask(mask, sources[0], volumes[0])
    images, foregrounds = zip(*(
        normalise(source.path, np.asarray(volume.dataobj), settings, inside) for source, volume in zip(sources, volumes)
    ))
    scan = Scan(sources[0], volumes[0], list(images), functools.reduce(np.logical_or, foregrounds), settings)
    if settings.foreground == "nonzero":
        scan.require_in_field(scan.foreground, "the brain")
    return scan


def _load_mask(source: Source, like: Source, grid: nib.Nifti1Image) -> np.ndarray:
    volume = load_volume(*source)
    check_same_grid(source.path, volume, like.path, grid)
    values = np.unique(volume.dataobj)
    if len(values) != 2 or values[0] != 0:
        raise UserError(f"{source.path}: is no mask of the body, 0 outside and one value inside; name another --mask")
    return np.asarray(volume.dataobj) > 0


def open_scan(path: Path, settings: Settings, mask: Path | None = None) -> Scan:
    """A new scan, prepared as the records with these settings were, with those of their modalities that are there.

    Args:
        path: the scan: a NIfTI file, or the folder of a DICOM series. With several modalities, any of the patient's
            files, named as in a BraTS release, or a folder of files, or of series' folders, named MODALITY.
        settings: of the data that a network was trained on.
        mask: a mask of the brain, for a head that is not skull-stripped.

    Raises:
        UserError: the file can't be used, or the settings are not those of scans.
    """
    if settings.foreground not in ("nonzero", "window"):
        raise UserError(f"{path}: the model was trained on pictures, not on scans; give a picture of the slice")
    if not path.exists():
        raise UserError(f"{path}: does not exist; check the path")
    found, match = dict.fromkeys(settings.modalities, path), match_name(path)
    if match and match[2] not in settings.modalities:
        raise UserError(f"{path}: is {match[2]}, the model reads {', '.join(settings.modalities)}; give that file")
    if len(settings.modalities) > 1 and path.is_dir():
        found = {name: file for name in settings.modalities if (file := _file_of(path, name))}
        if not found:
            name, *others = settings.modalities
            raise UserError(f"{path}: holds neither {name}.nii.gz nor a folder {name} of a DICOM series, nor of "
                            f"{', '.join(others)}; name another folder")
    elif len(settings.modalities) > 1:
        if not match:
            raise UserError(
                f"{path}: the model reads {', '.join(settings.modalities)}; name the files as BraTS does, or give a "
                f"folder with {settings.modalities[0]}.nii.gz and so on"
            )
        files = find_patients(path.parent)[match[1]].files
        found = {name: files[name] for name in settings.modalities if name in files}
    settings = dataclasses.replace(settings, modalities=tuple(found))
    return load_scan([Source(path) for path in found.values()], settings, mask and Source(mask))


def _file_of(folder: Path, modality: str) -> Path | None:
    files = (folder / name for name in (f"{modality}.nii.gz", f"{modality}.nii", modality))
    return next((file for file in files if file.exists()), None)
