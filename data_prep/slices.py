"""Writes prepared slices as a data set: workers prepare patients, one process writes them in order."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy

from data_prep.shards import RecordFormat, ShardWriter, write_metadata
from data_prep.workers import map_in_order
from decomp_jax.data.schema import FINGERPRINTS, FORMAT_VERSION, SPLITS, Settings, content_digest, row_dtype
from decomp_jax.errors import UserError
from decomp_jax.files import making

MIN_CONTENT = 0.01  # share of pixels other than 0 from which equal images can't be chance


@dataclasses.dataclass(frozen=True)
class PatientSlices:
    """One patient's prepared slices, stacked.

    Attributes:
        patient_id: unique within the data set.
        image: float16 [n,S,S,C] in [0,1], background 0.
        label: uint8 [n,S,S], zeros where not labelled.
        slice_index: int32 [n], position in the volume, from inferior to superior.
        position_mm: float32 [n], height along the axis; NaN where unknown.
        anatomy: uint8 [n,S,S], or None.
        healthy: float16 [n,S,S,C], the slices without the lesion, or None.
        labelled: whether `label` is known, for all slices or [n].
        columns: further values [n] that travel to the rows, of the types given to `write_dataset`.
    """

    patient_id: str
    image: np.ndarray
    label: np.ndarray
    slice_index: np.ndarray
    position_mm: np.ndarray
    anatomy: np.ndarray | None = None
    healthy: np.ndarray | None = None
    labelled: bool | np.ndarray = True
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def rows(self, dtype: np.dtype) -> np.ndarray:
        rows = np.empty(len(self.image), dtype)
        columns = {
            "patient_id": self.patient_id,
            "slice_index": self.slice_index,
            "position_mm": self.position_mm,
            "has_abnormality": self.label.any(axis=(1, 2)),
            "labelled": self.labelled,
            **self.columns,
        }
        for name in dtype.names:
            rows[name] = columns[name]
        return rows

    @functools.cached_property
    def fingerprints(self) -> np.ndarray:
        """A number of each image, uint64 [n]; 0 where it is all but empty."""
        return np.array([
            int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest())
            if np.count_nonzero(image) > MIN_CONTENT * image.size else 0
            for image in self.image
        ], np.uint64)


def write_dataset(
    out: Path,
    *,
    settings: Settings,
    splits: Mapping[str, str],
    prepare: Callable[[str], PatientSlices],
    workers: int,
    on_error: Literal["stop", "skip"],
    columns: Mapping[str, str] | None = None,
    source: Mapping[str, Any] | None = None,
    shard: tuple[int, int] | None = None,
) -> None:
    """Prepares every patient, or a shard of them, and writes the data set `out`, whole or not at all.

    What a data set holds: `decomp_jax.data.schema`.

    Args:
        out: directory to make.
        settings: what `prepare` gives.
        splits: patient_id -> split.
        prepare: picklable; runs in worker processes and raises `UserError` for a patient that can't be used.
        workers: number of processes; the bytes written do not depend on it.
        on_error: "skip" leaves out the patients that can't be used and lists them in the manifest.
        columns: NumPy type of each of `PatientSlices.columns`; text stays text, whatever it looks like.
        source: what else the manifest should tell about where the data came from.
        shard: (i, n): only the i-th, from 1, of n runs of patients by name; some splits may be missing then.

    Raises:
        UserError: `out` exists, a patient can't be used, two patients have an image in common, a split has lost all its
            patients, or the shard has none.
    """
    patient_ids = sorted(_shard(sorted(splits), shard), key=lambda patient_id: SPLITS.index(splits[patient_id]))
    row_type = row_dtype(max(map(len, patient_ids)), columns)
    record = RecordFormat(settings)
    screen = _Screen(on_error)
    written: dict[str, _SplitWriter] = {}
    with making(out) as folder:
        (folder / "slices").mkdir()
        with contextlib.closing(map_in_order(prepare, patient_ids, workers=workers, unit="patient")) as prepared:
            for split, patients in itertools.groupby(prepared, key=lambda pair: splits[pair[0]]):
                with _SplitWriter(folder, split, record, row_type) as written[split]:
                    for patient in screen.usable(patients):
                        written[split].write(patient)
                if not written[split].patients:
                    written.pop(split).rows.unlink()
                    if shard is None or not written and len(screen.skipped) == len(patient_ids):
                        raise UserError(
                            f"split {split}: every patient was skipped, first because of {screen.skipped[-1]['error']}"
                        )
        fingerprints = [of_patient for writer in written.values() for of_patient in writer.fingerprints]
        np.save(folder / FINGERPRINTS, np.concatenate(fingerprints))
        seen = frozenset().union(*(writer.seen for writer in written.values()))
        if unseen := [name for i, name in enumerate(settings.lesion_classes, 1) if i not in seen]:
            print(f"{out}: no slice shows {', '.join(unseen)}", file=sys.stderr)
        write_metadata(folder / "slices", record, {split: writer.shards for split, writer in written.items()})
        write_manifest(
            folder,
            settings,
            record.layout() | {"ends": {name: end for one in written.values() for name, end in one.shards.ends.items()}},
            {split: {"patients": writer.patients, "slices": writer.slices} for split, writer in written.items()},
            {f"slices/{name}": sum_ for one in written.values() for name, sum_ in one.shards.checksums.items()},
            skipped=screen.skipped,
            source=dict(source or {}) | ({"shard": "{}/{}".format(*shard)} if shard else {}),
        )


def _shard(patient_ids: list[str], shard: tuple[int, int] | None) -> list[str]:
    if shard is None:
        return patient_ids
    i, n = shard
    if n > len(patient_ids):
        raise UserError(f"--shard={i}/{n}: there are {len(patient_ids)} patients; make fewer parts")
    return np.array_split(patient_ids, n)[i - 1].tolist()


class _Screen:
    """Lets the patients through that can be used, each image once; lists those `skipped`."""

    def __init__(self, on_error: str) -> None:
        self.skipped: list[dict[str, str]] = []
        self._on_error = on_error
        self._patient_of: dict[int, str] = {}  # by the fingerprint of an image

    def usable(self, results: Iterable[tuple[str, PatientSlices | UserError]]) -> Iterator[PatientSlices]:
        for patient_id, result in results:
            error = result if isinstance(result, UserError) else self._twin(result)
            if error is None:
                yield result
            elif self._on_error == "stop":
                raise error
            else:
                self.skipped.append({"patient_id": patient_id, "error": str(error)})

    def _twin(self, patient: PatientSlices) -> UserError | None:
        """The refusal of a patient who has an image in common with an earlier one."""
        fingerprints = patient.fingerprints[patient.fingerprints > 0].tolist()
        for fingerprint in fingerprints:
            if twin := self._patient_of.get(fingerprint):
                return UserError(f"{patient.patient_id}: has the same images as {twin}; remove one of the two")
        self._patient_of.update(dict.fromkeys(fingerprints, patient.patient_id))
        return None


class _SplitWriter:
    """Rows and shards of one split, patient by patient.

    Attributes:
        seen: labels that slices show.
    """

    def __init__(self, folder: Path, split: str, record: RecordFormat, row_type: np.dtype) -> None:
        self.patients = self.slices = 0
        self.fingerprints: list[np.ndarray] = []
        self.seen: set[int] = set()
        self.shards = ShardWriter(folder / "slices", split, record.itemsize)
        self.rows = folder / f"rows-{split}.npy"
        self._record, self._row_type = record, row_type

    def __enter__(self) -> "_SplitWriter":
        self._rows = self.rows.open("wb+")
        self._write_header()
        return self

    def write(self, patient: PatientSlices) -> None:
        self.patients += 1
        self.slices += len(patient.image)
        self.fingerprints.append(patient.fingerprints)
        self.seen.update(np.unique(patient.label).tolist())
        self._rows.write(patient.rows(self._row_type).tobytes())
        for record in self._record.serialize(vars(patient)):
            self.shards.write(record)

    def __exit__(self, *_: Any) -> None:
        self.shards.close()
        self._rows.seek(0)
        self._write_header()
        self._rows.close()

    def _write_header(self) -> None:
        """Of a .npy file; NumPy leaves room in it for any number of rows."""
        descr = npy.dtype_to_descr(self._row_type)
        npy.write_array_header_2_0(self._rows, {"descr": descr, "fortran_order": False, "shape": (self.slices,)})


def write_manifest(
    folder: Path,
    settings: Settings,
    record: Mapping[str, Any],
    splits: Mapping[str, Mapping[str, int]],
    checksums: Mapping[str, str],
    **more: Any,
) -> None:
    """manifest.json of a data set whose other .npy files lie in `folder`; `checksums` are of its records."""
    files = {}
    for path in sorted(folder.glob("*.npy")):
        with path.open("rb") as file:
            files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    content = {
        "patients": sum(counts["patients"] for counts in splits.values()),
        "slices": sum(counts["slices"] for counts in splits.values()),
        "splits": splits,
        "settings": settings.to_json(),
        "record": record,
        "files": {**files, **checksums},
    }
    manifest = {"format_version": FORMAT_VERSION, "digest": content_digest({**content, **more}), **content, **more}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
