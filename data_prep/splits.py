"""Which patient belongs to which split. A patient is never in two."""

import bisect
import csv
import hashlib
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

from decomp_jax.data.schema import SPLITS
from decomp_jax.errors import UserError

# Shares of the patients. Phantoms are made for the demo: most of them train, and few queries are enough.
PHANTOM_SHARES = {"train": 0.70, "validation": 0.06, "query": 0.08, "reference": 0.16}
PATIENT_SHARES = {"train": 0.60, "validation": 0.10, "query": 0.10, "reference": 0.20}
FOLD_SHARES = {"train": 0.90, "validation": 0.10}


def split_by_hash(
    patient_ids: Iterable[str], shares: Mapping[str, float], *, seed: int, growing: bool = False
) -> dict[str, str]:
    """patient_id -> split, by a seeded hash.

    By order of the hash: every split gets its share of the patients, at least one, and training what the others leave.
    Or, for data sets that grow, each patient by its own hash, whoever else is there: shares hold on average.

    Raises:
        UserError: fewer patients than splits, unless growing.
    """
    ordered = sorted(patient_ids, key=lambda patient_id: _digest(seed, patient_id))
    if growing:
        names = [name for name in shares if name != "train"]
        ends = list(itertools.accumulate(shares[name] for name in names))
        places = (int.from_bytes(_digest(seed, patient_id)) / 2**256 for patient_id in ordered)
        return dict(zip(ordered, ([*names, "train"][bisect.bisect(ends, place)] for place in places)))
    if len(ordered) < len(shares):
        raise UserError(
            f"{len(ordered)} labelled patients: too few for the splits {', '.join(shares)}; "
            "add patients or name each one's split with --splits"
        )
    sizes = {name: max(1, round(share * len(ordered))) for name, share in shares.items() if name != "train"}
    names = [name for name, size in sizes.items() for _ in range(size)]
    names += ["train"] * (len(ordered) - len(names))
    return dict(zip(ordered, names))


def _digest(seed: int, patient_id: str) -> bytes:
    return hashlib.sha256(f"{seed} {patient_id}".encode()).digest()


def split_labelled(labelled: Mapping[str, bool], *, seed: int, growing: bool = False) -> dict[str, str]:
    """patient_id -> split by hash, for patients of which some have no labels.

    Those can be found but neither train nor score: they are for reference.
    """
    labelled_ids = [patient_id for patient_id, has_label in labelled.items() if has_label]
    if not growing and len(labelled_ids) < len(labelled) and 0 < len(labelled_ids) < len(PATIENT_SHARES):
        unlabelled = next(patient_id for patient_id, has_label in labelled.items() if not has_label)
        raise UserError(
            f"{len(labelled_ids)} labelled patients of {len(labelled)}, {unlabelled} not being one: too few for the splits "
            f"{', '.join(PATIENT_SHARES)}; add labels or name each one's split with --splits"
        )
    splits = split_by_hash(labelled_ids, PATIENT_SHARES, seed=seed, growing=growing) if labelled_ids else {}
    return {patient_id: splits.get(patient_id, "reference") for patient_id in labelled}


def read_table(path: Path, required: Iterable[str]) -> dict[int, dict[str, str]]:
    """Line in the file -> column -> text, stripped, of a CSV file; empty lines are passed over.

    Raises:
        UserError: the file can't be read as CSV, lacks a required column, or a line has too few or too many fields.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            rows = {reader.line_num: row for row in reader}
            head = ",".join(reader.fieldnames or ())
            names = [name.strip() for name in reader.fieldnames or ()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read as CSV in UTF-8 ({error}); give a readable file") from error
    if missing := [name for name in required if name not in names]:
        raise UserError(f"{path}: no column {', '.join(missing)} in its first line, {head[:100]!r}; name the columns there, "
                        "with commas between them")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns have the same name; rename one")
    for line, row in rows.items():
        if None in row or None in row.values():
            raise UserError(f"{path}: line {line} has not {len(names)} fields; complete it")
    if not rows:
        raise UserError(f"{path}: has no lines; list at least one")
    return {line: dict(zip(names, (value.strip() for value in row.values()))) for line, row in rows.items()}


def only_value(pairs: Iterable[tuple[str, str]], path: Path) -> dict[str, str]:
    """patient_id -> value from (patient_id, value) pairs of the file `path`.

    Raises:
        UserError: a patient has two values.
    """
    values: dict[str, str] = {}
    for patient_id, value in pairs:
        if values.setdefault(patient_id, value) != value:
            raise UserError(f"{path}: patient {patient_id} is in {values[patient_id]} and in {value}; keep one")
    return values


def split_names(pairs: Iterable[tuple[str, str]], path: Path) -> dict[str, str]:
    """patient_id -> split from (patient_id, split) pairs of the file `path`.

    Raises:
        UserError: a split's name is unknown, or a patient is in two splits.
    """
    splits = only_value(pairs, path)
    for patient_id, split in splits.items():
        if split not in SPLITS:
            raise UserError(f"{path}: patient {patient_id} has split '{split}'; use one of {', '.join(SPLITS)}")
    return splits


def split_by_file(path: Path, patient_ids: Iterable[str]) -> dict[str, str]:
    """patient_id -> split from a CSV file with the columns patient_id and split.

    Raises:
        UserError: the file can't be used, or does not list exactly the patients.
    """
    rows = read_table(path, ("patient_id", "split"))
    splits = split_names([(row["patient_id"], row["split"]) for row in rows.values()], path)
    patient_ids = set(patient_ids)
    if unlisted := sorted(patient_ids - splits.keys()):
        raise UserError(f"{path}: patient {unlisted[0]} ({len(unlisted)} in all) has no line; add it")
    if unknown := sorted(splits.keys() - patient_ids):
        raise UserError(f"{path}: patient {unknown[0]} ({len(unknown)} in all) is not in the source; remove the line")
    return splits
