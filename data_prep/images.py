"""Any 2-D set of images and lesion masks, named by a table."""

import contextlib
import dataclasses
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.slices import PatientSlices
from data_prep.splits import (
    FOLD_SHARES, only_value, read_table, split_by_file, split_by_hash, split_labelled, split_names
)
from data_prep.workers import map_in_order
from decomp_jax.data.schema import ROW_COLUMNS, Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation.picture import load_mask, prepare_mask, prepare_picture

MAX_CLASSES = 32  # a mask with more values is a grey image


@dataclasses.dataclass(frozen=True)
class Picture:
    """A line of the table: the image, its mask if it has one, and the line itself."""

    image: Path
    mask: Path | None
    row: Mapping[str, str]

    @property
    def columns(self) -> dict[str, str]:
        """What travels to the rows."""
        kept = {name: value for name, value in self.row.items() if name not in ("mask", "patient", "split")}
        return {name or "unnamed": value for name, value in kept.items()}  # as the index of DataFrame.to_csv() is


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
        label=np.stack([_label(picture, classes, settings.size) for picture in of_patient]),
        slice_index=np.arange(n, dtype=np.int32),
        position_mm=np.full(n, np.nan, np.float32),
        labelled=np.array([picture.mask is not None for picture in of_patient]),
        columns={name: np.array([picture.columns[name] for picture in of_patient]) for name in of_patient[0].columns},
    )


def _label(picture: Picture, classes: Mapping[int, int], size: int) -> np.ndarray:
    if picture.mask is None:
        return np.zeros((size, size), np.uint8)
    return prepare_mask(picture.mask, picture.image, classes, size)


# ---------------------------------------------------------------- the table


def read_pictures(table: Path) -> dict[str, list[Picture]]:
    """patient_id -> pictures; without a column `patient` each image is its own. Paths are relative to the table.

    Raises:
        UserError: the table can't be used, names an image twice or a file that does not exist.
    """
    pictures: dict[str, list[Picture]] = {}
    seen: set[str] = set()
    for line, row in read_table(table, ("image", "mask")).items():
        where = f"{table}: line {line}"
        if clash := sorted(row.keys() & {*ROW_COLUMNS}):
            raise UserError(f"{table}: column {clash[0]} has a meaning of its own in data sets; rename it")
        # Of letters with accents there are two spellings, which look alike.
        patient_id = unicodedata.normalize("NFC", row.get("patient", row["image"]))
        if not row["image"] or not patient_id:
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


def describe(pictures: Mapping[str, Sequence[Picture]], table: Path, *, split_given: bool) -> str:
    """A line about what the table lists, and what of it is not used."""
    listed = [picture for of_patient in pictures.values() for picture in of_patient]
    line = f"{table}: {len(listed)} images, {sum(picture.mask is not None for picture in listed)} with a mask"
    line += f", of {len(pictures)} patients" if "patient" in listed[0].row else ""
    return line + ("; its column split is not used" if split_given and "split" in listed[0].row else "")


def column_types(pictures: Mapping[str, Sequence[Picture]]) -> dict[str, str]:
    """NumPy type of each column that travels: text, of the longest value's length."""
    lengths: dict[str, int] = {}
    for of_patient in pictures.values():
        for picture in of_patient:
            for name, value in picture.columns.items():
                lengths[name] = max(lengths.get(name, 1), len(value))
    return {name: f"U{length}" for name, length in lengths.items()}


def split_pictures(
    pictures: Mapping[str, Sequence[Picture]], table: Path, *, csv: Path | None, query_fold: str | None, seed: int,
    growing: bool = False,
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
        return queries | split_by_hash(folds.keys() - queries, FOLD_SHARES, seed=seed, growing=growing)
    if "split" in next(iter(pictures.values()))[0].row:
        return split_names(column("split"), table)
    labelled = {patient_id: any(p.mask for p in of_patient) for patient_id, of_patient in pictures.items()}
    return split_labelled(labelled, seed=seed, growing=growing)


def find_classes(
    pictures: Mapping[str, Sequence[Picture]], *, workers: int, on_error: Literal["stop", "skip"]
) -> dict[int, str]:
    """Mask value -> lesion class, from what the masks hold: "lesion" if each knows one value, else "class N".

    One value is the same for all, but that some masks may be 0 and 1 and others 0 and 255.

    Raises:
        UserError: a mask can't be read (unless skipped), its values are no class numbers, or no mask shows anything.
    """
    masks = [picture.mask for of_patient in pictures.values() for picture in of_patient if picture.mask]
    first: dict[int, Path] = {}
    most = 0
    with contextlib.closing(map_in_order(mask_values, masks, workers=workers, unit="mask")) as results:
        for mask, values in results:
            if not isinstance(values, UserError):
                most = max(most, len(values))
                for value in values:
                    first.setdefault(value, mask)
            elif on_error == "stop":
                raise values
    values = sorted(first)
    if masks and not values:
        raise UserError(f"{masks[0]}: is black, as all masks are; give masks that are 0 and 1, or 0 and 255")
    if len(values) <= 1 or values == [1, 255] and most == 1:
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
