from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tests.data_prep.conftest import LPS, SHAPE, manifest, prepare, records, save, volume

from data_prep.anatomy import AnatomySource, maps_of_nobody, six_regions
from decomp_jax.data.schema import ANATOMY_CLASSES
from decomp_jax.errors import UserError

BRAIN = volume() != 0
LIKE = nib.Nifti1Image(volume(), LPS)
PATH = Path("atlas.nii.gz")


def halves(left: int, right: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Ids left and right of the middle; the first axis of LPS volumes runs to the patient's left."""
    data = np.zeros(shape, np.uint16)
    data[shape[0] // 2 :], data[: shape[0] // 2] = left, right
    return data


def regions(ids: np.ndarray, scheme: str, affine: np.ndarray = LPS) -> np.ndarray:
    return six_regions(PATH, nib.Nifti1Image(ids, affine), scheme, LIKE, BRAIN)


def test_ids_become_regions_inside_the_brain():
    np.testing.assert_array_equal(regions(halves(1, 2), "six"), halves(1, 2) * BRAIN)
    np.testing.assert_array_equal(regions(halves(2, 41), "freesurfer"), halves(1, 2) * BRAIN)


@pytest.mark.parametrize("ids, region", [
    ((3, 10, 17, 1035, 3001), "left cerebrum"), ((42, 49, 53, 2035, 4001), "right cerebrum"),
    ((7, 8), "left cerebellum"), ((46, 47), "right cerebellum"),
    ((4, 5, 31), "left ventricle"), ((43, 44, 63), "right ventricle"),
])
def test_freesurfer_ids(ids, region):
    for value in ids:
        assert set(regions(halves(value, value), "freesurfer")[BRAIN]) == {1 + ANATOMY_CLASSES.index(region)}


def test_uncovered_brain_takes_the_nearest_and_other_brain_stays_empty():
    ids = halves(1, 2)
    ids[15:25, 18:22, 3] = 0  # a hole across the middle
    ids[12:14] = 7
    ids[14, :, 2] = 8
    result = regions(ids, "six")
    np.testing.assert_array_equal(result[15:25, 18:22, 3], halves(1, 2)[15:25, 18:22, 3])
    assert not result[12:14].any() and not result[14, :, 2].any()
    stem = halves(2, 41)
    stem[12:14], stem[15:17, :, 3] = 16, 85  # brain stem; optic chiasm, which has no side
    result = regions(stem, "freesurfer")
    assert not result[12:14].any() and (result[15:17, :, 3][BRAIN[15:17, :, 3]] == 2).all()


def test_another_grid_is_resampled_by_affine():
    coarse = np.array([[2.0, 0, 0, -48.5], [0, 2, 0, -9.5], [0, 0, 2, -4.5], [0, 0, 0, 1]])  # right, anterior, superior
    ids = np.zeros((30, 30, 8), np.uint8)
    ids[:15], ids[15:] = 1, 2  # the border lies at x = -19.5 mm
    np.testing.assert_array_equal(regions(ids, "six", coarse), halves(1, 2) * BRAIN)


@pytest.mark.parametrize("ids, scheme, reason", [
    (halves(2, 41), "six", "id 41"),
    (halves(2, 999), "freesurfer", "id 999"),
    (halves(1, 2) + 0.5, "six", "id 1.5"),
    (halves(0, 0), "six", "covers 0%"),
    (halves(7, 8), "six", "covers 100%"),
])
def test_maps_that_cannot_be_right_are_refused(ids, scheme, reason):
    with pytest.raises(UserError, match=f"atlas.nii.gz: .*{reason}"):
        regions(ids, scheme)


def test_a_map_in_another_space_is_refused():
    elsewhere = LPS.copy()
    elsewhere[0, 3] = 28
    with pytest.raises(UserError, match="covers .* of the brain"):
        regions(halves(1, 2), "six", elsewhere)


def test_a_folder_holds_one_map_a_patient(tmp_path):
    source = AnatomySource(tmp_path, "six")
    one = save(tmp_path / "P1.nii.gz", halves(1, 2))
    two = save(tmp_path / "P2_synthseg.nii.gz", halves(1, 2))
    ten = save(tmp_path / "P10" / "labels.nii.gz", halves(1, 2))
    assert [source.file(name) for name in ("P1", "P2", "P10")] == [one, two, ten]
    for ghost in ("P10/._labels.nii.gz", "._P1.nii.gz"):  # of macOS
        (tmp_path / ghost).write_bytes(b"\0\5\x16\7")
    assert [source.file(name) for name in ("P1", "P10")] == [one, ten]
    assert maps_of_nobody(tmp_path, ["P1", "P2", "P10"]) == []
    with pytest.raises(UserError, match="holds 0 label maps of P3"):
        source.file("P3")
    save(tmp_path / "P2_other.nii.gz", halves(1, 2))
    with pytest.raises(UserError, match="holds 2 label maps of P2"):
        source.file("P2")


def test_maps_of_no_patient_are_named(tmp_path, brats, capsys):
    patients = sorted(path.name for path in brats.iterdir())
    ours = [f"{patients[0]}.nii.gz", f"{patients[1]}-aseg.nii", f"{patients[2]}/any.nii.gz"]
    ours += [f"{name}_a.b.nii" for name in patients[3:]]
    others = ["P5.nii.gz", f"{patients[0]}1.nii.gz", f"x_{patients[0]}.nii.gz", f"{patients[1]}/deeper/any.nii.gz"]
    for name in ours + others:
        save(tmp_path / "maps" / name, halves(1, 2))
    prepare("brats", "--src", brats, "--out", tmp_path / "out", "--size", 64, "--anatomy", tmp_path / "maps",
            "--anatomy_scheme", "six")
    told = f"--anatomy {tmp_path / 'maps'}: 4 files are of no patient, first {patients[0]}1.nii.gz"
    assert told in capsys.readouterr().err
    assert manifest(tmp_path / "out")["source"]["left_out_anatomy"] == [
        str(path) for path in sorted(map(Path, others))]


def test_records_hold_the_regions(tmp_path, brats):
    atlas = save(tmp_path / "atlas.nii.gz", halves(1, 2))
    prepare("brats", "--src", brats, "--out", tmp_path / "out", "--size", 64, "--anatomy", atlas,
            "--anatomy_scheme", "six")
    assert manifest(tmp_path / "out")["settings"]["anatomy_classes"] == list(ANATOMY_CLASSES)
    anatomy = records(tmp_path / "out", "train")[0]["anatomy"]
    assert set(anatomy[:, :32].flat) == {0, 2} and set(anatomy[:, 32:].flat) == {0, 1}  # left is on the right
    with pytest.raises(UserError, match="go together"):
        prepare("brats", "--src", brats, "--out", tmp_path / "again", "--anatomy", atlas)
    with pytest.raises(UserError, match="--anatomy .* does not exist"):
        prepare("brats", "--src", brats, "--out", tmp_path / "again", "--anatomy", "no", "--anatomy_scheme", "six")
