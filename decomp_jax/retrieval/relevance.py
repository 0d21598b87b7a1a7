"""How alike slices are by their label maps, and how good a ranking is by that measure.

Nothing in the paper says how good its retrieval is (section 5 leaves it to further work); the measures are the field's
own: the Dice overlap of label maps as graded relevance, nDCG, average precision. Pairs of slices are compared by matrix
products of flattened masks, a block of queries at a time.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

REFERENCE_BLOCK = 1024

AnyArray = np.ndarray | Array


def class_dice(
    query: UInt8[AnyArray, "q *pixels"], reference: UInt8[AnyArray, "r *pixels"], *, classes: int
) -> Float[Array, "q r {classes}"]:
    """Dice of each query with each reference for the labels 1..`classes`; NaN where a class is absent from both."""
    return _by_blocks(query, reference, range(1, classes + 1))


def whole_dice(
    query: UInt8[AnyArray, "q *pixels"], reference: UInt8[AnyArray, "r *pixels"]
) -> Float[Array, "q r"]:
    """Dice of the parts that have any label; NaN where neither slice has one."""
    return _by_blocks(query, reference, (0,))[..., 0]


def _by_blocks(query: AnyArray, reference: AnyArray, labels: Sequence[int]) -> Float[Array, "q r l"]:
    """Dice for each of the labels. A block of references at a time is on the device, the others may be in a file."""
    query = jnp.asarray(query)
    starts = range(0, len(reference), REFERENCE_BLOCK)
    blocks = (jnp.asarray(reference[i : i + REFERENCE_BLOCK]) for i in starts)
    dice = [jnp.stack([_dice(query, block, label) for label in labels], axis=-1) for block in blocks]
    return jnp.concatenate(dice, axis=1)


@jax.jit
def _dice(
    query: UInt8[AnyArray, "q *pixels"], reference: UInt8[AnyArray, "r *pixels"], label: int
) -> Float[Array, "q r"]:
    """Dice of the pixels with one label, or of those with any, if `label` is 0."""
    # Zeros and ones are exact in any type, and float32 counts pixels exactly up to 2**24; bfloat16 is slow on a CPU.
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    maps = (labels.reshape(len(labels), -1) for labels in (query, reference))
    a, b = (jnp.where(label, labels == label, labels > 0).astype(dtype) for labels in maps)
    overlap = jnp.matmul(a, b.T, preferred_element_type=jnp.float32)
    return _share(2 * overlap, a.sum(1, dtype=jnp.float32)[:, None] + b.sum(1, dtype=jnp.float32))


@jax.jit
def area_similarity(
    query: Float[AnyArray, "q classes"], reference: Float[AnyArray, "r classes"]
) -> Float[Array, "q r classes"]:
    """The Dice that areas alone would allow, 2 min(a, b) / (a + b), per class; NaN where it is absent from both."""
    a, b = query[:, None], reference[None]
    return _share(2 * jnp.minimum(a, b), a + b)


def class_areas(labels: UInt8[np.ndarray, "n *pixels"], *, classes: int) -> Float[np.ndarray, "n {classes}"]:
    """Pixels of each class."""
    labels = labels.reshape(len(labels), -1)
    return np.stack([(labels == label).sum(1, dtype=np.float32) for label in range(1, classes + 1)], axis=-1)


def _share(part: Array, whole: Array) -> Array:
    """part / whole of counts; NaN where `whole` is 0."""
    return jnp.where(whole > 0, part / jnp.maximum(whole, 1), jnp.nan)


@functools.partial(jax.jit, static_argnames="absent")
def mean_over_classes(
    values: Float[AnyArray, "q r classes"], absent: Literal["skipped", "zero"] = "skipped"
) -> Float[Array, "q r"]:
    """Mean over classes. A class absent from both slices is left out of the mean, or counted as 0.

    The second convention is that of the paper's authors' later work; it can't reach 1 unless every class is present.
    A pair without any class is NaN when skipped.
    """
    if absent == "zero":
        return jnp.nan_to_num(values).mean(-1)
    return _share(jnp.nan_to_num(values).sum(-1), (~jnp.isnan(values)).sum(-1))


def centre_lesions(labels: UInt8[np.ndarray, "n h w"]) -> UInt8[np.ndarray, "n h w"]:
    """Label maps shifted by whole pixels so that each lesion's centroid lies in the middle of the image."""
    centred = np.zeros_like(labels)
    middle = np.array(labels.shape[1:]) // 2
    for i, label in enumerate(labels):
        if label.any():
            centroid = np.floor(np.argwhere(label).mean(0) + 0.5).astype(int)
            centred[i] = np.roll(label, middle - centroid, axis=(0, 1))
    return centred


def nearest(
    distances: Float[AnyArray, "q r"], *, excluded: Bool[np.ndarray, "q r"], k: int
) -> Int[np.ndarray, "q k"]:
    """The k references of least distance, nearest first, ties to the lower row; -1 where fewer are left. A reference
    without a distance (NaN, infinite) is no hit."""
    rows = np.asarray(_nearest(distances, excluded, min(k, distances.shape[1])))
    return np.pad(rows, ((0, 0), (0, k - rows.shape[1])), constant_values=-1)


@functools.partial(jax.jit, static_argnames="k")
def _nearest(distances: Float[AnyArray, "q r"], excluded: Bool[AnyArray, "q r"], k: int) -> Int[Array, "q k"]:
    closeness = jnp.where(excluded | jnp.isnan(distances), -jnp.inf, -distances)
    values, rows = jax.lax.top_k(closeness, k)
    return jnp.where(jnp.isinf(values), -1, rows)


def first_of_each(
    rows: Int[np.ndarray, "q n"], group: Int[np.ndarray, "r"], *, k: int
) -> Int[np.ndarray, "q k"]:
    """Keeps of each ranking the first hit of every group (a patient), and of these the first k; -1 beyond."""
    groups = np.where(rows < 0, -1, group[rows])
    order = np.argsort(groups, axis=1, kind="stable")
    ordered = np.take_along_axis(groups, order, 1)
    starts = np.diff(ordered, axis=1, prepend=-1) != 0
    first = np.zeros_like(starts)
    np.put_along_axis(first, order, starts, axis=1)
    front = np.argsort(~first, axis=1, kind="stable")[:, :k]
    kept = np.where(np.take_along_axis(first, front, 1), np.take_along_axis(rows, front, 1), -1)
    return np.pad(kept, ((0, 0), (0, k - kept.shape[1])), constant_values=-1)


def gains_of(relevance: Float[np.ndarray, "q r"], rows: Int[np.ndarray, "q k"]) -> Float[np.ndarray, "q k"]:
    """Relevance of the hits in order; NaN where there is no hit."""
    return np.where(rows < 0, np.nan, np.take_along_axis(relevance, rows, 1))


def mean_gain(gains: Float[np.ndarray, "q n"], k: int) -> Float[np.ndarray, "q"]:
    """Mean relevance of the first k hits, of those there are; NaN without any. Of 0/1 relevance: precision@k."""
    is_hit = ~np.isnan(gains[:, :k])
    hits = is_hit.sum(1)
    return np.where(hits > 0, np.where(is_hit, gains[:, :k], 0).sum(1) / np.maximum(hits, 1), np.nan)


def ndcg(gains: Float[np.ndarray, "q n"], ideal: Float[np.ndarray, "q n"], k: int) -> Float[np.ndarray, "q"]:
    """Discounted cumulative gain of the first k hits over that of the ideal ranking; NaN where that is 0."""

    def discounted(values: np.ndarray) -> np.ndarray:
        values = np.nan_to_num(values[:, :k])
        return (values / np.log2(np.arange(values.shape[1]) + 2)).sum(1)

    best = discounted(ideal)
    return np.where(best > 0, discounted(gains) / np.where(best > 0, best, 1), np.nan)


def recall_of_ideal(
    gains: Float[np.ndarray, "q n"], ideal: Float[np.ndarray, "q n"], k: int
) -> Float[np.ndarray, "q"]:
    """Share of the ideal top k (those of any relevance) found among the first k hits; equals count as found."""
    positive = np.nan_to_num(ideal[:, :k]) > 0
    wanted = positive.sum(1)
    least = np.min(ideal[:, :k], axis=1, where=positive, initial=np.inf)
    ideal_hits = (np.nan_to_num(gains[:, :k]) >= least[:, None]).sum(1)
    return np.where(wanted > 0, np.minimum(ideal_hits, wanted) / np.maximum(wanted, 1), np.nan)


def average_precision(
    relevant: Bool[np.ndarray, "q n"], total: Int[np.ndarray, "q"]
) -> Float[np.ndarray, "q"]:
    """Mean over the `total` relevant references of the precision at the rank of each; those not ranked count 0."""
    precision = np.cumsum(relevant, axis=1) / np.arange(1, relevant.shape[1] + 1)
    return np.where(total > 0, (precision * relevant).sum(1) / np.maximum(total, 1), np.nan)
