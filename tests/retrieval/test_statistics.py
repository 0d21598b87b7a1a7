"""Averages and intervals against scipy's bootstrap and scikit-learn's AUROC."""

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from decomp_jax.retrieval.statistics import LEAST_PATIENTS, Bootstrap, PairBootstrap, interval


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
        estimate = interval(point[column], resampled[:, column])
        expected = scipy.stats.bootstrap((means[:, column],), np.mean, n_resamples=20000, method="percentile", rng=2)
        np.testing.assert_allclose(estimate[1:], expected.confidence_interval, atol=0.02)
        assert estimate.mean == pytest.approx(means[:, column].mean())


def test_paired_difference_agrees_with_scipy() -> None:
    patient, values = slices()
    bootstrap = Bootstrap.draw(patient, samples=20000, seed=1)
    point, resampled = bootstrap.macro(values)
    difference = interval(point[1] - point[0], resampled[:, 1] - resampled[:, 0])
    expected = scipy.stats.bootstrap(
        tuple(bootstrap.patient_means(values).T), lambda a, b, axis: b.mean(axis) - a.mean(axis), paired=True,
        n_resamples=20000, method="percentile", rng=2,
    )
    np.testing.assert_allclose(difference[1:], expected.confidence_interval, atol=0.02)


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
    auroc = bootstrap.auroc(scores, positive)
    resampled = [roc_auc_score(positive, scores, sample_weight=draw[patient]) for draw in bootstrap.counts]
    assert auroc.mean == pytest.approx(roc_auc_score(positive, scores))
    np.testing.assert_allclose(auroc[1:], np.quantile(resampled, (0.025, 0.975)))


def test_auroc_without_one_of_the_two_is_undefined() -> None:
    patient, values = slices()
    assert np.isnan(Bootstrap.draw(patient).auroc(values[:, 0], np.ones(len(patient), bool))).all()


def test_fewer_than_five_patients_have_no_interval() -> None:
    patient, values = np.repeat(np.arange(LEAST_PATIENTS), 4), np.random.default_rng(0).normal(size=(20, 1))
    few = np.where(patient[:, None] > 0, values, np.nan)  # one patient lacks the measure
    (enough, alone), resampled = Bootstrap.draw(patient).macro(np.stack([values[:, 0], few[:, 0]], axis=1))
    assert np.isfinite(interval(enough, resampled[:, 0])).all()
    assert np.isfinite(alone) and np.isnan(interval(alone, resampled[:, 1])[1:]).all()
    scores, positive = values[:, 0], np.arange(len(patient)) % 2 > 0
    assert np.isfinite(Bootstrap.draw(patient).auroc(scores, positive)).all()
    few = Bootstrap.draw(patient).auroc(scores, positive & (patient > 0))
    assert np.isfinite(few.mean) and np.isnan(few[1:]).all()


def pairs(patients: int = 12, slices: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Patients of A and B of pairs of slices, and scores to which the patients of both add."""
    rng = np.random.default_rng(seed)
    a = np.repeat(np.arange(patients), slices)
    b = (a + rng.integers(1, patients, len(a))) % patients
    effects = rng.normal(size=(2, patients))
    return np.stack([a, b], axis=1), effects[0, a] + 2 * effects[1, b] + 0.1 * rng.normal(size=len(a))


def test_resamples_of_pairs_are_those_of_repeated_slices() -> None:
    patients, values = pairs()
    values[::5] = np.nan
    bootstrap = PairBootstrap.draw(patients, samples=50)
    means, resampled = bootstrap.macro(values[:, None])
    once = np.ones((1, 12), int)
    for counts, mean in zip(np.concatenate([once, bootstrap.counts]), np.concatenate([means, resampled[:, 0]])):
        of_patient = []
        for a in np.repeat(np.arange(12), counts):
            repeated = np.repeat(values[patients[:, 0] == a], counts[patients[patients[:, 0] == a, 1]])
            if np.isfinite(repeated).any():
                of_patient.append(np.nanmean(repeated))
        assert mean == pytest.approx(np.mean(of_patient))


def test_pairs_whose_second_patient_adds_nothing_agree_with_scipy() -> None:
    """All pairs of 30 patients, scored by A alone: the interval is that of A's patients."""
    a, b = (side.ravel() for side in np.indices((30, 30)))
    patients = np.stack([a, b], axis=1)[a != b]
    effect = np.random.default_rng(0).normal(size=30)
    means, resampled = PairBootstrap.draw(patients, samples=20000, seed=1).macro(effect[patients[:, :1]])
    expected = scipy.stats.bootstrap((effect,), np.mean, n_resamples=20000, method="percentile", rng=2)
    np.testing.assert_allclose(interval(means[0], resampled[:, 0])[1:], expected.confidence_interval, atol=0.02)


def test_pairs_are_less_sure_than_the_patients_of_a_alone() -> None:
    patients, values = pairs()
    both, alone = (
        interval(means[0], resampled[:, 0]) for means, resampled in (
            PairBootstrap.draw(patients).macro(values[:, None]), Bootstrap.draw(patients[:, 0]).macro(values[:, None])
        )
    )
    assert both.mean == pytest.approx(alone.mean)
    assert both.high - both.low > 1.1 * (alone.high - alone.low)


def test_pairs_of_few_patients_have_no_interval() -> None:
    patients, values = pairs(patients=LEAST_PATIENTS)
    assert np.isfinite(PairBootstrap.draw(patients).macro(values[:, None])[1]).any()
    one_b = patients[:, 1] == 0
    assert np.isnan(PairBootstrap.draw(patients[one_b]).macro(values[one_b, None])[1]).all()
