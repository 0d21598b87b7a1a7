"""BraTS releases as they come: which patients a folder holds, and what their files and labels mean."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from decomp_jax.errors import UserError

NIFTI = re.compile(r"\.nii(?:\.gz)?$", re.IGNORECASE)


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
    pattern = re.compile(rf"(.+){separator}({'|'.join(kinds)})\.nii(?:\.gz)?", re.IGNORECASE)
    return Release(pattern, kinds, label_map, visit)


UNTIL_2021 = _release(
    "_", {"t1ce": "t1ce", "t1": "t1", "t2": "t2", "flair": "flair"}, {0: 0, 1: 1, 2: 2, 4: 3}, visit="(?!)"
)
SINCE_2023 = _release(
    "-", {"t1c": "t1ce", "t1n": "t1", "t2w": "t2", "t2f": "flair"}, {0: 0, 1: 1, 2: 2, 3: 3}, visit=r"(?<=-\d{5})-\d{3}$"
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
        """The person: releases from 2023 name patients BraTS-GLI-PERSON-VISIT, of five and three digits."""
        return re.sub(self.release.visit, "", self.patient_id)

    def label_map(self, extra: Mapping[int, int]) -> dict[int, int]:
        """Label -> class; `extra` only adds what the release does not name, since releases may be mixed."""
        # The paediatric set renumbered its labels between years under the same names, so nothing is guessed.
        return {**extra, **({0: 0} if self.patient_id.startswith("BraTS-PED") else self.release.label_map)}


def match_name(path: Path) -> tuple[Release, str, str] | None:
    """Release, patient and kind that a file's name tells."""
    for release in (UNTIL_2021, SINCE_2023):
        if match := release.pattern.fullmatch(path.name):
            return release, match[1], release.kinds[match[2].lower()]
    return None


@dataclasses.dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        patients: patient_id -> patient.
        left_out: NIfTI files whose names no release has.
        renamed: segmentations of other names, taken for that of the only patient of their folder.
    """

    patients: dict[str, Patient]
    left_out: list[Path]
    renamed: list[Path]

    def describe(self, src: Path) -> str:
        """A line about what was found, and what of it was left out."""
        labelled = sum("seg" in patient.files for patient in self.patients.values())
        line = f"{src}: {len(self.patients)} patients, {labelled} with a segmentation"
        for what, paths in (("segmentations of other names taken", self.renamed), ("NIfTI files left out", self.left_out)):
            if paths:
                line += f"; {len(paths)} {what}, first {paths[0]}"
        return line


def find_patients(src: Path) -> dict[str, Patient]:
    """patient_id -> patient, as `survey` finds them."""
    return survey(src).patients


def survey(src: Path) -> Found:
    """The patients of all BraTS releases below `src`, mixed as they may be, and what else is there.

    Links are followed; hidden files are passed over.

    Raises:
        UserError: no patient is found, or a patient's file is found twice.
    """
    if not src.is_dir():
        raise UserError(f"--src {src}: is no folder; name the one that holds the patients' folders")
    patients: dict[str, Patient] = {}
    left_out: list[Path] = []
    for path, name in _volumes(src):
        if not (match := match_name(name)):
            left_out.append(path)
            continue
        release, patient_id, kind = match
        patient = patients.setdefault(patient_id, Patient(patient_id, path.parent, release, {}))
        if kind in patient.files or release != patient.release:
            other = patient.files.get(kind, next(iter(patient.files.values())))
            raise UserError(f"{path}: {patient_id} is there twice (see {other}); remove one")
        patient.files[kind] = path
    if not patients:
        seen = f" ({len(left_out)} other NIfTI files, first {left_out[0]})" if left_out else ""
        raise UserError(
            f"--src {src}: holds no files like ID/ID_t1ce.nii.gz or ID/ID-t1c.nii.gz{seen}; name another folder, or "
            "rename them so"
        )
    renamed = _take_segmentations(patients, left_out)
    return Found(patients, [path for path in left_out if path not in renamed], renamed)


def _volumes(src: Path) -> Iterator[tuple[Path, Path]]:
    """NIfTI files below `src`, and the name that tells what they are: in some copies that of a folder around the file."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(src, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        names = sorted(name for name in files if not is_hidden(name) and NIFTI.search(name))
        of_folder = Path(folder) if len(names) == 1 and NIFTI.search(folder) and match_name(Path(folder)) else None
        yield from ((Path(folder, name), of_folder or Path(folder, name)) for name in names)


def is_hidden(name: str) -> bool:
    """As macOS' `._NAME` beside each file and `__MACOSX` are."""
    return name.startswith(".") or name == "__MACOSX"


def _take_segmentations(patients: Mapping[str, Patient], others: list[Path]) -> list[Path]:
    """BraTS 2020 has one segmentation of another name: it is its patient's if nothing else can be."""
    taken = []
    for patient in patients.values():
        candidates = [path for path in others if path.parent == patient.folder and "seg" in path.name.lower()]
        alone = sum(other.folder == patient.folder for other in patients.values()) == 1
        if "seg" not in patient.files and alone and len(candidates) == 1:
            patient.files["seg"] = candidates[0]
            taken += candidates
    return taken
