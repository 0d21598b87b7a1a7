"""What a reader brings: read as the library reads files, bounded, and nowhere on disk."""

import gzip
import io
import json
import logging
import struct
import sys
import tempfile
import tracemalloc
import warnings
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.preparation.picture import FOREGROUND, prepare_picture
from decomp_jax.preparation.scan import open_scan
from decomp_jax.room import upload
from decomp_jax.room.upload import Brought
from tests.data_prep.same_patients import AFFINE, patient, save_series, uid

SCANS = Settings("brats", 32)
PICTURES = Settings("images", 32, modalities=("image",), foreground=FOREGROUND)
TWO = Settings("brats", 32, modalities=("t1ce", "flair"))


def body(*groups: list[bytes]) -> bytes:
    """A request, a list of files a modality."""
    head = json.dumps([[len(file) for file in files] for files in groups]).encode()
    return struct.pack("<I", len(head)) + head + b"".join(file for files in groups for file in files)


def scan(seed: int = 0) -> bytes:
    volume = np.zeros((40, 48, 10), np.int16)
    volume[8:30, 10:40, 2:8] = np.random.default_rng(seed).integers(50, 200, (22, 30, 6))
    image = nib.Nifti1Image(volume, np.diag([4.0, 4, 4, 1]))
    longer_than_a_header = nib.nifti1.Nifti1Extension("comment", b"comment " * 100)
    image.header.extensions.append(longer_than_a_header)
    return image.to_bytes()


def image_of(brought: Brought, name: str, number: int) -> np.ndarray:
    slices, at = brought.slice_of(name, number)
    return slices.images[at]


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
    answer = brought.take(body([data]))
    assert answer == {"id": answer["id"], "slices": [2, 3, 4, 5, 6, 7], "scan": True}
    np.testing.assert_array_equal(image_of(brought, answer["id"], 5), open_scan(tmp_path / name, SCANS).shown(5))
    np.testing.assert_array_equal(brought.get(answer["id"]).heights, 4 * np.arange(2, 8))
    for wrong in (1, 8, "5", None, 5.0):
        with pytest.raises(UserError, match="shows nothing"):
            brought.slice_of(answer["id"], wrong)


def test_the_same_slices_have_the_same_id() -> None:
    """So that a session finds a scan that is brought again, and no other."""
    ids = [Brought(SCANS).take(body([data]))["id"] for data in (scan(), gzip.compress(scan()), scan(seed=1))]
    assert ids[0] == ids[1] != ids[2]


def test_modalities_are_files_of_their_own(tmp_path: Path) -> None:
    for name, seed in (("t1ce", 0), ("flair", 1)):
        (tmp_path / f"{name}.nii.gz").write_bytes(gzip.compress(scan(seed)))
    brought = Brought(TWO)
    name = brought.take(body([scan(0)], [gzip.compress(scan(1))]))["id"]
    found = image_of(brought, name, 4)
    np.testing.assert_array_equal(found, open_scan(tmp_path, TWO).shown(4))
    assert found.shape == (32, 32, 2) and (found[..., 0] != found[..., 1]).any()


def test_modalities_may_be_missing_where_the_network_was_trained_so(tmp_path: Path) -> None:
    (tmp_path / "flair.nii.gz").write_bytes(gzip.compress(scan(1)))
    brought = Brought(TWO, incomplete=True)
    name = brought.take(body([], [scan(1)]))["id"]
    found = image_of(brought, name, 4)
    assert found.shape == (32, 32, 2) and not found[..., 0].any()
    np.testing.assert_array_equal(found[..., 1:], open_scan(tmp_path, TWO).shown(4))
    with pytest.raises(UserError, match="t1ce and flair; bring some of them"):
        brought.take(body([], []))


@pytest.fixture
def series(tmp_path: Path) -> list[bytes]:
    save_series(tmp_path, "P", uid(), patient(0).t1ce)
    return [path.read_bytes() for path in sorted(tmp_path.iterdir())]


def test_a_dicom_series_is_prepared_as_from_its_folder(tmp_path: Path, series: list[bytes]) -> None:
    brought = Brought(SCANS)
    answer = brought.take(body(series))
    assert answer["slices"] == [1, 2, 3, 4]
    for number in answer["slices"]:
        np.testing.assert_array_equal(image_of(brought, answer["id"], number), open_scan(tmp_path, SCANS).shown(number))
    assert brought.take(body([dicom()]))["slices"] == [0]


def test_a_series_and_a_nifti_file_are_modalities_of_one_scan(series: list[bytes]) -> None:
    flair = nib.Nifti1Image(patient(0).flair, AFFINE)
    flair.header.set_qform(AFFINE)
    assert Brought(TWO).take(body(series, [flair.to_bytes()]))["slices"] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="give files of one grid"):
        Brought(TWO).take(body(series, [scan()]))


def test_a_dicom_image_is_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(image := dicom())
    brought = Brought(PICTURES)
    name = brought.take(body([image]))["id"]
    np.testing.assert_array_equal(image_of(brought, name, 0), prepare_picture(tmp_path / "a.dcm", PICTURES))


def test_nothing_that_dicom_says_of_a_patient_is_kept_or_told(
    tmp_path: Path, series: list[bytes], capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture,
) -> None:
    """Not in what is kept, in errors or in logs, of values that pydicom warns of, too."""
    def change(data: bytes, **tags: object) -> bytes:
        one, out = pydicom.dcmread(io.BytesIO(data)), io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for tag, value in tags.items():
                one.add_new(pydicom.datadict.tag_for_keyword(tag), pydicom.datadict.dictionary_VR(tag), value)
            one.save_as(out, enforce_file_format=True)
        return out.getvalue()

    brought = Brought(SCANS)
    odd = [change(one, PatientBirthDate="Doe, Jane", PatientAge="Doe" * 30, SeriesInstanceUID="1.Doe^Jane",
                  FrameOfReferenceUID="2.Doe^Jane") for one in series]
    other = change(series[0], SeriesInstanceUID="1.2.3")
    capfd.readouterr(), caplog.clear()
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        answer = brought.take(body(odd))
        with pytest.raises(UserError) as refused:
            brought.take(body([other, *odd[1:]]))
    said = repr(answer) + str(refused.value) + caplog.text + "".join(capfd.readouterr())
    assert not [secret for secret in ("Doe", "MRN", "Jane") if secret in said]
    assert logging.getLogger("pydicom").isEnabledFor(logging.WARNING), "others are still told"


def test_without_highdicom_the_extra_is_named(series: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(UserError, match=r"highdicom, which is not installed; pip install .*\[dicom\]"):
        Brought(SCANS).take(body(series))
    assert Brought(SCANS).take(body([scan()]))["scan"]


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_picture_is_prepared_as_from_its_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"a.{kind}").write_bytes(picture(kind))
    brought = Brought(PICTURES)
    answer = brought.take(body([picture(kind)]))
    assert answer == {"id": answer["id"], "slices": [0], "scan": False}
    np.testing.assert_array_equal(image_of(brought, answer["id"], 0), prepare_picture(tmp_path / f"a.{kind}", PICTURES))


def test_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "MOST_KEPT", 2 * 6 * 32 * 32 * 2)  # two scans of six slices
    brought = Brought(SCANS)
    ids = [brought.take(body([scan(seed)]))["id"] for seed in (0, 1, 0, 2)]
    with pytest.raises(UserError, match="no longer at hand"):
        brought.slice_of(ids[1], 5)
    for name in (ids[0], ids[3]):
        brought.slice_of(name, 5)


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


def dicom(declared: int = 36, *, syntax: str = pydicom.uid.ExplicitVRLittleEndian, **tags: object) -> bytes:
    """An image of `declared` columns and, whatever it declares, 36 x 40 pixels."""
    with tempfile.TemporaryDirectory() as folder:
        one, out = save_series(Path(folder), "P", uid(), patient(0).t1ce)[2], io.BytesIO()
    one.Columns, one.file_meta.TransferSyntaxUID = declared, syntax
    if one.file_meta.TransferSyntaxUID.is_encapsulated:
        one.PixelData = pydicom.encaps.encapsulate([one.PixelData])
    for name, value in tags.items():
        setattr(one, name, value)
    one.save_as(out, enforce_file_format=True)
    return out.getvalue()


def deflated_bomb() -> bytes:
    """Some 128 MiB of zeros behind the header of a deflated file."""
    head, packer, zeros = dicom(), zlib.compressobj(9, wbits=-zlib.MAX_WBITS), bytes(1 << 24)
    at = head.index(b"1.2.840.10008.1.2.1")
    deflated = head[:at] + b"1.2.840.10008.1.2.1.99" + head[at + 20:]
    deflated = deflated.replace(struct.pack("<H", 20) + b"1.2.840.10008.1.2.1.99", struct.pack("<H", 22)
                                + b"1.2.840.10008.1.2.1.99")
    return deflated + b"".join([*(packer.compress(zeros) for _ in range(8)), packer.flush()])


DICOM_ATTACKS = {
    "DICOM that declares more than is there": (lambda: dicom(60_000), "not what its header declares"),
    "DICOM of a billion frames": (lambda: dicom(NumberOfFrames=10**9), "not what its header declares"),
    "deflated DICOM": (deflated_bomb, "is compressed"),
    "DICOM in JPEG 2000": (lambda: dicom(syntax=pydicom.uid.JPEG2000Lossless), "is compressed .JPEG 2000"),
    "DICOM in run lengths": (lambda: dicom(syntax=pydicom.uid.RLELossless), "is compressed .RLE"),
    "a slide of a microscope": (lambda: dicom(TotalPixelMatrixRows=100_000), "no DICOM image of whole slices"),
    "DICOM without pixels": (lambda: dicom()[:400], "no DICOM image|can't be read as DICOM"),
    "DICOM in name alone": (lambda: bytes(128) + b"DICM" + b"nonsense" * 100, "can't be read as DICOM|no DICOM image"),
    "DICOM of sequences in sequences": (lambda: nested(2000), "can't be read as DICOM|no DICOM image"),
    "a single pixel bit": (lambda: dicom(BitsAllocated=1), "not what its header declares"),
    "DICOM with far more than its pixels": (
        lambda: dicom(EncapsulatedDocument=bytes(upload.MOST_HEADERS + 2)), "beside its pixels"),
}


def nested(depth: int) -> bytes:
    """Sequences, each the only item of the one around it, of undefined length."""
    return dicom() + depth * (b"\x0b\x00\x01\x10SQ\x00\x00\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff")


PICTURE_ATTACKS = {
    "PNG bomb": (lambda: png_bomb(12_000), "144,000,000 pixels|can't be read"),
    "PNG within Pillow's own limit": (lambda: png_bomb(6_000), "36,000,000 pixels"),
    "PNG cut short": (lambda: picture("png")[:-600], "can't be read"),
    "a GIF called PNG": (lambda: upload.PNG + picture("gif"), "can't be read"),
    "JPEG without end": (lambda: upload.JPEG + bytes(1000), "can't be read"),
}


@pytest.mark.parametrize("name", [*ATTACKS, *DICOM_ATTACKS, *PICTURE_ATTACKS])
def test_attacks_are_told_and_cost_little(name: str) -> None:
    attack, message = {**ATTACKS, **DICOM_ATTACKS, **PICTURE_ATTACKS}[name]
    data, brought = body([attack()]), Brought(PICTURES if name in PICTURE_ATTACKS else SCANS)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            brought.take(data)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("files", "settings", "message"), [
    ([[scan()]], PICTURES, "bring a PNG, JPEG or DICOM"),
    ([[picture("png")]], SCANS, "bring NIfTI or DICOM"),
    ([[scan()]], TWO, "t1ce and flair; bring all of them"),
    ([[scan()], []], TWO, "t1ce and flair; bring all of them"),
    ([[declaring((400, 400, 300))]] * 2, TWO, "declares 96,000,000 voxels"),
    ([[scan()], [b"nothing"]], TWO, "the flair file: is no NIfTI"),
    ([[scan()], [scan(), scan()]], TWO, "the flair file: is one of 2"),
    ([[scan()], [scan()]], SCANS, "reads t1ce; bring"),
    ([[scan(), scan()]], SCANS, "is one of 2; bring one NIfTI file"),
    ([[dicom(), scan()]], SCANS, "files of other kinds"),
    ([[scan(), dicom()]], SCANS, "is one of 2"),
    ([[picture("png"), picture("png")]], PICTURES, "is one of 2"),
    ([[dicom(), dicom()]], SCANS, "can't be read as DICOM"),
    ([], SCANS, "bring all of them"),
])
def test_what_the_network_can_not_read_is_told(files: list[list[bytes]], settings: Settings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Brought(settings).take(body(*files))


def sized(head: bytes) -> bytes:
    return struct.pack("<I", len(head)) + head


@pytest.mark.parametrize("data", [
    b"", b"\x01", struct.pack("<I", 1 << 31) + b"[]", sized(b"[[1]]"), sized(b"[[1]]") + b"ab",
    sized(b"[[-1, 2]]") + b"a", sized(b"{}"), sized(b"[1]") + b"a", sized(b"[[1.0]]") + b"a", sized(b"[[true]]") + b"a",
    sized(b'["a"]'), sized(b"null"), sized(b"[" * 30_000), sized(b"[[" + b"0," * upload.MOST_SIZES + b"0]]"),
])
def test_bodies_that_are_no_files_are_told(data: bytes) -> None:
    with pytest.raises(UserError, match="did not arrive whole|bring all of them"):
        Brought(SCANS).take(data)
