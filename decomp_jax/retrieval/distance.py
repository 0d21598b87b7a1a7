"""Distances of queries to codes, from tables of integers.

The distance of a code x is a sum over cells p of entries L[x_p, p] of the query's table (`queries`). From the entries
of each cell a number is taken off, which changes no order: the smallest of them, or that of "nothing" where codes are
sparse.
Two integer tables stand for what is left:

    exact   in units so small that all entries add up to less than 2^62, rounded, int64. Sums are exact, so that they
            don't depend on order, shards or devices; the rounding is below float64's own.
    lower   floor(exact / step), a step being 2^shift units, clipped to what adds up in int16, uint8. Every entry is at
            most exact / step, so every sum, times step, is a lower bound on the exact distance.

`nearest` scans all codes with the lower table, keeps the smallest bound of each group of `GROUP` neighbouring codes,
looks at the groups with the smallest bounds by the exact table, and knows that it is right when the k-th exact distance
is below the smallest bound among the groups not looked at.

Codes of a path in which most cells hold "nothing" (code 0) are sparse: a code is the list of its other cells, and its
distance is the one of nothing plus sum over these of (L[x_p, p] - L[0, p]). Codes with lists of one length stand
together, in a bucket.

Looking up entries is what CPUs are good at. Accelerators get the same sums as products of matrices of small integers,
where all codes are dense.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int32, Int64, Shaped, UInt8, UInt16

# Codes whose smallest bound is kept as one number: 32 uint16 are a cache line.
GROUP = 32
# Codes that the scan of a batch holds at a time; buckets of a shard are padded to whole blocks.
BLOCK = 1024
# Such blocks that an accelerator holds at a time.
BLOCKS = 8
# Distance of a code that the query may not find.
NO_DISTANCE = np.iinfo(np.int64).max
# In place of a patient: nobody has the code (padding), or is excluded; several patients have it.
NOBODY, SEVERAL = -1, -2
# Entries beyond this many times their mean share one bound: a few outlying codes mustn't coarsen all bounds.
CLIP = 3.0


class Tables(NamedTuple):
    """Lines for Q queries to look up: what every code adds to the distance in one position.

    Attributes:
        exact: int64 [T,K], units.
        lower: uint8 [T,K], at most exact / step; plus `zero(positions)` in the lines of sparse positions.
        lines: int32 [Q,P], the line of each position, those of dense positions first.
        shift: int64 [Q], a step is 2^shift units.
    """

    exact: Int64[Array, "t k"]
    lower: UInt8[Array, "t k"]
    lines: Int32[Array, "q p"]
    shift: Int64[Array, "q"]


class Quantised(NamedTuple):
    """A table L [P,K] as integers: L = base + unit * exact.

    Attributes:
        exact, lower: [P,K], as in `Tables`.
        base: float64 [P].
        shift: int64, a step is 2^shift units.
        unit: float64, squared L2 of one unit.
    """

    exact: Int64[Array, "p k"]
    lower: UInt8[Array, "p k"]
    base: Float[Array, "p"]
    shift: Int64[Array, ""]
    unit: Float[Array, ""]


def largest(positions: int) -> int:
    """Largest entry of `lower` of which `positions` add up in int16."""
    return min(np.iinfo(np.uint8).max, np.iinfo(np.int16).max // positions)


def zero(positions: int) -> int:
    """What stands for 0 in `lower` of sparse positions, whose entries are signed."""
    return (largest(positions) + 1) // 2


def quantise(tables: Sequence[Float[Array, "_ _"]], sparse: Sequence[bool], positions: int) -> Quantised:
    """Tables float64 [P_i,K_i], one after the other, as integers of which any `positions` add up.

    `sparse` says which tables are of sparse positions: their entries are signed, 0 for code 0.
    """
    top, middle, size = largest(positions), zero(positions), max(table.shape[1] for table in tables)
    bases = [table[:, 0] if signed else table.min(1) for table, signed in zip(tables, sparse)]
    tables = [table - base[:, None] for table, base in zip(tables, bases)]
    lows, highs, means = (jnp.stack([reduce(table) for table in tables]) for reduce in (jnp.min, jnp.max, jnp.mean))
    clip = jnp.minimum((highs - lows).max(), CLIP * (means - lows).mean())
    signed_steps = jnp.maximum(-lows / middle, (clip + lows) / (top - middle))
    step = jnp.where(jnp.asarray(sparse), signed_steps, clip / top).max()
    step = jnp.maximum(step, jnp.finfo(jnp.float32).tiny) * (1 + 1e-9)
    most = jnp.maximum(jnp.maximum(highs.max(), -lows.min()) / step, top) * positions
    shift = jnp.floor(61 - jnp.log2(most)).astype(jnp.int64)
    unit = step / jnp.exp2(shift.astype(step.dtype))
    exact = [jnp.rint(table / unit).astype(jnp.int64) for table in tables]
    lower = [jnp.clip((table >> shift) + middle * signed, 0, top).astype(jnp.uint8)
             for table, signed in zip(exact, sparse)]
    exact, lower = (
        jnp.concatenate([jnp.pad(table, ((0, 0), (0, size - table.shape[1]))) for table in part])
        for part in (exact, lower)
    )
    return Quantised(exact, lower, jnp.concatenate(bases), shift, unit)


class Buckets(NamedTuple):
    """How a shard's codes stand in `DistinctCodes`, bucket after bucket.

    Attributes:
        dense, sparse: number of positions of either kind.
        sizes: of each bucket the number of codes, a multiple of BLOCK, and the length of their lists.
    """

    dense: int
    sparse: int
    sizes: tuple[tuple[int, int], ...]

    @property
    def firsts(self) -> list[int]:
        """Positions of each bucket's first code, and the number of codes."""
        return list(itertools.accumulate((count for count, _ in self.sizes), initial=0))

    @property
    def begins(self) -> list[int]:
        """Positions of each bucket's first key, and the number of keys."""
        return list(itertools.accumulate((count * length for count, length in self.sizes), initial=0))


class DistinctCodes(NamedTuple):
    """Distinct codes, sharded: n codes, as many in each shard.

    Attributes:
        dense: uint16 [n,dense], an index for each dense position.
        keys: uint16 or uint32, flat, `position * K + index` of the sparse positions whose index isn't 0, K being the
            width of the tables, padded with 0 to the length of the bucket.
        owners: int32 [n], the one patient that has the code; SEVERAL or NOBODY.
        numbers: int32 [n], the code's number in the order of first rows; a larger one for padding.
    """

    dense: UInt16[Array, "n p"]
    keys: Shaped[Array, "_"]
    owners: Int32[Array, "n"]
    numbers: Int32[Array, "n"]


class Nearest(NamedTuple):
    """Distinct codes by (distance, number); `certain` where no code left out comes before the last.

    Attributes:
        distances: int64 [Q,S*c], c a shard; NO_DISTANCE where a code is padding or an excluded patient's alone.
        codes: int32 [Q,S*c], numbers of the codes.
        certain: bool [Q,S].
    """

    distances: Int64[Array, "q c"]
    codes: Int32[Array, "q c"]
    certain: Bool[Array, "q s"]


@functools.cache
def nearest(mesh: Mesh, buckets: Buckets, groups: int, count: int) -> Callable[..., Nearest]:
    """Compiled search for the `count` nearest codes of each shard among the `groups` groups with the smallest bounds.

    The function takes (codes, tables, exclude int32 [Q,2] of patients).
    """
    return _sharded(functools.partial(_nearest, buckets=buckets, groups=groups, count=count), mesh)


@functools.cache
def every(mesh: Mesh, buckets: Buckets) -> Callable[..., Int64[Array, "q n"]]:
    """Compiled distances from each query to each code, NO_DISTANCE as in `Nearest`; takes the same."""
    return _sharded(functools.partial(_every, buckets=buckets), mesh)


def _sharded(function: Callable, mesh: Mesh) -> Callable:
    return jax.jit(jax.shard_map(
        function, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P(None, "data"), check_vma=False,
    ))


def _nearest(codes: DistinctCodes, tables: Tables, exclude: Array, *, buckets: Buckets, groups: int, count: int
             ) -> Nearest:
    # XLA's CPU compiler sorts everything where an output of top_k is sliced, so all of it is used: the last group is
    # looked at although the others would do.
    minima = group_minima(codes, tables.lower, tables.lines, buckets).astype(jnp.float32)
    minima = jnp.where(codes.owners[::GROUP] == NOBODY, jnp.inf, minima)  # padding alone
    bounds, group = lax.top_k(-minima, groups)
    bounds = jnp.minimum(-bounds.min(1), np.iinfo(np.int16).max)
    beyond = bounds.astype(jnp.int64) << tables.shift
    code = (group[..., None] * GROUP + jnp.arange(GROUP, dtype=group.dtype)).reshape(len(group), -1)

    def distances(one: tuple[Array, Array]) -> Array:
        luts = _luts(tables.exact[one[1]], buckets)
        return add_up(codes.dense[one[0]], luts.dense) + _add_up_keys(_keys(codes.keys, one[0], buckets).T, luts.sparse)

    distance = lax.map(distances, (code, tables.lines))
    distance = jnp.where(_allowed(codes.owners[code], exclude), distance, NO_DISTANCE)
    code = codes.numbers[code]
    # Rounding to float32 keeps order but for ties: what is left out comes later if its float32 is strictly greater.
    rounded, at = lax.top_k(-distance.astype(jnp.float32), count + GROUP // 2)
    near = lax.sort([jnp.take_along_axis(values, at, 1) for values in (distance, code)], num_keys=2)
    distance, code = (values[:, :count] for values in near)
    last = distance[:, -1]
    certain = (last < beyond) & (last.astype(jnp.float32) < -rounded.min(1))
    return Nearest(distance, code, certain[:, None])


def _every(codes: DistinctCodes, tables: Tables, exclude: Array, *, buckets: Buckets) -> Array:
    def distances(lines: Array) -> Array:
        luts = _luts(tables.exact[lines], buckets)
        sums = _add_up_in_turn(lambda code, lut: lut.at[code], codes.dense.T, luts.dense.T)
        by_length = [_add_up_in_turn(lambda key: luts.sparse.at[key], codes.keys[begin:end].reshape(-1, length).T)
                     for begin, end, (_, length) in zip(buckets.begins, buckets.begins[1:], buckets.sizes) if length]
        return sums + jnp.concatenate(by_length) if by_length else sums

    return jnp.where(_allowed(codes.owners, exclude), lax.map(distances, tables.lines), NO_DISTANCE)


def _allowed(owners: Int32[Array, "*q n"], exclude: Int32[Array, "q 2"]) -> Bool[Array, "q n"]:
    """Whether a code has rows that a query may find. Of those of several patients the host leaves out rows."""
    return (owners != NOBODY) & (owners[..., None] != exclude[:, None]).all(-1)


def group_minima(codes: DistinctCodes, lower: UInt8[Array, "t k"], lines: Int[Array, "q p"], buckets: Buckets
                 ) -> Int[Array, "q g"]:
    """Smallest bound, in steps, of each group of GROUP neighbouring codes.

    A batch is scanned block by block, so that bounds [n,Q] are never held at once.
    """
    if jax.default_backend() != "cpu":
        return _minima_by_products(codes.dense, lower[lines])
    return (_minima_of_one if len(lines) == 1 else _minima_of_batch)(codes, lower, lines, buckets)


def _minima_by_products(codes: UInt16[Array, "n p"], lower: UInt8[Array, "q p k"]) -> Int[Array, "q g"]:
    """Of dense codes: a cell's codes as rows of an identity matrix, times the cell's entries."""
    middle = 128  # entries less this are int8
    tables = (lower.astype(jnp.int16) - middle).astype(jnp.int8).transpose(1, 2, 0)
    every = jnp.arange(tables.shape[1], dtype=codes.dtype)

    def add(sums: Array, cell: tuple[Array, Array]) -> tuple[Array, None]:
        code, table = cell
        one_hot = (code[:, None] == every).astype(jnp.int8)
        return sums + lax.dot(one_hot, table, preferred_element_type=jnp.int32), None

    def minima(block: Array) -> Array:
        zeros = jnp.zeros((len(block), len(lower)), jnp.int32)
        sums, _ = lax.scan(add, zeros, (block.T, tables))
        return sums.reshape(-1, GROUP, len(lower)).min(1)

    blocks = codes.reshape(-1, BLOCK, codes.shape[1])
    least = lax.map(minima, blocks, batch_size=BLOCKS).reshape(-1, len(lower)).T
    return (least + middle * len(tables)).astype(jnp.int16)


def _minima_of_one(codes: DistinctCodes, lower: UInt8[Array, "t k"], lines: Int[Array, "1 p"], buckets: Buckets
                   ) -> Int[Array, "1 g"]:
    """Fused, the whole would be shared out among threads by codes, of which those with long lists take the longest, and
    its tables would crowd each other out of the cache. So each part is computed apart.
    """
    def apart(function: Callable[[], Any]) -> Any:
        """What a function gives, as arrays: XLA's CPU compiler fuses nothing with what a condition gives."""
        nothing = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), jax.eval_shape(function))
        return lax.cond(lines[0, 0] >= 0, function, lambda: nothing)  # always, which the compiler can't know

    luts = apart(lambda: _luts(lower[lines[0]], buckets))
    if not buckets.sparse:
        return add_up(codes.dense, luts.dense).reshape(1, -1, GROUP).min(2)
    sums = apart(lambda: add_up(codes.dense, luts.dense)) if buckets.dense else None
    minima = []
    for begin, end, first, (count, length) in zip(buckets.begins, buckets.begins[1:], buckets.firsts, buckets.sizes):
        def bucket_minima() -> Array:
            keys = [lax.slice(codes.keys, (begin + i,), (end,), (length,)) for i in range(length)]
            bounds = _add_up_keys(keys, luts.sparse) - jnp.int16(length * zero(buckets.dense + buckets.sparse))
            return (bounds if sums is None else bounds + sums[first:first + count]).reshape(-1, GROUP).min(1)

        minima.append(apart(bucket_minima))
    return jnp.concatenate(minima)[None]


def _minima_of_batch(codes: DistinctCodes, lower: UInt8[Array, "t k"], lines: Int[Array, "q p"], buckets: Buckets
                     ) -> Int[Array, "q g"]:
    """XLA's CPU compiler turns gathers of rows into scalar code once they are fused with a reduction. So each turn adds
    up one block while it reduces the one before: a loop's carry is never fused.
    """
    queries, luts = len(lines), _luts(lower[lines], buckets)
    count, length = np.array(buckets.sizes).T
    zeros = np.repeat(length * zero(buckets.dense + buckets.sparse), count // GROUP).astype(np.int16)  # of the keys

    def reduce(bounds: Array) -> Array:
        return bounds.reshape(-1, GROUP, queries).min(1)

    def add_keys(sums: Array, block: Array, begin: int, first: int, length: int) -> Array:
        start = begin + (block - first // BLOCK) * (BLOCK * length)
        keys = lax.dynamic_slice(codes.keys, (start,), (BLOCK * length,)).reshape(BLOCK, length)
        return sums + _add_up_keys(keys.T, luts.sparse)

    by_bucket = [functools.partial(add_keys, begin=begin, first=first, length=length)
                 for begin, first, (_, length) in zip(buckets.begins, buckets.firsts, buckets.sizes)]

    def turn(before: Array, block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        dense, number, bucket = block
        sums = add_up(dense, luts.dense)
        if buckets.sparse:
            sums = lax.switch(bucket, by_bucket, sums, number)
        return sums, reduce(before)

    blocks = count // BLOCK
    dense = codes.dense.reshape(blocks.sum(), BLOCK, buckets.dense)
    numbers, bucket = np.arange(blocks.sum()), np.repeat(np.arange(len(blocks)), blocks)
    first = jnp.zeros((BLOCK, queries), jnp.int16)
    last, minima = lax.scan(turn, first, (dense, jnp.asarray(numbers), jnp.asarray(bucket)))
    return jnp.concatenate([minima.reshape(-1, queries), reduce(last)])[BLOCK // GROUP:].T - zeros


class Luts(NamedTuple):
    """Entries of one query, or with a last axis of several: of dense positions [k,p], of sparse keys [p*k]."""

    dense: Array
    sparse: Array


def _luts(entries: Shaped[Array, "*q p k"], buckets: Buckets) -> Luts:
    entries = jnp.moveaxis(entries, (-2, -1), (0, 1))
    sparse = entries[buckets.dense:]
    return Luts(entries[:buckets.dense].swapaxes(0, 1), sparse.reshape(-1, *sparse.shape[2:]))


def _keys(keys: Shaped[Array, "_"], at: Int[Array, "n"], buckets: Buckets) -> Shaped[Array, "n w"]:
    """Keys of the codes at some positions, padded to the longest list."""
    count, length = np.array(buckets.sizes).T
    bucket = jnp.searchsorted(jnp.asarray(np.cumsum(count)), at, side="right")
    begins, firsts, lengths = (jnp.asarray(values) for values in (buckets.begins, buckets.firsts, length))
    key, length = jnp.arange(length.max()), lengths[bucket, None]
    begin = begins[bucket, None] + (at - firsts[bucket])[:, None] * length
    return jnp.where(key < length, keys[begin + jnp.minimum(key, length - 1)], 0)


def add_up(codes: UInt16[Array, "n p"], luts: Shaped[Array, "k p *q"]) -> Array | int:
    """Sums over positions of luts[codes[:,p],p], 0 without any. Unrolled on CPUs: one pass over the codes.

    A code's entries for all positions lie together: in few pages of memory, and in different lines of the cache.
    """
    if jax.default_backend() != "cpu":
        return luts[codes, np.arange(codes.shape[1])].sum(1)
    return _sum([luts.at[codes[:, p], p] for p in range(codes.shape[1])], luts)


def _add_up_keys(keys: Sequence[Shaped[Array, "n"]], luts: Shaped[Array, "e *q"]) -> Array | int:
    return _sum([luts.at[some] for some in keys], luts)


def _add_up_in_turn(entry: Callable, codes: Shaped[Array, "p n"], *luts: Int64[Array, "p k"]) -> Int64[Array, "n"]:
    """Sums over positions of their entries, not unrolled: what is seldom run is better compiled quickly."""

    def add(sums: Array, position: tuple[Array, ...]) -> tuple[Array, None]:
        return sums + entry(*position).get(mode="promise_in_bounds"), None

    return lax.scan(add, jnp.zeros(codes.shape[1], jnp.int64), (codes, *luts))[0]


def _sum(entries: list, luts: Array) -> Array | int:
    kind = jnp.int16 if luts.dtype == jnp.uint8 else luts.dtype
    return sum(entry.get(mode="promise_in_bounds").astype(kind) for entry in entries)
