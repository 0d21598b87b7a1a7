"""Codes of a bank rearranged for search: each distinct code once, with the rows that have it."""

import dataclasses
import functools
import mmap
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from decomp_jax.retrieval.distance import BLOCK, NOBODY, SEVERAL, Buckets, DistinctCodes

READ_AT_ONCE = 1 << 12
# Lengths of the lists of sparse codes: a list is padded to the next one, or to the number of positions.
LENGTHS = (3, 5, 7, 9, 11, 13, 17, 24)
# Where an array in memory must begin for JAX to take it as a device's without a copy.
ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Members:
    """Rows of each distinct code, ascending, int32: those of code c are rows[starts[c]:starts[c+1]]."""

    rows: np.ndarray
    starts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Layout:
    """Distinct codes, numbered in the order of their first rows, and the rows that have them, numbered from 0.

    Attributes:
        codes: on the devices of a mesh, in `buckets`.
        members: all rows of each code.
        patients: int32 [N], number of each row's patient.
    """

    codes: DistinctCodes
    buckets: Buckets
    members: Members
    patients: np.ndarray

    @property
    def count(self) -> int:
        """Number of distinct codes."""
        return len(self.members.starts) - 1

    @functools.cached_property
    def patient_members(self) -> Members:
        """Of the rows of each code, the first of each patient. Made when first asked for."""
        code = np.repeat(np.arange(self.count), np.diff(self.members.starts))
        pair = code * (self.patients.max(initial=0) + 1) + self.patients[self.members.rows]
        firsts = np.sort(np.unique(pair, return_index=True)[1])
        return _members(self.members.rows[firsts], code[firsts], self.count)


def make_layout(read: Callable[[np.ndarray | slice], np.ndarray], patients: np.ndarray, mesh: Mesh, *, sparse: int,
                width: int) -> Layout:
    """Layout of N rows over the axis "data" of a mesh.

    Args:
        read: gives the codes uint16 [n,positions] of n rows.
        patients: int32 [N], number of each row's patient.
        sparse: how many of the positions, the last ones, are sparse: most codes have a 0 there.
        width: of the tables, more than any index.
    """
    code_of_row, first_row = _distinct(read, len(patients))
    order = np.argsort(code_of_row, kind="stable").astype(np.int32)
    members = _members(order, code_of_row, len(first_row))
    buckets, numbers = _buckets(read, first_row, mesh.size, sparse)
    patient, starts = patients[order], members.starts[:-1]
    first, last = np.minimum.reduceat(patient, starts), np.maximum.reduceat(patient, starts)
    owners = np.append(np.where(first == last, first, SEVERAL), NOBODY).astype(np.int32)[numbers]
    codes = DistinctCodes(*_arrays(read, first_row, buckets, numbers, width), owners, numbers)
    return Layout(jax.device_put(codes, NamedSharding(mesh, P("data"))), buckets, members, patients)


def leave_pages(array: np.ndarray) -> None:
    """Gives the pages of a mapped file back to the system: what has been read once doesn't stay in memory."""
    if isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_DONTNEED)


def run_starts(values: np.ndarray) -> np.ndarray:
    """Positions at which a value differs from the one before."""
    return np.flatnonzero(np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]]))


def _distinct(read: Callable[[np.ndarray | slice], np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of each row's code, and the first row of each code, ascending.

    Rows with equal hashes are compared; where hashes collide, a row is its own code, which costs speed alone.
    """
    factors = np.random.default_rng(0).integers(2**64, size=read(slice(0)).shape[1], dtype=np.uint64)
    hashes = np.empty(size, np.uint64)
    for chunk in chunks(size):
        hashes[chunk] = read(chunk).astype(np.uint64) @ factors
    order = np.argsort(hashes, kind="stable").astype(np.int32)
    hashes = hashes[order]
    heads = run_starts(hashes)
    twin = np.empty(size, np.int32)
    twin[order] = np.repeat(order[heads], np.diff(heads, append=size))
    repeats = np.flatnonzero(twin != np.arange(size))
    for chunk in chunks(len(repeats)):
        some = repeats[chunk]
        collided = some[(read(some) != read(twin[some])).any(1)]
        twin[collided] = collided
    is_first = twin == np.arange(size)
    return (np.cumsum(is_first, dtype=np.int32) - 1)[twin], np.flatnonzero(is_first)


def _members(rows: np.ndarray, codes: np.ndarray, count: int) -> Members:
    """Members of `count` codes, from rows in the order of their codes, and the codes in any order."""
    return Members(rows, np.cumsum(np.bincount(codes + 1, minlength=count + 1), dtype=np.int32))


def _buckets(read: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, shards: int, sparse: int
             ) -> tuple[Buckets, np.ndarray]:
    """Buckets of the rows' codes, and the number int32 [n] of the code at each position, len(rows) for padding."""
    positions = read(slice(0)).shape[1]
    dense = positions - sparse
    lengths = np.array([length for length in LENGTHS if length < sparse] + [sparse])
    bucket = np.zeros(len(rows), np.int8)
    for some in chunks(len(rows) if sparse else 0):
        bucket[some] = np.searchsorted(lengths, np.count_nonzero(read(rows[some])[:, dense:], axis=1))
    sizes, numbers = [], []
    for i, length in enumerate(lengths):
        members = np.flatnonzero(bucket == i)
        count = -(-len(members) // (BLOCK * shards)) * BLOCK
        if count or not sizes and i == len(lengths) - 1:
            count = max(count, BLOCK)
            sizes.append((count, int(length)))
            padded = np.pad(members, (0, count * shards - len(members)), constant_values=len(rows))
            numbers.append(padded.reshape(shards, count))
    return Buckets(dense, sparse, tuple(sizes)), np.concatenate(numbers, 1).ravel().astype(np.int32)


def _arrays(read: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, buckets: Buckets, numbers: np.ndarray,
            width: int) -> tuple[np.ndarray, np.ndarray]:
    """`dense` and `keys` of `DistinctCodes`, of all shards; `numbers` as `_buckets` gives them."""
    shards = len(numbers) // buckets.firsts[-1]
    kind = np.min_scalar_type(max(2**16, buckets.sparse * width) - 1)
    dense = aligned((len(numbers), buckets.dense), np.dtype(np.uint16))
    keys = aligned((shards, buckets.begins[-1]), kind)
    for shard, shard_keys in enumerate(keys):
        for begin, first, (count, length) in zip(buckets.begins, buckets.firsts, buckets.sizes):
            first += shard * buckets.firsts[-1]
            bucket_keys = shard_keys[begin:begin + count * length].reshape(count, length)
            members = numbers[first:first + count]
            members = members[members < len(rows)]
            for some in chunks(len(members)):
                codes = read(rows[members[some]])
                dense[first:][some][:len(codes)] = codes[:, :buckets.dense]
                bucket_keys[some][:len(codes)] = _pack(codes[:, buckets.dense:], length, width, kind)
    return dense, keys.ravel()


def _pack(codes: np.ndarray, length: int, width: int, kind: np.dtype) -> np.ndarray:
    """Keys [n,length] of the indices other than 0 of codes [n,positions]."""
    keys = np.zeros((len(codes), length), kind)
    code, position = np.nonzero(codes)
    rank = np.arange(len(code)) - np.searchsorted(code, code)
    keys[code, rank] = position * width + codes[code, position]
    return keys


def aligned(shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    """Zeros that begin where JAX takes them over without a copy."""
    size = int(np.prod(shape)) * kind.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    return memory[-memory.ctypes.data % ALIGNMENT:][:size].view(kind).reshape(shape)


def chunks(size: int) -> Iterator[slice]:
    """All of so many rows, `READ_AT_ONCE` at a time."""
    return (slice(start, start + READ_AT_ONCE) for start in range(0, size, READ_AT_ONCE))
