"""What a room answers, against distances in float64."""

import base64
import dataclasses
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from decomp_jax.data.schema import Settings, row_dtype
from decomp_jax.errors import UserError
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.inference.sketch import region_weights
from decomp_jax.inference.slab import latents_of, over_scan
from decomp_jax.retrieval import CodeBank
from decomp_jax.room import session
from decomp_jax.room.images import FEW, Pictures
from decomp_jax.room.archive import Archive
from decomp_jax.room.session import Room
from tests.evaluation.fakes import SIZE, FakeDecomposer, Heads
from tests.inference.networks import random_network
from tests.room.test_upload import body, scan

PATHS = ("normal", "abnormal")


def compared(bank: Any, path: str, points: np.ndarray) -> np.ndarray:
    """Of each cell of points [h,w,D] and of each row of the bank the squared distance, and the squared lengths of both.

    float64 [2,N,h,w]; a question's sums of the first, over those of the second, are its relative distances.
    """
    points, stored = points.astype(float), getattr(bank, f"{path}_codebook").astype(float)[getattr(bank, f"{path}_indices")]
    return np.stack([((points - stored) ** 2).sum(-1), (points**2).sum(-1) + (stored**2).sum(-1)])


def tables(decomposer: FakeDecomposer, bank: Any, image: np.ndarray) -> dict[str, np.ndarray]:
    output = decomposer.decompose(image[None])
    return {path: compared(bank, path, getattr(output, f"z_e_{path}")[0]) for path in PATHS}


def check(answer: Any, compared: np.ndarray, *, without: np.ndarray, k: int) -> None:
    """The k nearest rows, by relative distance and row, and what their cells add."""
    lengths = compared[1].sum((1, 2), keepdims=True)
    cells = np.divide(compared[0], lengths, out=np.zeros_like(compared[0]), where=lengths > 0)
    distances = np.where(without, np.inf, cells.sum((1, 2)))
    rows = answer.data["rows"]
    assert len(rows) == min(k, np.isfinite(distances).sum()) and not without[rows].any()
    np.testing.assert_allclose(answer.data["distances"], np.sort(distances)[:len(rows)], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(distances[rows], answer.data["distances"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(answer.arrays["why"], cells[rows], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.sum([*answer.data["parts"].values()], 0), distances[rows], rtol=1e-5)


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_the_anatomy_of_one_with_the_lesion_of_another(
    room: Room, decomposer: FakeDecomposer, heads: dict[str, Heads], reference: SliceSet, share: float,
) -> None:
    images, bank = heads["reference"].fields["image"], reference.bank
    answer = room.ask({"anatomy": {"row": 3}, "lesion": {"row": 20}, "share": share, "k": 7})
    anatomy, lesion, own = {0: (1, 0, ["r0"]), 0.3: (1.4, 0.6, ["r0", "r3"]), 1: (0, 1, ["r3"])}[share]
    cells = (anatomy * tables(decomposer, bank, images[3])["normal"]
             + lesion * tables(decomposer, bank, images[20])["abnormal"])
    check(answer, cells, without=np.isin(bank.rows["patient_id"], own), k=7)
    row = answer.data["rows"][0]
    assert answer.data["about"][0] == {
        "patient_id": f"r{row // 6}", "slice_index": row % 6, "position_mm": 4.0 * (row % 6), "labelled": True,
        "has_abnormality": bool(heads["reference"].rows["has_abnormality"][row]),
        "tumour": "glioma" if row // 6 % 2 else "meningioma",
    }


@pytest.mark.parametrize("count", [1, 3, 4])
def test_examples_and_counter_examples_within_a_region(
    room: Room, decomposer: FakeDecomposer, heads: dict[str, Heads], reference: SliceSet, count: int,
) -> None:
    images, bank = heads["reference"].fields["image"], reference.bank
    like, unlike = list(range(6, 6 + count)), [30, 31]
    region = [0, SIZE * 8, 1, SIZE * 12, 0, SIZE * 12]
    answer = room.ask({
        "lesion": {"row": 2}, "share": 1, "region": region, "other_patients": False, "k": 9,
        "like": [{"row": row} for row in like], "unlike": [{"row": row} for row in unlike],
    })
    weights = region_weights(np.repeat(region[::2], region[1::2]).reshape(SIZE, SIZE) > 0, decomposer.grid)
    parts = [np.array([weight, abs(weight)])[:, None, None, None] * tables(decomposer, bank, images[row])["abnormal"]
             for weight, rows in ((1 / (1 + count), [2, *like]), (-0.5 / 2, unlike)) for row in rows]
    check(answer, weights * sum(parts), without=np.zeros(len(bank), bool), k=9)


def test_an_image_that_was_brought_is_asked_with_as_one_of_the_archive(room: Room, heads: dict[str, Heads]) -> None:
    image = heads["reference"].fields["image"][14]
    brought = {"pixels": base64.b64encode(image.astype("<f2").tobytes()).decode(), "name": "mine"}
    question = {"anatomy": {"row": 14}, "lesion": {"row": 14}, "other_patients": False}
    own, other = room.ask(question), room.ask(question | {"anatomy": brought, "lesion": brought})
    assert own.data == other.data and own.data["rows"][0] == 14
    assert room.ask(question).data == own.data, "the same question has the same answer"


def test_slices_are_asked_with_as_the_archive_was_encoded(decomposer: FakeDecomposer, heads: dict[str, Heads]) -> None:
    """With slabs: what is said of a row agrees with its codes, alone and with others."""
    archive = heads["reference"]
    bank = SliceSet.encode(decomposer, archive, "reference", slab_mm=6.0).bank
    room, codes = Room(decomposer, bank, archive, bank_digest=""), bank.abnormal_indices
    assert not np.array_equal(codes, decomposer.encode(archive.fields["image"]).abnormal_indices)
    for row in (3, 20, 21):
        np.testing.assert_array_equal(room.look({"image": {"row": row}}).arrays["abnormal_codes"], codes[row])
    fresh = Room(decomposer, bank, archive, bank_digest="")
    pictures = fresh._pictures.pictures([{"row": row} for row in range(48)])
    np.testing.assert_array_equal([picture.indices["abnormal"] for picture in pictures], codes)


def test_a_slice_that_was_brought_keeps_its_slab(room: Room, decomposer: FakeDecomposer, reference: SliceSet) -> None:
    """In a session, too, whose room has not seen the scan."""
    slabs = dataclasses.replace(reference.bank, meta={"slab_mm": 6.0})
    first, second = (Room(decomposer, slabs, None, bank_digest="") for _ in range(2))
    name = first.bring(body([scan()])).data["id"]
    answer = first.slice_of({"id": name, "slice": 4})
    image = {part: base64.b64encode(answer.arrays[part].tobytes()).decode() for part in ("pixels", "slab")}
    alone = second.look({"image": {"pixels": image["pixels"]}}).arrays["abnormal_codes"]
    looks = [one.look({"image": image}).arrays["abnormal_codes"] for one in (first, second)]
    np.testing.assert_array_equal(*looks)
    scan_slices = np.stack([first.slice_of({"id": name, "slice": z}).arrays["pixels"] for z in range(2, 8)])
    of_slabs = over_scan(latents_of(decomposer, scan_slices), 4.0 * np.arange(6), 6.0)
    np.testing.assert_array_equal(looks[0], decomposer.quantize(*vars(of_slabs).values()).abnormal_indices[2])
    np.testing.assert_array_equal(alone, decomposer.encode(scan_slices[[2]]).abnormal_indices[0])


@pytest.mark.parametrize("slab_mm", [0.0, 6.0])
def test_after_the_warm_up_nothing_is_compiled_for_what_is_brought(
    decomposer: FakeDecomposer, heads: dict[str, Heads], reference: SliceSet, monkeypatch: pytest.MonkeyPatch,
    slab_mm: float,
) -> None:
    widths, latents = set(), FakeDecomposer.latents
    monkeypatch.setattr(FakeDecomposer, "latents", lambda self, images: widths.add(len(images)) or latents(self, images))
    bank = dataclasses.replace(reference.bank, meta={"slab_mm": slab_mm})
    room = Room(decomposer, bank, heads["reference"], bank_digest="")
    for step in room.warm_up():
        step()
    warm = set(widths)
    answer = room.slice_of({"id": room.bring(body([scan()])).data["id"], "slice": 4})
    image = {part: base64.b64encode(answer.arrays[part].tobytes()).decode() for part in ("pixels", "slab")}
    room.look({"image": image})
    room.look({"image": {"row": 20}})
    assert widths == warm


def test_a_drawing_is_asked_with(
    room: Room, decomposer: FakeDecomposer, heads: dict[str, Heads], reference: SliceSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By what the network would draw it to, here the share of each cell that is drawn."""
    def share_of_cells(_: FakeDecomposer, labels: np.ndarray) -> np.ndarray:
        shares = (labels > 0).reshape(4, SIZE // 4, 4, SIZE // 4).mean((1, 3)).astype(np.float32)
        return np.pad(shares[..., None], ((0, 0), (0, 0), (0, 2)))

    monkeypatch.setattr(session, "sketch_latents", share_of_cells)
    drawing, bank = [0, SIZE * 5, 1, SIZE * 7, 2, SIZE * 3, 0, SIZE * 17], reference.bank
    answer = room.ask({"anatomy": {"row": 8}, "lesion": {"drawing": drawing}, "k": 8})
    labels = np.repeat(drawing[::2], drawing[1::2]).reshape(SIZE, SIZE)
    lesion = compared(bank, "abnormal", share_of_cells(decomposer, labels))
    cells = lesion + tables(decomposer, bank, heads["reference"].fields["image"][8])["normal"]
    check(answer, cells, without=bank.rows["patient_id"] == "r1", k=8)


def test_one_slice_of_each_patient(room: Room) -> None:
    answer = room.ask({"anatomy": {"row": 0}, "share": 0, "one_per_patient": True})
    assert sorted(about["patient_id"] for about in answer.data["about"]) == [f"r{i}" for i in range(1, 8)]


def test_what_is_looked_at(room: Room, decomposer: FakeDecomposer, heads: dict[str, Heads]) -> None:
    image, label = (heads["reference"].fields[name][9] for name in ("image", "label"))
    answer = room.look({"image": {"row": 9}})
    output = decomposer.decompose(image[None])
    for name, plane in (("image", image), ("x_minus", output.x_minus[0])):
        np.testing.assert_allclose(answer.arrays[name] / 65535, plane.transpose(2, 0, 1).astype(float), atol=1e-5)
    np.testing.assert_array_equal(answer.arrays["label"], label)
    np.testing.assert_array_equal(answer.arrays["lesion"], output.segmentation[0].argmax(-1))
    np.testing.assert_array_equal(answer.arrays["normal_codes"], output.normal_indices[0])
    small = room.thumbnails([9, 3])
    np.testing.assert_allclose(small.arrays["image"][0, 0] / 255, image[..., 0].astype(float), atol=1 / 500)
    assert small.data["about"][1]["slice_index"] == 3


def test_without_images_the_codes_are_asked_with_and_painted(
    painted_room: Room, decomposer: FakeDecomposer, reference: SliceSet
) -> None:
    bank = reference.bank
    assert not painted_room.about().data["at_hand"]
    look = painted_room.look({"image": {"row": 5}})
    painted = decomposer.paint(bank.normal_indices[5:6], bank.abnormal_indices[5:6])[0, ..., 0]
    np.testing.assert_allclose(look.arrays["image"][0] / 65535, painted, atol=1e-3)
    assert not look.data["at_hand"] and (look.arrays["label"] == 255).all()
    seen = (bank.abnormal_indices[5] > 0).repeat(SIZE // 4, 0).repeat(SIZE // 4, 1)
    np.testing.assert_array_equal(look.arrays["lesion"] > 0, seen)
    answer = painted_room.ask({"anatomy": {"row": 5}, "share": 0, "other_patients": False})
    cells = compared(bank, "normal", bank.normal_codebook[bank.normal_indices[5]])
    check(answer, cells, without=np.zeros(len(bank), bool), k=60)


def test_an_image_that_is_kept_keeps_no_other(decomposer: FakeDecomposer, reference: SliceSet, heads: dict[str, Heads]
                                              ) -> None:
    bank = reference.bank
    pictures = Pictures(decomposer, bank, heads["reference"], Archive(bank.rows, bank.heights))
    found = pictures.pictures([{"row": row} for row in range(FEW + 1)])
    assert all(value.base is None for picture in found for value in vars(picture.decomposition).values())


def test_patients_are_those_of_the_library(room: Room, decomposer: FakeDecomposer, heads: dict[str, Heads],
                                           reference: SliceSet) -> None:
    """By anatomy: each slice with the nearest within 5 mm, there and back, by brute force but for the scale."""
    bank, images = reference.bank, heads["reference"].fields["image"]
    answer = room.ask_patients({"row": 13, "share": 0})
    assert answer.data["rows"] == list(range(12, 18)) and not answer.arrays
    check_patients(answer, decomposer, bank, images[12:18], bank.rows["position_mm"][12:18], without=[2])


def check_patients(answer: Any, decomposer: FakeDecomposer, bank: Any, images: np.ndarray, heights: np.ndarray, *,
                   without: list[int]) -> None:
    distances = np.array([tables(decomposer, bank, image)["normal"][0].sum((1, 2)) for image in images])
    far = abs(heights[:, None] - bank.rows["position_mm"]) > 5
    near = np.where(far, np.inf, distances).reshape(len(images), 8, 6)
    expected = (near.min(2).mean(0) + near.min(0).mean(1)) / 2
    order = [i for i in np.argsort(expected) if i not in without]
    assert answer.data["patients"] == [f"r{i}" for i in order]
    found, expected = np.array(answer.data["distances"]), expected[order]
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-4)
    assert answer.data["matches"]["normal"][0] == (near[:, order[0]].argmin(1) + 6 * order[0]).tolist()


def test_patients_like_a_scan_that_was_brought(room: Room, decomposer: FakeDecomposer, reference: SliceSet) -> None:
    """By all of its slices, and by its own heights."""
    volume = np.zeros((40, 48, 6), np.int16)
    for z, side in enumerate((9, 12, 15, 16, 14, 10)):
        volume[20 - side:20 + side, 24 - side:24 + side, z] = np.random.default_rng(z).integers(50, 200, 2 * [2 * side])
    affine = np.diag([4.0, 4, 4, 1])
    affine[2, 3] = 1.5
    name = room.bring(body([nib.Nifti1Image(volume, affine).to_bytes()])).data["id"]
    images = np.stack([room.slice_of({"id": name, "slice": z}).arrays["pixels"] for z in range(6)])
    answer = room.ask_patients({"scan": name, "share": 0})
    check_patients(answer, decomposer, reference.bank, images, 1.5 + 4 * np.arange(6), without=[])
    assert answer.data["rows"] == []
    np.testing.assert_allclose(answer.arrays["image"] / 255, images.transpose(0, 3, 1, 2).astype(float), atol=1 / 500)


def test_heights_that_are_not_known_match_no_slices(decomposer: FakeDecomposer, reference: SliceSet) -> None:
    rows = reference.bank.rows.copy()
    rows["position_mm"] = np.nan
    room = Room(decomposer, dataclasses.replace(reference.bank, rows=rows), None, bank_digest="")
    name = room.bring(body([scan()])).data["id"]
    with pytest.raises(UserError, match="heights in mm"):
        room.ask_patients({"scan": name})


class Noise:
    """Stands in for `SliceDataset`: slices of two modalities."""

    def __init__(self, settings: Settings) -> None:
        rng = np.random.default_rng(5)
        shape = (24, settings.size, settings.size)
        self.settings = settings
        images = rng.random((*shape, 2)).astype(np.float16)
        self.fields = {"image": images, "label": rng.integers(0, 4, shape, np.uint8)}
        self.rows = np.zeros(24, row_dtype(4))
        self.rows["patient_id"], self.rows["slice_index"] = [f"p{i // 6}" for i in range(24)], np.arange(24) % 6
        self.rows["position_mm"] = 4 * (np.arange(24) % 6)

    def stack(self, names: tuple[str, ...], rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: self.fields[name][rows] for name in names}


def test_a_network_of_two_modalities_from_upload_to_hits() -> None:
    """Each channel is shown and asked with, the archive's and those of a scan that is brought as two files."""
    settings = Settings("brats", 16, modalities=("t1ce", "flair"))
    network, noise = random_network(settings), Noise(settings)
    images = noise.fields["image"]
    indices = vars(network.encode(images))
    bank = CodeBank.from_arrays(**indices, normal_codebook=network.normal_codebook,
                                abnormal_codebook=network.abnormal_codebook, rows=noise.rows)
    room = Room(network, bank, noise, bank_digest="")
    about = room.about().data
    assert len(about["white"]) == 2 and about["aliases"]["t1ce"] == ("t1ce", "t1c", "t1gd")
    look, output = room.look({"image": {"row": 7}}), network.decompose(images[7:8])
    for name, plane in (("image", images[7]), ("x_minus", output.x_minus[0]), ("x_plus", output.x_plus[0])):
        shown = plane.transpose(2, 0, 1).astype(float).clip(0, 1)
        np.testing.assert_allclose(look.arrays[name] / 65535, shown, atol=1e-4)
    assert room.thumbnails([3, 4, 5]).arrays["image"].shape == (3, 2, 16, 16)
    name = room.bring(body([scan(0)], [scan(1)])).data["id"]
    pixels = room.slice_of({"id": name, "slice": 4}).arrays["pixels"]
    image = {"pixels": base64.b64encode(pixels.tobytes()).decode()}
    swapped = {"pixels": base64.b64encode(np.ascontiguousarray(pixels[..., ::-1]).tobytes()).decode()}
    found, other = (room.ask({"anatomy": one, "share": 0, "k": 24}) for one in (image, swapped))
    cells = tables(network, bank, pixels)["normal"]
    check(found, cells, without=np.zeros(24, bool), k=24)
    assert found.data["distances"] != other.data["distances"]
    assert room.ask_patients({"scan": name}).arrays["image"].shape == (6, 2, 16, 16)
    with pytest.raises(UserError, match="t1ce and flair"):
        room.bring(body([scan()]))


def test_patients_are_found_by_text_and_columns(room: Room) -> None:
    every = room.patients({})
    assert every.data["count"] == 8 and every.data["patients"][1] == {"id": "r1", "row": 6, "slices": 6, "fit": 6}
    assert [one["id"] for one in room.patients({"text": "R3"}).data["patients"]] == ["r3"]
    assert [one["id"] for one in room.patients({"where": {"tumour": "glioma"}}).data["patients"]] == [
        "r1", "r3", "r5", "r7"]
    assert [one["id"] for one in room.patients({"start": 6}).data["patients"]] == ["r6", "r7"]
    assert room.patients({"text": "<script>"}).data == {"count": 0, "patients": []}


PIXELS = 2 * SIZE * SIZE
WHITE = base64.b64encode(b"\x00\x3c" * (PIXELS // 2)).decode()


@pytest.mark.parametrize(("method", "request_", "message"), [
    ("look", {"image": {"row": "../../etc/passwd"}}, "row"),
    ("look", {"image": {"row": True}}, "row"),
    ("look", {"image": {"row": 48}}, "0 to 47"),
    ("look", {"image": {"row": -1}}, "row"),
    ("look", {"image": {"path": "/etc/passwd"}}, "needs a row"),
    ("look", {"image": "/etc/passwd"}, "needs an image"),
    ("look", {"image": {"pixels": "AAAA"}}, "3 bytes"),
    ("look", {"image": {"pixels": "?"}}, "base64"),
    ("look", {"image": {"pixels": base64.b64encode(b"\x00\x7e" * (PIXELS // 2)).decode()}}, "no numbers"),
    ("look", {"image": {"pixels": WHITE, "slab": "AAAA"}}, "3 bytes"),
    ("look", {"image": {"pixels": WHITE, "slab": 5}}, "base64"),
    ("look", {"image": {"pixels": WHITE, "slab": base64.b64encode(b"\xff" * 4 * 48).decode()}}, "no numbers"),
    ("look", {"image": {"pixels": WHITE, "slab": base64.b64encode(b"\x7e" * 4 * 48).decode()}}, "that no network gives"),
    ("look", {"image": {"pixels": base64.b64encode(b"\x00\x40" * (PIXELS // 2)).decode()}}, "outside 0 to 1"),
    ("slices", {"row": "r1"}, "row"),
    ("ask", {}, "anatomy"),
    ("ask", {"anatomy": {"row": 1}}, "lesion"),
    ("ask", {"anatomy": {"drawing": [1, SIZE * SIZE]}, "share": 0}, "not a drawing"),
    ("ask", {"anatomy": {"row": 1}, "lesion": "x"}, "lesion"),
    ("ask", {"anatomy": {"row": 1}, "share": float("nan")}, "share"),
    ("ask", {"anatomy": {"row": 1}, "share": 0, "k": 10**9}, "k: needs"),
    ("ask", {"anatomy": {"row": 1}, "share": 0, "like": [{"row": 1}] * 17}, "like"),
    ("ask", {"anatomy": {"row": 1}, "share": 0, "bank": "/etc"}, "unknown part 'bank'"),
    ("ask", {"anatomy": {"row": 1}, "share": 0, "region": [0, SIZE * SIZE]}, "region: is empty"),
    ("ask", {"anatomy": {"row": 1}, "share": 0, "region": [1, 10**9]}, "run lengths"),
    ("ask", {"anatomy": {"row": 1}, "share": 0, "region": []}, "pixels"),
    ("ask", {"lesion": {"drawing": [7, SIZE * SIZE]}, "share": 1}, "values 0 to 2"),
    ("ask", {"lesion": {"drawing": [0, SIZE * SIZE]}, "share": 1}, "sketch"),
    ("paint", {"anatomy": {"row": 1}, "drawing": [[0], 1]}, "run lengths"),
    ("patients", {"where": {"patient_id": "r1"}}, "filter"),
    ("patients", {"where": [], "start": -1}, "filter"),
    ("slice_of", {"id": "99", "slice": 0}, "no longer at hand"),
    ("slice_of", {"id": ["a"]}, "no longer at hand"),
    ("ask_patients", {"scan": "99"}, "no longer at hand"),
    ("ask_patients", {"row": 1, "share": 2}, "share"),
    ("ask_patients", {"row": -1}, "row"),
    ("ask_patients", {}, "row"),
])
def test_what_can_not_be_asked_is_told(room: Room, method: str, request_: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        getattr(room, method)(request_)


@pytest.mark.parametrize("rows", [None, [], [1] * 257, ["1"], [1.0], [48], "../secret"])
def test_thumbnails_are_of_rows_alone(room: Room, rows: Any) -> None:
    with pytest.raises(UserError, match="row"):
        room.thumbnails(rows)
