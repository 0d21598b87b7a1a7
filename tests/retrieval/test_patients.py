"""Patients nearest to a patient, held to float64 brute force over the exported arrays."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from brute_force import make_any_queries, make_bank, make_queries

from decomp_jax.errors import UserError
from decomp_jax.retrieval import CodeBank, PatientHits, Queries, codes
from decomp_jax.retrieval.bank import WITHIN_MM


def with_heights(bank: CodeBank) -> CodeBank:
    """The bank's rows with heights from 0 to 60 mm, some equal."""
    rows = np.zeros(len(bank), [*bank.rows.dtype.descr, ("position_mm", "f4")])
    rows["patient_id"], rows["position_mm"] = bank.rows["patient_id"], np.arange(len(bank)) * 7 % 61
    return dataclasses.replace(bank, rows=rows)


def distances(bank: CodeBank, path: str, queries: Queries) -> np.ndarray:
    """float64 [Q,N], from the examples."""
    codebook = getattr(bank, f"{path}_codebook").astype(np.float64)
    stored, total = codebook[getattr(bank, f"{path}_indices")], 0.0
    for example in (example for example in queries.examples if example.path == path):
        points = codebook[example.points] if example.quantised else example.points.astype(np.float64)
        total = total + (np.square(points[:, None] - stored).sum(-1) * example.weights[:, None]).sum((2, 3))
    return total


def one_way(bank: CodeBank, path: str, queries: Queries, heights: np.ndarray, within: float
            ) -> dict[str, tuple[float, np.ndarray]]:
    """Distance, and matched rows, of each patient, slice by slice as the documentation has it."""
    codebook, indices = getattr(bank, f"{path}_codebook").astype(float), getattr(bank, f"{path}_indices")
    tables = np.stack([distances_to_each_code(codebook, path, queries, i) for i in range(len(queries))])
    distance = distances(bank, path, queries)
    weights = sum(example.weights for example in queries.examples if example.path == path)
    if path == "abnormal" and not codebook[0].any():
        alone, others = tables[:, :, 0].sum(1), (np.square(codebook[indices]).sum(-1) * weights.mean(0)).sum((1, 2))
    else:
        alone = tables.mean(2).sum(1)
        others = np.full(len(bank), alone.mean())
    answers = {}
    for patient in np.unique(bank.rows["patient_id"]):
        rows = np.flatnonzero(bank.rows["patient_id"] == patient)
        reachable = np.abs(heights[:, None] - bank.rows["position_mm"][rows]) <= within
        between = distance[:, rows]
        there = [line[ok].min() if ok.any() else own for ok, line, own in zip(reachable, between, alone)]
        back = [line[ok].min() if ok.any() else own for ok, line, own in zip(reachable.T, between.T, others[rows])]
        value = weights.max() * (sum(there) + sum(back)) / (alone.sum() + others[rows].sum())
        matches = [rows[ok & (line == least)] if ok.any() else [-1]
                   for ok, line, least in zip(reachable, between, there)]
        answers[patient] = value, matches
    return answers


def distances_to_each_code(codebook: np.ndarray, path: str, queries: Queries, i: int) -> np.ndarray:
    total = 0.0
    for example in (example for example in queries.examples if example.path == path):
        point, weight = (array[min(i, len(array) - 1)] for array in (example.points, example.weights))
        point = (codebook[point] if example.quantised else point.astype(np.float64)).reshape(-1, codebook.shape[1])
        total = total + np.square(point[:, None] - codebook).sum(2) * weight.reshape(-1, 1)
    return total


def assert_exact(bank: CodeBank, hits: PatientHits, queries: Queries, heights: np.ndarray, within: dict[str, float],
                 k: int, exclude: tuple[str, ...] = ()) -> None:
    paths = {path: one_way(bank, path, queries, heights, within[path]) for path in queries.paths}
    totals = {patient: sum(answers[patient][0] for answers in paths.values()) for patient in paths[queries.paths[0]]}
    order = sorted((total, patient) for patient, total in totals.items() if patient not in exclude)[:k]
    assert list(hits.patients) == [patient for _, patient in order]
    np.testing.assert_allclose(hits.distances, [total for total, _ in order], rtol=1e-9)
    for path, answers in paths.items():
        for patient, matches in zip(hits.patients, hits.matches[path]):
            assert all(row in expected for row, expected in zip(matches, answers[patient][1]))


@pytest.mark.parametrize("kind", ["uniform", "sparse"])
@pytest.mark.parametrize("name, within", [
    ("latent normal", {"normal": 5}), ("latent abnormal", {"abnormal": np.inf}), ("region of codes", {}),
    ("both latent", {"normal": 0, "abnormal": 10}),
])
def test_equals_brute_force(kind: str, name: str, within: dict[str, float]) -> None:
    bank = with_heights(make_bank(kind, 900))
    queries, _ = make_any_queries(bank, name, 17)
    heights = np.linspace(-3.0, 63.0, 17).round()
    hits = bank.search_patients(queries, heights=heights, within_mm=within, k=6, exclude=["p3"])
    assert_exact(bank, hits, queries, heights, {"normal": 5.0, "abnormal": 10.0, **within}, 6, ("p3",))


def test_few_patients_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from decomp_jax.retrieval import patients

    bank, looked_at = with_heights(make_bank("clustered", 2000)), []
    look = patients._look
    monkeypatch.setattr(patients, "_look", lambda *given: looked_at.append(given[2]) or look(*given))
    own = bank.rows["patient_id"] == "p5"
    hits = bank.search_patients(codes(normal=bank.normal_indices[own]), heights=bank.rows["position_mm"][own], k=1)
    assert list(hits.patients) == ["p5"] and hits.distances[0] < 1e-9 and len(looked_at) < 5
    np.testing.assert_array_equal(bank.rows["patient_id"][hits.matches["normal"][0]], "p5")


def test_patients_of_any_length_are_searched_by_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes memory as long as a program lives that serves."""
    from decomp_jax.retrieval import patients

    bank, widths, tables = with_heights(make_bank("clustered", 400)), set(), patients._tables

    def seen(examples: Any, codebook: np.ndarray) -> Any:
        widths.add(len(examples.squares))
        return tables(examples, codebook)

    monkeypatch.setattr(patients, "_tables", seen)
    for count in (1, 16, 17, 130, 145, 160, 161, 175, 190):
        some = np.arange(count)
        queries, heights = codes(normal=bank.normal_indices[some]), bank.rows["position_mm"][some]
        assert_exact(bank, bank.search_patients(queries, heights=heights, k=3), queries, heights, WITHIN_MM, 3, ())
    assert sorted(widths) == [16, 32, 160, 192]


def test_pictures_have_no_heights() -> None:
    """Their slices' numbers stand in for a height that is nan, as where there is no such column."""
    bank = make_bank("clustered", 400)
    rows = np.zeros(len(bank), [*bank.rows.dtype.descr, ("position_mm", "f4")])
    rows["patient_id"], rows["position_mm"] = bank.rows["patient_id"], np.nan
    rows["slice_index"] = np.arange(len(bank)) * 7 % 61
    pictures = dataclasses.replace(bank, rows=rows)
    queries, _ = make_any_queries(bank, "both latent", 4)
    heights, within = np.array([0.0, 20, 40, 60]), {"normal": 5.0, "abnormal": np.inf}
    hits = pictures.search_patients(queries, heights=heights, within_mm=within, k=5)
    rows = rows.copy()
    rows["position_mm"] = rows["slice_index"]
    assert_exact(dataclasses.replace(bank, rows=rows), hits, queries, heights, within, 5)


@pytest.mark.parametrize("n", [0, 3])
def test_few_patients(n: int) -> None:
    bank = make_bank("uniform", 3)
    queries = codes(**make_queries(bank, 2))
    bank = dataclasses.replace(bank, **{name: getattr(bank, name)[:n] for name in (
        "normal_indices", "abnormal_indices", "rows")})
    hits = bank.search_patients(queries, heights=np.zeros(2), k=4)
    patients = len(set(bank.rows["patient_id"]))
    assert len(hits.patients) == len(hits.distances) == patients
    assert hits.matches["normal"].shape == (patients, 2)


@pytest.mark.parametrize("bad, message", [
    ({"heights": np.zeros(3)}, r"heights: needs a finite height for each of 2 queries"),
    ({"heights": np.array([0, np.nan])}, "heights: needs a finite"), ({"k": 0}, "k: must be"),
    ({"queries": -1 * codes(normal=np.zeros((2, 8, 8), int))}, "queries: negative weights"),
    ({"within_mm": {"lesion": 3}}, "within_mm: needs numbers"), ({"within_mm": {"normal": -1}}, "within_mm: needs"),
])
def test_bad_arguments(bad: dict[str, object], message: str) -> None:
    bank = make_bank("uniform", 6)
    with pytest.raises(UserError, match=message):
        bank.search_patients(**{"queries": codes(**make_queries(bank, 2)), "heights": np.zeros(2), **bad})


def test_weights_of_paths_weigh_their_distances() -> None:
    bank = with_heights(make_bank("sparse", 300))
    heights, given = np.arange(4.0), {path: codes(**{path: indices}) for path, indices in make_queries(bank, 4).items()}
    found = [bank.search_patients(queries, heights=heights, k=50) for queries in (
        given["normal"], given["abnormal"], 0.5 * given["normal"] + 1.5 * given["abnormal"])]
    normal, abnormal, both = (dict(zip(hits.patients, hits.distances)) for hits in found)
    assert both == pytest.approx({patient: 0.5 * normal[patient] + 1.5 * abnormal[patient] for patient in both})


def test_lesions_without_overlap_are_as_far_apart_whatever_their_sizes() -> None:
    """So that small lesions are near to none but their like; two patients without any are alike."""
    codebook = np.diag(np.float32([0, 1, 1, 1]))
    indices = np.zeros((4, 2, 2), int)
    indices[0, 0], indices[1, 1, 0], indices[2] = 1, 1, 2
    rows = np.zeros(4, [("patient_id", "U1"), ("slice_index", "i4")])
    rows["patient_id"] = ["a", "b", "c", "d"]
    bank = CodeBank.from_arrays(normal_indices=indices * 0, abnormal_indices=indices, normal_codebook=codebook,
                                abnormal_codebook=codebook, rows=rows)
    for row, expected in ((0, {"a": 0, "b": 2, "c": 2, "d": 2}), (3, {"a": 2, "b": 2, "c": 2, "d": 0})):
        hits = bank.search_patients(codes(abnormal=indices[row : row + 1]), heights=np.zeros(1), k=4)
        assert dict(zip(hits.patients, hits.distances)) == pytest.approx(expected)
