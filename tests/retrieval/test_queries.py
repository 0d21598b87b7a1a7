"""Queries of every kind, held to float64 brute force over the exported arrays."""

import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import ANY_QUERIES, assert_nearest, distances, make_any_queries, make_bank, make_queries

from decomp_jax.errors import UserError
from decomp_jax.retrieval import CodeBank, by_examples, codes, latents


@pytest.fixture(scope="module", params=["duplicates", "sparse"])
def bank(request: pytest.FixtureRequest) -> CodeBank:
    return make_bank(request.param, 5000)


@pytest.mark.parametrize("name", ANY_QUERIES)
def test_equals_brute_force(bank: CodeBank, name: str) -> None:
    queries, distances = make_any_queries(bank, name, 5)
    assert_nearest(bank, bank.search(queries, k=10), distances, k=10)


@pytest.mark.parametrize("name", ["both latent", "counter-example", "region"])
def test_patients(bank: CodeBank, name: str) -> None:
    queries, distances = make_any_queries(bank, name, 5)
    options = {"k": 7, "exclude": bank.rows["patient_id"][:5], "one_per_patient": True}
    assert_nearest(bank, bank.search(queries, **options), distances, **options)


def test_weights_of_any_kind_of_number() -> None:
    bank = make_bank("uniform", 500)
    queries = codes(normal=make_queries(bank, 2)["normal"])
    weights = np.arange(16).reshape(bank.grid) % 3
    expected = bank.search(weights * queries, k=5)
    for weighted in (queries * weights, jnp.asarray(weights) * queries, queries * weights.astype(np.float32)[None],
                     0.5 * (2 * weights * queries)):
        np.testing.assert_array_equal(bank.search(weighted, k=5).rows, expected.rows)


def test_examples_and_counter_examples(bank: CodeBank) -> None:
    """The mean of two less half the mean of two others, each path for itself; one example has no anatomy."""
    asked = [make_queries(bank, 3, seed=seed) for seed in range(4)]
    like = [codes(**asked[0]), codes(abnormal=asked[1]["abnormal"])]
    queries = by_examples(like, [codes(**one) for one in asked[2:]], weight=0.3)
    normal, abnormal = ([distances(bank, {path: one[path]}) for one in asked] for path in ("normal", "abnormal"))
    expected = (1.4 * (normal[0] - 0.5 * np.mean(normal[2:], 0))
                + 0.6 * (np.mean(abnormal[:2], 0) - 0.5 * np.mean(abnormal[2:], 0)))
    assert_nearest(bank, bank.search(queries, k=10), expected, k=10)
    alone = by_examples([codes(normal=asked[0]["normal"])], weight=0.3)
    assert_nearest(bank, bank.search(alone, k=10), normal[0], k=10)


def test_codes_without_table_of_their_own_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that changes nothing leads through the tables of arbitrary queries."""
    bank = make_bank("sparse", 3000)
    queries = make_queries(bank, 6)
    hits, other = (bank.search(factor * codes(**queries), k=20) for factor in (1, 2))
    np.testing.assert_array_equal(hits.rows, other.rows)
    np.testing.assert_allclose(2 * hits.distances, other.distances, rtol=1e-6, atol=1e-9)


def test_answers_do_not_depend_on_the_batch() -> None:
    bank = make_bank("sparse", 3000)
    queries, _ = make_any_queries(bank, "counter-example", 70)
    hits = bank.search(queries, k=3)
    for one in (0, 63, 64, 69):
        alone = bank.search(queries[one:one + 1], k=3)
        np.testing.assert_array_equal(alone.rows[0], hits.rows[one])
        np.testing.assert_array_equal(alone.distances[0], hits.distances[one])


def test_equal_codes_are_at_distance_0() -> None:
    """And not what rounding leaves of two sums, which may be below 0."""
    bank = make_bank("sparse", 1000)
    for paths in (("abnormal",), ("normal", "abnormal")):
        queries = {path: getattr(bank, f"{path}_indices")[:200] for path in paths}
        assert (bank.search(**queries, k=1).distances == 0).all()


def test_large_codebooks_have_wide_keys() -> None:
    bank = make_bank("sparse", 1500, codes=4200)
    assert bank._index(("abnormal",), None).layout.codes.keys.dtype == np.uint32
    queries, distances = make_any_queries(bank, "latent abnormal", 3)
    assert_nearest(bank, bank.search(queries, k=10), distances, k=10)


def test_sparse_codes_are_short() -> None:
    bank = make_bank("sparse", 20000)
    dense = make_bank("uniform", 20000)
    keys, dense_keys = (some._index(("abnormal",), None).layout.codes[i] for i, some in ((1, bank), (0, dense)))
    assert 2 * keys.size < dense_keys.size


def bad_queries(bank: CodeBank) -> dict[str, tuple[object, str]]:
    indices, vectors = np.zeros((2, 4, 4), int), np.zeros((2, 4, 4, 8), np.float32)
    return {
        "nothing given": (lambda: codes(), "normal, abnormal: give one"),
        "codes as latents": (lambda: latents(normal=indices), r"normal: needs finite latents \[Q,h,w,D\], not int64"),
        "latents as codes": (lambda: codes(normal=vectors), "normal: needs integer indices"),
        "not finite": (lambda: latents(normal=vectors + np.nan), "normal: needs finite latents"),
        "counts": (lambda: codes(normal=indices) + latents(abnormal=vectors[[0, 0, 1]]),
                   r"queries: 2 \(normal\), 3 \(abnormal\) are put together"),
        "weights' shape": (lambda: np.ones((4, 5)) * codes(normal=indices), r"weights: need .* not \[4, 5\]"),
        "weights' count": (lambda: np.ones((3, 4, 4)) * codes(normal=indices), "weights: 3 for 2 queries"),
        "weights not finite": (lambda: np.inf * codes(normal=indices), "weights: need a finite number"),
        "channels": (lambda: bank.search(latents(abnormal=vectors)), r"abnormal: needs latents \[Q,4,4,6\]"),
        "indices": (lambda: bank.search(codes(abnormal=indices + 72)), "abnormal: holds 72..72"),
        "both": (lambda: bank.search(codes(normal=indices), normal=indices), "queries, normal, abnormal: give"),
    }


@pytest.mark.parametrize("name", bad_queries(None))
def test_bad_queries(name: str) -> None:
    ask, message = bad_queries(make_bank("uniform", 6))[name]
    with pytest.raises(UserError, match=message):
        ask()


@pytest.mark.parametrize("name", ANY_QUERIES)
def test_cells_add_up_to_the_distance(bank: CodeBank, name: str) -> None:
    queries, distances = make_any_queries(bank, name, 5)
    hits = bank.search(queries, k=10)
    parts = bank.contributions(queries, hits.rows)
    cells = sum(parts.values())
    assert tuple(parts) == queries.paths
    assert cells.shape == (5, 10, *bank.grid)
    expected = np.take_along_axis(distances, hits.rows, 1)
    np.testing.assert_allclose(cells.sum((2, 3)), expected, rtol=1e-9, atol=1e-9 * abs(expected).max())


def test_a_cell_adds_what_its_codes_differ_by() -> None:
    bank = make_bank("uniform", 50)
    stored, other = bank.normal_indices[:1].copy(), bank.normal_indices[0, 2, 3]
    stored[0, 2, 3] = (other + 1) % 64
    cells = bank.contributions(codes(normal=stored), np.array([[0, -1]]))["normal"]
    codebook, expected = bank.normal_codebook.astype(float), np.zeros((1, 2, 4, 4))
    expected[0, 0, 2, 3] = ((codebook[other] - codebook[(other + 1) % 64]) ** 2).sum()
    np.testing.assert_allclose(cells, expected)
    for rows in ([[50]], [[-2]], [0], [[0], [0]]):
        with pytest.raises(UserError, match="rows: needs rows"):
            bank.contributions(codes(normal=stored), np.array(rows))
