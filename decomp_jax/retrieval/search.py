"""Exact search over banks of discrete codes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int, Int64
from scipy.spatial.distance import cdist

from decomp_jax.errors import UserError

if TYPE_CHECKING:
    from decomp_jax.retrieval.bank import CodeBank


class Hits(NamedTuple):
    """The answer to Q queries: `distances` ascending, squared L2; missing hits have row -1 at distance inf."""

    distances: Float32[np.ndarray, "q k"]
    rows: Int64[np.ndarray, "q k"]


def search(
    bank: "CodeBank", *, normal: Int[np.ndarray | jax.Array, "q h w"] | None = None,
    abnormal: Int[np.ndarray | jax.Array, "q h w"] | None = None, k: int = 10,
    exclude: Sequence[str] | np.ndarray | None = None, one_per_patient: bool = False,
    cells: Bool[np.ndarray | jax.Array, "h w"] | None = None, mesh: jax.sharding.Mesh | None = None,
) -> Hits:
    """The k rows of the bank nearest to each query by squared L2 of their codes, exactly; ties go to the lower row."""
    if k < 1:
        raise UserError(f"k: must be at least 1, not {k}")
    total = 0.0
    for part, query in (("normal", normal), ("abnormal", abnormal)):
        if query is None:
            continue
        query = np.asarray(query)
        if query.shape[1:] != bank.grid or query.ndim != 3:
            raise UserError(f"{part}: query of shape {query.shape} is not [Q,{bank.grid[0]},{bank.grid[1]}]")
        codebook = getattr(bank, f"{part}_codebook").astype(np.float64)
        table = cdist(codebook, codebook, "sqeuclidean")
        if query.size and not 0 <= query.min() <= query.max() < len(codebook):
            raise UserError(f"{part}: indices outside 0..{len(codebook) - 1}")
        weight = np.ones(bank.grid, bool) if cells is None else np.asarray(cells)
        indices = getattr(bank, f"{part}_indices")
        total = total + np.stack([(table[one, indices] * weight).sum((1, 2)) for one in query]
                                 ).reshape(len(query), len(bank))
    if np.ndim(total) == 0:
        raise UserError("normal, abnormal: give one of them, or both")
    distances = np.full((len(total), k), np.inf, np.float32)
    rows = np.full((len(total), k), -1, np.int64)
    patients = bank.rows["patient_id"]
    for i, distance in enumerate(total):
        order = np.argsort(distance, kind="stable")
        if exclude is not None:
            order = order[~np.isin(patients[order], exclude[i])]
        if one_per_patient:
            order = order[np.sort(np.unique(patients[order], return_index=True)[1])]
        order = order[:k]
        distances[i, :len(order)], rows[i, :len(order)] = distance[order], order
    return Hits(distances, rows)
