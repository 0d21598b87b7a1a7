"""Relative distances, held to float64 brute force over the exported arrays."""

import dataclasses

import numpy as np
import pytest
from brute_force import ANY_QUERIES, assert_nearest, lengths, make_any_queries, make_bank

from decomp_jax.retrieval import CodeBank, Queries, latents, relative
from decomp_jax.retrieval.search import MOST_QUERIES


@pytest.fixture(scope="module", params=["duplicates", "sparse"])
def bank(request: pytest.FixtureRequest) -> CodeBank:
    return make_bank(request.param, 3000)


def ratios(bank: CodeBank, queries: Queries, distances: np.ndarray) -> np.ndarray:
    over = lengths(bank, queries)
    return np.divide(distances, over, out=np.zeros_like(over), where=over > 0)


@pytest.mark.parametrize("name", ANY_QUERIES)
def test_equals_brute_force(bank: CodeBank, name: str) -> None:
    queries, distances = make_any_queries(bank, name, 5)
    assert_nearest(bank, bank.search(relative(queries), k=10), ratios(bank, queries, distances), k=10)


def test_more_queries_than_are_scanned_together() -> None:
    """Faint and strong lesions by turns: each has a threshold of its own, in every block of queries and every round."""
    bank, count = make_bank("sparse", 1000), 2 * MOST_QUERIES + 10
    book = bank.abnormal_codebook.astype(np.float64)
    points = (book[bank.abnormal_indices[-count:]] * np.geomspace(0.05, 5, count)[:, None, None, None]).astype(np.float32)
    distances = np.stack([np.square(one - book[bank.abnormal_indices]).sum((1, 2, 3)) for one in points.astype(float)])
    queries = latents(abnormal=points)
    assert_nearest(bank, bank.search(relative(queries), k=10), ratios(bank, queries, distances), k=10)


@pytest.mark.parametrize("name", ["both latent", "counter-example", "region"])
def test_patients(bank: CodeBank, name: str) -> None:
    queries, distances = make_any_queries(bank, name, 5)
    options = {"k": 20, "exclude": bank.rows["patient_id"][:5], "one_per_patient": True}
    assert_nearest(bank, bank.search(relative(queries), **options), ratios(bank, queries, distances), **options)
    assert len(set(bank.rows["patient_id"])) > 20


def test_a_bank_of_fewer_rows_than_asked_for() -> None:
    bank = make_bank("sparse", 12)
    queries, distances = make_any_queries(bank, "latent abnormal", 3)
    for k in (11, 12, 40):
        assert_nearest(bank, bank.search(relative(queries), k=k), ratios(bank, queries, distances), k=k)
    assert_nearest(bank, bank.search(relative(queries), k=40, one_per_patient=True), ratios(bank, queries, distances),
                   k=40, one_per_patient=True)


def test_nothing_is_nothing_and_what_has_no_cell_in_common_is_1() -> None:
    """Ties without end: empty codes are all the same to a question about nothing, and all others are nothing like it."""
    bank = make_bank("sparse", 3000)
    empty = latents(abnormal=np.zeros((1, *bank.grid, 6), np.float32))
    hits, empties = bank.search(relative(empty), k=2000), np.flatnonzero(~bank.abnormal_indices.any((1, 2)))
    assert 0 < len(empties) < 2000
    np.testing.assert_array_equal(hits.rows[0, :len(empties)], empties)
    assert (hits.distances[0, :len(empties)] == 0).all() and (hits.distances[0, len(empties):] == 1).all()
    assert (np.diff(hits.rows[0, len(empties):]) > 0).all()


def test_what_differs_by_rounding_alone_is_a_tie() -> None:
    """A lesion where nobody has one: all are at 1, as sums of other numbers."""
    bank = make_bank("sparse", 3000)
    indices = np.where(np.arange(16).reshape(bank.grid) == 5, 0, bank.abnormal_indices)
    bank = dataclasses.replace(bank, abnormal_indices=indices)
    alone = np.zeros((1, *bank.grid, 6), np.float32)
    alone[0, 1, 1] = np.pi
    hits = bank.search(relative(latents(abnormal=alone)), k=200)
    assert hits.rows[0].tolist() == list(range(200)) and (hits.distances == 1).all()


def test_a_small_lesion_is_not_near_to_a_large_one_that_it_does_not_touch() -> None:
    """The plain distance prefers a small lesion elsewhere to twice the lesion in its place; the relative one doesn't."""
    grid, book = (2, 4), np.array([[0.0], [1.0], [2.0]], np.float32)
    codes = np.zeros((3, *grid), np.uint16)
    codes[0, 1] = 1  # the question
    codes[1, 0, 0] = 1  # little, elsewhere
    codes[2, :, :] = 1
    codes[2, 1] = 2  # more, around it
    rows = np.zeros(3, [("patient_id", "U1"), ("slice_index", "i4")])
    bank = CodeBank.from_arrays(normal_indices=codes, abnormal_indices=codes, normal_codebook=book,
                                abnormal_codebook=book, rows=rows)
    question = latents(abnormal=book[codes[:1]])
    assert bank.search(question, k=3).rows[0].tolist() == [0, 1, 2]
    hits = bank.search(relative(question), k=3)
    assert hits.rows[0].tolist() == [0, 2, 1]
    np.testing.assert_allclose(hits.distances[0], [0, (4 + 4) / (4 + 4 + 16), 1])


def test_cells_add_up_to_the_ratio(bank: CodeBank) -> None:
    queries, distances = make_any_queries(bank, "slider", 4)
    hits = bank.search(relative(queries), k=6)
    parts = bank.contributions(relative(queries), hits.rows)
    assert list(parts) == ["normal", "abnormal"] and all((cells >= 0).all() for cells in parts.values())
    np.testing.assert_allclose(sum(parts.values()).sum((2, 3)), hits.distances, rtol=1e-6)


def test_operations_keep_it() -> None:
    bank = make_bank("sparse", 200)
    one, _ = make_any_queries(bank, "latent abnormal", 4)
    for queries in (2 * relative(one), relative(one) + one, one + relative(one), relative(one)[1:3]):
        assert queries.relative
    np.testing.assert_array_equal(bank.search(2 * relative(one), k=3).rows, bank.search(relative(one), k=3).rows)
