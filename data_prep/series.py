"""DICOM series as cases: a list of what is there, and a table, filled in by hand, of what each is."""

import csv
import hashlib
import sys
from pathlib import Path

from data_prep.layouts import Found, Layout
from data_prep.names import channel_name
from data_prep.splits import read_table
from decomp_jax.errors import UserError
from decomp_jax.preparation.dicom import Series, find_series, segment_names
from decomp_jax.preparation.volume import Source

LABEL = "label"
COLUMNS = ("case", "channel", "series")


def print_series(src: Path) -> None:
    """Prints a table of the series below a folder, in which to fill in channels.

    Cases are numbered by study. Names and numbers of patients are not printed; descriptions are, whatever they hold.
    """
    numbers: dict[str, int] = {}
    lines = []
    for series in find_series(src):
        number = numbers.setdefault(series.header.get("StudyInstanceUID", ""), len(numbers) + 1)
        header, channel = series.header, LABEL if series.modality == "SEG" else ""
        lines.append((
            f"case-{number:04d}", channel, series.uid, series.modality, header.get("SeriesDescription", ""),
            len(series.files), header.get("Rows", ""), header.get("Columns", ""), series.files[0].parent,
        ))
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow((*COLUMNS, "modality", "description", "files", "rows", "columns", "folder"))
    out.writerows(sorted(lines, key=lambda line: line[0]))


def read_series_table(src: Path, table: Path) -> Layout:
    """The cases of a table with the columns `case`, `channel` and `series`, a SeriesInstanceUID.

    Lines without a channel are left out; the channel "label" is a DICOM SEG, whose segments name themselves.

    Raises:
        UserError: the table can't be used, or names a series that is not there, or a channel of a case twice.
    """
    there = {series.uid: series for series in find_series(src)}
    of_case: dict[str, dict[str, Series]] = {}
    for line, row in read_table(table, COLUMNS).items():
        case_id, channel, uid = (row[name] for name in COLUMNS)
        if not channel:
            continue
        channel = channel if channel == LABEL else channel_name(channel)
        if not case_id or uid not in there:
            raise UserError(f"{table}: line {line} names no case, or a series that {src} does not hold; see --list")
        if (channel == LABEL) != (there[uid].modality == "SEG") or channel == LABEL and len(there[uid].files) != 1:
            raise UserError(f"{table}: line {line}: the channel {LABEL!r} is for one DICOM SEG, and only that")
        if channel in of_case.setdefault(case_id, {}):
            raise UserError(f"{table}: line {line}: case {case_id} has {channel} already; keep one")
        of_case[case_id][channel] = there[uid]
    channels = list(dict.fromkeys(name for series in of_case.values() for name in series if name != LABEL))
    if not channels:
        raise UserError(f"{table}: names no channel of images; fill in the column channel")
    cases = [_case(case_id, series, channels) for case_id, series in of_case.items()]
    return Layout("DICOM series", table, dict(enumerate(channels)), {}, cases)


def _case(case_id: str, series: dict[str, Series], channels: list[str]) -> Found:
    persons = {str(one.header.get("PatientID", "")) for one in series.values()}
    if len(persons) > 1:
        raise UserError(f"case {case_id}: its series are of several patients; mend the table")
    label = Source(series[LABEL].files[0]) if LABEL in series else None
    images = {name: Source(one.files[0].parent, files=one.files) for name, one in series.items() if name != LABEL}
    return Found(
        case_id,
        {channels.index(name): source for name, source in images.items()},
        label,
        regions=segment_names(label.path) if label else {},
        # A person's scans stay together in whatever part; nothing of the number itself is kept.
        subject=hashlib.sha256(persons.pop().encode()).hexdigest()[:16] if any(persons) else case_id,
    )
