"""The field of view: a square of 256 mm around the centre of the volume, as a radiologist reads it.

Stored slices are [row, column] with row 0 anterior and column 0 the patient's right. A volume of 240 x 240 voxels of
1 mm is padded by 8 to 256 x 256 and nothing is resampled.
"""

import numpy as np
from scipy import sparse

FIELD_MM = 256.0


def voxel_edges(n: int, spacing: float) -> np.ndarray:
    """Edges [n+1] of n voxels centred in the field, in mm; shifted by up to half a voxel so that 1 mm stays on 1 mm."""
    margin = np.floor((FIELD_MM / spacing - n) / 2 + 1e-3)  # in voxels; not one less by a rounding error
    return (margin + np.arange(n + 1)) * spacing


def _mean_weights(n: int, spacing: float, size: int) -> sparse.csr_array:
    """Weights [size,n] of voxels in pixels: means over a pixel's width, linear interpolation where voxels are wider."""
    pixel = FIELD_MM / size
    width = max(pixel, spacing)
    centres = (np.arange(size)[:, None] + 0.5) * pixel
    edges = voxel_edges(n, spacing)
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
        index = np.searchsorted(voxel_edges(n, mm), centres + 1e-6, side="right") - 1
        inside = ((index >= 0) & (index < n)).reshape(-1, *[1] * (2 - axis))
        slices = np.where(inside, slices.take(index.clip(0, n - 1), axis), 0).astype(slices.dtype)
    return slices


def axial(array: np.ndarray) -> np.ndarray:
    """[right, anterior, superior] voxels as [slice, row, column]: slices upwards, rows backwards, columns leftwards."""
    return array[::-1, ::-1].transpose(2, 1, 0)
