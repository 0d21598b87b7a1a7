"""What a reader brings: read from bytes, bounded before it is unpacked, kept in memory and nowhere else."""

import collections
import io
import itertools
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation.picture import FOREGROUND as PICTURES
from decomp_jax.preparation.picture import parse_picture, prepare_values
from decomp_jax.preparation.scan import make_scan
from decomp_jax.preparation.volume import Source, declared_bytes, parse_volume

# Pixels of a picture; voxels of a scan, of which float32 copies take some 1.5 GB while it is prepared; bytes of
# prepared slices that are kept.
MOST_PIXELS = 1 << 25
MOST_VOXELS = 1 << 26
MOST_BYTES = 9 * MOST_VOXELS
MOST_KEPT = 1 << 28
GZIP, PNG, JPEG = b"\x1f\x8b", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
HEADER = 540  # bytes of the longest NIfTI header
# Stands for the file's name, which stays in the browser.
FILE = Path("the file")


class Brought:
    """The slices of scans and pictures that were brought to one room; the oldest are forgotten."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._numbers = itertools.count(1)
        self._kept: collections.OrderedDict[int, dict[int, np.ndarray]] = collections.OrderedDict()

    def take(self, data: bytes) -> dict[str, Any]:
        """Number of what was brought, and the slices of a scan that can be asked for.

        Raises:
            UserError: the bytes are no NIfTI scan, PNG or JPEG that the network can read.
        """
        if len(self._settings.modalities) > 1:
            names = ", ".join(self._settings.modalities)
            raise UserError(f"{FILE}: the network reads {names} together, of which a page can bring one; "
                            "prepare the patient with data_prep and encode it into a bank")
        picture = data.startswith((PNG, JPEG))
        if picture != (self._settings.foreground == PICTURES):
            wanted = "scans: bring a NIfTI file" if picture else "pictures: bring a PNG or JPEG"
            raise UserError(f"{FILE}: the network was trained on {wanted}")
        if picture:
            slices = {0: prepare_values(FILE, _bitmap(data), self._settings)}
        else:
            slices = _slices(data, self._settings)
        number = next(self._numbers)
        self._kept[number] = slices
        while len(self._kept) > 1 and sum(_size(kept) for kept in self._kept.values()) > MOST_KEPT:
            self._kept.popitem(last=False)
        return {"number": number, "slices": list(slices), "scan": not picture}

    def slice_of(self, number: Any, slice_index: Any) -> np.ndarray:
        """float16 [S,S,C]. Raises UserError if there is no such slice, or no longer."""
        slices = self._kept.get(number) if type(number) is int else None
        if slices is None:
            raise UserError(f"{FILE}: is no longer at hand; bring it again")
        if type(slice_index) is not int or slice_index not in slices:
            raise UserError("slice: shows nothing; take another one")
        return slices[slice_index]


def _size(slices: dict[int, np.ndarray]) -> int:
    return sum(image.nbytes for image in slices.values())


def _bitmap(data: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{FILE}: can't be read as an image; export it again") from error
    if width * height > MOST_PIXELS:
        raise UserError(f"{FILE}: has {width} x {height} pixels; bring one of at most {MOST_PIXELS:,}")
    return parse_picture(FILE, data)


def _slices(data: bytes, settings: Settings) -> dict[int, np.ndarray]:
    packed = data.startswith(GZIP)
    size, voxels = declared_bytes(FILE, _unpacked(data, HEADER)[0] if packed else data[:HEADER])
    if not 0 < voxels <= MOST_VOXELS or not 0 < size <= MOST_BYTES:
        raise UserError(f"{FILE}: declares {voxels:,} voxels; bring a scan of at most {MOST_VOXELS:,}")
    if packed:
        data, whole = _unpacked(data, size + 1)
        if not whole:
            raise UserError(f"{FILE}: is not what its header declares; copy or download it again")
    scan = make_scan([Source(FILE)], [parse_volume(FILE, data)], settings)
    filled = scan.filled_slices
    return dict(zip(filled.tolist(), scan.image(filled)))


def _unpacked(data: bytes, most: int) -> tuple[bytes, bool]:
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
        raise UserError(f"{FILE}: is a damaged gzip file; copy or download it again") from error
