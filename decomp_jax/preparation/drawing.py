"""Drawings: label maps and masks that a reader made, laid out as the network sees images."""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from decomp_jax.data.schema import FIELD_MM, Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation.field import PLANES, field_nearest
from decomp_jax.preparation.picture import FOREGROUND, check_same_frame, load_mask
from decomp_jax.preparation.scan import Scan
from decomp_jax.preparation.volume import Source, check_same_grid, load_volume


def load_drawing(
    path: Path, settings: Settings, slice_index: int | None = None, asked: Scan | Path | None = None
) -> Integer[np.ndarray, "n n"]:
    """The values of a drawing on the field of view, of any size n.

    Bitmaps and NumPy arrays of as many pixels as the slices of the scan asked with lie on these; others fill the field
    with their longer side, as pictures do. For networks of scans, NIfTI files lie where scans do, by their millimetres.

    Args:
        settings: of the data that the network was trained on.
        slice_index: slice of a NIfTI volume, counted as a scan's; drawings of one slice need none.
        asked: what is asked with, a scan or the file of a picture.

    Raises:
        UserError: the file can't be read as one 2-D drawing of whole numbers, or lies elsewhere than what is asked
            with.
    """
    scan = asked if isinstance(asked, Scan) else None
    if isinstance(asked, Path):
        check_same_frame(path, asked)
    field = dataclasses.replace(settings, size=round(settings.field_mm))
    if settings.foreground == FOREGROUND or not path.name.lower().endswith((".nii", ".nii.gz")):
        drawn = load_mask(path)
        if scan is not None and drawn.shape == scan.slice_shape:
            return dataclasses.replace(scan, settings=field).on_field(drawn[None])[0]
        size = max(drawn.shape)
        return field_nearest(drawn[None], (FIELD_MM / size,) * 2, size)[0]
    volume = load_volume(path)
    values = np.asarray(volume.dataobj)
    axis = PLANES[settings.plane][0]
    slices = values.shape[axis]
    if scan is not None:
        own = slice(slice_index, slice_index + 1) if slices == 1 else slice(None)
        check_same_grid(path, volume, scan.source.path, scan.volume.slicer[(slice(None),) * axis + (own,)])
    index = 0 if slices == 1 else slice_index
    if index is None or not 0 <= index < slices:
        raise UserError(f"{path}: has slices 0 to {slices - 1}; name one of them by --slice")
    if (values != np.rint(values)).any() or values.min() < 0:
        raise UserError(f"{path}: has values that are not 0, 1, 2 ...; resample labels with nearest neighbour")
    drawing = Scan(Source(path), volume, [], values > 0, field)
    return drawing.labels(values.astype(np.int32), np.asarray([index]))[0]
