"""What a reader brings: read as the library reads files, bounded, and nowhere on disk."""

import gzip
import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation.picture import FOREGROUND, prepare_picture
from decomp_jax.preparation.scan import open_scan
from decomp_jax.room import upload
from decomp_jax.room.upload import Brought

SCANS = Settings("brats", 32)
PICTURES = Settings("images", 32, modalities=("image",), foreground=FOREGROUND)


def scan() -> bytes:
    volume = np.zeros((40, 48, 10), np.int16)
    volume[8:30, 10:40, 2:8] = np.random.default_rng(0).integers(50, 200, (22, 30, 6))
    image = nib.Nifti1Image(volume, np.diag([4.0, 4, 4, 1]))
    longer_than_a_header = nib.nifti1.Nifti1Extension("comment", b"comment " * 100)
    image.header.extensions.append(longer_than_a_header)
    return image.to_bytes()


def picture(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_a_scan_is_prepared_as_from_its_file(tmp_path: Path, name: str) -> None:
    data = scan()
    if name.endswith("gz"):  # two members, as bgzip writes them
        data = gzip.compress(data[:5000]) + gzip.compress(data[5000:])
    (tmp_path / name).write_bytes(data)
    brought = Brought(SCANS)
    answer = brought.take(data)
    assert answer == {"number": 1, "slices": [2, 3, 4, 5, 6, 7], "scan": True}
    np.testing.assert_array_equal(brought.slice_of(1, 5), open_scan(tmp_path / name, SCANS).shown(5))
    for wrong in (1, 8, "5", None, 5.0):
        with pytest.raises(UserError, match="shows nothing"):
            brought.slice_of(1, wrong)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_picture_is_prepared_as_from_its_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"a.{kind}").write_bytes(picture(kind))
    brought = Brought(PICTURES)
    assert brought.take(picture(kind)) == {"number": 1, "slices": [0], "scan": False}
    np.testing.assert_array_equal(brought.slice_of(1, 0), prepare_picture(tmp_path / f"a.{kind}", PICTURES))


def test_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "MOST_KEPT", 2 * 6 * 32 * 32 * 2)  # two scans of six slices
    brought = Brought(SCANS)
    for _ in range(3):
        brought.take(scan())
    with pytest.raises(UserError, match="no longer at hand"):
        brought.slice_of(1, 5)
    brought.slice_of(2, 5)


def bomb(most: int) -> bytes:
    """A gzip file of a real scan, then so many bytes of zeros."""
    packer = zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16)
    zeros = bytes(1 << 24)
    return b"".join([packer.compress(scan()), *(packer.compress(zeros) for _ in range(most >> 24)), packer.flush()])


def declaring(shape: tuple[int, int, int]) -> bytes:
    header = nib.Nifti2Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape(shape)
    return header.binaryblock + bytes(4096)


def png_bomb(side: int) -> bytes:
    """A PNG of side x side zeros, a few kB a gigabyte."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join([*(packer.compress(bytes(side + 1)) for _ in range(side)), packer.flush()])
    return upload.PNG + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{}], object), allow_pickle=True)
    return file.getvalue()


ATTACKS = {
    "gzip bomb": (lambda: bomb(1 << 27), "not what its header declares"),
    "terabytes": (lambda: declaring((100_000, 100_000, 100)), "declares 1,000,000,000,000 voxels"),
    "terabytes, packed": (lambda: gzip.compress(declaring((100_000, 100_000, 100))), "declares 1,000,000"),
    "more than is there": (lambda: declaring((400, 400, 400)), "truncated"),
    "nothing": (lambda: b"", "no NIfTI file"),
    "a pickle": (pickled, "no NIfTI file"),
    "cut short": (lambda: gzip.compress(scan())[:-900], "not what its header declares|damaged gzip"),
    "wrong checksum": (lambda: gzip.compress(scan())[:-8] + b"12345678", "damaged gzip"),
    "no gzip": (lambda: upload.GZIP + b"nonsense", "damaged gzip"),
    "text": (lambda: b"<script>alert(1)</script>" * 100, "no NIfTI file"),
}
PICTURE_ATTACKS = {
    "PNG bomb": (lambda: png_bomb(12_000), "12000 x 12000 pixels|can't be read"),
    "PNG within Pillow's own limit": (lambda: png_bomb(6_000), "6000 x 6000 pixels"),
    "PNG cut short": (lambda: picture("png")[:-600], "can't be read"),
    "a GIF called PNG": (lambda: upload.PNG + picture("gif"), "can't be read"),
    "JPEG without end": (lambda: upload.JPEG + bytes(1000), "can't be read"),
}


@pytest.mark.parametrize("name", [*ATTACKS, *PICTURE_ATTACKS])
def test_attacks_are_told_and_cost_little(name: str) -> None:
    (attack, message), settings = (ATTACKS[name], SCANS) if name in ATTACKS else (PICTURE_ATTACKS[name], PICTURES)
    data, brought = attack(), Brought(settings)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            brought.take(data)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("data", "settings", "message"), [
    (scan(), PICTURES, "bring a PNG or JPEG"),
    (picture("png"), SCANS, "bring a NIfTI"),
    (scan(), Settings("brats", 32, modalities=("t1ce", "flair")), "t1ce, flair together"),
])
def test_what_the_network_can_not_read_is_told(data: bytes, settings: Settings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Brought(settings).take(data)
