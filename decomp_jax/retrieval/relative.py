"""Exact search by relative distances, of which `search` knows nothing.

A relative distance is a ratio r = D / M of two sums over cells: D is the distance, M the same sum of squared lengths,

    M = sum over examples and cells of  |weight| * (||point||^2 + ||codebook[k]||^2)

Lesion codes lie along how much of a cell the lesion takes, so that 1 - D / M is a Dice of two lesions, where D alone
has a small lesion near to all others. Whether r <= t is whether D - t M <= 0, and D - t M is a query's table like any
other. So a search for the k smallest D - t M either has a k-th ratio below t, the next t, or has found the k smallest
ratios (Dinkelbach 1967). A few rounds do.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64, Int

from decomp_jax.retrieval.queries import Queries
from decomp_jax.retrieval.search import Hits

SPARE = 8  # hits beyond the k-th, for what rounding may exchange
DIGITS = 12  # of ratios: what differs by rounding alone is a tie, and no reason for another round
MORE = 8  # rows looked at for each patient that is wanted, and again so many times as many

Rows = Int[np.ndarray, "q k"]
Ratios = Float64[np.ndarray, "q k"]


def search_relative(
    search: Callable[..., Hits], ratios: Callable[[Queries, Rows], Ratios], queries: Queries, ids: np.ndarray, *,
    k: int, exclude: Sequence[str] | np.ndarray | None, one_per_patient: bool,
) -> Hits:
    """The k rows of the smallest ratios for each query; ties go to the lower row.

    Args:
        search: gives the nearest rows by distance for `queries, k, exclude`.
        ratios: those of some rows, infinite where a row is -1.
        ids: patient ids of all rows.
    """
    found = Hits(np.full((len(queries), k), np.inf, np.float32), np.full((len(queries), k), -1))
    pending, count = np.arange(len(queries)), MORE * k if one_per_patient else k
    while len(pending):
        excluded = None if exclude is None else np.asarray(exclude)[pending]
        distances, rows = _smallest(search, ratios, queries[pending], min(count, len(ids)), excluded)
        whole = np.ones(len(pending), bool)
        for i, query in enumerate(pending):
            there = np.flatnonzero(rows[i] >= 0)
            if one_per_patient:
                there = there[np.sort(np.unique(ids[rows[i, there]], return_index=True)[1])]
                whole[i] = len(there) >= k or count >= len(ids) or rows[i, -1] < 0
            there = there[:k]
            found.distances[query, :len(there)], found.rows[query, :len(there)] = distances[i, there], rows[i, there]
        pending, count = pending[~whole], MORE * count
    return found


def _smallest(
    search: Callable[..., Hits], ratios: Callable[[Queries, Rows], Ratios], queries: Queries, k: int,
    exclude: np.ndarray | None,
) -> tuple[Ratios, Rows]:
    distances, rows = np.full((len(queries), k), np.inf), np.full((len(queries), k), -1)
    active, share = np.arange(len(queries)), np.full(len(queries), np.nan)
    while len(active):
        some, first = queries[active], np.isnan(share[active])
        asked = some if first.all() else some.less(share[active])
        hits = search(asked, k=k + SPARE, exclude=None if exclude is None else exclude[active])
        # What was found before stays, for rows of no length at all, whose D - t M is 0 whatever t is.
        ratio = np.concatenate([distances[active], np.round(ratios(some, hits.rows), DIGITS)], 1)
        distances[active], rows[active] = _best(ratio, np.concatenate([rows[active], hits.rows], 1), k)
        every = hits.rows[:, -1] < 0
        certain = every | (distances[active, -1] >= share[active])  # not in the first round, whose share is no number
        share[active] = distances[active, -1]
        active = active[~certain]
    return distances, rows


def _best(ratios: Ratios, rows: Rows, k: int) -> tuple[Ratios, Rows]:
    """The k smallest by (ratio, row), each row once."""
    order = np.lexsort((rows, ratios))
    ratios, rows = (np.take_along_axis(part, order, 1) for part in (ratios, rows))
    twice = np.pad(rows[:, 1:] == rows[:, :-1], ((0, 0), (1, 0)))
    order = np.argsort(twice, axis=1, kind="stable")[:, :k]
    ratios, rows, twice = (np.take_along_axis(part, order, 1) for part in (ratios, rows, twice))
    return np.where(twice, np.inf, ratios), np.where(twice, -1, rows)
