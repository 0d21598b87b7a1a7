"""Intensities: z-scores over the foreground, or values within a window, clipped and mapped to [0, 1]."""

from pathlib import Path

import numpy as np

from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError

# Resampling leaves values about 0 around a skull-stripped brain; below this share of the 99th percentile they are 0.
RESIDUE = 1e-4
MAX_FOREGROUND = 0.9  # a volume with more voxels other than 0 has no background
MAX_EDGE = 0.3  # of the voxels at its left, right, front and back, which a brain touches at most in places


def normalise(
    path: Path, data: np.ndarray, settings: Settings, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A volume in [0,1], 0 outside the foreground; and the foreground, as bool.

    By `settings.foreground` that is every voxel other than 0, but for residue of resampling (`RESIDUE`), and values are
    z-scores over it; or every voxel above the window's lower end, and values are as stored. Within `mask` alone, if
    there is one.

    Raises:
        UserError: the volume has no foreground, is constant, or is to be skull-stripped and is not.
    """
    if mask is not None:
        data = np.where(mask, data, settings.intensity_clip[0] if settings.foreground == "window" else 0)
    if settings.foreground == "window":
        return _windowed(path, data, settings)
    magnitude = np.abs(data)
    if not magnitude.any():
        raise UserError(f"{path}: every voxel is 0; export the scan again")
    foreground = magnitude > RESIDUE * np.percentile(magnitude[magnitude > 0], 99)
    edge = np.concatenate([foreground[[0, -1]].ravel(), foreground[:, [0, -1]].ravel()])
    if foreground.mean() > MAX_FOREGROUND or edge.mean() > MAX_EDGE:
        raise UserError(f"{path}: has no background of 0; strip the skull first, or name its brain mask with --mask")
    return scale_intensity(path, data, foreground, settings), foreground


def _windowed(path: Path, data: np.ndarray, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    low, high = settings.intensity_clip
    foreground = data > low
    if not foreground.any():
        raise UserError(f"{path}: no voxel is above {low:g}, where --window begins; give it in the volume's unit")
    return ((np.clip(data, low, high) - low) / (high - low)).astype(np.float32), foreground


def scale_intensity(path: Path, data: np.ndarray, foreground: np.ndarray, settings: Settings) -> np.ndarray:
    """z-scores over the foreground, clipped to `settings.intensity_clip` and mapped to [0,1]; 0 elsewhere."""
    values = data[foreground].astype(np.float64)
    if values.size == 0 or values.std() == 0:
        raise UserError(f"{path}: has the same value everywhere; export the image again")
    low, high = settings.intensity_clip
    scaled = np.zeros(data.shape, np.float32)
    scaled[foreground] = (np.clip((values - values.mean()) / values.std(), low, high) - low) / (high - low)
    return scaled
