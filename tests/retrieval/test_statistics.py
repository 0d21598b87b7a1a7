"""Averages and intervals against scipy's bootstrap and scikit-learn's AUROC."""

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from decomp_jax.retrieval.statistics import Bootstrap, interval


def slices(seed: int = 0, patients: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Patient of each slice (unequal numbers of slices), and two measures that differ between patients."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rng.integers(1, 9, patients))
    effect = rng.normal(size=(patients, 1))
    return patient, effect[patient] + rng.normal(size=(len(patient), 2)) + [0.0, 0.5]


def test_macro_average_weighs_patients_not_slices() -> None:
    values = np.array([[1.0], [1.0], [1.0], [5.0], [np.nan], [np.nan]])
    point, _ = Bootstrap.draw(np.array(["a", "a", "a", "b", "b", "c"])).macro(values)
    assert point[0] == 3


def test_interval_agrees_with_scipy() -> None:
    patient, values = slices()
    bootstrap = Bootstrap.draw(patient, samples=20000, seed=1)
    point, resampled = bootstrap.macro(values)
    means = bootstrap.patient_means(values)
    for column in range(2):
        ours = interval(point[column], resampled[:, column])
        scipys = scipy.stats.bootstrap((means[:, column],), np.mean, n_resamples=20000, method="percentile", rng=2)
        np.testing.assert_allclose(ours[1:], scipys.confidence_interval, atol=0.02)
        assert ours.mean == pytest.approx(means[:, column].mean())


def test_paired_difference_agrees_with_scipy() -> None:
    patient, values = slices()
    bootstrap = Bootstrap.draw(patient, samples=20000, seed=1)
    point, resampled = bootstrap.macro(values)
    ours = interval(point[1] - point[0], resampled[:, 1] - resampled[:, 0])
    scipys = scipy.stats.bootstrap(
        tuple(bootstrap.patient_means(values).T), lambda a, b, axis: b.mean(axis) - a.mean(axis), paired=True,
        n_resamples=20000, method="percentile", rng=2,
    )
    np.testing.assert_allclose(ours[1:], scipys.confidence_interval, atol=0.02)


def test_paired_difference_is_surer_than_the_two_apart() -> None:
    patient, values = slices()
    point, resampled = Bootstrap.draw(patient).macro(values)
    difference = interval(point[1] - point[0], resampled[:, 1] - resampled[:, 0])
    apart = interval(point[0], resampled[:, 0])
    assert difference.low < difference.mean < difference.high
    assert difference.high - difference.low < apart.high - apart.low


def test_seeded() -> None:
    patient, _ = slices()
    np.testing.assert_array_equal(Bootstrap.draw(patient, seed=3).counts, Bootstrap.draw(patient, seed=3).counts)
    assert (Bootstrap.draw(patient, seed=3).counts != Bootstrap.draw(patient, seed=4).counts).any()


def test_auroc_agrees_with_scikit_learn_on_every_resample() -> None:
    patient, values = slices()
    scores, positive = np.round(values[:, 0], 1), values[:, 1] > 0
    bootstrap = Bootstrap.draw(patient, samples=200)
    ours = bootstrap.auroc(scores, positive)
    resampled = [roc_auc_score(positive, scores, sample_weight=draw[patient]) for draw in bootstrap.counts]
    assert ours.mean == pytest.approx(roc_auc_score(positive, scores))
    np.testing.assert_allclose(ours[1:], np.quantile(resampled, (0.025, 0.975)))


def test_auroc_without_one_of_the_two_is_undefined() -> None:
    patient, values = slices()
    assert np.isnan(Bootstrap.draw(patient).auroc(values[:, 0], np.ones(len(patient), bool))).all()
