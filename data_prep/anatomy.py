"""Label maps of normal anatomy, read as the paper's six regions (`decomp_jax.data.schema.ANATOMY_CLASSES`)."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy import ndimage

from decomp_jax.errors import UserError
from decomp_jax.preparation.releases import is_hidden

LEFT_CEREBRUM, RIGHT_CEREBRUM, LEFT_CEREBELLUM, RIGHT_CEREBELLUM, LEFT_VENTRICLE, RIGHT_VENTRICLE = range(1, 7)
UNCOVERED = 0  # takes the nearest of the six where there is brain
OTHER = 7  # brain that belongs to none of the six

# Ids of FreeSurfer's aseg, aparc+aseg and wmparc, which SynthSeg shares. Ids of tissue without a side (cerebrospinal
# fluid, vessels, corpus callosum, vermis ...) are uncovered.
_FREESURFER = {
    LEFT_CEREBRUM: (2, 3, 9, 10, 11, 12, 13, 17, 18, 19, 20, 25, 26, 27, 28, 29, 78, 81, 96, *range(1000, 1036),
                    *range(3000, 3036), 5001, *range(11100, 11176), *range(13100, 13176)),
    RIGHT_CEREBRUM: (41, 42, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 79, 82, 97, *range(2000, 2036),
                     *range(4000, 4036), 5002, *range(12100, 12176), *range(14100, 14176)),
    LEFT_CEREBELLUM: (6, 7, 8),
    RIGHT_CEREBELLUM: (45, 46, 47),
    LEFT_VENTRICLE: (4, 5, 31),
    RIGHT_VENTRICLE: (43, 44, 63),
    OTHER: (14, 15, 16, 72, 170, 171, 173, 174, 175, 178),
    UNCOVERED: (0, 24, 30, 62, 77, 80, 85, 172, 192, *range(250, 256)),
}
SCHEMES: Mapping[str, Mapping[int, int]] = {
    "six": {**{region: region for region in range(7)}, 7: OTHER, 8: OTHER},
    "freesurfer": {value: region for region, values in _FREESURFER.items() for value in values},
}
MIN_COVERAGE = 0.25  # of the brain; a label map in another space covers less


@dataclasses.dataclass(frozen=True)
class AnatomySource:
    """Where label maps come from and how their ids are read.

    Attributes:
        path: a folder with one label map a patient, or one atlas for all.
        scheme: key of `SCHEMES`.
    """

    path: Path
    scheme: str

    def file(self, patient_id: str) -> Path:
        """The patient's label map: the atlas, or the one that `only_map` finds. Raises UserError if there is none."""
        return self.path if self.path.is_file() else only_map("--anatomy", self.path, patient_id)


def only_map(flag: str, folder: Path, patient_id: str) -> Path:
    """The patient's map in a folder: ID.nii[.gz], or the only file of ID/ or named ID-... , ID_... or ID.... .

    For the flag --mask, files that have "mask" in their names come before others, so that it may lie beside the scan.

    Raises:
        UserError: there is none, or more than one.
    """
    files = _maps_of(folder, patient_id)
    if flag == "--mask":
        files = {path for path in files if "mask" in path.name.lower()} or files
    if len(files) != 1:
        kind, other = ("masks", "") if flag == "--mask" else ("label maps", ", or give one atlas file for all")
        raise UserError(
            f"{flag} {folder}: holds {len(files)} {kind} of {patient_id}; name exactly one {patient_id}.nii.gz{other}"
        )
    return files.pop()


def _maps_of(folder: Path, patient_id: str) -> set[Path]:
    paths = (*folder.glob("*.nii*"), *(folder / patient_id).glob("*.nii*"))
    return {path for path in paths if patient_id in _ids_of(path.relative_to(folder)) and not is_hidden(path.name)}


def _ids_of(path: Path) -> set[str]:
    """All that the patient may be called whose map this is, by its path within the folder."""
    if len(path.parts) > 1:
        return {path.parts[0]} if len(path.parts) == 2 else set()
    return {path.name[:i] for i, letter in enumerate(path.name) if letter in "-_."}


def maps_of_nobody(folder: Path, patient_ids: Iterable[str]) -> list[Path]:
    """Files of a folder that are the map of none of the patients."""
    ids = set(patient_ids)
    return sorted(path for path in folder.rglob("*.nii*")
                  if ids.isdisjoint(_ids_of(path.relative_to(folder))) and not is_hidden(path.name))


def six_regions(
    path: Path, labels: nib.Nifti1Image, scheme: str, like: nib.Nifti1Image, brain: np.ndarray
) -> np.ndarray:
    """The six regions, uint8 [x,y,z] with values 0..6, of the label map `labels` on the grid of `like`.

    Brain voxels that the map leaves uncovered take the nearest of the six regions; brain of none of the six and
    voxels outside the brain are 0.

    Args:
        path: file of `labels`, for messages.
        labels: the label map, on any grid.
        scheme: key of `SCHEMES`.
        like: volume whose grid is wanted.
        brain: bool, on that grid.

    Raises:
        UserError: the map has an id that the scheme does not know, or does not lie on the brain.
    """
    regions = _read_ids(path, np.asarray(labels.dataobj), scheme)
    if labels.shape != like.shape or not np.allclose(labels.affine, like.affine, atol=1e-3):
        regions = np.asarray(resample_from_to(nib.Nifti1Image(regions, labels.affine), like, order=0).dataobj)
    coverage = (regions[brain] != UNCOVERED).mean()
    six = (regions != UNCOVERED) & (regions != OTHER)
    if coverage < MIN_COVERAGE or not six[brain].any():
        raise UserError(f"{path}: covers {coverage:.0%} of the brain; give a label map in the images' space")
    box = ndimage.find_objects(brain.astype(np.uint8))[0]
    nearest = ndimage.distance_transform_edt(
        ~six[box], sampling=nib.affines.voxel_sizes(like.affine), return_distances=False, return_indices=True
    )
    filled = np.where(regions[box] == UNCOVERED, regions[box][tuple(nearest)], regions[box])
    result = np.zeros_like(regions)
    result[box] = np.where(brain[box] & (filled != OTHER), filled, 0)
    return result


def _read_ids(path: Path, ids: np.ndarray, scheme: str) -> np.ndarray:
    values = np.unique(ids)
    if unknown := [value for value in values.tolist() if value not in SCHEMES[scheme]]:
        raise UserError(f"{path}: has id {unknown[0]:g}, which scheme {scheme} does not know; see --anatomy_scheme")
    regions = np.asarray([SCHEMES[scheme][value] for value in values.tolist()], np.uint8)
    return regions[np.searchsorted(values, ids)]
