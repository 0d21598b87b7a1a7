"""Any 2-D set of images and lesion masks, named by a table.

Pictures are padded to a square, brought to the wanted size without aliasing, and normalised as scans are, over their
foreground: pixels brighter than a tenth of the way from the darkest to the 99th percentile, and what these
enclose. Bitmaps and NumPy arrays are taken as they are, rows downwards; NIfTI slices as a radiologist reads them.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from scipy import ndimage

from data_prep.nifti import FIELD_MM, field_mean, field_nearest, load_volume, scale_intensity
from data_prep.slices import PatientSlices, map_in_order
from data_prep.splits import (
    FOLD_SHARES, only_value, read_table, split_by_file, split_by_hash, split_labelled, split_names
)
from decomp_jax.data.schema import SLICE_COLUMNS, Settings
from decomp_jax.errors import UserError

FOREGROUND = "above 10 % of the 99th percentile, holes filled"
FOREGROUND_LEVEL = 0.1
JPEG = (".jpg", ".jpeg")
BITMAPS = (".png", *JPEG)
COLOURS = ("P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes other than plain numbers
MAX_CLASSES = 32  # a mask with more values is a grey image


# ---------------------------------------------------------------- files


def load_picture(path: Path) -> np.ndarray:
    """Grey values [rows,columns], float32, of a PNG, JPEG, NIfTI or NumPy file; colours become luminance.

    Raises:
        UserError: the file can't be read as one 2-D image of finite values.
    """
    return _as_plane(path, _load_values(path, luminance=True).astype(np.float32))


def load_mask(path: Path) -> np.ndarray:
    """Mask values [rows,columns], int32; those of JPEG files, which are inexact, become 0 and 255.

    Raises:
        UserError: the file can't be read as one 2-D image of whole numbers.
    """
    values = _load_values(path, luminance=False)
    if values.ndim == 3 and values.shape[2] in (3, 4) and (values[..., :3] == values[..., :1]).all():
        values = values[..., 0]  # grey, stored as colour
    values = _as_plane(path, values.astype(np.float32))
    if path.suffix.lower() in JPEG:
        return np.where(values >= 128, 255, 0)
    if (values != np.round(values)).any() or values.min() < 0:
        raise UserError(f"{path}: has mask values that are not 0, 1, 2 ...; store class numbers, or 0 and 255")
    return values.astype(np.int32)


def _load_bitmap(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: can't be read as an image ({error}); export it again") from error


def _load_values(path: Path, *, luminance: bool) -> np.ndarray:
    """The values as stored, palette indices and channels last included, or with colours as luminance."""
    name = path.name.lower()
    if name.endswith(BITMAPS):
        image = _load_bitmap(path)
        return np.asarray(image.convert("RGB").convert("L") if luminance and image.mode in COLOURS else image)
    if name.endswith((".nii", ".nii.gz")):
        volume = np.asarray(load_volume(path).dataobj)
        if 1 not in volume.shape:
            raise UserError(f"{path}: is a volume of shape {volume.shape}; give 2-D slices")
        return np.flip(volume.squeeze(volume.shape.index(1))).T
    if name.endswith(".npy"):
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: can't be read as a NumPy array ({error}); save it again") from error
    raise UserError(f"{path}: is no PNG, JPEG, NIfTI or .npy file; convert it")


def _as_plane(path: Path, values: np.ndarray) -> np.ndarray:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2 or 0 in values.shape:
        raise UserError(f"{path}: has shape {values.shape}, not rows and columns; give a 2-D image")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: has values that are NaN or infinite; replace them")
    return values


# ---------------------------------------------------------------- pictures


def prepare_picture(path: Path, settings: Settings) -> np.ndarray:
    """A picture as float16 [S,S,1] in [0,1], prepared as the records with these settings were.

    Raises:
        UserError: the file can't be used, or the settings are those of scans.
    """
    if settings.foreground != FOREGROUND:
        raise UserError(f"{path}: the model was trained on scans, not on pictures; give a NIfTI volume and --slice")
    values = load_picture(path)
    darkest = values.min()
    bright = values > darkest + FOREGROUND_LEVEL * (np.percentile(values, 99) - darkest)
    image = scale_intensity(path, values, ndimage.binary_fill_holes(bright), settings)
    return field_mean(image[None], _pixel_spacing(values), settings.size)[0, ..., None].astype(np.float16)


def _pixel_spacing(values: np.ndarray) -> tuple[float, float]:
    """Pixel height and width at which the longer side fills the field."""
    return (FIELD_MM / max(values.shape),) * 2


@dataclasses.dataclass(frozen=True)
class Picture:
    """A line of the table: the image, its mask if it has one, and the line itself."""

    image: Path
    mask: Path | None
    row: Mapping[str, str]

    @property
    def columns(self) -> dict[str, str]:
        """What travels to the slice table."""
        return {name: value for name, value in self.row.items() if name not in ("mask", "patient", "split")}


def prepare_pictures(
    patient_id: str, *, pictures: Mapping[str, Sequence[Picture]], classes: Mapping[int, int], settings: Settings
) -> PatientSlices:
    """All pictures of a patient; `classes` maps mask values to labels.

    Raises:
        UserError: a file can't be used, or a mask has another shape than its image.
    """
    of_patient = pictures[patient_id]
    n = len(of_patient)
    return PatientSlices(
        patient_id=patient_id,
        image=np.stack([prepare_picture(picture.image, settings) for picture in of_patient]),
        label=np.stack([_prepare_mask(picture, classes, settings.size) for picture in of_patient]),
        slice_index=np.arange(n, dtype=np.int32),
        position_mm=np.full(n, np.nan, np.float32),
        labelled=np.array([picture.mask is not None for picture in of_patient]),
        columns={name: np.array([picture.columns[name] for picture in of_patient]) for name in of_patient[0].columns},
    )


def _prepare_mask(picture: Picture, classes: Mapping[int, int], size: int) -> np.ndarray:
    if picture.mask is None:
        return np.zeros((size, size), np.uint8)
    mask, image = load_mask(picture.mask), load_picture(picture.image)
    if mask.shape != image.shape:
        raise UserError(f"{picture.mask}: has shape {mask.shape} but its image {image.shape}; give a mask of its size")
    label = np.zeros(mask.shape, np.uint8)
    for value, number in classes.items():
        label[mask == value] = number
    return field_nearest(label[None], _pixel_spacing(label), size)[0]


# ---------------------------------------------------------------- the table


def read_pictures(table: Path) -> dict[str, list[Picture]]:
    """patient_id -> pictures; without a column `patient` each image is its own. Paths are relative to the table.

    Raises:
        UserError: the table can't be used, names an image twice or a file that does not exist.
    """
    pictures: dict[str, list[Picture]] = {}
    seen: set[str] = set()
    for line, row in enumerate(read_table(table, ("image", "mask")), 2):
        where = f"{table}: line {line}"
        if clash := sorted(row.keys() & {*SLICE_COLUMNS} - {"split"}):
            raise UserError(f"{table}: column {clash[0]} has a meaning of its own in data sets; rename it")
        if not row["image"] or not (patient_id := row.get("patient", row["image"])):
            raise UserError(f"{where} names no image or no patient; complete it")
        if row["image"] in seen:
            raise UserError(f"{where} names {row['image']} again; remove one of the two")
        seen.add(row["image"])
        image, mask = (table.parent / row[name] if row[name] else None for name in ("image", "mask"))
        for path in filter(None, (image, mask)):
            if not path.is_file():
                raise UserError(f"{where} names {path}, which does not exist; mend the path")
        pictures.setdefault(patient_id, []).append(Picture(image, mask, row))
    return pictures


def split_pictures(
    pictures: Mapping[str, Sequence[Picture]], table: Path, *, csv: Path | None, query_fold: str | None, seed: int
) -> dict[str, str]:
    """patient_id -> split: from `csv`, by `query_fold`, from the table's column `split`, or by a seeded hash.

    Raises:
        UserError: the split asked for can't be made, or puts a patient into two.
    """
    def column(name: str) -> list[tuple[str, str]]:
        rows = [(patient_id, picture.row) for patient_id, of_patient in pictures.items() for picture in of_patient]
        if name not in rows[0][1]:
            raise UserError(f"{table}: has no column {name}; add it, or leave out --query_fold")
        return [(patient_id, row[name]) for patient_id, row in rows]

    if csv:
        return split_by_file(csv, pictures)
    if query_fold is not None:
        folds = only_value(column("fold"), table)
        queries = {patient_id: "query" for patient_id, fold in folds.items() if fold == query_fold}
        if not queries:
            raise UserError(f"--query_fold={query_fold}: {table} has the folds {', '.join(sorted({*folds.values()}))}")
        return queries | split_by_hash(folds.keys() - queries, FOLD_SHARES, seed=seed)
    if "split" in next(iter(pictures.values()))[0].row:
        return split_names(column("split"), table)
    labelled = {patient_id: any(p.mask for p in of_patient) for patient_id, of_patient in pictures.items()}
    return split_labelled(labelled, seed=seed)


def find_classes(
    pictures: Mapping[str, Sequence[Picture]], *, workers: int, on_error: Literal["stop", "skip"]
) -> dict[int, str]:
    """Mask value -> lesion class, from what the masks hold: "lesion" if they know one value, else "class N".

    Raises:
        UserError: a mask can't be read (unless skipped), or its values are no class numbers.
    """
    masks = [picture.mask for of_patient in pictures.values() for picture in of_patient if picture.mask]
    first: dict[int, Path] = {}
    with contextlib.closing(map_in_order(mask_values, masks, workers=workers, unit="mask")) as results:
        for mask, future in results:
            try:
                for value in future.result():
                    first.setdefault(value, mask)
            except UserError:
                if on_error == "stop":
                    raise
    values = sorted(first)
    if len(values) <= 1:
        return {value: "lesion" for value in values or (1,)}
    if values[-1] == 255 or len(values) > MAX_CLASSES:
        raise UserError(
            f"{first[values[-1]]}: has the value {values[-1]}, other masks {values[0]}; "
            "give every mask 0 and 255, or class numbers 0, 1, 2 ..."
        )
    return {value: f"class {value}" for value in values}


def mask_values(path: Path) -> list[int]:
    """The values other than 0 of a mask, sorted. Raises UserError if it is none."""
    values = np.unique(load_mask(path))
    if len(values) > MAX_CLASSES + 1:
        raise UserError(f"{path}: has {len(values)} values, as a grey image; give class numbers, or 0 and 255")
    return values[values != 0].tolist()
