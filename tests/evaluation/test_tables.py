"""Tables against independent values."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from decomp_jax.evaluation.rankers import Search
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.evaluation.tables import (
    Summary, abnormality_table, code_use, mixed_queries, mixed_table, segmentation_summary, strata,
)
from decomp_jax.retrieval.statistics import Bootstrap
from tests.evaluation.fakes import settings


def test_a_summary_nests_by_name_and_leaves_out_what_was_never_asked() -> None:
    bootstrap = Bootstrap.draw(np.array(["a", "a", "b"]))
    summary = Summary.average({("x", "p"): np.array([1.0, 3.0, 4.0]), ("x", "q"): np.full(3, np.nan)}, bootstrap)
    assert summary.nested()["x"]["p"].mean == 3
    assert list(summary.nested()["x"]) == ["p"]


def test_comparison_of_a_measure_with_twice_itself_is_certain() -> None:
    values = np.random.default_rng(0).random(40)
    bootstrap = Bootstrap.draw(np.arange(40) // 4)
    compared = Summary.average({("a",): values, ("b",): 2 * values}, bootstrap).compare(("b",), ("a",))
    np.testing.assert_allclose(compared["ratio"], 2)
    assert compared["difference"].mean == pytest.approx(values.mean())


def test_segmentation_dice_is_that_of_the_patients_volumes(query: SliceSet) -> None:
    rng = np.random.default_rng(0)
    noise = rng.random(query.label.shape) < 0.1
    noisy = dataclasses.replace(query, segmentation=np.where(noise, rng.integers(0, 3, noise.shape), query.label))
    table = segmentation_summary(noisy, settings().lesion_classes).nested()
    patients = np.unique(query.rows["patient_id"])
    for label, name in enumerate(settings().lesion_classes, start=1):
        expected = [
            f1_score((query.label == label)[of].ravel(), (noisy.segmentation == label)[of].ravel())
            for of in (query.rows["patient_id"] == patient for patient in patients)
            if (query.label[of] == label).any()
        ]
        assert table["dice"][name].mean == pytest.approx(np.mean(expected))


def test_auroc_of_the_abnormality_score(query: SliceSet) -> None:
    noisy = dataclasses.replace(query, abnormality=query.abnormality + np.random.default_rng(0).normal(size=len(query)))
    assert abnormality_table(noisy)["auroc"].mean == pytest.approx(roc_auc_score(query.lesion, noisy.abnormality))
    probable = roc_auc_score(query.lesion, noisy.lesion_probability)
    assert abnormality_table(noisy)["auroc of lesion probability"].mean == pytest.approx(probable) == 1
    assert abnormality_table(dataclasses.replace(query, label=np.ones_like(query.label))) == {}


def test_use_of_a_codebook() -> None:
    use = code_use(np.repeat([0, 1], 4).reshape(2, 2, 2), size=4)
    assert use == {"used": 2, "perplexity": pytest.approx(2), "most common": 0.5}


def test_mixed_queries_are_of_two_patients_and_lie_between_the_codes(query: SliceSet, reference: SliceSet) -> None:
    mixed = mixed_queries(Search(query, reference, settings()))
    of_a, of_b = query.rows["patient_id"][mixed.pairs].T
    assert (of_a != of_b).all()
    np.testing.assert_array_equal(mixed.pairs[:, 0], np.flatnonzero(query.lesion))
    assert query.lesion[mixed.pairs].all()
    table = mixed_table(mixed, query)
    for target, pure, other in (
        ("anatomy of A", "normal code of A", "abnormal code of B"),
        ("lesion of B", "abnormal code of B", "normal code of A"),
    ):
        assert table[other][target]["dice@5"].mean < table["mixed"][target]["dice@5"].mean
        assert table["mixed vs pure"][target]["ratio"].mean == pytest.approx(
            table["mixed"][target]["dice@5"].mean / table[pure][target]["dice@5"].mean
        )
    for target, half in (("anatomy of A", "oracle of A"), ("lesion of B", "oracle of B")):
        best, kept = table[half][target]["dice@5"].mean, table["oracle vs pure"][target]["ratio"].mean
        assert all(table[method][target]["dice@5"].mean <= best + 1e-6 for method in ("mixed", "oracle of both"))
        assert kept == pytest.approx(table["oracle of both"][target]["dice@5"].mean / best)


def test_without_labels_among_the_references_nothing_is_mixed(query: SliceSet, reference: SliceSet) -> None:
    rows = reference.rows.copy()
    rows["labelled"] = False
    archive = dataclasses.replace(reference, rows=rows, label=np.zeros_like(reference.label))
    assert mixed_queries(Search(query, archive, settings())) is None


def test_thirds_that_hold_no_slice_are_left_out(query: SliceSet) -> None:
    rows = query.rows.copy()
    rows["position_mm"] = np.arange(len(rows)) % 2
    scores = {("normal", "normal", "dice@5"): np.random.default_rng(0).random(len(rows))}
    table = strata(scores, dataclasses.replace(query, rows=rows), Bootstrap.draw(rows["patient_id"]))
    assert [third["from_to"] for third in table["slice height"].values()] == [[0, 0], [1, 1]]
