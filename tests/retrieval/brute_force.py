"""Banks of several kinds, and search as one would write it in NumPy, in float64, over everything."""

import dataclasses
from typing import Any

import numpy as np

from decomp_jax.retrieval import CodeBank, Hits, Queries, codes, latents

KINDS = ("uniform", "clustered", "duplicates", "sparse")


def make_bank(kind: str, n: int, *, seed: int = 0, codes: int = 64, grid: tuple[int, int] = (4, 4)) -> CodeBank:
    """`n` rows of shuffled patients. "duplicates" is 40 % one code, the rest 30 times each; in the abnormal
    codes of "sparse" most cells hold code 0, the zero vector."""
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

    normal, abnormal, abnormal_codebook = indices(), indices(), rng.normal(size=(codes + 8, 6)) * 3
    if kind == "sparse":
        abnormal *= rng.random(abnormal.shape) < rng.choice([0, 0.1, 0.3, 1], (n, 1, 1), p=[0.3, 0.4, 0.2, 0.1])
        abnormal_codebook[0] = 0
    return CodeBank.from_arrays(
        normal_indices=normal, abnormal_indices=abnormal, rows=rows,
        normal_codebook=rng.normal(size=(codes, 8)), abnormal_codebook=abnormal_codebook,
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


def make_any_queries(bank: CodeBank, name: str, count: int, *, seed: int = 2) -> tuple[Queries, np.ndarray]:
    """Queries of a kind of `ANY_QUERIES`, and their distances float64 [Q,N] to the rows."""
    rng = np.random.default_rng(seed)
    given, distance, vectors = {}, {}, {}
    for path, indices in make_queries(bank, count, seed=seed).items():
        codebook = getattr(bank, f"{path}_codebook").astype(np.float64)
        stored = codebook[getattr(bank, f"{path}_indices")]
        vectors[path] = (codebook[indices] + rng.normal(size=(*indices.shape, codebook.shape[1]))).astype(np.float32)
        given[path] = {"code": codes(**{path: indices}), "latent": latents(**{path: vectors[path]})}
        points = {"code": codebook[indices], "latent": vectors[path].astype(np.float64)}
        distance[path] = {name: np.square(point[:, None] - stored).sum(-1) for name, point in points.items()}

    def total(path: str, kind: str, weights: np.ndarray | float = 1.0) -> np.ndarray:
        return (distance[path][kind] * weights).sum((2, 3))

    def shifted(path: str, kind: str) -> tuple[Queries, np.ndarray]:
        """The queries in another order, as further examples."""
        return Queries(tuple(dataclasses.replace(example, points=np.roll(example.points, 1, axis=0))
                             for example in given[path][kind].examples)), np.roll(distance[path][kind], 1, axis=0)

    region = rng.random(bank.grid) < 0.4
    own_weights = rng.random((count, *bank.grid)) * (rng.random((count, *bank.grid)) < 0.7)
    normal, abnormal = given["normal"], given["abnormal"]
    other, other_distance = shifted("abnormal", "latent")
    third, third_distance = shifted("normal", "code")
    return {
        "latent normal": lambda: (normal["latent"], total("normal", "latent")),
        "latent abnormal": lambda: (abnormal["latent"], total("abnormal", "latent")),
        "both latent": lambda: (normal["latent"] + abnormal["latent"],
                                total("normal", "latent") + total("abnormal", "latent")),
        "code and latent": lambda: (normal["code"] + abnormal["latent"],
                                    total("normal", "code") + total("abnormal", "latent")),
        "region": lambda: (region * abnormal["latent"], total("abnormal", "latent", region)),
        "region of codes": lambda: (normal["code"] + region * abnormal["code"],
                                    total("normal", "code") + total("abnormal", "code", region)),
        "weights a query": lambda: (abnormal["code"] * own_weights, total("abnormal", "code", own_weights[:, None])),
        "slider": lambda: (0.2 * normal["latent"] + 0.8 * abnormal["code"],
                           0.2 * total("normal", "latent") + 0.8 * total("abnormal", "code")),
        "examples": lambda: (abnormal["code"] + other,
                             total("abnormal", "code") + other_distance.sum((2, 3))),
        "one example for all": lambda: (abnormal["latent"] + abnormal["code"][:1],
                                        total("abnormal", "latent") + total("abnormal", "code")[:1]),
        "counter-example": lambda: (2 * abnormal["latent"] - other + normal["code"] - 0.5 * third,
                                    2 * total("abnormal", "latent") - other_distance.sum((2, 3))
                                    + total("normal", "code") - 0.5 * third_distance.sum((2, 3))),
        "far from": lambda: (-1 * abnormal["code"], -total("abnormal", "code")),
        "nothing counts": lambda: (0 * abnormal["latent"], 0 * total("abnormal", "latent")),
        "sketch of nothing": lambda: (latents(abnormal=np.zeros_like(vectors["abnormal"])),
                                      distances(bank, {"abnormal": np.zeros((count, *bank.grid), int)})),
    }[name]()


def lengths(bank: CodeBank, queries: Queries) -> np.ndarray:
    """float64 [Q,N]: what relative distances are relative to."""
    total = np.zeros((len(queries), len(bank)))
    for example in queries.examples:
        codebook = getattr(bank, f"{example.path}_codebook").astype(np.float64)
        points = codebook[example.points] if example.points.ndim == 3 else example.points.astype(np.float64)
        stored = np.square(codebook[getattr(bank, f"{example.path}_indices")]).sum(-1)
        squares = np.square(points).sum(-1)[:, None] + stored
        total += (np.abs(example.weights)[:, None] * squares).sum((2, 3))
    return total


ANY_QUERIES = (
    "latent normal", "latent abnormal", "both latent", "code and latent", "region", "region of codes",
    "weights a query", "slider", "examples", "one example for all", "counter-example", "far from", "nothing counts",
)


def assert_exact(bank: CodeBank, hits: Hits, queries: dict[str, np.ndarray], *, cells: np.ndarray | None = None,
                 **options: Any) -> None:
    """Fails unless the hits are the k nearest allowed rows of codes, in order."""
    assert_nearest(bank, hits, distances(bank, queries, cells), **options)


def assert_nearest(bank: CodeBank, hits: Hits, distances: np.ndarray, *, k: int, exclude: np.ndarray | None = None,
                   one_per_patient: bool = False) -> None:
    """Fails unless the hits are the k allowed rows of the smallest distances [Q,N], ties (to 1e-12) by row."""
    patients = bank.rows["patient_id"]
    for i, exact in enumerate(distances):
        distance = np.round(exact / (tie := 1e-12 * max(np.abs(exact).max(initial=0), 1e-300))) * tie
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
        tolerance = {"rtol": 1e-6, "atol": 1e-7 * np.abs(exact).max(initial=0)}
        np.testing.assert_allclose(hits.distances[i][:len(order)], exact[order], **tolerance)
        np.testing.assert_array_equal(row, order)
