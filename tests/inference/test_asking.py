"""Questions put to the network that ships, about a phantom: drawings, regions, examples, weights and whole scans.

Distances are held to float64 sums over the bank's arrays; what a drawing finds, to the labels of the phantom.
"""

import csv
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

import evaluate
from decomp_jax.data.records import SliceDataset
from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.inference import sheet
from decomp_jax.inference.asking import Question, read_scan, read_slice
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.display import contact_sheet
from decomp_jax.inference.query import run_query
from decomp_jax.inference.sketch import region_weights, sketch_latents
from decomp_jax.preparation.drawing import load_drawing
from decomp_jax.preparation.picture import FOREGROUND
from decomp_jax.preparation.scan import open_scan
from decomp_jax.retrieval import CodeBank
from decomp_jax.retrieval.queries import AWAY
from tests.conftest import ROOT, run_python

MODEL = ROOT / "models" / "phantom64"


@dataclasses.dataclass(frozen=True)
class Archive:
    """A bank of two splits of a phantom, with their images and labels."""

    folder: Path
    decomposer: Decomposer
    bank: CodeBank
    images: np.ndarray
    labels: np.ndarray

    def compared(self, path: str, points: np.ndarray) -> np.ndarray:
        """float64 [2,N,h,w]: of points [h,w,D] the squared distances from all codes, and the squared lengths of both."""
        codebook = getattr(self.bank, f"{path}_codebook").astype(np.float64)
        points, stored = points.astype(np.float64), codebook[getattr(self.bank, f"{path}_indices")]
        return np.stack([((points - stored) ** 2).sum(-1), (points**2).sum(-1) + (stored**2).sum(-1)])

    def of_row(self, path: str, row: int) -> np.ndarray:
        codebook = getattr(self.bank, f"{path}_codebook").astype(np.float64)
        return self.compared(path, codebook[getattr(self.bank, f"{path}_indices")[row]])


def ratio(compared: np.ndarray) -> np.ndarray:
    """Relative distances [N]."""
    distances, lengths = compared.sum((2, 3))
    return distances / lengths


@pytest.fixture(scope="module")
def archive(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    folder, decomposer = tmp_path_factory.mktemp("asking"), Decomposer.restore(MODEL)
    splits = [SliceDataset(phantom, split) for split in ("validation", "train")]
    stacked = [data.stack(("image", "label")) for data in splits]
    images, labels = (np.concatenate([fields[name] for fields in stacked]) for name in ("image", "label"))
    codes = decomposer.encode(images)
    CodeBank.from_arrays(
        normal_indices=codes.normal_indices, abnormal_indices=codes.abnormal_indices,
        rows=np.concatenate([data.rows for data in splits]),
        normal_codebook=decomposer.normal_codebook, abnormal_codebook=decomposer.abnormal_codebook,
        meta={"model_digest": decomposer.model_digest, "data_digest": splits[0].digest, "data": str(phantom)},
    ).save(folder / "bank")
    return Archive(folder, decomposer, CodeBank.load(folder / "bank"), images, labels)


@pytest.fixture(scope="module")
def row(archive: Archive) -> int:
    """The slice with the largest lesion."""
    return int((archive.labels > 0).sum((1, 2)).argmax())


def write_scan(path: Path, images: np.ndarray, spacing: float = 4.0, bottom: float = 0.0) -> Path:
    """Slices [n,64,64] as a volume, whose lowest slice stands at `bottom` mm."""
    affine = np.diag([4.0, 4.0, spacing, 1.0])
    affine[2, 3] = bottom
    nibabel.save(nibabel.Nifti1Image(images.astype(np.float32)[:, ::-1, ::-1].transpose(2, 1, 0), affine), path)
    return path


@pytest.fixture(scope="module")
def scan(archive: Archive, row: int) -> Path:
    """The slice of `row`, four times; slice 2 is asked with."""
    return write_scan(archive.folder / "scan.nii.gz", 1000 * archive.images[[row] * 4, ..., 0])


def image_of(archive: Archive, scan: Path) -> np.ndarray:
    return open_scan(scan, archive.decomposer.settings).shown(2)[None]


@pytest.fixture
def ask(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a query; gives the distances of the rows, or patients, that it found, in order."""
    monkeypatch.setattr(Decomposer, "restore", lambda workdir: archive.decomposer)

    def run(*, k: int = 8, **flags: object) -> dict[str, float]:
        run_query(MODEL, archive.folder / "bank", k=k, out=tmp_path / "out", **flags)
        assert Image.open(tmp_path / "out" / "sheet.png").size[0] > 1000
        with (tmp_path / "out" / "hits.csv").open(newline="") as file:
            return {line.get("row", line["patient_id"]): float(line["distance"]) for line in csv.DictReader(file)}

    return run


def draw(path: Path, labels: np.ndarray) -> Path:
    Image.fromarray(labels.astype(np.uint8)).save(path)
    return path


def assert_nearest(hits: dict[str, float], distances: np.ndarray) -> None:
    np.testing.assert_allclose(list(hits.values()), np.sort(distances)[: len(hits)], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(list(hits.values()), distances[[int(row) for row in hits]], rtol=1e-4, atol=1e-6)


def test_a_drawn_lesion_finds_such_lesions(archive: Archive, row: int, ask, tmp_path: Path) -> None:
    """Its true outline, drawn in one class: the hits overlap it more than lesions at large do."""
    drawn = np.kron(archive.labels[row] > 0, np.ones((3, 3), int)) * 2
    hits = ask(sketch=draw(tmp_path / "lesion.png", drawn), by="abnormal", k=5)
    assert_nearest(hits, ratio(archive.compared("abnormal", sketch_latents(archive.decomposer, drawn))))
    lesions = archive.labels > 0
    dice = 2 * (lesions & lesions[row]).sum((1, 2)) / (lesions.sum((1, 2)) + lesions[row].sum())
    assert dice[[int(hit) for hit in hits]].mean() > 2 * dice[lesions.any((1, 2))].mean()


def test_a_bitmap_drawn_on_the_slice_lies_on_it(archive: Archive, row: int, ask, tmp_path: Path) -> None:
    """As the same drawing in a NIfTI file does: the slice's 60 pixels of 4 mm don't fill the field of 256 mm."""
    image, drawn = (stored[row][2:62, 2:62] for stored in (archive.images[..., 0], archive.labels))
    scan = write_scan(tmp_path / "scan.nii.gz", 1000 * image[None])
    asked = {"image": scan, "slice_index": 0}
    for flag, flags in (("sketch", {"by": "abnormal"}), ("region", {})):
        hits = [ask(**asked, **{flag: file}, **flags)
                for file in (draw(tmp_path / "drawn.png", drawn), write_scan(tmp_path / "drawn.nii.gz", drawn[None]))]
        assert hits[0] == hits[1]


@pytest.mark.parametrize("weight", [None, 0.0, 0.2, 1.0])
def test_this_anatomy_with_that_lesion(archive: Archive, row: int, scan: Path, ask, tmp_path: Path, weight) -> None:
    drawn = np.zeros((64, 64), int)
    drawn[20:30, 36:50] = 3
    hits = ask(image=scan, slice_index=2, sketch=draw(tmp_path / "lesion.png", drawn), weight=weight)
    output = archive.decomposer.decompose(image_of(archive, scan))
    anatomy = archive.compared("normal", output.z_e_normal[0])
    lesion = archive.compared("abnormal", sketch_latents(archive.decomposer, drawn))
    share = 0.5 if weight is None else weight
    assert_nearest(hits, ratio((1 - share) * anatomy + share * lesion))


def test_the_sheet_paints_the_drawing(archive: Archive, scan: Path, ask, tmp_path: Path, monkeypatch) -> None:
    shown = []
    monkeypatch.setattr(sheet, "contact_sheet",
                        lambda sections, **rest: shown.append(sections) or contact_sheet(sections, **rest))
    drawn = np.zeros((64, 64), int)
    drawn[20:30, 36:50] = 3
    hits = ask(image=scan, slice_index=2, sketch=draw(tmp_path / "lesion.png", drawn), k=3)
    asked, found = shown[0]
    assert [tile.name.split("\n")[0] for tile in asked.lines[0]] == ["scan.nii.gz", "the drawing", "what the network"]
    assert [tile.name for tile in found.lines[1]] == [f"distance {distance:.4g}" for distance in hits.values()]
    outline = next(iter(asked.lines[0][2].outlines.values()))
    painted, plain = asked.lines[0][2].rgb[..., 0], asked.lines[0][0].rgb[..., 0]
    assert outline.sum() == 140 and painted.shape == plain.shape
    assert painted[outline].mean() > painted[outline[:, ::-1]].mean() + 0.1  # enhancing tumour is bright


def test_pixels_of_a_bank_of_two_splits(archive: Archive) -> None:
    rows = np.array([len(archive.bank) - 1, 0, 5])
    pixels = sheet.pixels_of(archive.decomposer, archive.bank, rows)
    np.testing.assert_array_equal(pixels.images, archive.images[rows])
    np.testing.assert_array_equal(pixels.labels, archive.labels[rows])


def test_a_region_alone_counts(archive: Archive, scan: Path, ask, tmp_path: Path) -> None:
    mask = np.zeros((50, 50), int)
    mask[5:30, 20:45] = 255
    hits = ask(image=scan, slice_index=2, region=draw(tmp_path / "mask.png", mask))
    output = archive.decomposer.decompose(image_of(archive, scan))
    cells = sum(archive.compared(path, getattr(output, f"z_e_{path}")[0]) for path in ("normal", "abnormal"))
    assert_nearest(hits, ratio(cells * region_weights(mask > 0, 8)))


def test_examples_and_counterexamples(archive: Archive, row: int, ask) -> None:
    patients = archive.bank.rows["patient_id"]
    other = int(np.flatnonzero(patients != patients[row])[5])
    hits = ask(like=(row, row - 1), unlike=(other,), by="abnormal")
    one, two, away = (archive.of_row("abnormal", one) for one in (row, row - 1, other))
    away[0] *= -1  # lengths count as they are
    expected = np.where(patients == patients[row], np.inf, ratio((one + two) / 2 + AWAY * away))
    assert patients[row] == patients[row - 1]
    assert_nearest(hits, expected)
    hits = ask(like=(row, row - 1), unlike=(other,), by="abnormal", one_per_patient=True, k=3)
    nearest = {patient: expected[patients == patient].min() for patient in {*patients} - {patients[row]}}
    np.testing.assert_allclose(list(hits.values()), sorted(nearest.values())[:3], rtol=1e-4, atol=1e-6)


def test_codes_with_codes(archive: Archive, scan: Path, ask) -> None:
    hits = ask(image=scan, slice_index=2, by="abnormal", codes=True)
    codes = archive.decomposer.encode(image_of(archive, scan))
    points = archive.bank.abnormal_codebook[codes.abnormal_indices[0]]
    assert_nearest(hits, archive.compared("abnormal", points)[0].sum((1, 2)))


@pytest.mark.parametrize("by", ["normal", "abnormal", "both"])
def test_a_whole_scan_finds_its_patient(archive: Archive, row: int, ask, tmp_path: Path, by: str) -> None:
    rows = archive.bank.rows
    own = np.flatnonzero(rows["patient_id"] == rows["patient_id"][row])
    heights = rows["position_mm"][own]
    step = float(np.median(np.diff(heights)))
    path = write_scan(tmp_path / "scan.nii.gz", 1000 * archive.images[own, ..., 0], step, float(heights[0]))
    hits = ask(image=path, level="patient", by=by, k=3)
    assert list(hits)[0] == rows["patient_id"][row] and len(hits) == 3
    assert hits[rows["patient_id"][row]] < 0.7 * list(hits.values())[1]
    assert list(hits.values()) == sorted(hits.values())


def test_a_scan_between_the_heights_of_all_slices(archive: Archive, row: int, ask, tmp_path: Path, monkeypatch) -> None:
    shown = []
    monkeypatch.setattr(sheet, "contact_sheet",
                        lambda sections, **rest: shown.append(sections) or contact_sheet(sections, **rest))
    path = write_scan(tmp_path / "scan.nii.gz", 1000 * archive.images[[row] * 2, ..., 0], 1.0, 1e4)
    assert len(ask(image=path, level="patient", by="normal", within_mm=0.0, k=2)) == 2
    asked, *found = shown[0]
    assert len(asked.lines[0]) == 2 and len(found) == 2
    assert {tile.name for patient in found for tile in patient.lines[0]} == {"no slice within reach"}


@pytest.mark.parametrize("flags, message", [
    ({}, "--image: nothing to ask with; give an image, or --sketch"),
    ({"unlike": (3,)}, "--image: nothing to ask with"),
    ({"sketch": "lesion.png"}, "--sketch: has no anatomy to search --by=both with; give --image, too"),
    ({"sketch": "lesion.png", "by": "normal"}, "--sketch: is a lesion, which --by=normal leaves out"),
    ({"sketch": "strange.png", "by": "abnormal"}, "strange.png: sketch: has class 7; draw with 0 .nothing., 1 NCR"),
    ({"sketch": "empty.png", "by": "abnormal"}, "empty.png: sketch: is empty; draw a lesion"),
    ({"sketch": "nowhere.png", "by": "abnormal"}, "nowhere.png: can't be read"),
    ({"like": (0,), "region": "empty.png"}, "empty.png: region: is empty; mark"),
    ({"like": (0, 10**6)}, "--like: row 1000000 is not in .*bank, whose rows are 0 to"),
    ({"like": (0,), "unlike": (-1,)}, "--unlike: row -1 is not in"),
    ({"like": (0,), "weight": 1.5}, "--weight: is the share of the lesion, from 0 to 1, not 1.5"),
    ({"like": (0,), "weight": float("nan")}, "--weight: is the share of the lesion, from 0 to 1, not nan"),
    ({"like": (0,), "weight": 0.5, "by": "normal"}, "--weight: shares out a search by both codes"),
    ({"like": (0,), "lesion_from": "scan.nii.gz"}, "--lesion_from: needs an anatomy to go with"),
    ({"image": "scan.nii.gz", "sketch": "lesion.png", "lesion_from": "scan.nii.gz"}, "both give the lesion"),
    ({"image": "scan.nii.gz"}, "--slice: the network was trained on scans; name the slice of .*scan.nii.gz, from"),
    ({"image": "scan.nii.gz", "slice_index": 2, "lesion_from": "scan.nii.gz"},
     "--lesion_slice: the network was trained on scans; name the slice of"),
    ({"like": (0,), "mask": "empty.png"}, "--mask: is of --image; give that, too"),
    ({"like": (0,), "within_mm": 5.0}, "--within_mm: is of --level=patient"),
    ({"level": "patient"}, "--level=patient: asks with a whole scan; give --image$"),
    ({"level": "patient", "image": "scan.nii.gz", "slice_index": 2}, "asks with all of --image; leave out --slice$"),
    ({"level": "patient", "image": "scan.nii.gz", "sketch": "lesion.png"}, "leave out --sketch$"),
    ({"level": "patient", "image": "scan.nii.gz", "one_per_patient": True, "like": (3,)},
     "leave out --like, --one_per_patient$"),
    ({"level": "patient", "image": "scan.nii.gz", "weight": 0.8}, "leave out --weight$"),
    ({"level": "patient", "image": "nowhere.nii.gz"}, "nowhere.nii.gz: does not exist"),
    ({"level": "patient", "image": "scan.nii.gz", "within_mm": -1.0}, "--within_mm: is a distance, 0 or more, not -1"),
])
def test_mistakes_are_told(archive: Archive, scan: Path, ask, tmp_path: Path, flags: dict, message: str) -> None:
    draw(tmp_path / "lesion.png", np.ones((8, 8)))
    draw(tmp_path / "strange.png", np.full((8, 8), 7))
    draw(tmp_path / "empty.png", np.zeros((8, 8)))
    place = {name: (archive.folder if value == "scan.nii.gz" else tmp_path) / value
             for name, value in flags.items() if name in ("image", "sketch", "region", "lesion_from")}
    with pytest.raises(UserError, match=message):
        ask(**flags | place)
    assert not (tmp_path / "out").exists()


def test_examples_of_all_patients_leave_none(archive: Archive, ask, tmp_path: Path) -> None:
    _, rows = np.unique(archive.bank.rows["patient_id"], return_index=True)
    with pytest.raises(UserError, match="no patients but those of the examples"):
        ask(like=tuple(rows.tolist()))
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_python("evaluate.py", "query", f"--workdir={MODEL}", f"--bank={tmp_path}", f"--out={tmp_path}/out",
                      "--like=1,2", "--weight=2")
    assert done.returncode == 2 and done.stderr.startswith("error: --weight: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_flags_are_those_of_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "query", "--workdir=a", "--bank=b", "--out=c"])
    flags = vars(evaluate.parse_args())
    fields = {field.name: field.default for field in dataclasses.fields(Question)}
    assert {name: flags[name] for name in fields} == fields
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--like=3,17", "--unlike=4", "--codes", "--weight=0.3"])
    flags = vars(evaluate.parse_args())
    assert (flags["like"], flags["unlike"], flags["codes"], flags["weight"]) == ((3, 17), (4,), True, 0.3)


def test_a_slice_of_a_scan_asks_with_its_slab(archive: Archive, row: int, tmp_path: Path) -> None:
    """As all of the scan does, and as the patient's slices were encoded; the anatomy is the slice's own."""
    rows = archive.bank.rows
    of_patient = np.flatnonzero(rows["patient_id"] == rows["patient_id"][row])
    at = int(np.searchsorted(of_patient, row))
    path = write_scan(tmp_path / "scan.nii.gz", 1000 * archive.images[of_patient, ..., 0])
    slabs = dataclasses.replace(archive.bank, meta={**archive.bank.meta, "slab_mm": 4.0})

    def points(read: Callable, bank: CodeBank, by: str, **flags: object) -> np.ndarray:
        return read(Question(image=path, by=by, **flags), archive.decomposer, bank).queries.examples[0].points

    whole = points(read_scan, slabs, "abnormal", level="patient")[at]
    one, alone = (points(read_slice, bank, "abnormal", slice_index=at)[0] for bank in (slabs, archive.bank))
    np.testing.assert_allclose(one, whole, atol=1e-3)
    assert np.abs(alone - whole).max() > 0.1
    anatomy = [points(read_slice, bank, "normal", slice_index=at) for bank in (slabs, archive.bank)]
    np.testing.assert_array_equal(*anatomy)


def test_drawings_lie_where_images_do(archive: Archive, tmp_path: Path) -> None:
    """A NIfTI drawing by its millimetres; a bitmap of the size of the scan's slices on these, others in the middle of
    the field."""
    drawn = np.zeros((3, 60, 60), int)
    drawn[1, 10:20, 5:25] = 2
    settings = archive.decomposer.settings
    volume = write_scan(tmp_path / "drawn.nii.gz", drawn)
    expected = np.zeros((64, 64), int)
    expected[12:22, 7:27] = 2  # 60 pixels of 4 mm in the middle of 256 mm
    np.testing.assert_array_equal(load_drawing(volume, settings, 1), np.kron(expected, np.ones((4, 4), int)))
    with pytest.raises(UserError, match="drawn.nii.gz: has slices 0 to 2; name one of them by --slice"):
        load_drawing(volume, settings)
    with pytest.raises(UserError, match="has slices 0 to 2"):
        load_drawing(volume, settings, 3)
    single = write_scan(tmp_path / "single.nii.gz", drawn[1:2])
    np.testing.assert_array_equal(load_drawing(single, settings, 80), load_drawing(volume, settings, 1))
    with pytest.raises(UserError, match="half.nii.gz: has values that are not 0, 1, 2"):
        load_drawing(write_scan(tmp_path / "half.nii.gz", drawn + 0.5), settings, 1)
    asked = open_scan(write_scan(tmp_path / "asked.nii.gz", drawn * np.arange(1, 61)), settings)
    on_slice = load_drawing(draw(tmp_path / "slice.png", drawn[1]), settings, asked=asked)
    np.testing.assert_array_equal(on_slice, load_drawing(volume, settings, 1))
    smaller = draw(tmp_path / "smaller.png", drawn[1, :50, :50])
    np.testing.assert_array_equal(load_drawing(smaller, settings, asked=asked), drawn[1, :50, :50])
    with pytest.raises(UserError, match="other.nii.gz: its affine disagrees with asked.nii.gz by up to 8"):
        load_drawing(write_scan(tmp_path / "other.nii.gz", drawn, bottom=8), settings, 1, asked=asked)
    own = write_scan(tmp_path / "own.nii.gz", drawn[1:2], bottom=4)
    np.testing.assert_array_equal(load_drawing(own, settings, 1, asked=asked), load_drawing(volume, settings, 1))
    with pytest.raises(UserError, match="own.nii.gz: its affine disagrees with asked.nii.gz by up to 4"):
        load_drawing(own, settings, 2, asked=asked)
    with pytest.raises(UserError, match="part.nii.gz: has shape .*50.* but asked.nii.gz"):
        load_drawing(write_scan(tmp_path / "part.nii.gz", drawn[1:2, :50], bottom=4), settings, 1, asked=asked)
    pictures = Settings("images", 64, modalities=("image",), foreground=FOREGROUND)
    with pytest.raises(UserError, match="single.nii.gz: of single.nii.gz and wide.png one is NIfTI"):
        load_drawing(single, pictures, asked=tmp_path / "wide.png")
    np.testing.assert_array_equal(load_drawing(single, pictures, asked=single), drawn[1])
    wide = load_drawing(draw(tmp_path / "wide.png", np.ones((10, 20))), settings)
    np.testing.assert_array_equal(wide, np.pad(np.ones((10, 20), int), ((5, 5), (0, 0))))
    np.save(tmp_path / "wide.npy", np.ones((10, 20)))
    np.testing.assert_array_equal(load_drawing(tmp_path / "wide.npy", settings), wide)
