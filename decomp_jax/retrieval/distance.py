"""Squared L2 between grids of codes, from tables of integers.

The squared distance of two code grids is the sum over positions p of T[q_p, x_p], T being the squared distances between
codebook rows. Two integer tables stand for T:

    exact   T in units of (largest T) * P / 2^62, rounded, int64. Sums are exact, so that they don't depend on order,
            shards or devices; the rounding is below float64's own.
    lower   floor(exact / step), clipped to what P entries can add up to in int16, uint8. Every entry is at most
            exact / step, so every sum, times step, is a lower bound on the exact distance.

`nearest` scans all codes with the lower table, keeps the smallest bound of each group of `GROUP` neighbouring codes,
looks at the groups with the smallest bounds by the exact table, and knows that it is right when the k-th exact distance
is below the smallest bound among the groups not looked at.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, Int32, Int64, UInt8, UInt16
from scipy.spatial.distance import cdist

# Codes whose smallest bound is kept as one number: 32 uint16 are a cache line.
GROUP = 32
# Codes that the scan of a batch holds at a time; shards are padded to whole blocks.
BLOCK = 512
# Distance of a code that the query may not find.
NO_DISTANCE = np.iinfo(np.int64).max
# In place of a patient: nobody has the code (padding), or is excluded; several patients have it.
NOBODY, SEVERAL = -1, -2
# Entries of T beyond this many times its mean share one bound: a few outlying codes mustn't coarsen all bounds.
CLIP = 3.0


class Tables(NamedTuple):
    """Distances between codes; column K_0 + ... + K_(i-1) + a holds those to code a of codebook i, the last one zeros.

    Attributes:
        exact: int64 [K,T], squared distance / `unit`.
        lower: uint8 [K,T], at most exact / `step`.
        step: int64.
        unit: squared L2 of one unit.
    """

    exact: Int64[np.ndarray, "k t"]
    lower: UInt8[np.ndarray, "k t"]
    step: np.int64
    unit: float


def make_tables(codebooks: Sequence[np.ndarray], cells: int) -> Tables:
    """Tables for codes with `cells` positions from each of the codebooks [K_i,D_i]."""
    squares = [cdist(book, book, "sqeuclidean") for book in (np.asarray(book, np.float64) for book in codebooks)]
    positions = cells * len(codebooks)
    unit = max(square.max() for square in squares) * positions / 2.0**62 or 1.0
    sizes = [len(square) for square in squares]
    exact = np.zeros((max(sizes), sum(sizes) + 1), np.int64)
    for square, start in zip(squares, np.cumsum([0, *sizes])):
        exact[:len(square), start:start + len(square)] = np.rint(square / unit)
    largest = min(np.iinfo(np.uint8).max, np.iinfo(np.int16).max // positions)
    clip = min(CLIP * np.mean([square.mean() for square in squares]), max(square.max() for square in squares))
    step = np.int64(clip / unit / largest) + 1
    lower = np.minimum(exact // step, largest).astype(np.uint8)
    return Tables(exact, lower, step, unit)


class DistinctCodes(NamedTuple):
    """Distinct codes, sharded over their number n, a multiple of BLOCK.

    Attributes:
        indices: uint16 [n,positions].
        owners: int32 [n], the one patient that has the code; SEVERAL or NOBODY.
    """

    indices: UInt16[Array, "n p"]
    owners: Int32[Array, "n"]


class Nearest(NamedTuple):
    """Distinct codes by (distance, code); `certain` where no code left out comes before the last.

    Attributes:
        distances: int64 [Q,S*c], c a shard; NO_DISTANCE where a code is padding or an excluded patient's alone.
        codes: int32 [Q,S*c], position of the code among all.
        certain: bool [Q,S].
    """

    distances: Int64[Array, "q c"]
    codes: Int32[Array, "q c"]
    certain: Bool[Array, "q s"]


@functools.cache
def nearest(mesh: Mesh, groups: int, count: int) -> Callable[..., Nearest]:
    """Compiled search for the `count` nearest codes of each shard among the `groups` groups with the smallest bounds.

    The function takes (codes, tables, queries int32 [Q,positions] of table columns, exclude int32 [Q,2] of patients).
    """
    return _sharded(functools.partial(_nearest, groups=groups, count=count), mesh)


@functools.cache
def every(mesh: Mesh) -> Callable[..., Int64[Array, "q n"]]:
    """Compiled distances from each query to each code, NO_DISTANCE as in `Nearest`; takes the same."""
    return _sharded(_every, mesh)


def _sharded(function: Callable, mesh: Mesh) -> Callable:
    return jax.jit(jax.shard_map(
        function, mesh=mesh, in_specs=(P("data"), P(), P(), P()), out_specs=P(None, "data"), check_vma=False,
    ))


def _nearest(codes: DistinctCodes, tables: Tables, queries: Array, exclude: Array, *, groups: int, count: int) -> Nearest:
    # XLA's CPU compiler sorts everything where an output of top_k is sliced, so all of it is used: the last group is
    # looked at although the others would do.
    bounds, group = lax.top_k(-group_minima(codes.indices, tables.lower, queries).astype(jnp.float32), groups)
    beyond = -bounds.min(1).astype(jnp.int64) * tables.step
    code = (group[..., None] * GROUP + jnp.arange(GROUP, dtype=group.dtype)).reshape(len(queries), -1)
    distance = lax.map(lambda one: _add_up(codes.indices[one[0]], tables.exact[:, one[1]]), (code, queries))
    distance = jnp.where(_allowed(codes.owners[code], exclude), distance, NO_DISTANCE)
    # Rounding to float32 keeps order but for ties: what is left out comes later if its float32 is strictly greater.
    rounded, at = lax.top_k(-distance.astype(jnp.float32), count + GROUP // 2)
    near = lax.sort([jnp.take_along_axis(values, at, 1) for values in (distance, code)], num_keys=2)
    distance, code = (values[:, :count] for values in near)
    last = distance[:, -1]
    certain = (last < beyond) & (last.astype(jnp.float32) < -rounded.min(1))
    offset = lax.axis_index("data") * len(codes.owners)
    return Nearest(distance, code + offset.astype(code.dtype), certain[:, None])


def _every(codes: DistinctCodes, tables: Tables, queries: Array, exclude: Array) -> Array:
    distance = lax.map(lambda query: _add_up(codes.indices, tables.exact[:, query]), queries)
    return jnp.where(_allowed(codes.owners, exclude), distance, NO_DISTANCE)


def _allowed(owners: Int32[Array, "*q n"], exclude: Int32[Array, "q 2"]) -> Bool[Array, "q n"]:
    """Whether a code has rows that a query may find. Of those of several patients the host leaves out rows."""
    return (owners != NOBODY) & (owners[..., None] != exclude[:, None]).all(-1)


def group_minima(indices: UInt16[Array, "n p"], lower: UInt8[Array, "k t"], queries: Int[Array, "q p"]
                 ) -> Int[Array, "q g"]:
    """Smallest bound, in steps, of each group of GROUP neighbouring codes.

    XLA's CPU compiler turns gathers of rows into scalar code once they are fused with a reduction. So a batch is
    scanned block by block, each turn adding up one block while it reduces the one before: a loop's carry is never
    fused.
    """
    luts = lower[:, queries[0] if len(queries) == 1 else queries.T]
    if len(queries) == 1 or jax.default_backend() != "cpu":
        return _add_up(indices, luts).reshape(-1, GROUP, len(queries)).min(1).T

    def reduce(bounds: Array) -> Array:
        return bounds.reshape(-1, GROUP, len(queries)).min(1)

    def turn(before: Array, block: Array) -> tuple[Array, Array]:
        return _add_up(block, luts), reduce(before)

    first = jnp.zeros((BLOCK, len(queries)), jnp.int16)
    last, minima = lax.scan(turn, first, indices.reshape(-1, BLOCK, indices.shape[1]))
    return jnp.concatenate([minima.reshape(-1, len(queries)), reduce(last)])[BLOCK // GROUP:].T


def _add_up(indices: UInt16[Array, "n p"], luts: Array) -> Array:
    """Sums over positions of luts[indices[:,p],p]; luts are [k,p] or [k,p,q]. Unrolled: one pass over the codes.

    A code's entries for all positions lie together: in few pages of memory, and in different lines of the cache.
    """
    kind = jnp.int16 if luts.dtype == jnp.uint8 else luts.dtype
    return sum(luts.at[indices[:, p], p].get(mode="promise_in_bounds").astype(kind) for p in range(luts.shape[1]))
