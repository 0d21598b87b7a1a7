"""Patients nearest to a patient: each of its slices is matched with the nearest slice of the other within reach.

D(i, j) being the distance of slice i of the query patient, at height z_i, to code j of a reference patient, at z_j, the
distance between the two is

    sum_i min over j with |z_i - z_j| <= reach of D(i, j)  +  sum_j min over i with |z_i - z_j| <= reach of D(i, j)
    ---------------------------------------------------------------------------------------------------------------
                                           sum_i alone(i)  +  sum_j alone(j)

in which `alone` is the distance of a slice that has no match; where nothing is within reach it stands in place of the
minimum. By lesion it is the distance to a slice that holds nothing: without such a denominator, how much lesion the two
have, small lesions would be near to all others. By anatomy it is the mean distance to a code drawn by chance.
The distance is 0 between equals, and 1 or more where nothing is alike. It is multiplied by the path's largest weight of
a cell; by both, the distances of the two paths are added.

Exact by bounds: one scan gives lower bounds of all D, their minima a lower bound of each patient's distance. Distances
are computed in the order of the bounds, until the k-th is below the next bound.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Float64, Int32, Int64, Shaped, UInt16

from decomp_jax.mesh import give_back_host_memory
from decomp_jax.retrieval.distance import add_up, quantise
from decomp_jax.retrieval.layout import aligned, chunks, run_starts
from decomp_jax.retrieval.queries import Merged, Queries, is_sparse, merged, padded, table

# Slices of a patient whose smallest bound is kept as one number, and slices scanned at a time.
GROUP = 16
BLOCK = 512
# What float32 bounds may be too large by, as a share of the largest number they are made of.
ROUNDING = 1e-5


class PatientHits(NamedTuple):
    """The k patients nearest to one, fewer where the bank has fewer.

    Attributes:
        distances: ascending; equal ones in the order of the ids.
        patients: their ids.
        matches: of each path, the bank's row matched with each of the query's slices; -1 where none is within reach.
    """

    distances: Float64[np.ndarray, "k"]
    patients: Shaped[np.ndarray, "k"]
    matches: dict[str, Int64[np.ndarray, "k i"]]


class PatientIndex(NamedTuple):
    """Slices of one path by patient and height; patients are padded to whole groups, devices' slices to whole blocks.

    Attributes:
        codes: uint16 [n,p].
        on_devices: the same, shared out; where the device is the CPU, in the same memory.
        heights: float32 [n], mm; nan for padding.
        rows: int32 [n], the bank's; -1 for padding.
        starts: [patients+1], position of each patient's first slice; the last is where padding alone begins.
        names: sorted ids of the patients.
        mesh: the devices, along its axis "data".
    """

    codes: UInt16[np.ndarray, "n p"]
    on_devices: UInt16[Array, "n p"]
    heights: Float32[np.ndarray, "n"]
    rows: Int32[np.ndarray, "n"]
    starts: Int64[np.ndarray, "s"]
    names: np.ndarray
    mesh: Mesh


class _Slices(NamedTuple):
    """The query's slices in one path.

    Attributes:
        tables: float64 [p,k,j]; j is i rounded up by `_width`, the last slice being repeated.
        heights: float32 [i], mm.
        reach: how far a slice may be from the one that it is matched with, mm.
        alone: float64 [i], distance of each slice without a match.
        alone_codes: float64 [p,k], what a code adds to that of a reference slice.
        weight: the largest of a cell.
        farthest: the largest distance that a slice can have to any code.
    """

    tables: np.ndarray
    heights: np.ndarray
    reach: np.float32
    alone: np.ndarray
    alone_codes: np.ndarray
    weight: float
    farthest: float


def make_patient_index(
    read: Callable[[np.ndarray | slice], np.ndarray], ids: np.ndarray, heights: np.ndarray, mesh: Mesh
) -> PatientIndex:
    """Index of N rows. `read` gives the codes uint16 [n,p] of some."""
    order = np.lexsort((heights, ids))
    heads = run_starts(ids[order])
    sizes = np.diff(heads, append=len(ids))
    padded = -(-sizes // GROUP) * GROUP
    starts = np.concatenate([[0], np.cumsum(padded)])
    share = BLOCK * mesh.size
    total = -(-max(starts[-1], 1) // share) * share
    at = np.arange(len(ids)) + np.repeat(starts[:-1] - heads, sizes)
    rows, codes = np.full(total, -1, np.int32), aligned((total, read(slice(0)).shape[1]), np.dtype(np.uint16))
    sorted_heights = np.full(total, np.nan, np.float32)
    rows[at], sorted_heights[at] = order, heights[order]
    for some in chunks(len(ids)):
        codes[at[some]] = read(order[some])
    on_devices = jax.device_put(codes, NamedSharding(mesh, P("data")))
    return PatientIndex(codes, on_devices, sorted_heights, rows, starts, ids[order[heads]], mesh)


def search_patients(
    indices: Mapping[str, PatientIndex], codebooks: Mapping[str, np.ndarray], queries: Queries, *,
    heights: np.ndarray, within_mm: Mapping[str, float], k: int, exclude: Sequence[str] = (),
) -> PatientHits:
    """See `CodeBank.search_patients`; `indices` and `codebooks`, float64 [K,D], are those of the queries' paths."""
    names = next(iter(indices.values())).names
    slices, bounds = {}, np.zeros(len(names))
    for path, index in indices.items():
        slices[path] = _query_slices(queries, path, codebooks[path], heights, within_mm[path])
        bounds += _bounds(index, slices[path])
        give_back_host_memory()
    order = np.argsort(bounds, kind="stable")
    order = order[~np.isin(names[order], exclude)]
    hits: list[tuple[float, int, list[np.ndarray]]] = []
    for patient in order:
        if len(hits) == k and hits[-1][0] < bounds[patient]:
            break
        answers = [_look(index, slices[path], patient) for path, index in indices.items()]
        hits.append((sum(distance for distance, _ in answers), int(patient), [matches for _, matches in answers]))
        hits = sorted(hits, key=lambda hit: hit[:2])[:k]
    matches = {path: np.array([hit[2][i] for hit in hits], np.int64).reshape(len(hits), len(heights))
               for i, path in enumerate(indices)}
    return PatientHits(np.array([hit[0] for hit in hits]), names[[hit[1] for hit in hits]], matches)


def _query_slices(queries: Queries, path: str, codebook: np.ndarray, heights: np.ndarray, reach: float) -> _Slices:
    count, examples = len(queries), merged(queries, path, codebook)
    with jax.enable_x64(True):
        tables = np.asarray(_tables(padded(examples, _width(count)), codebook))
    own, weights = tables[..., :count], examples.squares
    if is_sparse(path, codebook):
        alone, alone_codes = own[:, 0].sum(0), weights.mean(0)[:, None] * (codebook**2).sum(1)
    else:
        alone = own.mean(1).sum(0)
        alone_codes = np.full(own.shape[:2], alone.mean() / len(own))
    farthest = own.max(1).sum(0).max()
    heights = np.asarray(heights, np.float32)
    return _Slices(tables, heights, np.float32(reach), alone, alone_codes, float(weights.max()), float(farthest))


def _width(count: int) -> int:
    """Slices that so many are padded to: one of few numbers, since each is compiled for, and kept.

    Whole groups, 5, 6 or 8 eighths of a power of two of them.
    """
    groups = -(-count // GROUP)
    power = 1 << (groups - 1).bit_length()
    return GROUP * next(share * power // 8 for share in (5, 6, 8) if 8 * groups <= share * power)


@jax.jit
def _tables(examples: Merged, codebook: Float[Array, "k d"]) -> Float[Array, "p k i"]:
    return jnp.moveaxis(lax.map(lambda own: table(own, codebook), examples), 0, 2)


def _look(index: PatientIndex, slices: _Slices, patient: int) -> tuple[float, np.ndarray]:
    """The distance of a patient, and the bank's row matched with each slice of the query."""
    some = slice(*index.starts[patient:patient + 2])
    some = slice(some.start, some.start + np.count_nonzero(index.rows[some] >= 0))
    codes, rows = index.codes[some], index.rows[some]
    count = len(slices.heights)
    distance = sum(entries[codes[:, p], :count] for p, entries in enumerate(slices.tables))  # [j,i]
    within = np.abs(index.heights[some][:, None] - slices.heights) <= slices.reach
    distance = np.where(within, distance, np.inf)
    alone = _alone(slices, codes)
    there, back = (np.where(np.isinf(least), other, least).sum()
                   for least, other in ((distance.min(0), slices.alone), (distance.min(1), alone)))
    matches = np.where(within.any(0), rows[distance.argmin(0)], -1)
    return slices.weight * _ratio(there + back, slices.alone.sum() + alone.sum()), matches


def _alone(slices: _Slices, codes: UInt16[np.ndarray, "j p"]) -> Float64[np.ndarray, "j"]:
    """Distance of reference slices without a match."""
    return sum(entries[codes[:, p]] for p, entries in enumerate(slices.alone_codes))


def _ratio(matched: float | np.ndarray, alone: float | np.ndarray) -> float | np.ndarray:
    """0 where there is nothing in either patient."""
    return np.divide(matched, alone, out=np.zeros(np.shape(alone)), where=np.asarray(alone) > 0)[()]


def _bounds(index: PatientIndex, slices: _Slices) -> Float64[np.ndarray, "s"]:
    """Lower bounds of the distances of all patients."""
    if len(index.starts) == 1:
        return np.zeros(0)
    count = len(slices.heights)
    heights = np.pad(slices.heights, (0, _width(count) - count), mode="edge")
    with jax.enable_x64(True):
        scan = _sharded_scan(index.mesh)
        *least, alone = scan(index.on_devices, index.heights, slices.tables, slices.alone_codes, heights, slices.reach)
    # Without each device's first block: see `_scan`.
    there, back = (np.asarray(part).reshape(index.mesh.size, -1, *part.shape[1:])[:, 1:] for part in least)
    end = index.starts[-1]
    there = np.minimum.reduceat(there.reshape(-1, there.shape[-1])[:end // GROUP, :count], index.starts[:-1] // GROUP)
    there = np.where(np.isinf(there), slices.alone, there).sum(1)
    valid, back = index.rows[:end] >= 0, back.ravel()[:end]
    alone = np.where(valid, np.asarray(alone)[:end], 0)
    back, alone, sizes = (np.add.reduceat(values, index.starts[:-1], dtype=float)
                          for values in (np.where(np.isinf(back), alone, back), alone, valid))
    matched = there + back - ROUNDING * slices.farthest * (count + sizes)
    return slices.weight * _ratio(matched, slices.alone.sum() + alone)


@functools.cache
def _sharded_scan(mesh: Mesh) -> Callable[..., tuple[Array, Array, Array]]:
    """`_scan`, each device scanning its own codes."""
    return jax.jit(jax.shard_map(
        _scan, mesh=mesh, in_specs=(P("data"), P("data"), P(), P(), P(), P()), out_specs=P("data"), check_vma=False,
    ))


def _scan(
    codes: UInt16[Array, "n p"], heights: Float32[Array, "n"], tables: Float[Array, "p k i"],
    alone_codes: Float[Array, "p k"], query_heights: Float32[Array, "i"], reach: Float32[Array, ""],
) -> tuple[Float32[Array, "b g i"], Float32[Array, "b m"], Float[Array, "n"]]:
    """Smallest bound of each group of codes for each slice of the query, and of each code for any slice, block by
    block, infinite where nothing is within reach; and the distance of each code without a match.

    A turn adds up a block while it reduces the one before: see `distance.group_minima`. So the first reduces nothing,
    and what it gives is to be left out; taken off here, the rest would be copied.
    """
    cells, _, slices = tables.shape
    own = lax.map(lambda one: quantise([one], (False,), cells), jnp.moveaxis(tables, 2, 0))
    luts = jnp.transpose(own.lower, (2, 1, 0))
    step = (own.unit * jnp.exp2(own.shift.astype(own.unit.dtype))).astype(jnp.float32)
    base = own.base.sum(1).astype(jnp.float32)
    blocks = codes.reshape(-1, BLOCK, cells), heights.reshape(-1, BLOCK)

    def turn(before: tuple[Array, Array], block: Array) -> tuple[tuple[Array, Array], Any]:
        sums, heights = before
        within = jnp.abs(heights[:, None] - query_heights) <= reach
        bounds = jnp.where(within, sums.astype(jnp.float32) * step + base, jnp.inf)
        codes, heights = (lax.dynamic_index_in_dim(values, block, keepdims=False) for values in blocks)
        return (add_up(codes, luts), heights), (bounds.reshape(-1, GROUP, slices).min(1), bounds.min(1))

    first = jnp.zeros((BLOCK, slices), jnp.int16), jnp.zeros(BLOCK, jnp.float32)
    _, least = lax.scan(turn, first, jnp.arange(len(blocks[0]) + 1))  # the last index is clamped: the last block again
    return *least, add_up(codes, alone_codes.T)
