"""Intensities: z-scores over the foreground, clipped and mapped to [0, 1]."""

from pathlib import Path

import numpy as np

from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError

# Resampling leaves values about 0 around a skull-stripped brain; below this share of the 99th percentile they are 0.
RESIDUE = 1e-4
MAX_FOREGROUND = 0.9  # a volume with more voxels other than 0 has no background
MAX_EDGE = 0.3  # of the voxels at its left, right, front and back, which a brain touches at most in places


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
    edge = np.concatenate([brain[[0, -1]].ravel(), brain[:, [0, -1]].ravel()])
    if brain.mean() > MAX_FOREGROUND or edge.mean() > MAX_EDGE:
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
