"""One data set of several: a manifest that names them, and their rows. Records stay where they are."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.slices import write_manifest
from decomp_jax.data.records import SliceDataset, read_manifest
from decomp_jax.data.schema import SPLITS, Settings
from decomp_jax.errors import UserError
from decomp_jax.files import making


class Part(NamedTuple):
    """A data set with records of its own."""

    folder: Path
    manifest: dict[str, Any]


def join_parts(out: Path, folders: Sequence[Path]) -> None:
    """Makes `out`, in which the patients of a split follow each other part by part, in the order of `folders`.

    Raises:
        UserError: `out` exists, or a part is damaged, was prepared otherwise than the first, or has a patient or an
            image that another has, too.
    """
    with making(out) as folder:
        parts = [part for name in folders for part in _parts(name)]
        for part in parts[1:]:
            _require_alike(parts[0], part)
        rows = [{split: _checked_rows(part, split) for split in part.manifest["splits"]} for part in parts]
        _require_distinct(parts, rows)
        splits = {}
        for split in (name for name in SPLITS if any(name in of_part for of_part in rows)):
            of_split = [of_part[split] for of_part in rows if split in of_part]
            np.save(folder / f"rows-{split}.npy", np.concatenate(of_split))
            counts = [part.manifest["splits"][split] for part in parts if split in part.manifest["splits"]]
            splits[split] = {name: sum(count[name] for count in counts) for name in ("patients", "slices")}
        first = parts[0].manifest
        write_manifest(
            folder,
            Settings.from_json(first["settings"]),
            _layout(parts[0]),
            splits,
            {},
            parts=[
                {"path": os.path.relpath(part.folder.resolve(), out.parent.resolve() / out.name),
                 "digest": part.manifest["digest"]}
                for part in parts
            ],
            skipped=[entry for part in parts for entry in part.manifest["skipped"]],
            source={
                "parts": len(parts),
                **{name: value for name, value in first["source"].items()
                   if all(part.manifest["source"].get(name) == value for part in parts)},
            },
        )


def _parts(folder: Path) -> list[Part]:
    """A data set, or those that were joined as it."""
    manifest = read_manifest(folder)
    if "parts" not in manifest:
        return [Part(folder, manifest)]
    return [part for entry in manifest["parts"] for part in _parts(folder / entry["path"])]


def _checked_rows(part: Part, split: str) -> np.ndarray:
    """Rows as they were written, of which each has a record."""
    path = part.folder / f"rows-{split}.npy"
    rows = SliceDataset(part.folder, split).rows
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != part.manifest["files"][path.name]:
            raise UserError(f"{path}: is not what manifest.json says (checksum); copy or prepare the part again")
    return rows


def _require_alike(first: Part, part: Part) -> None:
    ours, theirs = (Settings.from_json(one.manifest["settings"]) for one in (first, part))
    for name, value in vars(ours).items():
        if name != "source" and (other := getattr(theirs, name)) != value:
            raise UserError(
                f"{part.folder}: prepared with {name}={other}, but {first.folder} with {value}; prepare alike"
            )


    if _layout(part) != _layout(first):
        raise UserError(f"{part.folder}: its records are laid out otherwise than {first.folder}'s; prepare it again")


def _layout(part: Part) -> dict[str, Any]:
    """What records of all parts have in common."""
    return {name: part.manifest["record"][name] for name in ("bytes", "offsets")}


def _require_distinct(parts: Sequence[Part], rows: Sequence[dict[str, np.ndarray]]) -> None:
    columns = {one.dtype.names for of_part in rows for one in of_part.values()}
    if len(columns) > 1:
        raise UserError(f"{parts[0].folder}: its rows have other columns than another part's; prepare alike")
    part_of_patient: dict[str, Part] = {}
    seen = np.empty(0, np.uint64)
    for part, of_part in zip(parts, rows):
        patients = {name for one in of_part.values() for name in np.unique(one["patient_id"]).tolist()}
        if twins := sorted(patients & part_of_patient.keys()):
            raise UserError(
                f"{part.folder}: patient {twins[0]} ({len(twins)} in all) is in {part_of_patient[twins[0]].folder}, "
                "too; leave out one part, or prepare it without"
            )
        part_of_patient |= dict.fromkeys(patients, part)
        fingerprints = _fingerprints(part)
        if (again := np.isin(fingerprints, seen)).any():
            names = np.concatenate([one["patient_id"] for one in of_part.values()])
            raise UserError(
                f"{part.folder}: {names[again][0]} has the same images as a patient of another part; remove one of them"
            )
        seen = np.concatenate([seen, fingerprints[fingerprints > 0]])


def _fingerprints(part: Part) -> np.ndarray:
    """A number an image; empty where the part is older than they are."""
    path = part.folder / "fingerprints.npy"
    try:
        fingerprints = np.load(path, allow_pickle=False) if path.exists() else np.empty(0, np.uint64)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged ({error}); prepare the part again") from error
    if path.exists() and fingerprints.shape != (part.manifest["slices"],):
        raise UserError(f"{path}: damaged ({fingerprints.shape} numbers); prepare the part again")
    return fingerprints
