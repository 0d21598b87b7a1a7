"""Patients as volumes: Dice against MedPy, scores against scikit-learn, and what must hold of any ranking."""

import copy
import dataclasses

import numpy as np
import pytest
from medpy.metric.binary import dc
from scipy import ndimage
from sklearn.metrics import ndcg_score

from decomp_jax.evaluation.patients import METHODS, PatientSearch, Stack, patient_scores, patient_table, volume_dice
from decomp_jax.evaluation.rankers import Search
from decomp_jax.evaluation.slices import SliceSet
from tests.evaluation.fakes import SIZE, settings


@pytest.fixture(scope="module")
def patients(query: SliceSet, reference: SliceSet) -> PatientSearch:
    return PatientSearch(Search(query, reference, settings()))


def volumes(slices: SliceSet, labels: str) -> list[np.ndarray]:
    """The fakes' slices are 4 mm apart, of all patients at the same heights."""
    ids = slices.rows["patient_id"]
    return [getattr(slices, labels)[ids == patient] for patient in np.unique(ids)]


def dice(a: np.ndarray, b: np.ndarray, labels: list[int]) -> list[float]:
    pairs = [(a == label, b == label) if label else (a > 0, b > 0) for label in labels]
    return [dc(one, other) if one.any() or other.any() else np.nan for one, other in pairs]


def test_overlap_of_volumes_is_medpys(query: SliceSet, reference: SliceSet, patients: PatientSearch) -> None:
    for labels, target, classes in (("label", "abnormal", 2), ("anatomy", "normal", 6)):
        for i, one in enumerate(volumes(query, labels)):
            for j, other in enumerate(volumes(reference, labels)):
                *each, whole = dice(one, other, [*range(1, classes + 1), 0])
                assert patients.relevances[target]["dice"][i, j] == pytest.approx(np.nanmean(each), abs=1e-6)
                if target == "abnormal":
                    assert patients.relevances[target]["whole_dice"][i, j] == pytest.approx(whole, abs=1e-6)


def test_aligned_overlap_is_that_of_shifted_volumes(
    query: SliceSet, reference: SliceSet, patients: PatientSearch
) -> None:
    def centred(volume: np.ndarray) -> np.ndarray:
        middle, centroid = (0, SIZE // 2, SIZE // 2), ndimage.center_of_mass(volume > 0)
        shift = [int(np.floor(to - at + 0.5)) for to, at in zip(middle, centroid)]
        return np.roll(np.pad(volume, ((10, 10), (0, 0), (0, 0))), shift, (0, 1, 2))

    for i, one in enumerate(volumes(query, "label")):
        for j, other in enumerate(volumes(reference, "label")):
            expected = dc(centred(one) > 0, centred(other) > 0)
            assert patients.relevances["abnormal"]["aligned_whole_dice"][i, j] == pytest.approx(expected, abs=1e-6)


def test_slices_between_planes_go_to_the_nearest(query: SliceSet) -> None:
    """A stack a quarter of the spacing higher is the same volume; one that is two planes higher overlaps less."""
    def moved(by: float) -> Stack:
        rows = query.rows.copy()
        rows["position_mm"] += by
        return Stack(dataclasses.replace(query, rows=rows))

    still, near, far = (moved(by) for by in (0, 1, 8))
    assert still.spacing == 4
    planes = [stack.planes(query.label, 4.0) for stack in (still, near, far)]
    np.testing.assert_allclose(np.diag(volume_dice(planes[0], planes[1], 2)[..., -1]), 1)
    assert np.nanmax(np.diag(volume_dice(planes[0], planes[2], 2)[..., -1])) < 1


def test_scores_are_scikit_learns(patients: PatientSearch) -> None:
    scores = dict(patient_scores(patients, METHODS))
    true = patients.relevances["normal"]["dice"]
    distances = METHODS["pooled"].builder(patients, "normal")
    for i, (gains, distance) in enumerate(zip(true, distances)):
        assert scores["pooled", "normal", "ndcg@10"][i] == pytest.approx(ndcg_score(gains[None], -distance[None], k=10))
        nearest = np.argsort(distance)[:5]
        assert scores["pooled", "normal", "dice@5"][i] == pytest.approx(gains[nearest].mean(), abs=1e-6)


def test_the_oracle_is_not_beaten(patients: PatientSearch) -> None:
    scores = dict(patient_scores(patients, METHODS))
    assert {name for name, target, _ in scores if target == "abnormal"} == METHODS.keys()
    for (name, target, measure), values in scores.items():
        oracle = {"dice@5": "oracle", "whole_dice@5": "oracle_whole", "ndcg@10": "oracle"}.get(measure)
        if oracle and (oracle, target, measure) in scores:
            assert (values <= scores[oracle, target, measure] + 1e-6)[~np.isnan(values)].all(), name


def test_a_patient_is_not_among_its_own_hits(query: SliceSet) -> None:
    """Each among the others: no overlap of 1, and of five patients four hits."""
    patients = PatientSearch(Search(query, query, settings()))
    scores = dict(patient_scores(patients, METHODS))
    for name in METHODS.keys() - {"oracle_whole"}:
        assert np.nanmax(scores[name, "abnormal", "whole_dice@1"]) < 1, name
    others = np.where(patients.excluded, np.nan, patients.relevances["normal"]["dice"])
    np.testing.assert_allclose(scores["patient", "normal", "dice@10"], np.nanmean(others, axis=1), rtol=1e-6)


def test_volume_and_centroid(query: SliceSet) -> None:
    stack = Stack(query)
    found = stack.volume_and_centroid(query.label)
    for (radius, *centroid), volume in zip(found, volumes(query, "label")):
        z, y, x = ndimage.center_of_mass(volume > 0)
        np.testing.assert_allclose(centroid, [4 * z, 8 * y, 8 * x], rtol=1e-6)
        assert 4 / 3 * np.pi * radius**3 == pytest.approx((volume > 0).sum() * 4 * 8 * 8)


def test_a_wider_field_has_larger_pixels(query: SliceSet) -> None:
    wide = copy.copy(query.dataset)
    wide.settings = settings(field_mm=512.0)
    found, wider = (Stack(slices).volume_and_centroid(query.label)
                    for slices in (query, dataclasses.replace(query, dataset=wide)))
    np.testing.assert_allclose(wider / found, np.broadcast_to([4 ** (1 / 3), 1, 2, 2], found.shape))


@pytest.mark.filterwarnings("error")
def test_references_without_a_lesion_are_all_as_far(query: SliceSet, reference: SliceSet) -> None:
    nothing = dataclasses.replace(reference, segmentation=np.zeros_like(reference.segmentation))
    distances = METHODS["volume"].builder(PatientSearch(Search(query, nothing, settings())), "abnormal")
    assert np.isfinite(distances).all() and (distances == distances[:, :1]).all()


def test_pictures_without_heights_have_no_patients(query: SliceSet, reference: SliceSet) -> None:
    rows = reference.rows.copy()
    rows["position_mm"] = np.nan
    assert patient_table(Search(query, dataclasses.replace(reference, rows=rows), settings())) == {}
