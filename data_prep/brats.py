"""BraTS releases as cases."""

import collections
from collections.abc import Mapping

from data_prep.cases import Case, LabelValues
from decomp_jax.preparation.releases import Patient
from decomp_jax.preparation.volume import Source


def brats_cases(patients: Mapping[str, Patient], extra: Mapping[int, int]) -> dict[str, Case]:
    """case_id -> case; `extra`, label -> 0..3, names labels that a patient's release does not."""
    return {patient_id: _case(patient, extra) for patient_id, patient in patients.items()}


def _case(patient: Patient, extra: Mapping[int, int]) -> Case:
    files = {kind: Source(path) for kind, path in patient.files.items()}
    label = files.pop("seg", None)
    hint = ("map it to 0, 1 NCR, 2 ED or 3 ET, as with --label_map=4:0 (in releases from 2024, 4 is the resection "
            "cavity)")
    return Case(patient.patient_id, patient.subject, files, label, LabelValues(patient.label_map(extra), hint=hint))


def count_label_maps(cases: Mapping[str, Case]) -> dict[str, int]:
    """Number of labelled cases read with each label map, written "label:class,..."."""
    maps = (sorted(case.values.lesion.items()) for case in cases.values() if case.label)
    return dict(collections.Counter(",".join(f"{label}:{number}" for label, number in pairs) for pairs in maps))
