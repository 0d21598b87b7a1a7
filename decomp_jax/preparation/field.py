"""The field of view: a square around the centre of the volume, in one of the body's planes, as a radiologist reads it.

Stored slices are [row, column] with column 0 the patient's right (in sagittal slices, the front) and row 0 the top (in
axial slices, the front). A volume of 240 x 240 voxels of 1 mm is padded by 8 to a field of 256 mm and 256 x 256 pixels,
and nothing is resampled.
"""

import numpy as np
from scipy import sparse

from decomp_jax.data.schema import FIELD_MM

# Axes of [right, anterior, superior] voxels along which slices, rows and columns lie; rows and columns run backwards.
PLANES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}


def voxel_edges(n: int, spacing: float, field_mm: float = FIELD_MM) -> np.ndarray:
    """Edges [n+1] of n voxels centred in the field, in mm; shifted by up to half a voxel so that 1 mm stays on 1 mm."""
    margin = np.floor((field_mm / spacing - n) / 2 + 1e-3)  # in voxels; not one less by a rounding error
    return (margin + np.arange(n + 1)) * spacing


def _mean_weights(n: int, spacing: float, size: int, field_mm: float) -> sparse.csr_array:
    """Weights [size,n] of voxels in pixels: means over a pixel's width, linear interpolation where voxels are wider."""
    pixel = field_mm / size
    width = max(pixel, spacing)
    centres = (np.arange(size)[:, None] + 0.5) * pixel
    edges = voxel_edges(n, spacing, field_mm)
    overlap = np.minimum(centres + width / 2, edges[1:]) - np.maximum(centres - width / 2, edges[:-1])
    return sparse.csr_array(np.where(overlap > 1e-6, overlap / width, 0).astype(np.float32))


def field_mean(
    slices: np.ndarray, spacing: tuple[float, float], size: int, field_mm: float = FIELD_MM
) -> np.ndarray:
    """Images [n,rows,columns] with pixels of `spacing` mm on the field [n,size,size], averaged without aliasing."""
    rows, columns = (_mean_weights(n, mm, size, field_mm) for n, mm in zip(slices.shape[1:], spacing))
    return np.stack([rows @ (image @ columns.T) for image in slices])


def field_nearest(
    slices: np.ndarray, spacing: tuple[float, float], size: int, field_mm: float = FIELD_MM
) -> np.ndarray:
    """Labels [n,rows,columns] on the field [n,size,size]: the voxel at each pixel's centre, 0 outside."""
    centres = (np.arange(size) + 0.5) * field_mm / size
    for axis, (n, mm) in enumerate(zip(slices.shape[1:], spacing), 1):
        index = np.searchsorted(voxel_edges(n, mm, field_mm), centres + 1e-6, side="right") - 1
        inside = ((index >= 0) & (index < n)).reshape(-1, *[1] * (2 - axis))
        slices = np.where(inside, slices.take(index.clip(0, n - 1), axis), 0).astype(slices.dtype)
    return slices


def planar(array: np.ndarray, plane: str) -> np.ndarray:
    """[right, anterior, superior] voxels as [slice, row, column]; slices run upwards, forwards or to the right."""
    slices, rows, columns = PLANES[plane]
    return np.flip(array, (rows, columns)).transpose(slices, rows, columns)
