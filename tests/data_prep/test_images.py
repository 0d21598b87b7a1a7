import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tests.data_prep.conftest import manifest, prepare, records, table
from PIL import Image
from skimage.measure import block_reduce

from data_prep.images import describe, find_classes, mask_values, read_pictures
from decomp_jax.data.records import SliceDataset
from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation.picture import FOREGROUND, load_mask, load_picture, prepare_mask, prepare_picture

SETTINGS = Settings("images", 64, modalities=("image",), foreground=FOREGROUND)


def picture(seed: int = 0, shape: tuple[int, int] = (64, 64)) -> np.ndarray:
    values = np.zeros(shape, np.uint8)
    values[8:-8, 12:-12] = np.random.default_rng(seed).integers(60, 255, (shape[0] - 16, shape[1] - 24))
    return values


def mask(value: int = 255) -> np.ndarray:
    values = np.zeros((64, 64), np.uint8)
    values[20:30, 24:40] = value
    return values


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def save_set(folder: Path, values: tuple[int, ...] = (255,) * 10, columns: str = "kind,fold") -> Path:
    """Pictures with one mask value each, a table with further columns; the last one has no mask."""
    lines = [f"image,mask,{columns}"]
    for i, value in enumerate(values):
        save(folder / f"{i}.png", picture(i))
        save(folder / f"m{i}.png", mask(value))
        lines.append(f"{i}.png,{f'm{i}.png' if i < len(values) - 1 else ''},kind {i % 2},{i % 3}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


def test_every_kind_of_file_gives_the_same_picture(tmp_path):
    values = picture()
    expected = values.astype(np.float32)
    save(tmp_path / "a.png", values)
    save(tmp_path / "colour.png", np.stack([values] * 3, -1))
    save(tmp_path / "deep.png", values.astype(np.uint16))
    np.save(tmp_path / "a.npy", values.astype(np.float64)[..., None])
    anterior_left = np.diag([-1.0, -1, 1, 1])  # rows and columns of a picture run to the back and to the left
    nib.save(nib.Nifti1Image(values.T, anterior_left), tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(values.T[::-1, :, None], np.eye(4) * [1, -1, 1, 1]), tmp_path / "b.nii")
    for name in ("a.png", "colour.png", "deep.png", "a.npy", "a.nii.gz", "b.nii"):
        np.testing.assert_array_equal(load_picture(tmp_path / name), expected, err_msg=name)


def test_masks_of_jpeg_are_cleaned(tmp_path):
    path = tmp_path / "mask.jpg"
    Image.fromarray(mask()).save(path, quality=60)
    assert len(np.unique(np.asarray(Image.open(path)))) > 2
    assert set(np.unique(load_mask(path))) == {0, 255}
    np.testing.assert_array_equal(load_mask(save(tmp_path / "mask.png", np.stack([mask(2)] * 3, -1))), mask(2))
    one_bit = save(tmp_path / "bits.png", mask() > 0)
    assert set(np.unique(load_mask(one_bit))) == {0, 1}


def test_normalised_over_the_foreground(tmp_path):
    values = picture()
    values[20:22, 20:22] = 3  # a dark hole belongs to the foreground
    values[0, 0] = 9  # noise around it does not
    image = prepare_picture(save(tmp_path / "a.png", values), SETTINGS)[..., 0]
    inside = values[8:-8, 12:-12].astype(np.float64)
    expected = np.zeros((64, 64))
    expected[8:-8, 12:-12] = (np.clip((inside - inside.mean()) / inside.std(), -3, 5) + 3) / 8
    np.testing.assert_allclose(image, expected, atol=5e-4)


def test_pictures_are_padded_to_a_square_and_averaged(tmp_path):
    large = prepare_picture(save(tmp_path / "a.png", picture(shape=(300, 240))), Settings(
        "images", 300, modalities=("image",), foreground=FOREGROUND))[..., 0].astype(np.float32)
    assert not large[:, :30].any() and not large[:, -30:].any() and large[:, 42:-42].any()
    small = prepare_picture(tmp_path / "a.png", Settings("images", 100, modalities=("image",), foreground=FOREGROUND))
    np.testing.assert_allclose(small[..., 0], block_reduce(large, 3, np.mean), atol=1e-3)


def test_a_fold_becomes_the_queries_and_columns_travel(tmp_path):
    source = save_set(tmp_path / "set")
    prepare("images", "--table", source, "--out", tmp_path / "out", "--size", 32, "--query_fold=2")
    rows = table(tmp_path / "out")
    assert {row["split"] for row in rows} == {"train", "validation", "query"}
    assert all((row["split"] == "query") == (row["fold"] == "2") for row in rows)
    assert all(row["kind"] == f"kind {int(row['image'][0]) % 2}" and np.isnan(row["position_mm"]) for row in rows)
    assert [row["labelled"] for row in rows if row["image"] == "9.png"] == [False]
    known = manifest(tmp_path / "out")
    assert known["settings"]["lesion_classes"] == ["lesion"] and known["settings"]["modalities"] == ["image"]
    assert known["source"]["patients"] == "unknown: each image is its own patient"
    record = records(tmp_path / "out", "query")[0]
    expected = prepare_picture(source.parent / record["patient_id"], Settings.from_json(known["settings"]))
    np.testing.assert_array_equal(record["image"], expected)
    np.testing.assert_array_equal(record["label"], (mask() > 0)[1::2, 1::2])


def test_classes_follow_from_the_masks(tmp_path):
    source = save_set(tmp_path / "set", (1, 5, 2, 1, 5, 2, 1, 1))
    prepare("images", "--table", source, "--out", tmp_path / "out", "--size", 64)
    assert manifest(tmp_path / "out")["settings"]["lesion_classes"] == ["class 1", "class 2", "class 5"]
    label_of = {"0.png": 1, "1.png": 3, "2.png": 2}
    for split in manifest(tmp_path / "out")["splits"]:
        for record in records(tmp_path / "out", split):
            if expected := label_of.get(record["patient_id"]):
                assert set(np.unique(record["label"])) == {0, expected}


def test_patients_and_splits_of_the_table(tmp_path):
    source = save_set(tmp_path / "set", columns="patient,split")
    lines = source.read_text().replace("kind 0,0", "Ann,query").replace("kind 1,1", "Bob,train")
    lines = re.sub("kind .,.", "Bob,train", lines)
    source.write_text(lines)
    prepare("images", "--table", source, "--out", tmp_path / "out", "--size", 32)
    rows = table(tmp_path / "out")
    assert {(row["patient_id"], row["split"]) for row in rows} == {("Ann", "query"), ("Bob", "train")}
    assert [int(row["slice_index"]) for row in rows if row["patient_id"] == "Bob"] == list(range(8))
    source.write_text(lines.replace("Ann,query", "Bob,query", 1))
    with pytest.raises(UserError, match="table.csv: patient Bob is in "):
        prepare("images", "--table", source, "--out", tmp_path / "again")


def test_a_patient_is_one_in_either_spelling_of_accents(tmp_path):
    source = save_set(tmp_path / "set", columns="patient,side")
    lines = source.read_text().replace("kind 0", "M\u00fcller").replace("kind 1", "Mu\u0308ller")
    source.write_text(lines, encoding="utf-8")
    assert {name: len(pictures) for name, pictures in read_pictures(source).items()} == {"M\u00fcller": 10}


@pytest.mark.parametrize("old, new, reason", [
    ("0.png,", "none.png,", "line 2 names .*none.png, which does not exist"),
    ("1.png,m1", "0.png,m1", "line 3 names 0.png again"),
    ("kind,", "slice_index,", "column slice_index has a meaning"),
    ("image,mask", "image,truth", "no column mask"),
    ("0.png,m0.png", ",m0.png", "line 2 names no image"),
])
def test_broken_tables_are_refused(tmp_path, old, new, reason):
    source = save_set(tmp_path / "set")
    source.write_text(source.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=f"table.csv: .*{reason}.*; "):
        prepare("images", "--table", source, "--out", tmp_path / "out")


def test_columns_of_any_name_and_look_stay_text(tmp_path):
    """The index that DataFrame.to_csv() writes has no name."""
    source = save_set(tmp_path / "set", columns="kind,fold")
    head, *lines = source.read_text().splitlines()
    source.write_text("\n".join([f",{head}", *(f"{i},{line}" for i, line in enumerate(lines))]) + "\n")
    prepare("images", "--table", source, "--out", tmp_path / "out", "--size", 16)
    for split in manifest(tmp_path / "out")["splits"]:
        rows = SliceDataset(tmp_path / "out", split).rows
        assert rows.dtype["fold"].kind == rows.dtype["unnamed"].kind == "U"
        assert {*rows["fold"]} <= {"0", "1", "2"}


def test_folds_that_are_not_there_are_refused(tmp_path):
    source = save_set(tmp_path / "set")
    with pytest.raises(UserError, match="--query_fold=7: .* has the folds 0, 1, 2"):
        prepare("images", "--table", source, "--out", tmp_path / "out", "--query_fold=7")
    source.write_text(source.read_text().replace("fold", "part"))
    with pytest.raises(UserError, match="has no column fold"):
        prepare("images", "--table", source, "--out", tmp_path / "out", "--query_fold=7")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize("name, values, reason", [
    ("m3.png", mask()[:32], r"m3.png: has shape \(32, 64\)"),
    ("m3.png", mask(2), ".png: has the value 255, other masks 2"),
    ("3.png", picture(2), "3.png: has the same images as 2.png"),
])
def test_pictures_that_do_not_fit_are_refused(tmp_path, name, values, reason):
    source = save_set(tmp_path / "set")
    save(source.parent / name, values)
    with pytest.raises(UserError, match=f"{reason}.*; "):
        prepare("images", "--table", source, "--out", tmp_path / "out", "--size", 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_broken_pictures_are_refused(tmp_path):
    path = save(tmp_path / "a.png", picture())
    path.write_bytes(path.read_bytes()[:-300])
    for load in (load_picture, load_mask):
        with pytest.raises(UserError, match="a.png: can't be read as an image"):
            load(path)
    with pytest.raises(UserError, match="a.png: has the same value everywhere"):
        prepare_picture(save(path, np.zeros((64, 64), np.uint8)), SETTINGS)


@pytest.mark.parametrize("name, values, reason", [
    ("a.npy", np.zeros((4, 5, 6)), "not rows and columns"),
    ("a.npy", np.full((4, 5), np.nan), "NaN"),
    ("a.npy", np.array([None]), "can't be read"),
    ("a.tif", np.zeros((4, 5)), "no PNG, JPEG, NIfTI, DICOM .* or .npy"),
    ("a.nii", np.zeros((4, 5, 6)), "is a volume"),
])
def test_files_that_are_no_pictures_are_refused(tmp_path, name, values, reason):
    path = tmp_path / name
    if name.endswith(".nii"):
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    else:
        with open(path, "wb") as file:
            np.save(file, values)
    with pytest.raises(UserError, match=f"{name}: .*{reason}"):
        load_picture(path)


def test_masks_are_few_whole_numbers(tmp_path):
    for values in (np.full((4, 4), 0.5), np.full((4, 4), -1)):
        np.save(tmp_path / "mask.npy", values)
        with pytest.raises(UserError, match="mask.npy: has mask values"):
            load_mask(tmp_path / "mask.npy")
    with pytest.raises(UserError, match="a.png: has .* values, as a grey image"):
        mask_values(save(tmp_path / "a.png", picture()))
    with pytest.raises(UserError, match="a.png: has shape"):
        mask_values(save(tmp_path / "a.png", np.stack([mask(), mask(1), mask(2)], -1)))


def test_pictures_do_not_suit_a_model_of_scans(tmp_path):
    with pytest.raises(UserError, match="trained on scans"):
        prepare_picture(save(tmp_path / "a.png", picture()), Settings("brats", 64))


def palette(indices: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices, "P")
    image.putpalette([part for colour in colours for part in colour])
    return image


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)
GREY_AND_ALPHA = np.stack([mask(), np.full((64, 64), 255, np.uint8)], -1)
IN_ALPHA = np.stack([np.full((64, 64), 255, np.uint8), mask()], -1)


@pytest.mark.parametrize("image, values", [
    (palette(mask(0) + (mask() == 0), WHITE, BLACK), {255}),  # white first
    (palette(mask(1), BLACK, WHITE), {1}),
    (palette(mask(2), BLACK, WHITE, RED), {2}),
    (palette(np.ones((64, 64), np.uint8), WHITE, BLACK), set()),
    (Image.fromarray(GREY_AND_ALPHA), {255}),
    (Image.fromarray(np.stack([mask(), mask(), mask(), mask()], -1)), {255}),  # transparent where it is black
    (Image.fromarray(mask() > 0), {1}),
    (Image.fromarray(mask(44).astype(np.uint16) * 7), {308}),
])
def test_what_masks_say_in_colours_and_alpha(tmp_path, image, values):
    image.save(tmp_path / "mask.png")
    read = load_mask(tmp_path / "mask.png")
    np.testing.assert_array_equal(read > 0, (mask() > 0) & bool(values))
    assert set(np.unique(read)) - {0} == values


@pytest.mark.parametrize("image, name, reason", [
    (Image.fromarray(IN_ALPHA), "mask.png", "alpha channel says other"),
    (Image.fromarray(IN_ALPHA * np.uint8([0, 1])), "mask.png", "alpha channel says other"),  # painted in black
    (palette(mask(1), RED, BLACK), "mask.png", "first colour of its palette"),
    (palette(mask(1), BLACK, BLACK), "mask.png", "first colour of its palette"),
    (Image.fromarray(mask(1)), "mask.jpg", "JPEG mask other than black and white"),
    (Image.fromarray(mask(255) // 2), "mask.jpg", "JPEG mask other than black and white"),
    (Image.fromarray(np.maximum(mask(), np.roll(mask(), 20, 1) // 2)), "mask.jpg", "JPEG mask other than black"),
])
def test_masks_that_can_be_read_in_two_ways_are_refused(tmp_path, image, name, reason):
    image.save(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: .*{reason}.*; "):
        load_mask(tmp_path / name)


def test_bytes_say_what_a_file_is(tmp_path):
    """Class numbers of a PNG stay, under the name of a JPEG; a JPEG named .png is cleaned."""
    Image.fromarray(mask(2)).save(tmp_path / "mask.jpg", format="PNG")
    np.testing.assert_array_equal(load_mask(tmp_path / "mask.jpg"), mask(2))
    Image.fromarray(mask()).save(tmp_path / "mask.png", format="JPEG", quality=30)
    np.testing.assert_array_equal(load_mask(tmp_path / "mask.png"), mask())
    np.savez(tmp_path / "a.npz", picture())
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(UserError, match="a.npy: can't be read as a NumPy array"):
        load_picture(tmp_path / "a.npy")


def test_a_transparent_surround_is_background(tmp_path):
    opaque = np.full((64, 64), 255, np.uint8)
    opaque[:8] = 0
    for surround in (0, 255):
        grey = np.where(opaque, picture(), surround).astype(np.uint8)
        for name, layers in (("la.png", [grey]), ("rgba.png", [grey] * 3)):
            np.testing.assert_array_equal(load_picture(save(tmp_path / name, np.stack([*layers, opaque], -1))), picture())
    everywhere = save(tmp_path / "none.png", np.stack([picture(), np.zeros((64, 64), np.uint8)], -1))
    np.testing.assert_array_equal(load_picture(everywhere), picture())


def test_pictures_that_are_to_be_turned_are_refused(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=tag)
    Image.fromarray(picture()).save(tmp_path / "a.png", save_all=True, append_images=[Image.fromarray(picture(1))])
    for name, reason in (("a.jpg", "EXIF"), ("a.png", "holds 2 pictures")):
        with pytest.raises(UserError, match=f"{name}: .*{reason}.*; "):
            load_picture(tmp_path / name)


def test_masks_that_lie_elsewhere_are_refused(tmp_path):
    """Both are put upright by their affines; where they differ, or one is no NIfTI file, they would not overlap."""
    upright = np.diag([-1.0, -1, 1, 1])
    nib.save(nib.Nifti1Image(picture().T, upright), tmp_path / "a.nii")
    nib.save(nib.Nifti1Image(mask().T, upright), tmp_path / "m.nii")
    nib.save(nib.Nifti1Image(mask().T[..., None, None], upright), tmp_path / "four.nii")
    for name in ("m.nii", "four.nii"):
        np.testing.assert_array_equal(prepare_mask(tmp_path / name, tmp_path / "a.nii", {255: 1}, 64), mask() > 0)
    nib.save(nib.Nifti1Image(mask().T, np.eye(4)), tmp_path / "n.nii")
    with pytest.raises(UserError, match="n.nii: its affine disagrees with a.nii"):
        prepare_mask(tmp_path / "n.nii", tmp_path / "a.nii", {255: 1}, 64)
    for one, other in (("n.nii", "b.png"), ("b.png", "a.nii")):
        save(tmp_path / "b.png", picture())
        with pytest.raises(UserError, match=f"{one}: .*one is NIfTI"):
            prepare_mask(tmp_path / one, tmp_path / other, {255: 1}, 64)


def test_binary_masks_of_both_kinds_are_one_lesion(tmp_path):
    pictures = read_pictures(save_set(tmp_path / "set", (255, 1, 255, 1)))
    Image.fromarray(mask() > 0).save(tmp_path / "set" / "m0.png")
    assert find_classes(pictures, workers=1, on_error="stop") == {1: "lesion", 255: "lesion"}
    save(tmp_path / "set" / "m2.png", np.maximum(mask(1), np.roll(mask(), 20, 1)))
    with pytest.raises(UserError, match="has the value 255, other masks 1"):
        find_classes(pictures, workers=1, on_error="stop")
    black = read_pictures(save_set(tmp_path / "black", (0, 0, 0)))
    with pytest.raises(UserError, match="m0.png: is black, as all masks are"):
        find_classes(black, workers=1, on_error="stop")


def test_what_a_flag_would_leave_unused_is_told(tmp_path):
    source = save_set(tmp_path / "set", columns="split,fold")
    with pytest.raises(UserError, match="--splits and --query_fold"):
        prepare("images", "--table", source, "--out", tmp_path / "out", "--splits", source, "--query_fold=1")
    line = describe(read_pictures(source), source, split_given=True)
    assert line.endswith("table.csv: 10 images, 9 with a mask; its column split is not used")
