"""Random access to the slices of a prepared data set: every record is CRC-checked, none is looked at beforehand."""

import copy
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
from jaxtyping import Shaped

from decomp_jax.data.schema import (
    FORMAT_VERSION, RECORD_FOOTER, RECORD_HEADER, ROW_COLUMNS, Settings, content_digest
)
from decomp_jax.errors import UserError
from decomp_jax.files import map_array, read_json

_CRC_MASK_DELTA = 0xA282EAD8
_OPEN_FILES = 256  # a large data set has more shards than a process may open


def read_manifest(data_dir: str | Path) -> dict[str, Any]:
    """manifest.json of a data set. Raises UserError where there is none that can be used."""
    path = Path(data_dir) / "manifest.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; make a data set with `python -m data_prep phantom --out {data_dir}`")
    manifest = read_json(path, "prepare the data again")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: not of format {FORMAT_VERSION}; prepare the data again with this version")
    whole = manifest.get("digest") == content_digest(manifest) and isinstance(manifest.get("source"), dict)
    if not whole:
        raise UserError(f"{path}: damaged or edited, its digest does not hold; copy or prepare the data again")
    return manifest


class SliceDataset:
    """Splits of a prepared data set, mostly one; `dataset[i]` is a slice as NumPy arrays (see data/schema.py).

    Attributes:
        settings: how the images were prepared.
        digest: sha256 that names the data set's content.
        rows: structured array, of one split mapped from its file, a row a slice: patient_id, slice_index, position_mm,
            has_abnormality, labelled and whatever further columns the source had.
    """

    def __init__(self, data_dir: str | Path, *splits: str) -> None:
        """Raises UserError if the data set, a split or a file is missing, or rows and records do not match.

        Rows are compared with their checksum, files of records with their length and their last record's checksum.
        """
        data_dir, manifest = Path(data_dir), read_manifest(data_dir)
        for split in splits:
            if split not in manifest["splits"]:
                raise UserError(f"{data_dir}: no split {split!r}; there are {', '.join(manifest['splits'])}")
        self.settings = self._stored = Settings.from_json(manifest["settings"])
        self._record_bytes, self._offsets = manifest["record"]["bytes"], manifest["record"]["offsets"]
        self.digest: str = manifest["digest"]
        rows = [_map_rows(data_dir / f"rows-{split}.npy") for split in splits]
        self.rows = rows[0] if len(rows) == 1 else np.concatenate(rows)
        shards = [
            (folder / name, part["record"].get("ends", {}).get(Path(name).name))
            for split in splits for folder, part in _parts(data_dir, manifest)
            for name in sorted(part["files"]) if name.startswith(f"slices/slices-{split}.tfrecord-")
        ]
        self._shards = [path for path, _ in shards]
        self._ends = np.cumsum([_count_records(path, self._record_bytes, end) for path, end in shards], dtype=int)
        self._open = functools.lru_cache(_OPEN_FILES)(functools.partial(open, mode="rb", buffering=0))
        slices = sum(manifest["splits"][split]["slices"] for split in splits)
        if not len(self) == len(self.rows) == slices:
            raise UserError(f"{data_dir}: split {', '.join(splits)} has {len(self)} records, {len(self.rows)} rows "
                            f"and, by manifest.json, {slices} slices; copy or prepare the data again")
        for split in splits:
            check_sum(data_dir / f"rows-{split}.npy", manifest["files"])

    def with_modalities(self, names: tuple[str, ...]) -> Self:
        """The same slices with these channels; those that are not stored are 0."""
        other = copy.copy(self)
        other.settings = dataclasses.replace(self.settings, modalities=names)
        return other

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Raises UserError if the record's checksum does not hold."""
        return {name: values[0] for name, values in self.stack(tuple(self.settings.fields), [i]).items()}

    def stack(self, names: Sequence[str], rows: Sequence[int] | None = None) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        """The named fields, and no others, of all slices or of those given, stacked along a new first axis.

        Raises UserError if a record's checksum does not hold.
        """
        rows = range(len(self)) if rows is None else rows
        fields = {name: self._stored.fields[name] for name in names}
        stacked = {name: np.empty((len(rows), field.itemsize), np.uint8) for name, field in fields.items()}
        pieces = self._pieces(stacked)
        for place, row in enumerate(rows):
            self._read(int(row), [piece[place] if piece.ndim == 2 else piece for piece in pieces])
        return {
            name: self._channels(stacked[name].view(field.base).reshape(len(rows), *field.shape))
            for name, field in fields.items()
        }

    def _channels(self, values: np.ndarray) -> np.ndarray:
        """Those of `settings`, of an image [n,S,S,C]; label maps [n,S,S] as they are."""
        stored, shown = self._stored.modalities, self.settings.modalities
        if values.ndim < 4 or shown == stored:
            return values
        missing = np.zeros(values.shape[:-1], values.dtype)
        return np.stack([values[..., stored.index(name)] if name in stored else missing for name in shown], axis=-1)

    def _pieces(self, stacked: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Where the bytes of a record go, one after the other: into a row of `stacked`, or into bytes not needed."""
        spare = np.empty(self._record_bytes, np.uint8)
        pieces, at = [spare[:RECORD_HEADER]], RECORD_HEADER
        for name in sorted(stacked, key=self._offsets.__getitem__):
            pieces += [spare[at : self._offsets[name]], stacked[name]]
            at = self._offsets[name] + stacked[name].shape[1]
        return [*pieces, spare[at:-RECORD_FOOTER], spare[-RECORD_FOOTER:]]

    def _read(self, row: int, buffers: list[np.ndarray]) -> None:
        """Reads a record into `buffers`, of which the first is its header and the last its checksum."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        path, i = self._shards[shard], row - int(self._ends[shard - 1] if shard else 0)
        file = self._open(path)  # held, for another thread may take it from the cache and so close it
        # Not mapped: a disk that fails is an error then and no SIGBUS, and other threads go on while one waits for it.
        if os.preadv(file.fileno(), buffers, i * self._record_bytes) < self._record_bytes:
            raise UserError(f"{path}: cut short; copy or prepare the data again")
        crc = functools.reduce(google_crc32c.extend, buffers[1:-1], 0)
        if ((crc >> 15 | crc << 17) + _CRC_MASK_DELTA) & 0xFFFFFFFF != int.from_bytes(buffers[-1], "little"):
            raise UserError(f"{path}: record {i} is damaged (checksum); copy or prepare the data again")


def _parts(data_dir: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and manifest of each part of a joined data set, or of the only one."""
    if "parts" not in manifest:
        yield data_dir, manifest
    for part in manifest.get("parts", []):
        folder = data_dir / part["path"]
        if not folder.is_dir():
            raise UserError(f"{folder}: not found, a part of {data_dir}; join the parts again where they lie")
        known = read_manifest(folder)
        if known["digest"] != part["digest"]:
            raise UserError(f"{folder}: is not what was joined as {data_dir}; join again")
        yield folder, known


def _count_records(path: Path, record_bytes: int, end: str | None) -> int:
    """`end`: the checksum of the last record, where the manifest knows it."""
    try:
        with path.open("rb") as file:
            count, rest = divmod(file.seek(0, os.SEEK_END), record_bytes)
            file.seek(-min(RECORD_FOOTER, file.tell()), os.SEEK_END)
            found = file.read().hex()
    except FileNotFoundError:
        raise UserError(f"{path}: not found; copy or prepare the data again") from None
    if rest:
        raise UserError(f"{path}: cut short; copy or prepare the data again")
    if end not in (None, found):
        raise UserError(f"{path}: its last record is not the one that was prepared, so that it is damaged or another "
                        "data set's; copy or prepare the data again")
    return count


def _map_rows(path: Path) -> np.ndarray:
    rows = map_array(path, "copy or prepare the data again").view(np.ndarray)
    if not {*ROW_COLUMNS} <= {*(rows.dtype.names or ())} or rows.ndim != 1:
        raise UserError(f"{path}: lacks the columns {', '.join(ROW_COLUMNS)}; copy or prepare the data again")
    return rows


def check_sum(path: Path, checksums: dict[str, str], name: str = "") -> None:
    """Raises UserError if a file is missing, or not the one whose SHA-256 stands in manifest.json under `name`."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: not found; copy or prepare the data again") from None
    if found != checksums.get(name or path.name):
        raise UserError(f"{path}: checksum is not the one in manifest.json, so that it is damaged, edited or another "
                        "data set's; copy or prepare the data again")


def verify(data_dir: str | Path) -> None:
    """Reads all files of a data set. Raises UserError if the checksum of one is not that of manifest.json."""
    data_dir, manifest = Path(data_dir), read_manifest(data_dir)
    for split in manifest["splits"]:
        SliceDataset(data_dir, split)
    for folder, part in _parts(data_dir, manifest):
        for name in part["files"]:
            check_sum(folder / name, part["files"], name)
