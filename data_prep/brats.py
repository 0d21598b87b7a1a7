"""BraTS releases: their patients, split and prepared."""

import collections
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.anatomy import AnatomySource, six_regions
from data_prep.slices import PatientSlices
from data_prep.splits import only_value, split_by_file, split_labelled
from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation.releases import Patient
from decomp_jax.preparation.scan import load_scan
from decomp_jax.preparation.volume import load_labels, load_volume


def split_patients(patients: Mapping[str, Patient], csv: Path | None, *, seed: int) -> dict[str, str]:
    """patient_id -> split, from a file or by a seeded hash; the visits of one person stay together.

    By hash, patients without a segmentation are for reference: they can be found, but neither train nor score.
    """
    if csv:
        splits = split_by_file(csv, patients)
        only_value([(patients[patient_id].subject, split) for patient_id, split in splits.items()], csv)
        return splits
    labelled: dict[str, bool] = {}
    for patient in patients.values():
        labelled[patient.subject] = labelled.get(patient.subject, False) or "seg" in patient.files
    of_subject = split_labelled(labelled, seed=seed)
    return {patient_id: of_subject[patient.subject] for patient_id, patient in patients.items()}


def require_usable(patients: Mapping[str, Patient], extra: Mapping[int, int], *, unlabelled: bool) -> None:
    """Raises UserError for a patient without a segmentation, unless wanted, and for a label map that nobody needs."""
    for patient in patients.values():
        if "seg" not in patient.files and not unlabelled:
            raise no_segmentation(patient)
    for label, number in extra.items():
        if all(patient.label_map(extra)[label] != number for patient in patients.values()):
            raise UserError(
                f"--label_map={label}:{number}: the releases found here name label {label} themselves; leave it out, or "
                "renumber the files"
            )


def no_segmentation(patient: Patient) -> UserError:
    return UserError(
        f"{patient.folder}: {patient.patient_id} has no seg file; add it (so named), or use --unlabelled"
    )


def count_label_maps(patients: Mapping[str, Patient], extra: Mapping[int, int]) -> dict[str, int]:
    """Number of labelled patients read with each label map, written "label:class,..."."""
    maps = (sorted(p.label_map(extra).items()) for p in patients.values() if "seg" in p.files)
    return dict(collections.Counter(",".join(f"{label}:{number}" for label, number in pairs) for pairs in maps))


def prepare_patient(
    patient_id: str,
    *,
    patients: Mapping[str, Patient],
    settings: Settings,
    label_map: Mapping[int, int],
    unlabelled: bool,
    anatomy: AnatomySource | None,
) -> PatientSlices:
    """All axial slices of a patient that show brain.

    Args:
        patient_id: key of `patients`.
        patients: from `find_patients`.
        settings: size, modalities and intensity range.
        label_map: label -> 0..3, for labels that the patient's release does not name.
        unlabelled: take a patient without a segmentation.
        anatomy: where the anatomy labels come from.

    Raises:
        UserError: a file is missing or can't be used.
    """
    patient = patients[patient_id]
    paths = patient.paths(settings.modalities)
    segmentation = patient.files.get("seg")
    if segmentation is None and not unlabelled:
        raise no_segmentation(patient)
    scan = load_scan(paths, settings)
    labels = np.zeros(scan.brain.shape, np.uint8)
    if segmentation is not None:
        labels = load_labels(segmentation, paths[0], scan.volume, patient.label_map(label_map))
    slice_index = scan.slices_with_brain
    regions = None
    if anatomy:
        path = anatomy.file(patient_id)
        regions = six_regions(path, load_volume(path), anatomy.scheme, scan.volume, scan.brain)
    return PatientSlices(
        patient_id=patient_id,
        image=scan.image(slice_index, settings.size),
        label=scan.labels(labels, slice_index, settings.size),
        slice_index=slice_index,
        position_mm=scan.position_mm(slice_index),
        anatomy=None if regions is None else scan.labels(regions, slice_index, settings.size),
        labelled=segmentation is not None,
    )
