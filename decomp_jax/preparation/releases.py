"""BraTS releases as they come: which patients a folder holds, and what their files and labels mean."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from decomp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Release:
    """How the files of a BraTS release are named and its lesion labels numbered.

    Attributes:
        pattern: file name -> patient, kind.
        kinds: the release's name of a modality -> ours.
        label_map: the release's labels -> 0 background, 1 NCR, 2 ED, 3 ET.
        visit: what of a patient's name numbers the visit.
    """

    pattern: re.Pattern[str]
    kinds: Mapping[str, str]
    label_map: Mapping[int, int]
    visit: str


def _release(separator: str, kinds: Mapping[str, str], label_map: Mapping[int, int], visit: str) -> Release:
    kinds = {**kinds, "seg": "seg"}
    pattern = re.compile(rf"(.+){separator}({'|'.join(kinds)})\.nii(?:\.gz)?")
    return Release(pattern, kinds, label_map, visit)


UNTIL_2021 = _release(
    "_", {"t1ce": "t1ce", "t1": "t1", "t2": "t2", "flair": "flair"}, {0: 0, 1: 1, 2: 2, 4: 3}, visit="(?!)"
)
SINCE_2023 = _release(
    "-", {"t1c": "t1ce", "t1n": "t1", "t2w": "t2", "t2f": "flair"}, {0: 0, 1: 1, 2: 2, 3: 3}, visit=r"-\d{3}$"
)


@dataclasses.dataclass(frozen=True)
class Patient:
    """One visit of a patient as found on disk.

    Attributes:
        patient_id: the common start of the file names.
        folder: where the files lie.
        release: how they are named.
        files: modality or "seg" -> file.
    """

    patient_id: str
    folder: Path
    release: Release
    files: Mapping[str, Path]

    @property
    def subject(self) -> str:
        """The person: releases from 2023 end a patient's name with the visit."""
        return re.sub(self.release.visit, "", self.patient_id)

    def label_map(self, extra: Mapping[int, int]) -> dict[int, int]:
        """Label -> class; `extra` only adds what the release does not name, since releases may be mixed."""
        # The paediatric set renumbered its labels between years under the same names, so nothing is guessed.
        return {**extra, **({0: 0} if self.patient_id.startswith("BraTS-PED") else self.release.label_map)}

    def paths(self, modalities: Iterable[str]) -> list[Path]:
        if missing := [name for name in modalities if name not in self.files]:
            raise UserError(f"{self.folder}: {self.patient_id} has no {missing[0]} file; add it or choose --modalities")
        return [self.files[name] for name in modalities]


def match_name(path: Path) -> tuple[Release, str, str] | None:
    """Release, patient and kind that a file's name tells."""
    for release in (UNTIL_2021, SINCE_2023):
        if match := release.pattern.fullmatch(path.name):
            return release, match[1], release.kinds[match[2]]
    return None


def find_patients(src: Path) -> dict[str, Patient]:
    """patient_id -> patient, for all BraTS releases below `src`, mixed as they may be.

    Raises:
        UserError: no patient is found, or a patient's file is found twice.
    """
    if not src.is_dir():
        raise UserError(f"--src {src}: is no folder; name the one that holds the patients' folders")
    patients: dict[str, Patient] = {}
    for path in sorted(src.rglob("*.nii*")):
        if not path.is_file() or not (match := match_name(path)):
            continue
        release, patient_id, kind = match
        patient = patients.setdefault(patient_id, Patient(patient_id, path.parent, release, {}))
        if kind in patient.files or path.parent != patient.folder or release != patient.release:
            other = next(iter(patient.files.values()))
            raise UserError(f"{path}: {patient_id} is there twice (see {other}); remove one")
        patient.files[kind] = path
    if not patients:
        raise UserError(f"--src {src}: holds no files like ID/ID_t1ce.nii.gz or ID/ID-t1c.nii.gz; name another folder")
    return patients
