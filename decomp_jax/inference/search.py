"""The `evaluate.py search` command: the codes of one bank searched in another, written to hits.csv."""

import csv
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from tqdm import tqdm

from decomp_jax.errors import UserError
from decomp_jax.files import replacing
from decomp_jax.mesh import data_mesh
from decomp_jax.retrieval.bank import CodeBank, require_same_model
from decomp_jax.retrieval.patients import PatientHits
from decomp_jax.retrieval.queries import PATHS, codes
from decomp_jax.retrieval.search import Hits

COLUMNS = ("query", "rank", "row", "patient_id", "slice_index", "distance")
PATIENT_COLUMNS = ("query", "rank", "patient_id", "distance")
PAIR_COLUMNS = ("normal_row", "abnormal_row")


def search_banks(
    bank_dir: str | os.PathLike, queries_dir: str | os.PathLike, *, by: Literal["normal", "abnormal", "both"],
    k: int, out: str | os.PathLike, pairs: str | os.PathLike | None, exclude_same_patient: bool,
    one_per_patient: bool, relative: bool = False, level: Literal["slice", "patient"] = "slice",
    within_mm: float | None = None,
) -> None:
    """Searches `bank_dir` for the k rows nearest to each row of `queries_dir`, or to each pair of its rows.

    The bank is shared out to all devices of all processes; process 0 writes.

    Args:
        by: which code to compare.
        out: CSV to write: query, rank (from 1), row, patient_id, slice_index, distance; of patients query
            (a patient of `queries_dir`), rank, patient_id, distance.
        pairs: CSV with columns normal_row, abnormal_row: each line is a query, with the anatomy of one row of
            `queries_dir` and the lesion of another. Needs `by="both"`.
        exclude_same_patient: leaves out rows of the query's own patient (of both, for a pair).
        one_per_patient: keeps the nearest row of each patient.
        relative: ranks by relative distances, not by squared L2.
        level: "patient" searches for the patients nearest to each patient of `queries_dir`; each process for all.
        within_mm: for patients, how far apart in height matched slices may be; the bank's rule without it.

    Raises:
        UserError: naming the file or flag that doesn't fit.
    """
    if pairs is not None and by != "both":
        raise UserError(f"--pairs: mixes two codes and needs --by=both, not --by={by}")
    if pairs is not None and level == "patient":
        raise UserError("--pairs: names slices; leave it out with --level=patient")
    if relative and level == "patient":
        raise UserError("--relative: distances of patients are; leave it out with --level=patient")
    if within_mm is not None and level != "patient":
        raise UserError("--within_mm: is of --level=patient; leave it out, or search for patients")
    bank, queries = CodeBank.load(bank_dir), CodeBank.load(queries_dir)
    require_same_model(bank, queries)
    if bank.slab_mm != queries.slab_mm and by != "normal" and jax.process_index() == 0:
        print(f"{queries.name}: its abnormal codes are of slabs of {queries.slab_mm:g} mm, {bank.name}'s of "
              f"{bank.slab_mm:g} mm; encode both with one --slab_mm", file=sys.stderr)
    if level == "patient":
        found = _search_patients(bank, queries, PATHS if by == "both" else (by,), k=k, within_mm=within_mm,
                                 exclude_same_patient=exclude_same_patient)
        if jax.process_index() == 0:
            write_patient_hits(out, found)
        return
    query_rows = np.arange(len(queries))[:, None].repeat(2, 1) if pairs is None else _read_pairs(pairs, len(queries))
    normal_rows, abnormal_rows = query_rows.T
    asked = codes(
        normal=None if by == "abnormal" else queries.normal_indices[normal_rows],
        abnormal=None if by == "normal" else queries.abnormal_indices[abnormal_rows],
    )
    exclude = queries.rows["patient_id"][query_rows] if exclude_same_patient else None
    hits = bank.search(dataclasses.replace(asked, relative=relative), k=k, exclude=exclude,
                       one_per_patient=one_per_patient, mesh=data_mesh())
    if jax.process_index() == 0:
        write_hits(out, hits, bank.rows)


def _search_patients(
    bank: CodeBank, queries: CodeBank, paths: Sequence[str], *, k: int, within_mm: float | None,
    exclude_same_patient: bool,
) -> list[tuple[str, PatientHits]]:
    """The patients nearest to each patient of `queries`, in the order of their ids."""
    if bank.has_mm != queries.has_mm:
        without, other = (queries, bank) if bank.has_mm else (bank, queries)
        raise UserError(f"{without.name}/rows.npy: lacks heights in mm (position_mm), which {other.name} has; encode "
                        "both with one program")
    within, found = {} if within_mm is None else dict.fromkeys(paths, within_mm), []
    heights, ids = queries.heights, queries.rows["patient_id"]
    for patient in tqdm(np.unique(ids), desc="search", unit="patient", delay=2, disable=None):
        rows = np.flatnonzero(ids == patient)
        slices = codes(**{path: getattr(queries, f"{path}_indices")[rows] for path in paths})
        hits = bank.search_patients(slices, heights=heights[rows], within_mm=within, k=k, mesh=data_mesh(),
                                    exclude=[patient] if exclude_same_patient else [])
        found.append((patient, hits))
    return found


def write_hits(out: str | os.PathLike, hits: Hits, rows: np.ndarray) -> None:
    """Writes hits.csv: a line a hit, missing hits left out; `rows` are the searched bank's."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    queries, ranks = np.nonzero(hits.rows >= 0)
    hit_rows = hits.rows[queries, ranks]
    with replacing(out) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(zip(
            queries, ranks + 1, hit_rows, rows["patient_id"][hit_rows], rows["slice_index"][hit_rows],
            hits.distances[queries, ranks],
        ))


def write_patient_hits(out: str | os.PathLike, found: Sequence[tuple[str, PatientHits]]) -> None:
    """Writes hits.csv of patients: a line a hit of each query, a name and what was found."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(PATIENT_COLUMNS)
        for query, hits in found:
            ranked = enumerate(zip(hits.patients, hits.distances), start=1)
            writer.writerows((query, rank, patient, distance) for rank, (patient, distance) in ranked)


def _read_pairs(path: str | os.PathLike, size: int) -> np.ndarray:
    """Rows [Q,2] of the query bank named in a CSV with columns normal_row, abnormal_row."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            if not set(PAIR_COLUMNS) <= set(head := reader.fieldnames or ()):
                raise UserError(f"{path}: needs columns {', '.join(PAIR_COLUMNS)} in its first line, not "
                                f"{','.join(head)[:100]!r}; name them there, with a comma between them")
            pairs = np.array([[int(line[column]) for column in PAIR_COLUMNS] for line in reader], int).reshape(-1, 2)
    except (OSError, ValueError, TypeError, OverflowError, csv.Error) as error:
        raise UserError(f"{path}: can't be read ({error}); needs whole numbers in {', '.join(PAIR_COLUMNS)}") from None
    if pairs.size and not 0 <= pairs.min() <= pairs.max() < size:
        raise UserError(f"{path}: names rows {pairs.min()}..{pairs.max()}, but the query bank has rows 0..{size - 1}")
    return pairs
