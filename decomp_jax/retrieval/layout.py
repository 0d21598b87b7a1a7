"""Codes of a bank rearranged for search: each distinct code once, with the rows that have it."""

import dataclasses
import functools
import mmap
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from decomp_jax.retrieval.distance import BLOCK, NOBODY, SEVERAL, DistinctCodes

READ_AT_ONCE = 1 << 12
# Where an array in memory must begin for JAX to take it as a device's without a copy.
ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Members:
    """Rows of each distinct code, ascending, int32: those of code c are rows[starts[c]:starts[c+1]]."""

    rows: np.ndarray
    starts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Layout:
    """Distinct codes, in the order of their first rows, and the rows that have them. Rows are numbered from 0.

    Attributes:
        codes: on the devices of a mesh; padded beyond the distinct codes.
        members: all rows of each code.
        patients: int32 [N], number of each row's patient.
    """

    codes: DistinctCodes
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


def make_layout(read: Callable[[np.ndarray | slice], np.ndarray], patients: np.ndarray, mesh: Mesh) -> Layout:
    """Layout of N rows over the axis "data" of a mesh.

    Args:
        read: gives the codes uint16 [n,positions] of n rows.
        patients: int32 [N], number of each row's patient.
    """
    code_of_row, first_row = _distinct(read, len(patients))
    order = np.argsort(code_of_row, kind="stable").astype(np.int32)
    members = _members(order, code_of_row, len(first_row))
    size = -(-max(len(first_row), 1) // (BLOCK * mesh.size)) * BLOCK * mesh.size
    owners = np.full(size, NOBODY, np.int32)
    patient, starts = patients[order], members.starts[:-1]
    first, last = np.minimum.reduceat(patient, starts), np.maximum.reduceat(patient, starts)
    owners[:len(first_row)] = np.where(first == last, first, SEVERAL)
    codes = DistinctCodes(_gather(read, first_row, size), owners)
    return Layout(jax.device_put(codes, NamedSharding(mesh, P("data"))), members, patients)


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
    for start in range(0, size, READ_AT_ONCE):
        chunk = slice(start, min(start + READ_AT_ONCE, size))
        hashes[chunk] = read(chunk).astype(np.uint64) @ factors
    order = np.argsort(hashes, kind="stable").astype(np.int32)
    hashes = hashes[order]
    heads = run_starts(hashes)
    twin = np.empty(size, np.int32)
    twin[order] = np.repeat(order[heads], np.diff(heads, append=size))
    repeats = np.flatnonzero(twin != np.arange(size))
    for start in range(0, len(repeats), READ_AT_ONCE):
        some = repeats[start:start + READ_AT_ONCE]
        collided = some[(read(some) != read(twin[some])).any(1)]
        twin[collided] = collided
    is_first = twin == np.arange(size)
    return (np.cumsum(is_first, dtype=np.int32) - 1)[twin], np.flatnonzero(is_first)


def _members(rows: np.ndarray, codes: np.ndarray, count: int) -> Members:
    """Members of `count` codes, from rows in the order of their codes, and the codes in any order."""
    return Members(rows, np.cumsum(np.bincount(codes + 1, minlength=count + 1), dtype=np.int32))


def _gather(read: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, size: int) -> np.ndarray:
    """Codes of the rows, padded to uint16 [size,positions], in memory that JAX takes over without a copy."""
    shape = (size, read(slice(0)).shape[1])
    memory = np.zeros(2 * size * shape[1] + ALIGNMENT, np.uint8)
    codes = memory[-memory.ctypes.data % ALIGNMENT:][:2 * size * shape[1]].view(np.uint16).reshape(shape)
    for start in range(0, len(rows), READ_AT_ONCE):
        some = rows[start:start + READ_AT_ONCE]
        codes[start:start + len(some)] = read(some)
    return codes
