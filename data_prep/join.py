"""One data set of several: a manifest that names them, and their rows. Records stay where they are."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.slices import write_manifest
from decomp_jax.data.records import SliceDataset, check_sum, read_manifest
from decomp_jax.data.schema import FINGERPRINTS, SPLITS, Settings
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
        rows = [{split: SliceDataset(part.folder, split).rows for split in part.manifest["splits"]} for part in parts]
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
    """A number an image. Raises UserError where they are damaged, or older than their checksum."""
    if FINGERPRINTS not in part.manifest["files"]:
        raise UserError(f"{part.folder}: an older version prepared it, without a checksum of the fingerprints by which "
                        "twins are found; prepare it again")
    check_sum(part.folder / FINGERPRINTS, part.manifest["files"])
    return np.load(part.folder / FINGERPRINTS)
