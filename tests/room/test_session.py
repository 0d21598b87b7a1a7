"""What a room answers, against distances in float64."""

import base64
from typing import Any

import numpy as np
import pytest

from decomp_jax.errors import UserError
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.inference.drawing import region_weights
from decomp_jax.room import session
from decomp_jax.room.session import Room
from tests.evaluation.fakes import SIZE, FakeDecomposer, Heads

PATHS = ("normal", "abnormal")


def tables(decomposer: FakeDecomposer, bank: Any, image: np.ndarray) -> dict[str, np.ndarray]:
    """What each cell adds to the distance of an image to each row of the bank, float64 [N,h,w], a path."""
    output = decomposer.decompose(image[None])
    return {path: ((getattr(bank, f"{path}_codebook").astype(float)[getattr(bank, f"{path}_indices")]
                    - getattr(output, f"z_e_{path}")[0].astype(float)) ** 2).sum(-1) for path in PATHS}


def check(answer: Any, cells: np.ndarray, *, without: np.ndarray, k: int) -> None:
    """The k nearest rows, by distance and row, and what their cells add."""
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
    cells = weights * sum(weight * tables(decomposer, bank, images[row])["abnormal"]
                          for weight, rows in ((1 / (1 + count), [2, *like]), (-0.5 / 2, unlike)) for row in rows)
    check(answer, cells, without=np.zeros(len(bank), bool), k=9)


def test_an_image_that_was_brought_is_asked_with_as_one_of_the_archive(room: Room, heads: dict[str, Heads]) -> None:
    image = heads["reference"].fields["image"][14]
    brought = {"pixels": base64.b64encode(image.astype("<f2").tobytes()).decode(), "name": "mine"}
    question = {"anatomy": {"row": 14}, "lesion": {"row": 14}, "other_patients": False}
    own, other = room.ask(question), room.ask(question | {"anatomy": brought, "lesion": brought})
    assert own.data == other.data and own.data["rows"][0] == 14
    assert room.ask(question).data == own.data, "the same question has the same answer"


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
    points = bank.abnormal_codebook.astype(float)[bank.abnormal_indices] - share_of_cells(decomposer, labels)
    cells = (points**2).sum(-1) + tables(decomposer, bank, heads["reference"].fields["image"][8])["normal"]
    check(answer, cells, without=bank.rows["patient_id"] == "r1", k=8)


def test_one_slice_of_each_patient(room: Room) -> None:
    answer = room.ask({"anatomy": {"row": 0}, "share": 0, "one_per_patient": True})
    assert sorted(about["patient_id"] for about in answer.data["about"]) == [f"r{i}" for i in range(1, 8)]


def test_what_is_looked_at(room: Room, decomposer: FakeDecomposer, heads: dict[str, Heads]) -> None:
    image, label = (heads["reference"].fields[name][9] for name in ("image", "label"))
    answer = room.look({"image": {"row": 9}})
    output = decomposer.decompose(image[None])
    for name, plane in (("image", image), ("x_minus", output.x_minus[0])):
        np.testing.assert_allclose(answer.arrays[name] / 65535, plane[..., 0].astype(float), atol=1e-5)
    np.testing.assert_array_equal(answer.arrays["label"], label)
    np.testing.assert_array_equal(answer.arrays["lesion"], output.segmentation[0].argmax(-1))
    np.testing.assert_array_equal(answer.arrays["normal_codes"], output.normal_indices[0])
    small = room.thumbnails([9, 3])
    np.testing.assert_allclose(small.arrays["image"][0] / 255, image[..., 0].astype(float), atol=1 / 500)
    assert small.data["about"][1]["slice_index"] == 3


def test_without_images_the_codes_are_asked_with_and_painted(
    painted_room: Room, decomposer: FakeDecomposer, reference: SliceSet
) -> None:
    bank = reference.bank
    assert not painted_room.about().data["at_hand"]
    look = painted_room.look({"image": {"row": 5}})
    painted = decomposer.paint(bank.normal_indices[5:6], bank.abnormal_indices[5:6])[0, ..., 0]
    np.testing.assert_allclose(look.arrays["image"] / 65535, painted, atol=1e-3)
    assert not look.data["at_hand"] and (look.arrays["label"] == 255).all()
    seen = (bank.abnormal_indices[5] > 0).repeat(SIZE // 4, 0).repeat(SIZE // 4, 1)
    np.testing.assert_array_equal(look.arrays["lesion"] > 0, seen)
    answer = painted_room.ask({"anatomy": {"row": 5}, "share": 0, "other_patients": False})
    book = bank.normal_codebook.astype(float)
    cells = ((book[bank.normal_indices] - book[bank.normal_indices[5]]) ** 2).sum(-1)
    check(answer, cells, without=np.zeros(len(bank), bool), k=60)


def test_patients_are_those_of_the_library(room: Room, decomposer: FakeDecomposer, heads: dict[str, Heads],
                                           reference: SliceSet) -> None:
    """By anatomy: each slice with the nearest within 5 mm, there and back, by brute force but for the scale."""
    bank, images = reference.bank, heads["reference"].fields["image"]
    answer = room.ask_patients({"row": 13, "share": 0})
    assert answer.data["rows"] == list(range(12, 18))
    distances = np.array([tables(decomposer, bank, images[row])["normal"].sum((1, 2)) for row in range(12, 18)])
    heights = bank.rows["position_mm"]
    far = abs(heights[12:18, None] - heights) > 5
    near = np.where(far, np.inf, distances).reshape(6, 8, 6)
    expected = (near.min(2).mean(0) + near.min(0).mean(1)) / 2
    order = [i for i in np.argsort(expected) if i != 2]
    assert answer.data["patients"] == [f"r{i}" for i in order]
    distances, expected = np.array(answer.data["distances"]), expected[order]
    np.testing.assert_allclose(distances / distances[0], expected / expected[0], rtol=1e-4)
    assert answer.data["matches"]["normal"][0] == (near[:, order[0]].argmin(1) + 6 * order[0]).tolist()


def test_patients_are_found_by_text_and_columns(room: Room) -> None:
    every = room.patients({})
    assert every.data["count"] == 8 and every.data["patients"][1] == {"id": "r1", "row": 6, "slices": 6, "fit": 6}
    assert [one["id"] for one in room.patients({"text": "R3"}).data["patients"]] == ["r3"]
    assert [one["id"] for one in room.patients({"where": {"tumour": "glioma"}}).data["patients"]] == [
        "r1", "r3", "r5", "r7"]
    assert [one["id"] for one in room.patients({"start": 6}).data["patients"]] == ["r6", "r7"]
    assert room.patients({"text": "<script>"}).data == {"count": 0, "patients": []}


PIXELS = 2 * SIZE * SIZE


@pytest.mark.parametrize(("method", "request_", "message"), [
    ("look", {"image": {"row": "../../etc/passwd"}}, "row"),
    ("look", {"image": {"row": True}}, "row"),
    ("look", {"image": {"row": 48}}, "0 to 47"),
    ("look", {"image": {"row": -1}}, "row"),
    ("look", {"image": {"path": "/etc/passwd"}}, "needs a row"),
    ("look", {"image": "/etc/passwd"}, "needs an image"),
    ("look", {"image": {"pixels": "AAAA"}}, "3 bytes"),
    ("look", {"image": {"pixels": "?"}}, "base64"),
    ("look", {"image": {"pixels": base64.b64encode(b"\x00\x7e" * (PIXELS // 2)).decode()}}, "outside 0 to 1"),
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
    ("slice_of", {"number": 99, "slice": 0}, "no longer at hand"),
])
def test_what_can_not_be_asked_is_told(room: Room, method: str, request_: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        getattr(room, method)(request_)


@pytest.mark.parametrize("rows", [None, [], [1] * 257, ["1"], [1.0], [48], "../secret"])
def test_thumbnails_are_of_rows_alone(room: Room, rows: Any) -> None:
    with pytest.raises(UserError, match="row"):
        room.thumbnails(rows)
