"""Overlap of label maps against worked values, scikit-learn, MedPy; rankings against scikit-learn and trec_eval."""

import numpy as np
import pytest
import pytrec_eval
from medpy.metric import dc
from sklearn.metrics import average_precision_score, f1_score, ndcg_score

from decomp_jax.retrieval import relevance


def random_labels(n: int, *, classes: int = 3, side: int = 9, seed: int = 0) -> np.ndarray:
    """Label maps of which a third are empty and some lack a class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes + 1, (n, side, side)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.5] = 0
    labels[:: 3] = 0
    labels[1::4][labels[1::4] == 2] = 0
    return labels


def test_dice_of_a_worked_pair() -> None:
    query = np.array([[[1, 1, 0], [2, 0, 0]]], np.uint8)
    reference = np.array([[[1, 0, 0], [2, 2, 2]]], np.uint8)
    dice = np.asarray(relevance.class_dice(query, reference, classes=3))[0, 0]
    np.testing.assert_allclose(dice, [2 / 3, 1 / 2, np.nan])
    values = dice[None, None]
    assert relevance.mean_over_classes(values)[0, 0] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert relevance.mean_over_classes(values, "zero")[0, 0] == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert relevance.whole_dice(query, reference)[0, 0] == pytest.approx(4 / 7)
    areas = (relevance.class_areas(labels, classes=3) for labels in (query, reference))
    area = np.asarray(relevance.area_similarity(*areas))[0, 0]
    np.testing.assert_allclose(area, [2 / 3, 1 / 2, np.nan])


def test_dice_of_all_pairs_is_the_f1_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relevance, "REFERENCE_BLOCK", 4)
    query, reference = random_labels(5, seed=1), random_labels(11, seed=2)
    dice = np.asarray(relevance.class_dice(query, reference, classes=3))
    for i, a in enumerate(query):
        for j, b in enumerate(reference):
            expected = f1_score(a.ravel(), b.ravel(), labels=[1, 2, 3], average=None, zero_division=np.nan)
            np.testing.assert_allclose(dice[i, j], expected, atol=1e-6)


def test_whole_dice_is_that_of_medpy() -> None:
    query, reference = random_labels(5, seed=1), random_labels(7, seed=2)
    whole = np.asarray(relevance.whole_dice(query, reference))
    for i, a in enumerate(query):
        for j, b in enumerate(reference):
            expected = dc(a, b) if a.any() or b.any() else np.nan
            np.testing.assert_allclose(whole[i, j], expected, atol=1e-6)


def test_pairs_without_any_class_are_undefined_or_zero() -> None:
    empty = np.zeros((1, 4, 4), np.uint8)
    dice = relevance.class_dice(empty, empty, classes=2)
    assert np.isnan(relevance.mean_over_classes(dice)).all()
    assert (relevance.mean_over_classes(dice, "zero") == 0).all()


def test_centred_lesions_overlap_wherever_they_were() -> None:
    labels = np.zeros((3, 16, 16), np.uint8)
    labels[0, 1:4, 2:7] = 1
    labels[1, 10:13, 9:14] = 1
    centred = relevance.centre_lesions(labels)
    assert float(relevance.class_dice(labels[:1], labels[1:2], classes=1)[0, 0, 0]) == 0
    assert float(relevance.class_dice(centred[:1], centred[1:2], classes=1)[0, 0, 0]) == 1
    assert not centred[2].any()


def test_nearest_breaks_ties_by_row_and_marks_missing_hits() -> None:
    distances = np.array([[2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    excluded = np.array([[False, False, False, True], [True, True, True, False]])
    rows = relevance.nearest(distances, excluded=excluded, k=5)
    np.testing.assert_array_equal(rows, [[1, 2, 0, -1, -1], [3, -1, -1, -1, -1]])
    unknown = np.array([[np.nan, 1.0, np.inf], [np.nan, np.nan, np.nan]])
    rows = relevance.nearest(unknown, excluded=np.zeros((2, 3), bool), k=2)
    np.testing.assert_array_equal(rows, [[1, -1], [-1, -1]])


def test_one_hit_per_patient_keeps_the_nearest_of_each() -> None:
    patients = np.array([0, 0, 1, 1, 2])
    rows = np.array([[3, 2, 1, 0, 4], [0, 1, -1, -1, -1]])
    kept = relevance.first_of_each(rows, patients, k=4)
    np.testing.assert_array_equal(kept, [[3, 1, 4, -1], [0, -1, -1, -1]])


def test_mean_gain_averages_the_hits_there_are() -> None:
    gains = np.array([[1.0, 0.5, np.nan], [np.nan] * 3])
    np.testing.assert_allclose(relevance.mean_gain(gains, 2), [0.75, np.nan])
    np.testing.assert_allclose(relevance.mean_gain(gains, 3), [0.75, np.nan])


@pytest.mark.parametrize("k", [1, 5, 10])
def test_ndcg_and_average_precision_agree_with_scikit_learn(k: int) -> None:
    rng = np.random.default_rng(k)
    truth, distances = rng.random((7, 30)), rng.random((7, 30))
    none = np.zeros(truth.shape, bool)
    rows = relevance.nearest(distances, excluded=none, k=30)
    ideal = relevance.gains_of(truth, relevance.nearest(-truth, excluded=none, k=30))
    gains = relevance.gains_of(truth, rows)
    expected = [ndcg_score(truth[i : i + 1], -distances[i : i + 1], k=k) for i in range(7)]
    np.testing.assert_allclose(relevance.ndcg(gains, ideal, k), expected)
    relevant = truth > 0.7
    precision = relevance.average_precision(gains > 0.7, relevant.sum(1))
    expected = [average_precision_score(relevant[i], -distances[i]) for i in range(7)]
    np.testing.assert_allclose(precision, expected)


def test_rankings_agree_with_trec_eval() -> None:
    """Relevance in hundredths, as trec_eval knows whole numbers; a hit counts from 70 of them."""
    rng = np.random.default_rng(0)
    truth, distances = rng.integers(0, 101, (7, 30)), rng.random((7, 30))
    none = np.zeros(truth.shape, bool)
    gains = relevance.gains_of(truth.astype(float), relevance.nearest(distances, excluded=none, k=30))
    ideal = -np.sort(-truth, axis=1)
    ours = {
        **{f"ndcg_cut_{k}": relevance.ndcg(gains, ideal, k) for k in (5, 10)},
        **{f"P_{k}": relevance.mean_gain((gains >= 70).astype(float), k) for k in (1, 5, 10)},
        "map": relevance.average_precision(gains >= 70, (truth >= 70).sum(1)),
    }
    known = {str(i): {str(j): int(value) for j, value in enumerate(row)} for i, row in enumerate(truth)}
    ranked = {str(i): {str(j): -float(value) for j, value in enumerate(row)} for i, row in enumerate(distances)}
    judge = pytrec_eval.RelevanceEvaluator(known, {"ndcg_cut.5,10", "P.1,5,10", "map"}, relevance_level=70)
    theirs = judge.evaluate(ranked)
    for name, values in ours.items():
        np.testing.assert_allclose(values, [theirs[str(i)][name] for i in range(7)], err_msg=name)


def test_recall_of_the_ideal_counts_equals_and_skips_the_irrelevant() -> None:
    ideal = np.array([[0.9, 0.5, 0.5, 0.5], [0.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    gains = np.array([[0.5, 0.5, 0.1], [0.0, 0.9, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(relevance.recall_of_ideal(gains, ideal, 3), [2 / 3, 1, np.nan])


def test_a_ranking_blind_to_the_labels_scores_like_chance() -> None:
    labels = random_labels(60, seed=3)
    truth = np.asarray(relevance.mean_over_classes(relevance.class_dice(labels[1::3], labels, classes=3)))
    none = np.zeros(truth.shape, bool)
    shuffled = truth[:, np.random.default_rng(0).permutation(truth.shape[1])]
    blind = relevance.gains_of(truth, relevance.nearest(-shuffled, excluded=none, k=5))
    ideal = relevance.gains_of(truth, relevance.nearest(-truth, excluded=none, k=5))
    assert abs(relevance.mean_gain(blind, 5).mean() - truth.mean()) < 0.03
    assert relevance.mean_gain(ideal, 5).mean() > truth.mean() + 0.1
