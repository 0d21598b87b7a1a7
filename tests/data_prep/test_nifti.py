import functools
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tests.data_prep.conftest import LPS, SHAPE, damage, labels, save, save_patient, volume
from skimage.measure import block_reduce
from skimage.transform import resize

from data_prep.brats import brats_cases
from data_prep.cases import prepare_case
from data_prep.slices import PatientSlices
from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation.field import field_mean, field_nearest
from decomp_jax.preparation.releases import find_patients
from decomp_jax.preparation.scan import open_scan


def prepare(src: Path, size: int = 256, modalities: tuple[str, ...] = ("t1ce",), **options) -> PatientSlices:
    cases = brats_cases(find_patients(src), {})
    return prepare_case(
        next(iter(cases)),
        cases=cases,
        settings=Settings("brats", size, modalities=modalities),
        **{"unlabelled": False, "anatomy": None, "masks": None, **options},
    )


def axial_by_hand(data: np.ndarray) -> np.ndarray:
    """Left-posterior-superior voxels as [slice,row,column]: x falls to the right of the patient, y to the front."""
    return np.stack([data[:, :, z].T for z in range(1, data.shape[2])])


def test_a_volume_of_240_is_padded_and_nothing_is_resampled(tmp_path):
    data = volume(shape=(240, 240, 4))
    affine = LPS.copy()
    affine[1, 3] = 239
    save(tmp_path / "P_t1ce.nii.gz", data, affine)
    save(tmp_path / "P_seg.nii.gz", labels(shape=data.shape), affine)
    patient = prepare(tmp_path)

    brain = data[data != 0].astype(np.float64)
    z_scores = np.clip((data - brain.mean()) / brain.std(), -3, 5)
    expected = np.where(data != 0, (z_scores + 3) / 8, 0)
    expected = np.pad(axial_by_hand(expected), ((0, 0), (8, 8), (8, 8)))
    np.testing.assert_allclose(patient.image[..., 0], expected, atol=5e-4)  # float16
    classes = np.array([0, 1, 2, 0, 3])[labels(shape=data.shape)]
    expected_label = np.pad(axial_by_hand(classes), ((0, 0), (8, 8), (8, 8)))
    np.testing.assert_array_equal(patient.label, expected_label)
    np.testing.assert_array_equal(patient.slice_index, [1, 2, 3])
    np.testing.assert_array_equal(patient.position_mm, [1, 2, 3])
    assert patient.image.dtype == np.float16 and patient.label.dtype == np.uint8


def test_smaller_sizes_are_means_of_blocks_and_labels_nearest(tmp_path):
    src = save_patient(tmp_path, "P")
    large, small = prepare(src), prepare(src, size=64)
    means = block_reduce(large.image[..., 0].astype(np.float32), (1, 4, 4), np.mean)
    np.testing.assert_allclose(small.image[..., 0], means, atol=1e-3)
    np.testing.assert_array_equal(small.label, large.label[:, 2::4, 2::4])


def test_wide_voxels_are_interpolated_linearly():
    image = np.random.default_rng(0).random((2, 64, 64)).astype(np.float32)
    expected = np.stack([resize(layer, (128, 128), order=1, mode="edge", anti_aliasing=False) for layer in image])
    result = field_mean(image, (2.0, 2.0), 256)[:, 64:192, 64:192]
    np.testing.assert_allclose(result[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], atol=1e-5)


@pytest.mark.parametrize("shape, spacing", [((182, 218), 1.0), ((197, 233), 1.0), ((300, 270), 0.9), ((91, 109), 2.0)])
def test_any_grid_keeps_its_mean_and_labels_stay_aligned(shape, spacing):
    image = np.zeros((1, *shape), np.float32)
    image[:, 40:70, 30:60] = 1
    result, label = field_mean(image, (spacing, spacing), 128), field_nearest(image, (spacing, spacing), 128)
    assert result.sum() * 4 == pytest.approx(image.sum() * spacing**2, rel=1e-3)
    np.testing.assert_array_equal(result[(result == 0) | (result > 0.99)] > 0.5, label[(result == 0) | (result > 0.99)])


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAL", "ARI"])
def test_orientation_on_disk_does_not_matter(tmp_path, axes):
    expected = prepare(save_patient(tmp_path / "as_is", "P"), size=64)
    for path in save_patient(tmp_path / "turned", "P").iterdir():
        image = nib.load(path)
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(axes))
        )
        nib.save(image.as_reoriented(turn), path)
        assert "".join(nib.aff2axcodes(nib.load(path).affine)) == axes
    turned = prepare(tmp_path / "turned", size=64)
    for name in ("image", "label", "slice_index", "position_mm"):
        np.testing.assert_array_equal(getattr(turned, name), getattr(expected, name))


def test_rows_run_from_the_front_and_columns_from_the_right(tmp_path):
    data = volume()
    front_right = (slice(10, 14), slice(10, 14), 3)  # of an image whose axes run to the left and to the back
    data[front_right] = 30000
    save(save_patient(tmp_path, "P") / "P_t1ce.nii.gz", data)
    image = prepare(tmp_path).image[2, ..., 0]
    rows, columns = np.nonzero(image == 1)
    assert rows.max() < 128 and columns.max() < 128


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32, np.float64])
def test_data_type_does_not_matter(tmp_path, dtype):
    expected = prepare(save_patient(tmp_path / "int16", "P"), size=64)
    src = save_patient(tmp_path / "other", "P")
    save(src / "P_t1ce.nii.gz", volume().astype(dtype))
    save(src / "P_seg.nii.gz", labels().astype(dtype))
    np.testing.assert_array_equal(prepare(src, size=64).image, expected.image)
    np.testing.assert_array_equal(prepare(src, size=64).label, expected.label)


def test_negative_intensities_are_brain_and_residue_is_not(tmp_path):
    data = volume().astype(np.float32)
    brain = data != 0
    data[brain] -= 400.5
    src = save_patient(tmp_path, "P")
    expected = prepare(src, size=64)
    data[~brain] = np.random.default_rng(1).normal(0, 1e-4, (~brain).sum())
    save(src / "P_t1ce.nii.gz", data)
    np.testing.assert_allclose(prepare(src, size=64).image, expected.image, atol=1e-3)
    np.testing.assert_array_equal(prepare(src, size=64).slice_index, expected.slice_index)


def test_several_modalities_are_channels(tmp_path):
    src = save_patient(tmp_path, "P")
    save(src / "P_flair.nii.gz", volume(seed=7))
    both = prepare(src, size=64, modalities=("flair", "t1ce"))
    np.testing.assert_array_equal(both.image[..., 1], prepare(src, size=64).image[..., 0])
    with pytest.raises(UserError, match="has no t2 file"):
        prepare(src, modalities=("t2",))
    save(src / "P_t1.nii.gz", volume(shape=(40, 40, 5)))
    with pytest.raises(UserError, match="P_t1.nii.gz.*shape"):
        prepare(src, modalities=("t1ce", "t1"))


def test_patients_without_a_segmentation_need_the_flag(tmp_path):
    src = save_patient(tmp_path, "P")
    (src / "P_seg.nii.gz").unlink()
    with pytest.raises(UserError, match="P has no segmentation.*--unlabelled"):
        prepare(src)
    patient = prepare(src, unlabelled=True)
    assert not patient.labelled.any() and not patient.label.any()


def resave(path: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray = LPS) -> None:
    save(path, change(np.asarray(nib.load(path).dataobj)), affine)


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        data = data.astype(np.float32)
        data[20, 20, 3] = value
        return data

    return change


def moved(millimetres: float) -> np.ndarray:
    affine = LPS.copy()
    affine[0, 3] += millimetres
    return affine


def without_orientation(path: Path) -> None:
    image = nib.load(path)
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    nib.save(image, path)


def tilted(path: Path) -> None:
    c, s = np.cos(0.3), np.sin(0.3)
    resave(path, lambda data: data, np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))


def contradicting(path: Path, affine: np.ndarray = np.eye(4)) -> None:
    """The affine that is used, the sform, names other axes, or other widths, than the qform."""
    image = nib.load(path)
    image.set_qform(image.affine, code=1)
    image.set_sform(affine, code=2)
    nib.save(image, path)


def in_noise(zeros: float, path: Path) -> None:
    """A head with its skull, in air of which a share is exactly 0."""
    data = np.random.default_rng(0).rayleigh(8, (40, 40, 40))
    data[np.random.default_rng(1).random(data.shape) < zeros] = 0
    data[8:32, 8:32, 4:] += 400
    save(path, data.astype(np.int16))


BROKEN_IMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-200]), "gzip"),
    "empty": (lambda path: path.write_bytes(b""), "no NIfTI"),
    "not gzip": (lambda path: path.write_bytes(gzip.decompress(path.read_bytes())[2:]), "no gzip"),
    "gzip of a part": (
        lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-5000])), "truncated"
    ),
    "flipped byte": (damage, "CRC"),
    "text": (lambda path: path.write_bytes(gzip.compress(b"not found " * 100)), "no NIfTI"),
    "NaN": (functools.partial(resave, change=with_value(np.nan)), "NaN"),
    "infinity": (functools.partial(resave, change=with_value(np.inf)), "infinite"),
    "all zero": (functools.partial(resave, change=np.zeros_like), "every voxel is 0"),
    "constant": (functools.partial(resave, change=lambda data: (data != 0).astype(np.int16)), "same value"),
    "4-D": (functools.partial(resave, change=lambda data: np.stack([data, data], -1)), "three dimensions"),
    "not stripped": (functools.partial(resave, change=lambda data: data + 5), "no background"),
    "not stripped, a quarter of the air 0": (functools.partial(in_noise, 0.25), "no background"),
    "not stripped, half of the air 0": (functools.partial(in_noise, 0.5), "no background"),
    "sform against qform": (contradicting, r"sform \(RAS\) and qform \(LPS\) contradict"),
    "widths of sform against qform": (functools.partial(contradicting, affine=LPS * 2), "contradict"),
    "complex": (functools.partial(resave, change=lambda data: data.astype(np.complex64)), "complex64"),
    "no orientation": (without_orientation, "names no orientation"),
    "tilted": (tilted, "degrees off"),
    "metres": (functools.partial(resave, change=lambda d: d, affine=np.diag([1e-3, 1e-3, 1e-3, 1])), "can't be mm"),
}
BROKEN_SEGMENTATIONS = {
    "flipped byte": (damage, "CRC"),
    "other shape": (functools.partial(resave, change=lambda data: data[:, :, :-1]), "has shape"),
    "other affine": (functools.partial(resave, change=lambda data: data, affine=moved(3)), "affine disagrees"),
    "other orientation": (functools.partial(resave, change=lambda data: data, affine=np.eye(4)), "affine disagrees"),
    "sform against qform": (contradicting, r"sform \(RAS\) and qform \(LPS\) contradict"),
    "unknown": (functools.partial(resave, change=with_value(7)), "label 7"),
    "of 2023": (functools.partial(resave, change=with_value(3)), "label 3"),
    "negative": (functools.partial(resave, change=with_value(-1)), "label -1"),
    "fractional": (functools.partial(resave, change=with_value(1.5)), "label 1.5"),
    "NaN": (functools.partial(resave, change=with_value(np.nan)), "NaN"),
}


@pytest.mark.parametrize(
    "file, kind", [("t1ce", kind) for kind in BROKEN_IMAGES] + [("seg", kind) for kind in BROKEN_SEGMENTATIONS]
)
def test_broken_files_are_refused_by_name(tmp_path, file, kind):
    path = save_patient(tmp_path, "P") / f"P_{file}.nii.gz"
    spoil, reason = (BROKEN_IMAGES if file == "t1ce" else BROKEN_SEGMENTATIONS)[kind]
    spoil(path)
    with pytest.raises(UserError, match=f"{path.name}: .*{reason}.*; "):
        prepare(tmp_path)


def test_a_template_s_sform_beside_the_scanner_s_qform_is_no_contradiction(tmp_path):
    path = save_patient(tmp_path, "P") / "P_t1ce.nii.gz"
    expected = prepare(tmp_path, size=32)
    image = nib.load(path)
    image.set_qform(nib.affines.from_matvec(LPS[:3, :3] * 1.05, (3, 9, 27)), code=1)
    nib.save(image, path)
    np.testing.assert_array_equal(prepare(tmp_path, size=32).image, expected.image)


def test_bytes_say_whether_a_volume_is_compressed(tmp_path):
    src = save_patient(tmp_path / "a", "P")
    expected = prepare(src, size=32)
    plain, packed = src / "P_t1ce.nii.gz", src / "P_seg.nii"
    plain.write_bytes(gzip.decompress(plain.read_bytes()))
    (src / "P_seg.nii.gz").rename(packed)
    found = prepare(src, size=32)
    np.testing.assert_array_equal(found.image, expected.image)
    np.testing.assert_array_equal(found.label, expected.label)


def test_a_fourth_axis_of_one_volume_is_none(tmp_path):
    src = save_patient(tmp_path, "P")
    expected = prepare(src, size=32)
    for kind in ("t1ce", "seg"):
        resave(src / f"P_{kind}.nii.gz", lambda data: data[..., None])
    np.testing.assert_array_equal(prepare(src, size=32).label, expected.label)


def test_a_brain_beyond_the_field_is_refused(tmp_path):
    data = np.zeros((300, 40, 3), np.int16)
    data[10:290, 10:30] = np.random.default_rng(0).integers(1, 99, (280, 20, 3))
    save(tmp_path / "P_t1ce.nii.gz", data)
    with pytest.raises(UserError, match="beyond 256 mm"):
        prepare(tmp_path, unlabelled=True)


def test_an_uncompressed_volume_that_ends_early_is_refused(tmp_path):
    path = save_patient(tmp_path, "P", suffix=".nii") / "P_t1ce.nii"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="P_t1ce.nii: is truncated"):
        prepare(tmp_path)


def test_a_scan_to_query_with_is_prepared_as_the_records(tmp_path):
    src = save_patient(tmp_path, "P")
    save(src / "P_t2.nii.gz", volume(seed=3))
    settings = Settings("brats", 64, modalities=("t1ce", "t2"))
    expected = prepare(src, size=64, modalities=settings.modalities)
    path = src / "P_t1ce.nii.gz"
    np.testing.assert_array_equal(open_scan(path, settings).shown(3), expected.image[2])
    other = shutil.copy(path, tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(open_scan(other, Settings("phantom", 64)).shown(3), expected.image[2, ..., :1])
    with pytest.raises(UserError, match="P_t1ce.nii.gz: slice 0 shows nothing; take one from 1 to 5"):
        open_scan(path, settings).shown(0)
    with pytest.raises(UserError, match="name the files as BraTS does"):
        open_scan(other, settings).shown(3)
    folder = tmp_path / "by name"
    for name in settings.modalities:
        save(folder / f"{name}.nii.gz", np.asarray(nib.load(src / f"P_{name}.nii.gz").dataobj))
    np.testing.assert_array_equal(open_scan(folder, settings).shown(3), expected.image[2])
    (folder / "t2.nii.gz").unlink()
    lacking = open_scan(folder, settings)
    assert lacking.settings.modalities == ("t1ce",)
    completed = lacking.with_modalities(settings.modalities).shown(3)
    np.testing.assert_array_equal(completed, expected.image[2] * np.array([1, 0], np.float16))
    (src / "P_t1ce.nii.gz").unlink()
    assert open_scan(src / "P_t2.nii.gz", settings).settings.modalities == ("t2",)
    (folder / "t1ce.nii.gz").unlink()
    with pytest.raises(UserError, match="by name: holds neither t1ce.nii.gz nor a folder t1ce"):
        open_scan(folder, settings)
    with pytest.raises(UserError, match="trained on pictures"):
        open_scan(path, Settings("images", 64, foreground="bright")).shown(3)
    assert SHAPE[2] == len(expected.image) + 1
