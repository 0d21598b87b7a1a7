"""Exact search over codes that are laid out on devices.

Distinct codes are searched on the devices (`distance`), their rows are put in order on the host. With several processes
each searches its own rows on its own devices; one exchange of k hits a query joins the answers.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int64
from scipy.spatial.distance import cdist
from tqdm import tqdm

from decomp_jax.errors import UserError
from decomp_jax.retrieval.distance import (
    GROUP, NO_DISTANCE, NOBODY, Nearest, Quantised, Tables, every, nearest, quantise,
)
from decomp_jax.retrieval.layout import Layout, Members, make_layout, run_starts
from decomp_jax.retrieval.queries import Merged, Queries, is_sparse, merged, padded, table

# Queries scanned together, entries of their own tables, and codes that may be looked at exactly at a time (some 40
# bytes each).
MOST_QUERIES = 64
MOST_ENTRIES = 1 << 22
MOST_CANDIDATES = 1 << 22
# What two parts of a distance leave of each other by rounding alone, as a share of them.
ROUNDING = 1e-12


class Hits(NamedTuple):
    """The answer to Q queries: `distances` ascending; missing hits have row -1 at distance inf."""

    distances: Float32[np.ndarray, "q k"]
    rows: Int64[np.ndarray, "q k"]


class _Candidates(NamedTuple):
    """Rows that may be hits of queries, flat, in any order; `patient` is a number that stands for the row's patient."""

    query: np.ndarray
    distance: np.ndarray
    row: np.ndarray
    patient: np.ndarray


@dataclasses.dataclass(frozen=True)
class Index:
    """A process's rows, from `start` on, ready to be searched by the paths of `codebooks`.

    Attributes:
        layout: their distinct codes, on the devices of this process.
        codebooks: float64 [K,D], of the paths searched by.
        ids: patient ids of all rows, of other processes' too.
        names: sorted patient ids of this process's rows; a patient's number is a position among them.
        most: the largest number of rows of one patient.
        mesh: the devices of all processes.
    """

    layout: Layout
    codebooks: Mapping[str, np.ndarray]
    ids: np.ndarray
    start: int
    names: np.ndarray
    most: int
    mesh: Mesh

    @property
    def positions(self) -> int:
        return self.layout.buckets.dense + self.layout.buckets.sparse

    @property
    def sparse(self) -> tuple[bool, ...]:
        """Whether the codes of each path are sparse."""
        return tuple(_scanned_sparse(path, codebook) for path, codebook in self.codebooks.items())

    @functools.cached_property
    def code_tables(self) -> Quantised:
        """Tables for queries that are codes: a line for each code of each path, and one of zeros a path."""
        squares = [np.pad(cdist(book, book, "sqeuclidean"), ((0, 1), (0, 0))) for book in self.codebooks.values()]
        with jax.enable_x64(True):
            return quantise_shared(self._replicated(squares), sparse=self.sparse, positions=self.positions)

    def tables(self, queries: Queries) -> tuple[Tables, np.ndarray, np.ndarray]:
        """Tables on this process's devices, and what makes distances of sums: a unit and an offset [Q]."""
        count = len(queries)
        if _are_codes(queries):
            shared, lines = self.code_tables, _code_lines(queries, self.codebooks)
            shift, unit = (np.full(count, value) for value in (shared.shift, shared.unit))
            return Tables(shared.exact, shared.lower, lines, shift), unit, np.asarray(shared.base)[lines].sum(1)
        with jax.enable_x64(True):
            codebooks = list(self.codebooks.values())
            examples = [padded(merged(queries, *book), _power_of_two(count)) for book in self.codebooks.items()]
            own = own_tables(*self._replicated((examples, codebooks)), sparse=self.sparse, positions=self.positions)
        lines = np.arange(count * self.positions, dtype=np.int32).reshape(count, -1)
        shift, unit, base = (np.asarray(values)[:count] for values in (own.shift, own.unit, own.base))
        return Tables(own.exact, own.lower, lines, shift), unit, base.sum(1)

    def _replicated(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self.mesh.local_mesh, PartitionSpec()))


def make_index(
    read: Callable[[slice, slice | np.ndarray], np.ndarray], codebooks: Mapping[str, np.ndarray], ids: np.ndarray,
    mesh: Mesh,
) -> Index:
    """Index of N rows for the paths of `codebooks`.

    Args:
        read: gives the codes uint16 [n,positions] of some rows of a range, those of the paths side by side.
        ids: patient ids [N], text.
        mesh: shards the rows over its axis "data"; of several processes each reads its own rows alone.
    """
    processes = _processes(mesh)
    share = processes.index(jax.process_index())
    start, stop = (len(ids) * i // len(processes) for i in (share, share + 1))
    names, patients = _number_patients(ids[start:stop])
    read_own = functools.partial(read, slice(start, stop))
    cells = read_own(slice(0)).shape[1] // len(codebooks)
    sparse = sum(_scanned_sparse(path, codebook) for path, codebook in codebooks.items())
    width = max(map(len, codebooks.values()))
    layout = make_layout(read_own, patients, mesh.local_mesh, sparse=sparse * cells, width=width)
    return Index(layout, codebooks, ids, start, names, np.bincount(patients).max(initial=0), mesh)


def search(
    index: Index, queries: Queries, *, k: int, exclude: Sequence[str] | np.ndarray | None = None,
    one_per_patient: bool = False,
) -> Hits:
    """The k rows nearest to each query, exactly; ties go to the lower row. See `CodeBank.search`."""
    excluded = _patient_numbers(index.names, exclude, len(queries))
    distances, rows = _no_hits(len(queries), k)
    units, offsets = np.empty((2, len(queries), 1))
    blocks = list(_slices(len(queries), _block_size(index, queries)))
    for block in tqdm(blocks, desc="search", unit="block", delay=2, disable=None):
        tables, units[block, 0], offsets[block, 0] = index.tables(queries[block])
        distances[block], rows[block] = _search(index, tables, excluded[block], k, one_per_patient)
    if len(_processes(index.mesh)) > 1:
        distances, rows = _join_processes(distances, rows, index.ids, k, one_per_patient)
    floats = distances * units + offsets
    floats[np.abs(floats) < ROUNDING * np.abs(offsets)] = 0
    return Hits(np.where(rows < 0, np.inf, floats).astype(np.float32), rows)


def _search(index: Index, tables: Tables, excluded: np.ndarray, k: int, one_per_patient: bool
            ) -> tuple[np.ndarray, np.ndarray]:
    """Integer distances and rows [q,k] among this process's rows.

    The nearest k codes have the nearest k rows among them, but k patients may need more codes: as many as it takes for
    the last hit to come before every code not looked at.
    """
    layout, (distances, rows) = index.layout, _no_hits(len(excluded), k)
    members = layout.patient_members if one_per_patient else layout.members
    spare = excluded.shape[1] * (1 if one_per_patient else index.most) if (excluded != NOBODY).any() else 0
    pending, count = np.arange(len(excluded)), min(8 * k if one_per_patient else k, layout.count)
    while len(pending) and count:
        distance, code = _nearest_codes(index, _some(tables, pending), excluded[pending], count)
        candidates = _members_of_codes(layout, members, distance, code, excluded[pending], k + spare)
        distances[pending], rows[pending] = _best(candidates, len(pending), k, one_per_patient)
        last, seen = distances[pending, -1], distance[:, -1]
        first_row = members.rows[members.starts[code[:, -1]]]
        whole = (last < seen) | (last == seen) & (rows[pending, -1] <= first_row)
        if count == layout.count:
            break
        pending, count = pending[~whole], min(4 * count, layout.count)
    rows[rows >= 0] += index.start
    return distances, rows


def _nearest_codes(index: Index, tables: Tables, excluded: np.ndarray, count: int
                   ) -> tuple[np.ndarray, np.ndarray]:
    """Distances and numbers [q,count] of the nearest codes, by (distance, number): numbers go by first rows.

    Tries few groups, then more for queries that aren't certain, then every code for those that still aren't.
    """
    distance, code = (np.zeros((len(excluded), count), kind) for kind in (np.int64, np.int32))
    mesh, codes, buckets = index.mesh.local_mesh, index.layout.codes, index.layout.buckets
    numbers, size, certain = np.asarray(codes.numbers), len(codes.numbers), np.zeros(len(excluded), bool)
    pending = np.arange(len(excluded))

    def run(function: Callable, some: np.ndarray) -> Nearest | np.ndarray:
        padded = np.pad(some, (0, _power_of_two(len(some)) - len(some)), mode="edge")
        with jax.enable_x64(True):
            answer = function(codes, _some(tables, padded), excluded[padded])
        return jax.tree.map(lambda values: np.asarray(values)[:len(some)], answer)

    for groups in (factor * (count + GROUP // 2) for factor in (1, 4, 32)):
        if 2 * groups * GROUP * mesh.size > size:
            break
        for block in _slices(len(pending), MOST_CANDIDATES // (groups * GROUP)):
            some = pending[block]
            near = run(nearest(mesh, buckets, groups, count), some)
            order = np.lexsort((near.codes, near.distances))[:, :count]
            distance[some], code[some] = (np.take_along_axis(values, order, 1) for values in near[:2])
            certain[some] = near.certain.all(1)
        pending = np.flatnonzero(~certain)
    for block in _slices(len(pending), MOST_CANDIDATES // size):
        for one, all_distances in zip(pending[block], run(every(mesh, buckets), pending[block])):
            within = np.flatnonzero(all_distances <= np.partition(all_distances, count - 1)[count - 1])
            within = within[np.lexsort((numbers[within], all_distances[within]))[:count]]
            distance[one], code[one] = all_distances[within], numbers[within]
    return distance, code


def _some(tables: Tables, queries: np.ndarray) -> Tables:
    return tables._replace(lines=tables.lines[queries], shift=tables.shift[queries])


def _members_of_codes(layout: Layout, members: Members, distance: np.ndarray, code: np.ndarray, excluded: np.ndarray,
                   most: int) -> _Candidates:
    """Rows that have the codes [q,c]: of each code the first `most`, less those of excluded patients."""
    query, rank = np.nonzero(distance != NO_DISTANCE)
    distance, code = distance[query, rank], code[query, rank]
    firsts = members.starts[code]
    sizes = np.minimum(members.starts[code + 1] - firsts, most)
    ends = np.cumsum(sizes)
    row = members.rows[np.repeat(firsts - (ends - sizes), sizes) + np.arange(sizes.sum())]
    candidates = _Candidates(query.repeat(sizes), distance.repeat(sizes), row, layout.patients[row])
    allowed = (candidates.patient[:, None] != excluded[candidates.query]).all(1)
    return _Candidates(*(values[allowed] for values in candidates))


def _best(candidates: _Candidates, queries: int, k: int, one_per_patient: bool) -> tuple[np.ndarray, np.ndarray]:
    """Distances and rows [queries,k] by (distance, row), the first of each patient if so asked."""
    order = np.lexsort((candidates.row, candidates.distance, candidates.query))
    if one_per_patient:
        pair = (candidates.query * (candidates.patient.max(initial=0) + 1) + candidates.patient)[order]
        order = order[np.sort(np.unique(pair, return_index=True)[1])]
    query = candidates.query[order]
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    order, at = order[rank < k], (query[rank < k], rank[rank < k])
    distances, rows = _no_hits(queries, k)
    distances[at], rows[at] = candidates.distance[order], candidates.row[order]
    return distances, rows


def _no_hits(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((queries, k), NO_DISTANCE), np.full((queries, k), -1)


def _join_processes(distances: np.ndarray, rows: np.ndarray, ids: np.ndarray, k: int, one_per_patient: bool
                    ) -> tuple[np.ndarray, np.ndarray]:
    """Best of all processes' hits [q,k]."""
    with jax.enable_x64(True):
        distance, row = (np.asarray(values) for values in multihost_utils.process_allgather((distances, rows)))
    _, query, _ = np.nonzero(row >= 0)
    distance, row = distance[row >= 0], row[row >= 0]
    _, patient = np.unique(ids[row], return_inverse=True)
    return _best(_Candidates(query, distance, row, patient), len(rows), k, one_per_patient)


def _processes(mesh: Mesh) -> list[int]:
    return sorted({device.process_index for device in mesh.devices.flat})


def _number_patients(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted patient ids, and the number [n] of each row's. Rows of a patient mostly stand together: few are sorted."""
    heads = run_starts(ids)
    names, numbers = np.unique(ids[heads], return_inverse=True)
    return names, np.repeat(numbers, np.diff(heads, append=len(ids))).astype(np.int32)


def _patient_numbers(names: np.ndarray, exclude: Sequence[str] | np.ndarray | None, queries: int) -> np.ndarray:
    """Numbers int32 [Q,2] of the patients to exclude."""
    numbers = np.full((queries, 2), NOBODY, np.int32)
    if exclude is None:
        return numbers
    ids = np.asarray(exclude, str) if queries == 0 else np.asarray(exclude)
    if ids.dtype.kind != "U" or ids.shape not in ((queries,), (queries, 1), (queries, 2)):
        raise UserError(f"exclude: needs a patient_id a query, [{queries}] or [{queries},2] of text, not "
                        f"{ids.dtype} {list(ids.shape)}")
    if len(names):
        ids = ids.reshape(queries, -1) if queries else ids.reshape(0, 1)
        at = np.searchsorted(names, ids).clip(max=len(names) - 1)
        numbers[:, :ids.shape[1]] = np.where(names[at] == ids, at, NOBODY)
    return numbers


quantise_shared = jax.jit(quantise, static_argnames=("sparse", "positions"))


@functools.partial(jax.jit, static_argnames=("sparse", "positions"))
def own_tables(
    examples: Sequence[Merged], codebooks: Sequence[Float[Array, "k d"]], *, sparse: tuple[bool, ...], positions: int,
) -> Quantised:
    """Tables [Q*positions,K] of Q queries, from their examples and codebook of each path."""
    def one(examples: Sequence[Merged]) -> Quantised:
        return quantise([table(*both) for both in zip(examples, codebooks)], sparse, positions)

    own = jax.lax.map(one, examples)
    exact, lower = (part.reshape(-1, part.shape[2]) for part in own[:2])
    return own._replace(exact=exact, lower=lower)


def _scanned_sparse(path: str, codebook: np.ndarray) -> bool:
    """Whether a path's codes are lists of few cells: CPUs look these up, the matrix units of accelerators can't."""
    return is_sparse(path, codebook) and jax.default_backend() == "cpu"


def _are_codes(queries: Queries) -> bool:
    """Whether one table serves all of the queries: one code a path, each cell counted once or left out."""
    examples = queries.examples
    return queries.share is None and len(queries.paths) == len(examples) and all(
        example.quantised and np.isin(example.weights, (0, 1)).all() for example in examples
    )


def _code_lines(queries: Queries, codebooks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Lines int32 [Q,positions] of `code_tables`: queries' indices; the one of zeros where the weight is 0."""
    examples, lines, offset = {example.path: example for example in queries.examples}, [], 0
    for path, codebook in codebooks.items():
        points = np.where(examples[path].weights == 0, len(codebook), examples[path].points) + offset
        lines.append(np.broadcast_to(points, (len(queries), *points.shape[1:])).reshape(len(queries), -1))
        offset += len(codebook) + 1
    return np.concatenate(lines, 1, dtype=np.int32)


def _block_size(index: Index, queries: Queries) -> int:
    entries = max(map(len, index.codebooks.values())) * index.positions
    return MOST_QUERIES if _are_codes(queries) else min(MOST_QUERIES, MOST_ENTRIES // entries)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _slices(size: int, most: int) -> Iterator[slice]:
    most = max(most, 1)
    return (slice(start, start + most) for start in range(0, size, most))
