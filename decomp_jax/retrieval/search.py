"""Exact search over a bank of codes: what `CodeBank.search` does.

Distinct codes are searched on the devices (`distance`), their rows are put in order on the host. With several processes
each searches its own rows on its own devices; one exchange of k hits a query joins the answers.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float32, Int, Int64
from tqdm import tqdm

from decomp_jax.errors import UserError
from decomp_jax.retrieval.distance import GROUP, NO_DISTANCE, NOBODY, Nearest, Tables, every, make_tables, nearest
from decomp_jax.retrieval.layout import Layout, Members, leave_pages, make_layout, run_starts

# Queries scanned together, and codes that may be looked at exactly at a time (some 40 bytes each).
MOST_QUERIES = 64
MOST_CANDIDATES = 1 << 22


class Searchable(Protocol):
    """What a search needs of a bank: see `CodeBank`."""

    normal_codebook: np.ndarray
    abnormal_codebook: np.ndarray
    rows: np.ndarray
    cache: dict

    @property
    def grid(self) -> tuple[int, int]: ...

    def codes(self, parts: Sequence[str], rows: slice, some: np.ndarray | slice) -> np.ndarray: ...

    def __len__(self) -> int: ...


class Hits(NamedTuple):
    """The answer to Q queries: `distances` ascending, squared L2; missing hits have row -1 at distance inf."""

    distances: Float32[np.ndarray, "q k"]
    rows: Int64[np.ndarray, "q k"]


class _Found(NamedTuple):
    """Rows found for queries, flat, in any order; `patient` is a number that stands for the row's patient."""

    query: np.ndarray
    distance: np.ndarray
    row: np.ndarray
    patient: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Index:
    """A process's rows, from `start` on, ready to be searched by one code or by both.

    Attributes:
        layout: their distinct codes, on the devices of `mesh`.
        names: sorted patient ids; a patient's number is a position among them.
        most: the largest number of rows of one patient.
    """

    layout: Layout
    tables: Tables
    mesh: Mesh
    start: int
    names: np.ndarray
    most: int


def search(
    bank: Searchable, *, normal: Int[np.ndarray | jax.Array, "q h w"] | None = None,
    abnormal: Int[np.ndarray | jax.Array, "q h w"] | None = None, k: int = 10,
    exclude: Sequence[str] | np.ndarray | None = None, one_per_patient: bool = False,
    cells: Bool[np.ndarray | jax.Array, "h w"] | None = None, mesh: Mesh | None = None,
) -> Hits:
    """The k rows of the bank nearest to each query by squared L2 of their codes, exactly; ties go to the lower row.

    The answer doesn't depend on the number of shards, devices or processes. Memory stays bounded whatever N and Q.

    Args:
        normal, abnormal: indices of the queries. Both: the distance is that of the concatenated codes, and the two may
            come from different images.
        k: number of hits a query.
        exclude: patient_id [Q] whose rows each query leaves out; [Q,2] leaves out two (those of a mixed query).
        one_per_patient: keeps the nearest row of each patient.
        cells: restricts the distance to the cells that are True.
        mesh: shards the bank over its axis "data"; in a multi-process run each process reads its rows alone, all must
            call with the same arguments, and all get the answer. None: the first local device, the whole bank.

    Raises:
        UserError: naming the argument, or the bank's file, that doesn't fit.
    """
    queries = {part: np.asarray(query) for part, query in (("normal", normal), ("abnormal", abnormal))
               if query is not None}
    _check(bank, queries, k, cells, mesh)
    mesh = mesh or Mesh(jax.local_devices()[:1], ("data",))
    index = _index(bank, tuple(queries), mesh)
    table_columns = _table_columns(bank, queries, cells)
    excluded = _patient_numbers(index.names, exclude, len(table_columns))
    distances, rows = _no_hits(len(table_columns), k)
    blocks = list(_slices(len(table_columns), MOST_QUERIES))
    for block in tqdm(blocks, desc="search", unit="block", delay=2, disable=None):
        distances[block], rows[block] = _search(index, table_columns[block], excluded[block], k, one_per_patient)
    if len(_processes(mesh)) > 1:
        distances, rows = _join_processes(distances, rows, bank, k, one_per_patient)
    floats = np.where(rows < 0, np.inf, distances * float(index.tables.unit))
    return Hits(floats.astype(np.float32), rows)


def _search(index: _Index, queries: np.ndarray, excluded: np.ndarray, k: int, one_per_patient: bool
            ) -> tuple[np.ndarray, np.ndarray]:
    """Integer distances and rows [q,k] among this process's rows.

    The nearest k codes have the nearest k rows among them, but k patients may need more codes: as many as it takes for
    the last hit to come before every code not looked at.
    """
    layout, (distances, rows) = index.layout, _no_hits(len(queries), k)
    members = layout.patient_members if one_per_patient else layout.members
    spare = excluded.shape[1] * (1 if one_per_patient else index.most) if (excluded != NOBODY).any() else 0
    pending, count = np.arange(len(queries)), min(8 * k if one_per_patient else k, layout.count)
    while len(pending) and count:
        distance, code = _nearest_codes(index, queries[pending], excluded[pending], count)
        found = _members_found(layout, members, distance, code, excluded[pending], k + spare)
        distances[pending], rows[pending] = _best(found, len(pending), k, one_per_patient)
        last, seen = distances[pending, -1], distance[:, -1]
        first_row = members.rows[members.starts[code[:, -1]]]
        whole = (last < seen) | (last == seen) & (rows[pending, -1] <= first_row)
        if count == layout.count:
            break
        pending, count = pending[~whole], min(4 * count, layout.count)
    rows[rows >= 0] += index.start
    return distances, rows


def _nearest_codes(index: _Index, queries: np.ndarray, excluded: np.ndarray, count: int
                   ) -> tuple[np.ndarray, np.ndarray]:
    """Distances and numbers [q,count] of the nearest codes, by (distance, number): numbers go by first rows.

    Tries few groups, then more for queries that aren't certain, then every code for those that still aren't.
    """
    distance, code = (np.zeros((len(queries), count), kind) for kind in (np.int64, np.int32))
    size, certain = len(index.layout.codes.owners), np.zeros(len(queries), bool)
    pending = np.arange(len(queries))

    def run(function: Callable, some: np.ndarray) -> Nearest | np.ndarray:
        width = 1 << (len(some) - 1).bit_length()
        padded = np.pad(some, (0, width - len(some)), mode="edge")
        with jax.enable_x64(True):
            answer = function(index.layout.codes, index.tables, queries[padded], excluded[padded])
        return jax.tree.map(lambda values: np.asarray(values)[:len(some)], answer)

    for groups in (count + GROUP // 2, 4 * (count + GROUP // 2)):
        if 2 * groups * GROUP * index.mesh.size > size:
            break
        for block in _slices(len(pending), MOST_CANDIDATES // (groups * GROUP)):
            some = pending[block]
            near = run(nearest(index.mesh, groups, count), some)
            order = np.lexsort((near.codes, near.distances))[:, :count]
            distance[some], code[some] = (np.take_along_axis(values, order, 1) for values in near[:2])
            certain[some] = near.certain.all(1)
        pending = np.flatnonzero(~certain)
    for block in _slices(len(pending), MOST_CANDIDATES // size):
        for one, all_distances in zip(pending[block], run(every(index.mesh), pending[block])):
            within = np.flatnonzero(all_distances <= np.partition(all_distances, count - 1)[count - 1])
            code[one] = within[np.argsort(all_distances[within], kind="stable")[:count]]
            distance[one] = all_distances[code[one]]
    return distance, code


def _members_found(layout: Layout, members: Members, distance: np.ndarray, code: np.ndarray, excluded: np.ndarray,
                   most: int) -> _Found:
    """Rows that have the codes [q,c]: of each code the first `most`, less those of excluded patients."""
    query, rank = np.nonzero(distance != NO_DISTANCE)
    distance, code = distance[query, rank], code[query, rank]
    firsts = members.starts[code]
    sizes = np.minimum(members.starts[code + 1] - firsts, most)
    ends = np.cumsum(sizes)
    row = members.rows[np.repeat(firsts - (ends - sizes), sizes) + np.arange(sizes.sum())]
    found = _Found(query.repeat(sizes), distance.repeat(sizes), row, layout.patients[row])
    allowed = (found.patient[:, None] != excluded[found.query]).all(1)
    return _Found(*(values[allowed] for values in found))


def _best(found: _Found, queries: int, k: int, one_per_patient: bool) -> tuple[np.ndarray, np.ndarray]:
    """Distances and rows [queries,k] by (distance, row), the first of each patient if so asked."""
    order = np.lexsort((found.row, found.distance, found.query))
    if one_per_patient:
        pair = (found.query * (found.patient.max(initial=0) + 1) + found.patient)[order]
        order = order[np.sort(np.unique(pair, return_index=True)[1])]
    query = found.query[order]
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    order, at = order[rank < k], (query[rank < k], rank[rank < k])
    distances, rows = _no_hits(queries, k)
    distances[at], rows[at] = found.distance[order], found.row[order]
    return distances, rows


def _no_hits(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((queries, k), NO_DISTANCE), np.full((queries, k), -1)


def _join_processes(distances: np.ndarray, rows: np.ndarray, bank: Searchable, k: int, one_per_patient: bool
                    ) -> tuple[np.ndarray, np.ndarray]:
    """Best of all processes' hits [q,k]."""
    with jax.enable_x64(True):
        distance, row = (np.asarray(values) for values in multihost_utils.process_allgather((distances, rows)))
    _, query, _ = np.nonzero(row >= 0)
    distance, row = distance[row >= 0], row[row >= 0]
    _, patient = np.unique(bank.rows["patient_id"][row], return_inverse=True)
    return _best(_Found(query, distance, row, patient), len(rows), k, one_per_patient)


def _index(bank: Searchable, parts: tuple[str, ...], mesh: Mesh) -> _Index:
    if (parts, mesh) not in bank.cache:
        bank.cache[parts, mesh] = _make_index(bank, parts, mesh)
    return bank.cache[parts, mesh]


def _make_index(bank: Searchable, parts: tuple[str, ...], mesh: Mesh) -> _Index:
    processes = _processes(mesh)
    share = processes.index(jax.process_index())
    start, stop = (len(bank) * i // len(processes) for i in (share, share + 1))
    names, patients = _number_patients(bank.rows["patient_id"][start:stop])
    leave_pages(bank.rows)
    local = mesh.local_mesh
    layout = make_layout(lambda rows: bank.codes(parts, slice(start, stop), rows), patients, local)
    tables = make_tables([getattr(bank, f"{part}_codebook") for part in parts], int(np.prod(bank.grid)))
    with jax.enable_x64(True):
        tables = jax.device_put(tables, NamedSharding(local, PartitionSpec()))
    return _Index(layout, tables, local, start, names, np.bincount(patients).max(initial=0))


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


def _table_columns(bank: Searchable, queries: dict[str, np.ndarray], cells: np.ndarray | None) -> np.ndarray:
    """Columns int32 [Q,positions] of the tables to look up: queries' indices; the one of zeros where cells is False."""
    columns, offset = [], 0
    for part, query in queries.items():
        columns.append(query.reshape(len(query), query.shape[1] * query.shape[2]).astype(np.int32) + offset)
        offset += len(getattr(bank, f"{part}_codebook"))
    table_columns = np.concatenate(columns, 1)
    if cells is not None:
        table_columns[:, ~np.tile(np.asarray(cells).ravel(), len(queries))] = offset
    return table_columns


def _check(
    bank: Searchable, queries: dict[str, np.ndarray], k: int, cells: np.ndarray | None, mesh: Mesh | None,
) -> None:
    if not isinstance(k, int | np.integer) or k < 1:
        raise UserError(f"k: must be a whole number, at least 1, not {k}")
    if not queries:
        raise UserError("normal, abnormal: give one of them, or both")
    for part, query in queries.items():
        if query.ndim != 3 or query.shape[1:] != bank.grid or not np.issubdtype(query.dtype, np.integer):
            raise UserError(f"{part}: needs integer indices [Q,{bank.grid[0]},{bank.grid[1]}], as the bank's, not "
                            f"{query.dtype} {list(query.shape)}")
        size = len(getattr(bank, f"{part}_codebook"))
        if query.size and not 0 <= query.min() <= query.max() < size:
            raise UserError(f"{part}: holds {query.min()}..{query.max()}, but the bank's {part}_codebook has {size} "
                            "codes; encode queries and bank with one model")
    if len({len(query) for query in queries.values()}) > 1:
        raise UserError(f"normal, abnormal: {len(queries['normal'])} and {len(queries['abnormal'])} queries; give as "
                        "many of each")
    if cells is not None and (np.shape(cells) != bank.grid or np.asarray(cells).dtype != bool):
        raise UserError(f"cells: needs a boolean mask {list(bank.grid)}, not {np.asarray(cells).dtype} "
                        f"{list(np.shape(cells))}")
    if mesh is not None and mesh.axis_names != ("data",):
        raise UserError(f"mesh: needs one axis, \"data\", not {mesh.axis_names}")


def _slices(size: int, most: int) -> Iterator[slice]:
    most = max(most, 1)
    return (slice(start, start + most) for start in range(0, size, most))
