"""A new picture, looked up in a bank."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from decomp_jax.errors import UserError
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.inference import asking, sheet
from decomp_jax.inference import query as module
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.preparation.picture import FOREGROUND, prepare_picture
from decomp_jax.retrieval import CodeBank
from tests.evaluation.fakes import FakeDecomposer, Heads, settings


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: dict[str, Heads], reference: SliceSet
) -> dict[str, object]:
    """Arguments of `run_query` for a drawn bank and two pictures."""
    decomposer = FakeDecomposer(settings(source="images", foreground=FOREGROUND, modalities=("image",)))
    monkeypatch.setattr(Decomposer, "restore", lambda workdir: decomposer)
    meta = {"model_digest": decomposer.model_digest, "data_digest": heads["reference"].digest,
            "preprocessing": decomposer.settings.preprocessing, "data": "gone", "split": "reference"}
    rows = reference.bank.rows.copy()
    rows["position_mm"] = np.nan  # as pictures have it
    dataclasses.replace(reference.bank, rows=rows, meta=meta).save(tmp_path / "bank")
    for name, i in zip("ab", np.flatnonzero(heads["query"].rows["has_abnormality"])):
        pixels = (255 * heads["query"].fields["image"][i, ..., 0].astype(float)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return {"workdir": tmp_path, "bank": tmp_path / "bank", "image": tmp_path / "a.png", "k": 4,
            "out": tmp_path / "out"}


def hits_of(out: Path) -> list[dict[str, str]]:
    with open(out / "hits.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("codes", [False, True])
def test_hits_are_the_nearest(run: dict, reference: SliceSet, capsys: pytest.CaptureFixture, codes: bool) -> None:
    module.run_query(**run | {"by": "normal", "codes": codes})
    decomposer = Decomposer.restore(run["workdir"])
    image = prepare_picture(run["image"], decomposer.settings)
    book, output = decomposer.normal_codebook.astype(float), decomposer.decompose(image[None])
    asked, stored = book[output.normal_indices] if codes else output.z_e_normal.astype(float), book[reference.bank.normal_indices]
    distances = ((asked - stored) ** 2).sum((1, 2, 3))
    if not codes:
        distances /= (asked**2).sum() + (stored**2).sum((1, 2, 3))
    hits = hits_of(run["out"])
    assert [hit["rank"] for hit in hits] == ["1", "2", "3", "4"]
    np.testing.assert_allclose([float(hit["distance"]) for hit in hits], np.sort(distances)[:4], rtol=1e-5)
    for hit in hits:
        row = int(hit["row"])
        assert distances[row] == pytest.approx(float(hit["distance"]), rel=1e-5)
        assert (hit["patient_id"], int(hit["slice_index"])) == tuple(reference.rows[["patient_id", "slice_index"]][row])
    assert Image.open(run["out"] / "sheet.png").size[0] > 800
    assert "gone: the data set is not there" in capsys.readouterr().err


def test_lesion_of_another_picture_moves_the_hits(
    run: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The drawn network knows lesions by their grey values, which the preparation of a picture changes.
    monkeypatch.setattr(asking, "prepare_picture", lambda path, _: np.asarray(Image.open(path))[..., None] / 255)
    module.run_query(**run)
    module.run_query(**run | {"lesion_from": tmp_path / "b.png", "out": tmp_path / "mixed"})
    assert hits_of(run["out"]) != hits_of(tmp_path / "mixed")


def test_the_sheet_shows_the_images_where_they_are(
    run: dict, monkeypatch: pytest.MonkeyPatch, heads: dict[str, Heads], capsys: pytest.CaptureFixture
) -> None:
    shown = []
    manifest = {"digest": heads["reference"].digest, "splits": ("query", "reference")}
    monkeypatch.setattr(sheet, "read_manifest", lambda data: manifest)
    monkeypatch.setattr(sheet, "SliceDataset", lambda data, split: heads[split])
    for one in heads.values():
        monkeypatch.setattr(one, "settings", Decomposer.restore(run["workdir"]).settings)
    monkeypatch.setattr(sheet, "contact_sheet", lambda sections, **rest: shown.append((sections, rest)))
    with pytest.raises(AttributeError):  # nothing to save
        module.run_query(**run)
    asked, found = shown[0][0]
    assert [len(line) for line in found.lines] == [4, 4] and len(asked.lines[0]) == 1
    assert "with their labels" in shown[0][1]["note"]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": "normal", "lesion_from": "b.png"}, "--lesion_from"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"slice_index": 3}, "trained on pictures"),
        ({"mask": "mask.nii.gz"}, "mask.nii.gz: is of a volume"),
        ({"lesion_mask": "mask.nii.gz"}, "--lesion_mask: are of --lesion_from"),
    ],
)
def test_mistakes_are_told(run: dict, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        module.run_query(**run | change)
    assert not run["out"].exists()


def test_a_bank_of_another_network_is_refused(run: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(Decomposer.restore(""), model_digest="other")
    monkeypatch.setattr(Decomposer, "restore", lambda workdir: other)
    with pytest.raises(UserError, match="another network"):
        module.run_query(**run)


def test_an_empty_bank_is_refused(run: dict, tmp_path: Path) -> None:
    bank = CodeBank.load(run["bank"])
    parts = {name: getattr(bank, name)[:0] for name in ("normal_indices", "abnormal_indices", "rows")}
    dataclasses.replace(bank, **parts).save(tmp_path / "empty")
    with pytest.raises(UserError, match="empty: is empty; encode"):
        module.run_query(**run | {"bank": tmp_path / "empty"})
