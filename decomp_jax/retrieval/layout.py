"""Codes of a bank rearranged for search: each distinct code once, with the rows that have it."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from decomp_jax.retrieval.distance import BLOCK, NO_ROW, Codes

READ_AT_ONCE = 1 << 15
# No patient: what padding has, and queries that exclude nobody.
NOBODY = -1


@dataclasses.dataclass(frozen=True)
class Members:
    """Rows of each distinct code, ascending, int32: those of code c are rows[starts[c]:starts[c+1]].

    `most` is the largest number of rows that one patient has with one code.
    """

    rows: np.ndarray
    starts: np.ndarray
    most: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Distinct codes on the devices, and which rows have them.

    Attributes:
        codes: on the devices of a mesh.
        count: number of distinct codes; what `codes` holds beyond is padding.
        members: all rows of each code.
        patient_members: of the rows of each code, the first of each patient.
    """

    codes: Codes
    count: int
    members: Members
    patient_members: Members


def make_layout(
    read: Callable[[np.ndarray | slice], np.ndarray], patients: np.ndarray, start: int, mesh: Mesh,
) -> Layout:
    """Layout of the rows start .. start + len(patients).

    Args:
        read: gives the codes uint16 [n,positions] of n rows, numbered from 0 = `start`.
        patients: int32 [N], number of each row's patient.
    """
    code_of_row, first_row = _distinct(read, len(patients))
    order = np.argsort(code_of_row, kind="stable")
    pair = code_of_row[order].astype(np.int64) * (patients.max(initial=0) + 1) + patients[order]
    _, firsts, sizes = np.unique(pair, return_index=True, return_counts=True)
    firsts.sort()
    members = Members((order + start).astype(np.int32), _starts(code_of_row, len(first_row)), sizes.max(initial=1))
    heads = order[firsts]
    patient_members = Members((heads + start).astype(np.int32), _starts(code_of_row[heads], len(first_row)), 1)
    size = -(-max(len(first_row), 1) // (BLOCK * mesh.size)) * BLOCK * mesh.size
    rows, holders = np.full((3, size), NO_ROW, np.int32), np.full((3, size), NOBODY, np.int32)
    for i in range(3):
        at = patient_members.starts[:-1] + i
        has = at < patient_members.starts[1:]
        rows[i, :len(has)][has] = patient_members.rows[at[has]]
        holders[i, :len(has)][has] = patients[patient_members.rows[at[has]] - start]
    codes = Codes(_blocks(read, first_row, size // BLOCK), rows, holders)
    shardings = [NamedSharding(mesh, spec) for spec in (P("data"), P(None, "data"), P(None, "data"))]
    return Layout(jax.device_put(codes, Codes(*shardings)), len(first_row), members, patient_members)


def _distinct(read: Callable[[slice], np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of each row's code, and the first row of each code.

    Rows with equal hashes are compared; where hashes collide, a row is its own code, which costs speed alone.
    """
    chunks = [slice(start, min(start + READ_AT_ONCE, size)) for start in range(0, size, READ_AT_ONCE)]
    factors = np.random.default_rng(0).integers(2**64, size=read(slice(0)).shape[1], dtype=np.uint64)
    hashes = np.concatenate([np.zeros(0, np.uint64), *(read(chunk).astype(np.uint64) @ factors for chunk in chunks)])
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    label = first[inverse]
    repeats = np.flatnonzero(label != np.arange(size))
    for start in range(0, len(repeats), READ_AT_ONCE):
        some = repeats[start:start + READ_AT_ONCE]
        collided = some[(read(some) != read(label[some])).any(1)]
        label[collided] = collided
    first, inverse = np.unique(label, return_inverse=True)
    return inverse, first


def _blocks(read: Callable[[np.ndarray], np.ndarray], first_row: np.ndarray, number: int) -> np.ndarray:
    blocks = np.zeros((number, read(slice(0)).shape[1], BLOCK), np.uint16)
    for start in range(0, len(first_row), READ_AT_ONCE):
        codes = read(first_row[start:start + READ_AT_ONCE])
        whole = np.zeros((-(-len(codes) // BLOCK) * BLOCK, codes.shape[1]), np.uint16)
        whole[:len(codes)] = codes
        blocks[start // BLOCK:][:len(whole) // BLOCK] = whole.reshape(-1, BLOCK, codes.shape[1]).transpose(0, 2, 1)
    return blocks


def _starts(code_of_row: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(code_of_row, minlength=count))]).astype(np.int32)
