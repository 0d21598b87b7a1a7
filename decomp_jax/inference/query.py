"""The `evaluate.py query` command: a bank asked with a scan, a drawn lesion, slices of the bank, or a whole patient."""

from collections.abc import Sequence
from pathlib import Path

import jax
import matplotlib as mpl
import numpy as np

from decomp_jax.errors import UserError
from decomp_jax.files import replacing
from decomp_jax.inference.asking import Question, read_scan, read_slice
from decomp_jax.inference.display import STYLE
from decomp_jax.inference.encode import restore_with_bank
from decomp_jax.inference.search import write_hits, write_patient_hits
from decomp_jax.inference.sheet import patient_sheet, slice_sheet
from decomp_jax.retrieval import CodeBank, Hits, Queries


def run_query(workdir: str | Path, bank: str | Path, *, k: int, out: str | Path, **flags: object) -> None:
    """Writes OUT/hits.csv and OUT/sheet.png, what was asked above the k hits.

    Args:
        workdir: a training run; images are prepared as its training images were.
        bank: a bank encoded by that run's network.
        flags: those of `Question`.

    Raises:
        UserError: flags don't go together, a file can't be used, or the bank is another network's.
    """
    question, out = Question(**flags), Path(out)
    question.check()
    decomposer, searched = restore_with_bank(workdir, bank)
    if not len(searched):
        raise UserError(f"{bank}: is empty; encode images to be searched")
    if question.level == "patient" and not searched.has_mm:
        raise UserError(f"{bank}/rows.npy: lacks heights in mm (position_mm), by which slices are matched; use "
                        "--level=slice")
    for flag in ("like", "unlike"):
        if beyond := [row for row in getattr(question, flag) if not 0 <= row < len(searched)]:
            raise UserError(f"--{flag}: row {beyond[0]} is not in {bank}, whose rows are 0 to {len(searched) - 1}")
    writes = jax.process_index() == 0
    with mpl.rc_context(STYLE):
        if question.level == "patient":
            asked = read_scan(question, decomposer, searched)
            within_mm = {} if question.within_mm is None else dict.fromkeys(question.paths, question.within_mm)
            found = searched.search_patients(asked.queries, heights=asked.heights, within_mm=within_mm, k=k)
            sheet = patient_sheet(decomposer, searched, question, asked, found)
            if writes:
                write_patient_hits(out / "hits.csv", [(Path(question.image).name, found)])
        else:
            asked = read_slice(question, decomposer, searched)
            hits = search_others(searched, asked.queries, rows=question.like, k=k,
                                 one_per_patient=question.one_per_patient)
            sheet = slice_sheet(decomposer, searched, question, asked, hits)
            if writes:
                write_hits(out / "hits.csv", hits, searched.rows)
        if writes:
            with replacing(out / "sheet.png") as file:
                sheet.savefig(file)


def search_others(bank: CodeBank, queries: Queries, *, rows: Sequence[int], k: int, one_per_patient: bool) -> Hits:
    """The k nearest to one query, without the patients of some rows: examples would find themselves first."""
    known = np.isin(bank.rows["patient_id"], bank.rows["patient_id"][list(rows)])
    hits = bank.search(queries, k=k + int(known.sum()), one_per_patient=one_per_patient)
    others = (hits.rows[0] >= 0) & ~known[hits.rows[0]]
    if not others.any():
        raise UserError(f"{bank.name}: has no patients but those of the examples; take examples of fewer")
    return Hits(hits.distances[:, others][:, :k], hits.rows[:, others][:, :k])
