"""Drawings: label maps and masks that a reader made, laid out as the network sees images."""

from pathlib import Path

import numpy as np
from jaxtyping import Integer

from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation.field import FIELD_MM, axial, field_nearest
from decomp_jax.preparation.picture import load_mask
from decomp_jax.preparation.scan import pixel_spacing
from decomp_jax.preparation.volume import load_volume


def load_drawing(path: Path, settings: Settings, slice_index: int | None = None) -> Integer[np.ndarray, "n n"]:
    """The values of a drawing on the field of view, of any size n.

    Bitmaps and NumPy arrays fill the field with their longer side, as pictures do. For networks of scans, NIfTI files
    lie where scans do, by their millimetres.

    Args:
        settings: of the data that the network was trained on.
        slice_index: axial slice of a NIfTI volume, from the feet up; drawings of one slice need none.

    Raises:
        UserError: the file can't be read as one 2-D drawing of whole numbers.
    """
    if settings.foreground != "nonzero" or not path.name.lower().endswith((".nii", ".nii.gz")):
        mask = load_mask(path)
        size = max(mask.shape)
        return field_nearest(mask[None], (FIELD_MM / size,) * 2, size)[0]
    volume = load_volume(path)
    slices = axial(np.asarray(volume.dataobj))
    index = 0 if len(slices) == 1 else slice_index
    if index is None or not 0 <= index < len(slices):
        raise UserError(f"{path}: has slices 0 to {len(slices) - 1}; name one of them by --slice")
    drawn = slices[index]
    if (drawn != np.rint(drawn)).any() or drawn.min() < 0:
        raise UserError(f"{path}: has values that are not 0, 1, 2 ...; resample labels with nearest neighbour")
    return field_nearest(drawn[None].astype(np.int32), pixel_spacing(volume), round(FIELD_MM))[0]
