"""Random access to the slices of a prepared data set: an offset index over TFRecord shards, every record CRC-checked."""

import csv
import json
import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import tensorflow_datasets as tfds

from decomp_jax.data.schema import FORMAT_VERSION, SLICE_COLUMNS, Settings
from decomp_jax.errors import UserError

_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_CRC_MASK_DELTA = 0xA282EAD8


def read_manifest(data_dir: str | Path) -> dict[str, Any]:
    """manifest.json of a data set. Raises UserError where there is none."""
    path = Path(data_dir) / "manifest.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; make a data set with `python -m data_prep phantom --out {data_dir}`")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); prepare the data again") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: not of format {FORMAT_VERSION}; prepare the data again with this version")
    return manifest


class SliceDataset:
    """One split of a prepared data set; `dataset[i]` is a slice as NumPy arrays (see data/schema.py).

    Attributes:
        settings: how the images were prepared.
        digest: sha256 that names the data set's content.
        rows: structured array, a row a slice: patient_id, slice_index, position_mm, has_abnormality, labelled and
            whatever further columns the source had.
    """

    def __init__(self, data_dir: str | Path, split: str) -> None:
        """Raises UserError if the data set, the split or a shard is missing, or rows and records do not match."""
        manifest = read_manifest(data_dir)
        if split not in manifest["splits"]:
            raise UserError(f"{data_dir}: no split {split!r}; there are {', '.join(manifest['splits'])}")
        self.settings = Settings.from_json(manifest["settings"])
        self.digest: str = manifest["digest"]
        self.rows = _read_rows(Path(data_dir) / "slices.csv", split)
        folder = _records_folder(Path(data_dir))
        self._features = tfds.features.FeaturesDict.from_config(str(folder))
        self._shards = [_Shard(path) for path in sorted(folder.glob(f"*-{split}.tfrecord-*"))]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        if len(self) != len(self.rows):
            raise UserError(f"{folder}: {len(self)} records for {len(self.rows)} lines in slices.csv; prepare it again")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def record(self, i: int) -> bytes:
        """The serialised slice. Raises UserError if its checksum does not hold."""
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return self._shards[shard].read(int(i) - int(self._ends[shard - 1] if shard else 0))

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Raises UserError if the record's checksum does not hold."""
        return self._features.deserialize_example_np(self.record(i))

    def stack(self, names: Sequence[str], rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """The named fields, and no others, of all slices or of those given, stacked along a new first axis."""
        features = tfds.features.FeaturesDict({name: self._features[name] for name in names})
        rows = range(len(self)) if rows is None else rows
        stacked = {name: np.empty((len(rows), *one.shape), one.np_dtype) for name, one in features.items()}
        for place, i in enumerate(rows):
            for name, value in features.deserialize_example_np(self.record(i)).items():
                stacked[name][place] = value
        return stacked


class _Shard:
    """A memory-mapped TFRecord file: `length, crc(length), data, crc(data)` again and again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        self._offsets = self._index()

    def __len__(self) -> int:
        return len(self._offsets)

    def _index(self) -> list[tuple[int, int]]:
        offsets, at = [], 0
        while at < len(self._bytes):
            if at + _HEADER.size > len(self._bytes):
                raise UserError(f"{self._path}: cut short; prepare the data again")
            length, crc = _HEADER.unpack_from(self._bytes, at)
            self._check(self._bytes[at : at + 8], crc, len(offsets))
            offsets.append((at + _HEADER.size, length))
            at += _HEADER.size + length + _CRC.size
        if at != len(self._bytes):
            raise UserError(f"{self._path}: cut short; prepare the data again")
        return offsets

    def read(self, i: int) -> bytes:
        at, length = self._offsets[i]
        data = self._bytes[at : at + length]
        self._check(data, _CRC.unpack_from(self._bytes, at + length)[0], i)
        return data

    def _check(self, data: bytes, expected: int, record: int) -> None:
        crc = google_crc32c.value(data)
        if ((crc >> 15 | crc << 17) + _CRC_MASK_DELTA) & 0xFFFFFFFF != expected:
            raise UserError(f"{self._path}: record {record} is damaged (checksum); copy or prepare the data again")


def _records_folder(data_dir: Path) -> Path:
    found = sorted(data_dir.glob("slices/*/features.json"))
    if not found:
        raise UserError(f"{data_dir}: no slices/*/features.json; prepare the data again")
    return found[-1].parent


def _read_rows(path: Path, split: str) -> np.ndarray:
    """Lines of one split as a structured array; extra columns are numbers where all their values are, else text."""
    if not path.is_file():
        raise UserError(f"{path}: not found; prepare the data again")
    with path.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["split"] == split]
    names = list(lines[0]) if lines else list(SLICE_COLUMNS)
    columns = {name: _column(name, [line[name] for line in lines]) for name in names if name != "split"}
    rows = np.empty(len(lines), [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        rows[name] = column
    return rows


def _column(name: str, values: list[str]) -> np.ndarray:
    known = {"slice_index": np.int32, "position_mm": np.float32}
    if name in ("has_abnormality", "labelled"):
        return np.array([value == "1" for value in values], bool)
    if name in known:
        return np.array([value or "nan" for value in values]).astype(known[name])
    if name == "patient_id":
        return np.array(values, "U")
    try:
        return np.array(values).astype(np.float64)
    except ValueError:
        return np.array(values, "U")
