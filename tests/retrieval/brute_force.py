"""Banks of several kinds, and search as one would write it in NumPy, in float64, over everything."""

from typing import Any

import numpy as np

from decomp_jax.retrieval import CodeBank, Hits

KINDS = ("uniform", "clustered", "duplicates")


def make_bank(kind: str, n: int, *, seed: int = 0, codes: int = 64, grid: tuple[int, int] = (4, 4)) -> CodeBank:
    """`n` rows of shuffled patients. "duplicates" is 40 % one code, the rest 30 times each."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(n, [("patient_id", "U8"), ("slice_index", "i4")])
    rows["patient_id"] = np.char.mod("p%d", rng.integers(0, max(n // 20, 1), n))

    def indices() -> np.ndarray:
        centres = rng.integers(0, codes, (max(n // 30, 1), *grid))
        near = centres[np.sort(rng.integers(0, len(centres), n))]
        if kind == "clustered":
            return np.where(rng.random(near.shape) < 0.2, rng.integers(0, codes, near.shape), near)
        if kind == "duplicates":
            near[rng.random(n) < 0.4] = centres[0]
            return near
        return rng.integers(0, codes, (n, *grid))

    return CodeBank.from_arrays(
        normal_indices=indices(), abnormal_indices=indices(), rows=rows,
        normal_codebook=rng.normal(size=(codes, 8)), abnormal_codebook=rng.normal(size=(codes + 8, 6)) * 3,
    )


def make_queries(bank: CodeBank, count: int, *, seed: int = 1) -> dict[str, np.ndarray]:
    """Codes of the bank with a few cells changed, and some unchanged."""
    rng = np.random.default_rng(seed)
    queries = {}
    for part in ("normal", "abnormal"):
        codes = getattr(bank, f"{part}_indices")[rng.integers(0, len(bank), count)]
        changed = rng.random(codes.shape) < rng.choice([0, 0.2], (count, 1, 1))
        queries[part] = np.where(changed, rng.integers(0, len(getattr(bank, f"{part}_codebook")), codes.shape), codes)
    return queries


def distances(bank: CodeBank, queries: dict[str, np.ndarray], cells: np.ndarray | None = None) -> np.ndarray:
    """float64 [Q,N] squared L2 of dequantised codes."""
    total = 0.0
    for part, query in queries.items():
        codebook = getattr(bank, f"{part}_codebook").astype(np.float64)
        stored = codebook[getattr(bank, f"{part}_indices")]
        square = np.stack([np.square(codebook[one] - stored).sum(-1) for one in query])
        total = total + (square if cells is None else square * cells).sum((-1, -2))
    return total


def assert_exact(bank: CodeBank, hits: Hits, queries: dict[str, np.ndarray], *, k: int, cells: np.ndarray | None = None,
                 exclude: np.ndarray | None = None, one_per_patient: bool = False, **_: Any) -> None:
    """Fails unless the hits are the k nearest allowed rows, in order, up to ties at 1e-6 relative."""
    patients = bank.rows["patient_id"]
    for i, distance in enumerate(distances(bank, queries, cells)):
        order = np.argsort(distance, kind="stable")
        if exclude is not None:
            order = order[~np.isin(patients[order], exclude[i])]
        if one_per_patient:
            order = order[np.sort(np.unique(patients[order], return_index=True)[1])]
        order = order[:k]
        row = hits.rows[i][:len(order)]
        assert (row >= 0).all() and len(set(row)) == len(row)
        assert (hits.rows[i][len(order):] == -1).all() and np.isinf(hits.distances[i][len(order):]).all()
        assert exclude is None or not np.isin(patients[row], exclude[i]).any()
        assert not one_per_patient or len(set(patients[row])) == len(row)
        np.testing.assert_allclose(distance[row], distance[order], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(hits.distances[i][:len(order)], distance[order], rtol=1e-6, atol=1e-9)
        order_of_equals = np.lexsort((row, hits.distances[i][:len(order)]))
        assert (order_of_equals == np.arange(len(order))).all(), "ties must go to the lower row"
        nearer = np.setdiff1d(order, row)
        assert (distance[nearer] >= distance[order[-1:]] * (1 - 1e-6)).all()
