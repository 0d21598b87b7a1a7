"""Scores of rankings: against brute force with scikit-learn, and what must hold of any ranking."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from decomp_jax.evaluation.rankers import METHODS, ORACLES, PLAIN, Block, Method, Search, by_distance, rankers
from decomp_jax.evaluation.scores import Scores, score
from decomp_jax.evaluation.slices import SliceSet, lesion_side
from tests.evaluation.fakes import settings


def scored(query: SliceSet, reference: SliceSet) -> Scores:
    search = Search(query, reference, settings())
    return score(search, rankers(search))


@pytest.fixture(scope="module")
def scores(query: SliceSet, reference: SliceSet) -> Scores:
    return scored(query, reference)


def class_dice(a: np.ndarray, b: np.ndarray, classes: int) -> float:
    labels = list(range(1, classes + 1))
    return np.nanmean(f1_score(a.ravel(), b.ravel(), labels=labels, average=None, zero_division=np.nan))


def test_pixel_ranking_agrees_with_brute_force(query: SliceSet, reference: SliceSet, scores: Scores) -> None:
    for i in np.flatnonzero(query.lesion)[::4]:
        distance = ((query.thumbnail[i].astype(float) - reference.thumbnail.astype(float)) ** 2).sum((1, 2, 3))
        nearest = np.argsort(distance)[:5]
        for target, classes, labels in (("abnormal", 2, "label"), ("normal", 6, "anatomy")):
            of_query, of_reference = getattr(query, labels)[i], getattr(reference, labels)
            expected = np.mean([class_dice(of_query, of_reference[row], classes) for row in nearest])
            assert scores["pixel_l2", target, "dice@5"][i] == pytest.approx(expected, abs=1e-6)


def test_code_ranking_agrees_with_brute_force(query: SliceSet, reference: SliceSet, scores: Scores) -> None:
    """A query's codes are compared by the squared L2 of codebook rows; ties go to the lower row."""
    book = query.bank.abnormal_codebook.astype(float)
    for i in np.flatnonzero(query.lesion)[::4]:
        difference = book[query.bank.abnormal_indices[i]] - book[reference.bank.abnormal_indices]
        nearest = np.argsort(np.round((difference**2).sum((1, 2, 3)), 9), kind="stable")[:1]
        expected = class_dice(query.label[i], reference.label[nearest[0]], 2)
        assert scores["abnormal", "abnormal", "dice@1"][i] == pytest.approx(expected, abs=1e-6)


def test_no_ranking_beats_the_oracle(scores: Scores) -> None:
    for oracle, (target, kind) in ORACLES.items():
        for method, other, measure in scores:
            if other == target and measure in (f"{kind}@1", f"{kind}@5", f"{kind}@10"):
                assert (scores[method, target, measure] <= scores[oracle, target, measure] + 1e-6)[
                    ~np.isnan(scores[method, target, measure])
                ].all()
    for target in ("normal", "abnormal", "both"):
        for measure in ("ndcg@10", "recall of ideal@10"):
            values = scores[f"oracle_{target}", target, measure]
            np.testing.assert_allclose(values[~np.isnan(values)], 1)


def test_no_method_finds_a_slice_of_the_same_patient(query: SliceSet) -> None:
    """The slice itself would be the nearest of all."""
    search = Search(query, query, settings())
    patients, block = query.rows["patient_id"], Block.prepare(search, np.flatnonzero(query.lesion))
    for name, rank in rankers(search).items():
        rows = np.asarray(rank(block))
        assert ((patients[rows] != patients[block.queries][:, None]) | (rows < 0)).all(), name


def test_only_slices_with_a_lesion_ask_for_lesions(query: SliceSet, scores: Scores) -> None:
    np.testing.assert_array_equal(np.isnan(scores["random", "abnormal", "dice@5"]), ~query.lesion)
    assert not np.isnan(scores["random", "normal", "dice@5"]).any()


def test_column_precision_agrees_with_scikit_learn(query: SliceSet, reference: SliceSet, scores: Scores) -> None:
    for i in range(0, len(query), 7):
        same = query.rows["tumour"][i] == reference.rows["tumour"]
        distance = ((query.thumbnail[i].astype(float) - reference.thumbnail.astype(float)) ** 2).sum((1, 2, 3))
        expected = average_precision_score(same, -distance)
        assert scores["pixel_l2", "column tumour", "map"][i] == pytest.approx(expected)


def test_shuffled_labels_score_like_chance(query: SliceSet, reference: SliceSet, scores: Scores) -> None:
    """Labels dealt out anew among the references: no ranking may know of them, or there is a leak."""
    order = np.random.default_rng(0).permutation(len(reference))
    shuffled = dataclasses.replace(reference, label=reference.label[order], anatomy=reference.anatomy[order])
    dealt = scored(query, shuffled)
    overlap = Search(query, shuffled, settings()).overlap(np.arange(len(query)))
    blind = {method for method, _, _ in scores} - {"lesion_grid", *ORACLES}
    assert {"normal", "abnormal", "both", "segmentation", "z_e_normal", "z_e_abnormal"} < blind
    for target, knowing in (("abnormal", {"abnormal", "segmentation"}), ("normal", {"normal", "pixel_l2"})):
        chance, spread = np.nanmean(overlap[target]["dice"]), np.nanstd(overlap[target]["dice"])
        error = 4 * spread / np.sqrt(len(query))  # hits of neighbouring queries are shared
        for method in blind:
            assert abs(np.nanmean(dealt[method, target, "dice@5"]) - chance) < error, method
        for method in knowing:
            assert np.nanmean(scores[method, target, "dice@5"]) > chance + error, method
        assert np.nanmean(dealt[f"oracle_{target}", target, "dice@5"]) > chance + error


def test_hits_of_the_same_patient_are_left_out(query: SliceSet) -> None:
    scores = scored(query, query)
    assert np.nanmax(scores["oracle_abnormal", "abnormal", "whole_dice@1"]) < 1
    assert np.nanmax(scores["pixel_l2", "normal", "dice@1"]) < 1


def test_few_references_give_the_hits_there_are(query: SliceSet, reference: SliceSet) -> None:
    few = reference_part(reference, np.arange(3))
    scores = scored(query, few)
    overlap = Search(query, few, settings()).overlap(np.arange(len(query)))["normal"]["dice"]
    np.testing.assert_allclose(scores["normal", "normal", "dice@10"], overlap.mean(1), rtol=1e-6)


def reference_part(slices: SliceSet, rows: np.ndarray) -> SliceSet:
    """The given slices alone."""
    arrays = {
        field.name: getattr(slices, field.name)[rows] for field in dataclasses.fields(slices)
        if field.name not in ("bank", "dataset", "features")
    }
    bank = dataclasses.replace(
        slices.bank, rows=slices.rows[rows], normal_indices=slices.bank.normal_indices[rows],
        abnormal_indices=slices.bank.abnormal_indices[rows],
    )
    return SliceSet(**arrays, bank=bank, dataset=slices.dataset)


def test_a_new_method_is_one_entry(
    query: SliceSet, reference: SliceSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_row = by_distance(lambda search, queries: np.tile(np.arange(len(search.reference)), (len(queries), 1)))
    monkeypatch.setitem(METHODS, "row", Method("row", PLAIN, "The row.", by_row))
    search = Search(query, reference, settings())
    scores = score(search, rankers(search, ["row"]))
    dice = search.overlap(np.arange(len(query)))["normal"]["dice"]
    np.testing.assert_allclose(scores["row", "normal", "dice@5"], dice[:, :5].mean(1), rtol=1e-6)


def test_lesion_side() -> None:
    label = np.zeros((3, 4, 6), np.uint8)
    label[0, 0, :2], label[1, 0, 3:] = 1, 2
    np.testing.assert_array_equal(lesion_side(label), [-1, 1, 0])
