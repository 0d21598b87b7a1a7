"""Lesions reach through slices: in a scan, an abnormal latent is the mean over the slab around its slice.

What the network sees in one slice alone is noisy, and the lesion of the next slices is nearly the same lesion, on
cells that are wider than slices are apart. Anatomy changes faster: the normal code stays the slice's own
(`docs/retrieval.md`).
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from decomp_jax.data.schema import Settings
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.mesh import data_mesh, sharded, split_over
from decomp_jax.preparation.picture import FOREGROUND as PICTURES
from decomp_jax.types import Latents

Note = TypeVar("Note")

OF_A_CELL = 1 / 8  # the slab's deviation, of a code cell's side
REACH = 3  # deviations
# Slices of a scan encoded at a time, but for a few, which are encoded one by one.
BATCH = 8
FEW = 4


def default_slab_mm(settings: Settings, grid: int) -> float:
    """Deviation of the Gaussian slab along the scan, mm: 4 for a field of 256 mm and the paper's 8 x 8 codes.

    0 of pictures, which are of no scan.
    """
    return 0.0 if settings.foreground == PICTURES else settings.field_mm / grid * OF_A_CELL


def slab_weights(
    patients: Shaped[np.ndarray, "n"], heights: Float[np.ndarray, "n"], slab_mm: float
) -> Float[np.ndarray, "n o"]:
    """Weights of the slices around each, from `o // 2` rows before it to as many after, with a sum of 1.

    Slices of other patients, or of unknown height, count nothing. `slab_mm=0` leaves each slice by itself.
    """
    heights = np.asarray(heights, np.float64)
    sides: list[tuple[np.ndarray, np.ndarray]] = []
    while slab_mm and len(sides) + 1 < len(patients):
        step = len(sides) + 1
        apart = np.abs(heights[step:] - heights[:-step]) / slab_mm
        near = (patients[step:] == patients[:-step]) & (apart <= REACH)
        if not near.any():
            break
        weights = np.where(near, np.exp(-(np.where(near, apart, 0) ** 2) / 2), 0)
        sides.append((np.pad(weights, (step, 0)), np.pad(weights, (0, step))))
    columns = [before for before, _ in reversed(sides)] + [np.ones(len(patients))] + [after for _, after in sides]
    weights = np.stack(columns, axis=1)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def over_slab(around: Float[Array, "m h w d"], weights: Float[Array, "n o"]) -> Float[Array, "n h w d"]:
    """Weighted means of latents; `around` has `o // 2` more rows before the n, and as many after."""
    return sum(weights[:, o, None, None, None] * around[o : o + len(weights)] for o in range(weights.shape[1]))


def slab_around(heights: Float[np.ndarray, "n"], chosen: int, slab_mm: float) -> Integer[np.ndarray, "k"]:
    """Positions of the slices of a scan that the slab around the chosen one is made of."""
    apart = np.abs(heights - heights[chosen])
    return np.flatnonzero((apart <= REACH * slab_mm) | (np.arange(len(heights)) == chosen))


def latents_of(decomposer: Decomposer, images: Float[np.ndarray, "n s s c"]) -> Latents:
    """Latents of images, each by itself."""
    parts, size = [], 1 if len(images) <= FEW else BATCH  # two widths alone, since each is compiled for
    for start in range(0, len(images), size):
        some = images[start : start + size]
        padded = np.pad(some, [(0, size - len(some))] + [(0, 0)] * 3)
        parts.append(jax.tree.map(lambda part: part[: len(some)], decomposer.latents(padded)))
    return jax.tree.map(lambda *those: np.concatenate(those), *parts)


def over_scan(latents: Latents, heights: Float[np.ndarray, "n"], slab_mm: float) -> Latents:
    """Latents of slices of one scan in order of height, the abnormal ones of slabs made of these slices."""
    weights = slab_weights(np.zeros(len(heights)), heights, slab_mm)
    reach = weights.shape[1] // 2
    around = np.pad(latents.abnormal, [(reach, reach)] + [(0, 0)] * 3)
    return Latents(latents.normal, over_slab(around, weights))


def with_slab_latents(
    decomposer: Decomposer, batches: Iterable[tuple[Note, dict[str, jax.Array]]], rows: Shaped[np.ndarray, "n"],
    slab_mm: float,
) -> Iterator[tuple[Note, dict[str, jax.Array], Latents]]:
    """Global batches of a pass over `rows` with their latents, the abnormal ones of slabs. One batch is read ahead.

    Slices of a scan follow each other in order of height. Slabs end where they would pass a whole batch.
    """
    mesh = data_mesh()
    mean = jax.jit(_over_three, out_shardings=sharded(mesh))
    encoded = ((note, batch, decomposer.latents(batch["image"])) for note, batch in batches)
    before, own, start = None, next(encoded, None), 0
    while own is not None:
        after = next(encoded, None)
        note, batch, latents = own
        nothing = jnp.zeros_like(latents.abnormal)
        around = [nothing if other is None else other[2].abnormal for other in (before, own, after)]
        weights = split_over(mesh, _weights_of_batch(rows, start, len(nothing), slab_mm))
        yield note, batch, Latents(latents.normal, mean(*around, weights))
        before, own, start = own, after, start + len(nothing)


def _weights_of_batch(
    rows: Shaped[np.ndarray, "n"], start: int, size: int, slab_mm: float
) -> Float[np.ndarray, "b o"]:
    """The weights of rows from `start` on, which reach no further than the batches beside; 0 of padding."""
    low = max(start - size, 0)
    near = rows[low : start + 2 * size]
    weights = slab_weights(near["patient_id"], near["position_mm"], slab_mm)[start - low : start - low + size]
    middle = weights.shape[1] // 2
    reach = min(1 << (middle - 1).bit_length() if middle else 0, size)  # few widths, since each is compiled for
    cut, more = max(middle - reach, 0), max(reach - middle, 0)
    weights = np.pad(weights[:, cut : weights.shape[1] - cut], ((0, 0), (more, more)))
    return np.pad(weights / weights.sum(1, keepdims=True), ((0, size - len(weights)), (0, 0)))


def _over_three(before: Array, own: Array, after: Array, weights: Float[Array, "b o"]) -> Array:
    reach = weights.shape[1] // 2
    return over_slab(jnp.concatenate([before[len(before) - reach :], own, after[:reach]]), weights)
