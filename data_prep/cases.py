"""Cases: scans with their labels, from whatever layout, split and prepared."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.anatomy import AnatomySource, only_map, six_regions
from data_prep.slices import PatientSlices
from data_prep.splits import FOLD_SHARES, only_value, split_by_file, split_by_hash, split_labelled
from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation.field import planar
from decomp_jax.preparation.scan import load_scan
from decomp_jax.preparation.volume import Source, load_labels, load_volume


@dataclasses.dataclass(frozen=True)
class LabelValues:
    """What the values of a label file mean.

    Attributes:
        lesion: value -> 0, or 1 + index in the lesion classes.
        anatomy: value -> 0, or 1 + index in the anatomy classes.
        ignore: a value for voxels that no one has labelled.
        hint: of messages about a value that `lesion` lacks: how to name it.
    """

    lesion: Mapping[int, int]
    anatomy: Mapping[int, int] = dataclasses.field(default_factory=dict)
    ignore: int | None = None
    hint: str = "name it with --labels=NAME=NUMBER"


@dataclasses.dataclass(frozen=True)
class Case:
    """One visit of a patient.

    Attributes:
        case_id: unique within the source; the patient_id of records.
        subject: the person, who may have several visits.
        channels: modality -> where it lies.
        label: None where there is none.
        folds: of a cross-validation in which the case is held out, where the source names some.
    """

    case_id: str
    subject: str
    channels: Mapping[str, Source]
    label: Source | None
    values: LabelValues
    folds: frozenset[str] = frozenset()


def split_cases(
    cases: Mapping[str, Case], *, csv: Path | None, query_fold: str | None = None, seed: int, growing: bool = False
) -> dict[str, str]:
    """case_id -> split, from a file, by a fold or by a seeded hash; the visits of one person stay together.

    Cases without a label are for reference, but with a file: they can be found, and neither train nor score.
    """
    if csv:
        splits = split_by_file(csv, cases)
        only_value([(cases[case_id].subject, split) for case_id, split in splits.items()], csv)
        return splits
    labelled: dict[str, bool] = {}
    for case in cases.values():
        labelled[case.subject] = labelled.get(case.subject, False) or case.label is not None
    if query_fold is None:
        of_subject = split_labelled(labelled, seed=seed, growing=growing)
    else:
        queries = _query_subjects(cases, query_fold)
        rest = [subject for subject, has_label in labelled.items() if has_label and subject not in queries]
        of_subject = dict.fromkeys(labelled, "reference") | dict.fromkeys(queries, "query")
        of_subject |= split_by_hash(rest, FOLD_SHARES, seed=seed, growing=growing)
    return {case_id: of_subject[case.subject] for case_id, case in cases.items()}


def _query_subjects(cases: Mapping[str, Case], query_fold: str) -> set[str]:
    folds = {case.subject: case.folds for case in cases.values() if case.folds}
    for case in cases.values():
        if case.folds != (others := folds.get(case.subject, case.folds)) and case.label is not None:
            one, other = (" and ".join(sorted(names)) or "none" for names in (case.folds, others))
            raise UserError(
                f"--query_fold={query_fold}: visits of {case.subject} are in folds {one} and {other}; name splits with "
                "--splits"
            )
    queries = {subject for subject, names in folds.items() if query_fold in names}
    if not queries:
        there = ", ".join(sorted(frozenset().union(*folds.values()))) or "none"
        raise UserError(f"--query_fold={query_fold}: no case is in it; the source names the folds {there}")
    return queries


def prepare_case(
    case_id: str,
    *,
    cases: Mapping[str, Case],
    settings: Settings,
    unlabelled: bool,
    anatomy: AnatomySource | None,
    masks: Path | None,
) -> PatientSlices:
    """All slices of a case that show foreground.

    Args:
        case_id: key of `cases`.
        settings: what the slices are to be.
        unlabelled: take a case without a label.
        anatomy: where labels of the six regions come from; without, from the label's own values.
        masks: folder of masks of the brain.

    Raises:
        UserError: a file is missing or can't be used.
    """
    case = cases[case_id]
    if missing := [name for name in settings.modalities if name not in case.channels]:
        raise UserError(f"{_folder(case)}: {case_id} has no {missing[0]} file; add it or choose --modalities")
    if case.label is None and not unlabelled:
        raise UserError(f"{_folder(case)}: {case_id} has no segmentation; add it, or use --unlabelled")
    sources = [case.channels[name] for name in settings.modalities]
    scan = load_scan(sources, settings, masks and Source(only_map("--mask", masks, case_id)))
    values = np.zeros(scan.volume.shape, np.int32)
    if case.label is not None:
        values = load_labels(case.label, scan.source, scan.volume)
    lesion = _classes(values, case)
    scan.require_in_field(lesion > 0, "the lesion")
    slice_index = scan.filled_slices
    regions = None
    if anatomy:
        path = anatomy.file(case_id)
        regions = six_regions(path, load_volume(path), anatomy.scheme, scan.volume, scan.foreground)
    elif settings.anatomy_classes:
        regions = _looked_up(values, case.values.anatomy)
    label = scan.labels(lesion, slice_index)
    labelled = np.full(len(slice_index), case.label is not None)
    if case.values.ignore is not None:
        labelled &= ~planar(values == case.values.ignore, settings.plane)[slice_index].any(axis=(1, 2))
        label[~labelled] = 0
    return PatientSlices(
        patient_id=case_id,
        image=scan.image(slice_index),
        label=label,
        slice_index=slice_index,
        position_mm=scan.position_mm(slice_index),
        anatomy=None if regions is None else scan.labels(regions, slice_index),
        labelled=labelled,
    )


def _classes(values: np.ndarray, case: Case) -> np.ndarray:
    """Lesion classes uint8 [x,y,z]. Raises UserError for a value without a meaning."""
    known = {*case.values.lesion, 0} | ({case.values.ignore} if case.values.ignore is not None else set())
    unknown = values[~np.isin(values, sorted(known))]
    if unknown.size:
        raise UserError(f"{case.label.path}: has label {unknown.min()}, which nothing names; {case.values.hint}")
    return _looked_up(values, case.values.lesion)


def _looked_up(values: np.ndarray, table: Mapping[int, int]) -> np.ndarray:
    classes = np.zeros(values.shape, np.uint8)
    for value, number in table.items():
        if number:
            classes[values == value] = number
    return classes


def _folder(case: Case) -> Path:
    files = [*case.channels.values(), *([case.label] if case.label else [])]
    return files[0].path.parent
