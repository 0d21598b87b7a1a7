"""What a reader brings: read from bytes, bounded before it is unpacked, kept in memory and nowhere else.

A request is a little-endian uint32 n, n bytes of JSON [[size, ...], ...], and files of those sizes: a list of files a
modality of the network, one NIfTI file or those of a DICOM series, or none where modalities may be missing; or one
picture.
"""

import collections
import dataclasses
import hashlib
import io
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float16, Float32
from PIL import Image

from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation import dicom
from decomp_jax.preparation.picture import FOREGROUND as PICTURES
from decomp_jax.preparation.picture import parse_picture, prepare_values
from decomp_jax.preparation.scan import make_scan
from decomp_jax.preparation.volume import Source, declared_bytes, parse_series, parse_volume

# Pixels of a picture; voxels of a scan, of all its modalities together, of which float32 copies take some 1.5 GB while
# it is prepared; bytes of prepared slices that are kept.
MOST_PIXELS = 1 << 25
MOST_VOXELS = 1 << 26
MOST_BYTES = 9 * MOST_VOXELS
MOST_KEPT = 1 << 28
MOST_HEADERS = 1 << 24  # bytes of DICOM files beside their pixels: each element takes many times its own
GZIP, PNG, JPEG = b"\x1f\x8b", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
HEADER = 540  # bytes of the longest NIfTI header
MOST_SIZES = 1 << 16  # bytes of the list of files
# Stands for the file's name, which stays in the browser; of several modalities "the t1ce file".
FILE = Path("the file")


class Slices(NamedTuple):
    """What was brought, as the network reads it.

    Attributes:
        numbers: of the slices in the scan, from the feet up.
        heights: mm; nan of a picture.
    """

    images: Float16[np.ndarray, "n s s c"]
    numbers: list[int]
    heights: Float32[np.ndarray, "n"]


class Brought:
    """The slices of scans and pictures that were brought to one room; the oldest are forgotten."""

    def __init__(self, settings: Settings, *, incomplete: bool = False) -> None:
        """`incomplete`: modalities may be missing."""
        self._settings, self._incomplete = settings, incomplete
        self._kept: collections.OrderedDict[str, Slices] = collections.OrderedDict()

    def take(self, body: bytes) -> dict[str, Any]:
        """What to ask for: an id, the same for the same slices, and the numbers of the slices.

        Raises:
            UserError: the files are nothing that the network can read.
        """
        groups, modalities = _files(body), self._settings.modalities
        if len(groups) != len(modalities) or not (any if self._incomplete else all)(groups):
            names, many = " and ".join(modalities), "some" if self._incomplete else "all"
            raise UserError(f"{FILE}: the network reads {names}; bring {many} of them and nothing else")
        files = [group for group in groups if group]
        pictures, bitmap = self._settings.foreground == PICTURES, files[0][0].startswith((PNG, JPEG))
        if bitmap != pictures and not _is_dicom(files[0][0]):
            wanted = "pictures: bring a PNG, JPEG or DICOM image" if pictures else "scans: bring NIfTI or DICOM"
            raise UserError(f"{FILE}: the network was trained on {wanted}")
        if pictures and len(files[0]) > 1:
            raise UserError(f"{FILE}: is one of {len(files[0])}; bring one picture")
        if pictures:
            image = prepare_values(FILE, _picture(files[0][0]), self._settings)
            slices = Slices(image[None], [0], np.full(1, np.nan, np.float32))
        else:
            there = tuple(name for name, group in zip(modalities, groups) if group)
            slices = _slices(files, there, self._settings)
        name = hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in slices)).hexdigest()
        self._kept[name] = slices
        self._kept.move_to_end(name)
        while len(self._kept) > 1 and sum(kept.images.nbytes for kept in self._kept.values()) > MOST_KEPT:
            self._kept.popitem(last=False)
        return {"id": name, "slices": slices.numbers, "scan": not pictures}

    def get(self, name: Any) -> Slices:
        """Raises UserError if nothing of that id was brought, or it was forgotten."""
        slices = self._kept.get(name) if isinstance(name, str) else None
        if slices is None:
            raise UserError(f"{FILE}: is no longer at hand; bring it again")
        return slices

    def slice_of(self, name: Any, number: Any) -> tuple[Slices, int]:
        """What was brought, and a slice's place in it. Raises UserError if there is no such slice, or no longer."""
        slices = self.get(name)
        if type(number) is not int or number not in slices.numbers:
            raise UserError("slice: shows nothing; take another one")
        return slices, slices.numbers.index(number)


def _files(body: bytes) -> list[list[bytes]]:
    """The files of a request, by modality."""
    file = io.BytesIO(body)
    try:
        length, = struct.unpack("<I", file.read(4))
        groups = json.loads(file.read(min(length, MOST_SIZES)))
        sizes = [size for group in groups for size in group]
    except (struct.error, ValueError, TypeError, RecursionError):
        sizes = [-1]
    if not all(type(size) is int and size >= 0 for size in sizes) or sum(sizes) != len(body) - file.tell():
        raise UserError(f"{FILE}: did not arrive whole; bring it again")
    return [[file.read(size) for size in group] for group in groups]


def _is_dicom(data: bytes) -> bool:
    return data[dicom.MARK_AT:dicom.MARK_AT + len(dicom.MARK)] == dicom.MARK


def _picture(data: bytes) -> Float32[np.ndarray, "y x"]:
    pixels = dicom.declared_bytes(FILE, data)[1] if _is_dicom(data) else _bitmap_pixels(data)
    if pixels > MOST_PIXELS:
        raise UserError(f"{FILE}: has {pixels:,} pixels; bring one of at most {MOST_PIXELS:,}")
    return parse_picture(FILE, data)


def _bitmap_pixels(data: bytes) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                return image.width * image.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{FILE}: can't be read as an image; export it again") from error


def _slices(groups: list[list[bytes]], modalities: tuple[str, ...], settings: Settings) -> Slices:
    """Of a scan, from the files of each of the modalities that are there."""
    names = [FILE] if len(groups) == 1 else [Path(f"the {modality} file") for modality in modalities]
    voxels = sum((_series_voxels if _is_dicom(files[0]) else _volume_voxels)(name, files)
                 for name, files in zip(names, groups))
    if not 0 < voxels <= MOST_VOXELS:
        raise UserError(f"{FILE}: declares {voxels:,} voxels; bring a scan of at most {MOST_VOXELS:,}")
    volumes = [
        parse_series(name, [io.BytesIO(file) for file in files]) if _is_dicom(files[0])
        else parse_volume(name, _whole(name, files[0])) for name, files in zip(names, groups)
    ]
    scan = make_scan([Source(name) for name in names], volumes, dataclasses.replace(settings, modalities=modalities))
    scan = scan.with_modalities(settings.modalities)
    filled = scan.filled_slices
    return Slices(scan.image(filled), filled.tolist(), scan.position_mm(filled))


def _series_voxels(name: Path, files: list[bytes]) -> int:
    if not all(map(_is_dicom, files)):
        raise UserError(f"{name}: is brought with files of other kinds; bring those of one series")
    sizes, voxels = zip(*(dicom.declared_bytes(name, file) for file in files))
    if sum(map(len, files)) - sum(sizes) > MOST_HEADERS:
        raise UserError(f"{name}: holds more beside its pixels than the room takes; export the scan alone")
    return sum(voxels)


def _volume_voxels(name: Path, files: list[bytes]) -> int:
    if len(files) > 1:
        raise UserError(f"{name}: is one of {len(files)}; bring one NIfTI file, or those of one DICOM series")
    size, voxels = _declared(name, files[0])
    return voxels if 0 < size <= MOST_BYTES else max(voxels, MOST_VOXELS + 1)


def _declared(name: Path, data: bytes) -> tuple[int, int]:
    """Bytes of a NIfTI file, unpacked, and its voxels."""
    return declared_bytes(name, _unpacked(name, data, HEADER)[0] if data.startswith(GZIP) else data[:HEADER])


def _whole(name: Path, data: bytes) -> bytes:
    """A NIfTI file, no longer compressed."""
    if not data.startswith(GZIP):
        return data
    data, whole = _unpacked(name, data, _declared(name, data)[0] + 1)
    if not whole:
        raise UserError(f"{name}: is not what its header declares; copy or download it again")
    return data


def _unpacked(name: Path, data: bytes, most: int) -> tuple[bytes, bool]:
    """The first `most` bytes, no more being ever unpacked, and whether that is all, with the right checksums.

    A gzip file may have several members, one after the other.
    """
    parts, length = [], 0
    try:
        while data and length < most:
            unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
            parts.append(unpacker.decompress(data, most - length))
            length, data = length + len(parts[-1]), unpacker.unused_data
            if not unpacker.eof:
                return b"".join(parts), False
        return b"".join(parts), not data
    except zlib.error as error:
        raise UserError(f"{name}: is a damaged gzip file; copy or download it again") from error
