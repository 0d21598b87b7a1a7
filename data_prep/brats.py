"""BraTS releases as cases."""

import collections
from collections.abc import Mapping

from data_prep.cases import Case, LabelValues
from decomp_jax.errors import UserError
from decomp_jax.preparation.releases import Patient
from decomp_jax.preparation.volume import Source


def brats_cases(patients: Mapping[str, Patient], extra: Mapping[int, int]) -> dict[str, Case]:
    """case_id -> case; `extra`, label -> 0..3, names labels that a patient's release does not."""
    return {patient_id: _case(patient, extra) for patient_id, patient in patients.items()}


def require_segmentations(patients: Mapping[str, Patient]) -> None:
    """Raises UserError for a patient without a segmentation."""
    for patient in patients.values():
        if "seg" not in patient.files:
            raise UserError(
                f"{patient.folder}: {patient.patient_id} has no seg file; add it (so named), or use --unlabelled"
            )


def require_needed(extra: Mapping[int, int], patients: Mapping[str, Patient]) -> None:
    """Raises UserError for a label map that no patient needs."""
    for label, number in extra.items():
        if all(patient.label_map(extra)[label] != number for patient in patients.values()):
            raise UserError(
                f"--label_map={label}:{number}: the releases found here name label {label} themselves; leave it out, or "
                "renumber the files"
            )


def _case(patient: Patient, extra: Mapping[int, int]) -> Case:
    files = {kind: Source(path) for kind, path in patient.files.items()}
    label = files.pop("seg", None)
    known = patient.label_map(extra)
    hint = "map it to 0 none, 1 NCR, 2 ED or 3 ET, as with --label_map=" + _as_with(known)
    return Case(patient.patient_id, patient.subject, files, label, LabelValues(known, hint=hint))


def _as_with(known: Mapping[int, int]) -> str:
    """An example that is right for what releases, and copies of them, are known to hold beyond the named labels."""
    if known.keys() == {0, 1, 2, 3}:
        return "4:0 (in releases from 2024, 4 is the resection cavity)"
    if 4 in known and 3 not in known:
        return "3:3 (in copies that renumber enhancing tumour from 4 to 3)"
    return "LABEL:CLASS, once you know what it means"


def count_label_maps(cases: Mapping[str, Case]) -> dict[str, int]:
    """Number of labelled cases read with each label map, written "label:class,..."."""
    maps = (sorted(case.values.lesion.items()) for case in cases.values() if case.label)
    return dict(collections.Counter(",".join(f"{label}:{number}" for label, number in pairs) for pairs in maps))
