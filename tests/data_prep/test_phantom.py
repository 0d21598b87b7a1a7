"""Phantom patients: the properties that training and evaluation rely on."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import interpolate, ndimage

from data_prep import phantom
from data_prep.slices import PatientSlices
from decomp_jax.data.schema import ANATOMY_CLASSES
from decomp_jax.preparation.intensity import scale_intensity

Prepare = Callable[[str], PatientSlices]

SIZE = 64
PATIENTS = phantom.patient_ids(12)
prepared = functools.cache(functools.partial(phantom.prepare, seed=3, size=SIZE))
wide = functools.cache(functools.partial(phantom.prepare, seed=3, size=SIZE, domain=phantom.DOMAINS["wide"]))
CONTRASTS = ("flair", "t1ce", "t2", "t1")
in_all_contrasts = functools.cache(functools.partial(phantom.prepare, seed=3, size=SIZE, modalities=CONTRASTS))


def _values(patient: PatientSlices, name: str) -> np.ndarray:
    return getattr(patient, name)[..., 0].astype(np.float32)


def _digest(patient: PatientSlices) -> str:
    arrays = (patient.image, patient.label, patient.slice_index, patient.position_mm, patient.anatomy, patient.healthy)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def _pooled(name: str) -> np.ndarray:
    return np.concatenate([_values(prepared(patient_id), name) for patient_id in PATIENTS])


def _labels(name: str = "label") -> np.ndarray:
    return np.concatenate([getattr(prepared(patient_id), name) for patient_id in PATIENTS])


def test_ids_do_not_depend_on_their_number() -> None:
    assert phantom.patient_ids(5) == phantom.patient_ids(2000)[:5]
    assert len(set(phantom.patient_ids(20000))) == 20000


def test_same_arguments_same_bytes_whatever_was_drawn_before() -> None:
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    again = phantom.prepare(PATIENTS[1], seed=3, size=SIZE)
    assert _digest(again) == _digest(prepared(PATIENTS[1]))
    assert (np.random.get_state()[1] == state).all()


def test_patients_and_seeds_differ() -> None:
    digests = {_digest(prepared(patient_id)) for patient_id in PATIENTS}
    assert len(digests | {_digest(phantom.prepare(PATIENTS[0], seed=4, size=SIZE))}) == len(PATIENTS) + 1


@pytest.mark.parametrize("patient_id", PATIENTS[:4])
def test_shapes_types_and_ranges(patient_id: str) -> None:
    patient, settings = prepared(patient_id), phantom.settings(SIZE)
    n = len(patient.slice_index)
    assert patient.image.shape == patient.healthy.shape == (n, SIZE, SIZE, len(settings.modalities))
    assert patient.label.shape == patient.anatomy.shape == (n, SIZE, SIZE)
    assert patient.image.dtype == patient.healthy.dtype == np.float16
    assert patient.label.dtype == patient.anatomy.dtype == np.uint8
    assert (patient.slice_index.dtype, patient.position_mm.dtype) == (np.int32, np.float32)
    assert patient.image.min() == 0 and 0.5 < patient.image.max() <= 1
    assert patient.label.max() <= len(settings.lesion_classes)
    assert patient.anatomy.max() <= len(settings.anatomy_classes)
    assert (np.diff(patient.slice_index) > 0).all() and (np.diff(patient.position_mm) > 2).all()


@pytest.mark.parametrize("prepare", [prepared, wide, in_all_contrasts])
@pytest.mark.parametrize("patient_id", PATIENTS)
def test_twin_is_the_image_outside_the_lesion_alone(patient_id: str, prepare: Prepare) -> None:
    patient = prepare(patient_id)
    assert patient.label.any()
    same = patient.image == patient.healthy
    assert same[patient.label == 0].all()
    assert (same[patient.label > 0].mean(0) < 0.1).all()


@pytest.mark.parametrize("domain", phantom.DOMAINS.values(), ids=phantom.DOMAINS)
def test_a_contrast_is_the_same_whatever_others_are_painted(domain: phantom.Domain) -> None:
    several = phantom.prepare(PATIENTS[1], seed=3, size=SIZE, domain=domain, modalities=CONTRASTS[:2])
    assert several.image.shape == several.healthy.shape == (*several.label.shape, 2)
    for channel, name in enumerate(CONTRASTS[:2]):
        alone = phantom.prepare(PATIENTS[1], seed=3, size=SIZE, domain=domain, modalities=(name,))
        for field in ("image", "healthy"):
            np.testing.assert_array_equal(getattr(several, field)[..., [channel]], getattr(alone, field))
        np.testing.assert_array_equal(several.label, alone.label)
        np.testing.assert_array_equal(several.slice_index, alone.slice_index)


def test_contrasts_look_as_they_should() -> None:
    """By classes, and by tissues: fluid as the ventricles show it, white matter as T1ce does."""
    patients = [in_all_contrasts(patient_id) for patient_id in PATIENTS[:6]]
    image, healthy, label, anatomy = (
        np.concatenate([getattr(p, name) for p in patients]) for name in ("image", "healthy", "label", "anatomy")
    )
    image, healthy = (
        dict(zip(CONTRASTS, np.moveaxis(values.astype(np.float32), -1, 0))) for values in (image, healthy)
    )
    cerebrum, tissue = np.isin(anatomy, phantom.CEREBRUM), healthy["t1ce"]
    low, high = np.percentile(tissue[cerebrum], (35, 80))
    grey, white = (cerebrum & (np.abs(tissue - level) < 0.02) for level in (low, high))
    fluid = np.isin(anatomy, phantom.VENTRICLES) & (tissue < np.percentile(tissue[cerebrum], 5))
    necrosis, oedema, enhancing = (label == k for k in (phantom.NCR, phantom.ED, phantom.ET))

    def change(name: str, mask: np.ndarray) -> float:
        return image[name][mask].mean() - healthy[name][mask].mean()

    mean = {name: [healthy[name][mask].mean() for mask in (fluid, grey, white)] for name in CONTRASTS}
    assert mean["t1"][0] < mean["t1"][1] < mean["t1"][2]
    assert mean["t2"][0] > mean["t2"][1] > mean["t2"][2]
    assert mean["flair"][0] < mean["flair"][2] < mean["flair"][1]
    assert change("t1ce", enhancing) > 0.15 and change("t1", enhancing) < 0  # no contrast agent: nothing enhances
    assert np.percentile(healthy["t1"][cerebrum], 99.5) < np.percentile(healthy["t1ce"][cerebrum], 99.5)
    assert change("flair", oedema) > 3 * abs(change("t1ce", oedema)) and change("t2", oedema) > 0.1
    brightest = np.percentile(healthy["flair"][cerebrum], 99), image["flair"][enhancing].mean()
    assert image["flair"][oedema].mean() > max(brightest)
    assert change("t1", necrosis) < 0 < change("t2", necrosis)


def test_background_is_empty_and_labels_lie_in_the_brain() -> None:
    image, label, anatomy = _pooled("image"), _labels(), _labels("anatomy")
    edge = np.ones((SIZE, SIZE), bool)
    edge[2:-2, 2:-2] = False
    assert (image[:, edge] == 0).all()
    assert (_pooled("healthy")[label > 0] > 0).mean() > 0.99
    assert (image[anatomy > 0] > 0).mean() > 0.99
    assert (anatomy[image > 0] > 0).mean() > 0.85  # the rest: brain stem, third and fourth ventricle, cisterns, rim


def test_lesion_share() -> None:
    has_lesion = _labels().any(axis=(1, 2))
    assert abs(has_lesion.mean() - phantom.DOMAINS["plain"].lesion_share) < 0.05
    assert 10 * len(PATIENTS) < len(has_lesion) < 38 * len(PATIENTS)


def test_the_wide_domain_has_slices_of_every_amount_of_brain_and_half_of_them_without_a_lesion() -> None:
    areas, shares = zip(*((p.anatomy.astype(bool).sum((1, 2)), p.label.any((1, 2)).mean()) for p in map(wide, PATIENTS)))
    least = min(np.count_nonzero(area) for slices in map(prepared, PATIENTS) for area in slices.anatomy)
    assert min(map(np.min, areas)) < least / 2 and abs(np.mean(shares) - 0.5) < 0.1


def test_vessels_and_sinuses_of_the_wide_domain_differ_more_between_patients() -> None:
    def spread(prepare: Prepare) -> float:
        images = [_values(prepare(patient_id), "image") for patient_id in PATIENTS]
        return np.std([np.percentile(image[image > 0], 97) for image in images])

    assert spread(wide) > 1.3 * spread(prepared)


def test_the_wide_domain_leaves_bright_remains_beside_the_brain() -> None:
    """Which are no lesion, nor of any region."""

    def brightest(prepare: Prepare) -> float:
        beside = [_values(p, "image")[(p.anatomy == 0) & (p.label == 0) & (p.image[..., 0] > 0)] for p in map(prepare, PATIENTS)]
        return (np.concatenate(beside) > 0.7).mean()

    assert brightest(wide) > 3 * brightest(prepared)


def test_lesion_free_slices_come_from_every_height() -> None:
    heights = np.concatenate([prepared(i).position_mm[~prepared(i).label.any(axis=(1, 2))] for i in PATIENTS])
    assert heights.min() < -30 and heights.max() > 50
    assert np.histogram(heights, bins=(-60, -20, 20, 80))[0].min() > 0


def test_right_is_on_the_left_of_the_picture_and_the_front_on_top() -> None:
    anatomy = _labels("anatomy")
    row, column = (np.broadcast_to(index, anatomy.shape) for index in np.ogrid[:SIZE, :SIZE])

    def mean(index: np.ndarray, name: str) -> float:
        return index[anatomy == 1 + ANATOMY_CLASSES.index(name)].mean()

    for region in ("cerebrum", "cerebellum", "ventricle"):
        assert mean(column, f"right {region}") < SIZE / 2 - 2 and mean(column, f"left {region}") > SIZE / 2 + 1
    assert mean(row, "left cerebellum") > mean(row, "left cerebrum") + 5


def test_slices_of_equal_height_show_the_same_anatomy() -> None:
    """Nearest by height, another patient's slice agrees better in anatomy than one a centimetre off."""

    def agreement(a: PatientSlices, b: PatientSlices, offset: float) -> float:
        gap = np.abs(a.position_mm[:, None] + offset - b.position_mm)
        i, j = np.flatnonzero(gap.min(axis=1) < 2.5), gap.argmin(axis=1)
        brain = (a.anatomy[i] > 0) | (b.anatomy[j[i]] > 0)
        return (a.anatomy[i] == b.anatomy[j[i]])[brain].mean()

    pairs = [(prepared(a), prepared(b)) for a in PATIENTS for b in PATIENTS if a != b]
    matched, *shifted = (np.mean([agreement(a, b, offset) for a, b in pairs]) for offset in (0, -10, 10))
    assert matched > max(shifted) + 0.03


def test_classes_look_as_they_should() -> None:
    image, healthy, label = _pooled("image"), _pooled("healthy"), _labels()
    necrosis, oedema, enhancing = (label == k for k in (phantom.NCR, phantom.ED, phantom.ET))
    assert min(np.count_nonzero(mask) for mask in (necrosis, oedema, enhancing)) > 500
    assert image[enhancing].mean() > healthy[enhancing].mean() + 0.15
    assert image[necrosis].mean() < healthy[necrosis].mean() - 0.03
    assert image[oedema].mean() < healthy[oedema].mean() - 0.03
    assert healthy[oedema].mean() > np.median(healthy[healthy > 0])  # white matter


def test_ring_encloses_necrosis_and_oedema_lies_outside() -> None:
    """At 1 mm, over patients whose tumour enhances: what touches necrosis from outside is mostly the ring."""
    shares = []
    for patient_id in PATIENTS[:5]:
        label = phantom.prepare(patient_id, seed=3, size=256).label
        necrosis = label == phantom.NCR
        if np.count_nonzero(label == phantom.ET) < 0.2 * np.count_nonzero(necrosis):
            continue  # a tumour that does not enhance
        rim = ndimage.binary_dilation(necrosis, np.ones((1, 3, 3))) & ~necrosis
        shares.append((label[rim] == phantom.ET).mean())
    assert len(shares) >= 3
    assert np.mean(shares) > 0.7


def test_a_patient_is_the_same_at_every_size() -> None:
    small, large = prepared(PATIENTS[2]), phantom.prepare(PATIENTS[2], seed=3, size=128)
    assert np.isin(small.slice_index, large.slice_index).mean() > 0.9
    shared = np.intersect1d(small.slice_index, large.slice_index)
    a, b = (_values(patient, "image")[np.isin(patient.slice_index, shared)] for patient in (small, large))
    halved = b.reshape(len(shared), SIZE, 2, SIZE, 2).mean(axis=(2, 4))
    assert np.corrcoef(a.ravel(), halved.ravel())[0, 1] > 0.97
    volumes = [np.count_nonzero(p.label) / p.label[0].size for p in (small, large)]
    assert abs(volumes[0] / volumes[1] - 1) < 0.1


def test_intensities_are_those_of_scans() -> None:
    rng = np.random.default_rng(0)
    brain = rng.random((3, 8, 8)) < 0.6
    image = (rng.gamma(2, 30, brain.shape) * brain).astype(np.float32)
    ours, twin = phantom._scaled(image, image + 5 * brain, brain)
    theirs = scale_intensity(Path("scan"), image, brain, phantom.settings(SIZE))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    inside = brain & (twin < 1) & (ours > 0)
    shift = 5 / image[brain].std() / 8
    np.testing.assert_allclose((twin - ours)[inside], shift, rtol=1e-4)


def test_spline_matches_scipy() -> None:
    coefficients = np.random.default_rng(0).normal(size=12).astype(np.float32)
    positions = np.linspace(0, 8.9, 50, dtype=np.float32)
    expected = interpolate.BSpline(np.arange(-3, 13), coefficients, 3)(positions)
    np.testing.assert_allclose(phantom._spline(coefficients, positions, axis=-1), expected, atol=1e-5)


def test_noise_has_unit_variance_and_does_not_depend_on_the_grid() -> None:
    fine, coarse = (phantom.Grid(spacing).noise(np.random.default_rng(1), 12, 3) for spacing in (1, 4))
    assert fine.shape == (3, 38, 208, 160)
    assert abs(fine.mean()) < 0.1 and abs(fine.std() - 1) < 0.1
    means = np.stack([phantom.Grid(1).coarse(part) for part in fine])
    assert np.corrcoef(means.ravel(), coarse.ravel())[0, 1] > 0.995


def test_refining_keeps_linear_fields() -> None:
    grid = phantom.Grid(2)
    np.testing.assert_allclose(grid.fine(phantom.ISOTROPIC.points), grid.points, atol=1e-3)
