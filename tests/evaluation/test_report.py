"""The report of a drawn data set: files, numbers, page, and the sets that lack something."""

import csv
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.recfunctions import append_fields

from decomp_jax.errors import UserError
from decomp_jax.evaluation import report
from decomp_jax.evaluation.patients import METHODS as PATIENT_METHODS
from decomp_jax.evaluation.rankers import METHODS
from decomp_jax.evaluation.slices import SliceSet
from tests.evaluation.fakes import FakeDecomposer, Heads

CODES = {"normal", "abnormal", "both"}
NAMED = CODES | {f"{code}_{kind}" for code in CODES for kind in ("asymmetric", "relative")} | {"sketch", "sketch_circle", "sketch_shifted", "random", 
                 "pixel_l2", "oracle_normal", "oracle_abnormal"}


def write(
    folder: Path, monkeypatch: pytest.MonkeyPatch, heads: dict[str, Heads], reference: str = "reference",
    features: Sequence[tuple[str, Path]] = (),
) -> dict[str, Any]:
    """Writes a report of the given splits to `folder`/report and reads its numbers."""
    log = [{"step": step, "train/loss/total": 1 / step, "train/term/residual": 2 / step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    monkeypatch.setattr(report, "SliceDataset", lambda data, *splits: heads[" ".join(splits)])
    monkeypatch.setattr(report.Decomposer, "restore", lambda workdir: FakeDecomposer(heads["query"].settings))
    report.write_report(folder, "data", folder / "report", reference, features, slab_mm=0)  # each slice has its own lesion
    return json.loads((folder / "report" / "metrics.json").read_text())


class Page(HTMLParser):
    """Collects the tags and the text of a page, and checks that tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.images, self.links, self.text = [], [], [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.images += [values["src"]] if tag == "img" else []
        self.links += [value for name, value in attrs if name in ("href", "src") and tag != "img"]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, heads: dict[str, Heads]) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return folder / "report", write(folder, monkeypatch, heads)


def test_every_method_has_its_intervals(written: tuple[Path, dict[str, Any]]) -> None:
    retrieval = written[1]["retrieval"]
    assert NAMED <= retrieval.keys()
    for method in NAMED:
        for target in ("normal", "abnormal"):
            value = retrieval[method][target]["dice@5"]
            assert 0 <= value["low"] <= value["mean"] <= value["high"] <= 1


def test_codes_that_know_the_labels_score_as_such(written: tuple[Path, dict[str, Any]]) -> None:
    metrics = written[1]
    better = metrics["comparisons"]["abnormal"]["dice@5"]["abnormal vs pixel_l2"]
    assert better["difference"]["low"] > 0 and better["ratio"]["low"] > 1
    assert metrics["abnormality"]["auroc"]["mean"] == 1
    assert metrics["segmentation"]["dice"]["ED"]["mean"] == pytest.approx(1, abs=0.01)
    assert metrics["codebooks"]["abnormal"]["lesion-free slices"]["used"] == 1
    assert metrics["counterfactual"]["images"]["x_minus"]["psnr gain inside"]["low"] > 0


def test_table_and_json_hold_the_same_numbers(written: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = written
    lines = dict(line.split(",", 1) for line in (folder / "metrics.csv").read_text().splitlines())
    values = [float(value) for value in lines["retrieval | normal | abnormal | dice@5"].split(",")]
    written = metrics["retrieval"]["normal"]["abnormal"]["dice@5"]
    assert [written["mean"], written["low"], written["high"]] == pytest.approx(values, rel=1e-5)


def test_page_needs_no_other_file_and_says_what_it_must(written: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = written
    page = Page((folder / "index.html").read_text())
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert figures == {"retrieval", "decomposition", "failures", "selectivity", "training", "codebooks"}
    assert len(page.images) == len(figures)
    assert all(source.startswith("data:image/png;base64,") for source in page.images) and not page.links
    assert "Not a medical device" in page.text
    assert metrics["provenance"]["model_digest"] in page.text and metrics["provenance"]["data_digest"] in page.text
    assert f"{metrics['retrieval']['abnormal']['abnormal']['dice@5']['mean']:.3f}" in page.text
    assert not re.search(r"\b(nan|None)\b", page.text)
    assert all(method.sentence in page.text for method in (*METHODS.values(), *PATIENT_METHODS.values()))


def test_asymmetric_queries_and_drawn_lesions_find_at_least_as_much(written: tuple[Path, dict[str, Any]]) -> None:
    """The codes know the labels to a fifteenth; the query's vectors and a drawing of the labels know them wholly."""
    retrieval, patients = written[1]["retrieval"], written[1]["patients"]["retrieval"]
    code = retrieval["abnormal"]["abnormal"]["whole_dice@5"]["mean"]
    assert retrieval["abnormal_asymmetric"]["abnormal"]["whole_dice@5"]["mean"] > code - 0.01
    assert retrieval["abnormal_relative"]["abnormal"]["whole_dice@5"]["mean"] > code - 0.01
    drawn = retrieval["sketch"]["abnormal"]["whole_dice@5"]["mean"]
    assert drawn > code - 0.01 and drawn > retrieval["sketch_shifted"]["abnormal"]["whole_dice@5"]["mean"]
    for table, method in ((retrieval, "sketch_circle"), (patients, "patient")):
        dice = {name: table[name]["abnormal"]["whole_dice@5"]["mean"] for name in (method, "random")}
        assert dice[method] > dice["random"]


def test_features_of_others_are_in_every_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root shares of the true lesion rank as its overlap does; slices without a label have vectors, too."""
    splits = {split: Heads(3, 4, seed=i, prefix=split[0]) for i, split in enumerate(("query", "reference"))}
    splits["reference"].rows["labelled"][:2] = False
    labels = np.concatenate([heads.fields["label"] for heads in splits.values()]).reshape(24, -1) > 0
    np.save(tmp_path / "truth.npy", labels / np.sqrt(labels.sum(1, keepdims=True).clip(1)))
    source = {"data_digest": splits["query"].digest, "splits": ["query", "reference"]}
    (tmp_path / "truth.json").write_text(json.dumps(source))
    metrics = write(tmp_path, monkeypatch, splits, features=[("<truth>", tmp_path / "truth.npy")])
    retrieval = metrics["retrieval"]
    best = retrieval["oracle_whole"]["abnormal"]["whole_dice@1"]["mean"]
    assert retrieval["<truth>"]["abnormal"]["whole_dice@1"]["mean"] > 0.7 * best
    assert "<truth>" in metrics["patients"]["retrieval"]
    assert "abnormal vs <truth>" in metrics["comparisons"]["abnormal"]["dice@5"]
    assert "<truth>, mean over slices" in Page((tmp_path / "report" / "index.html").read_text()).text


def test_every_patient_asks_among_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: dict[str, Heads]
) -> None:
    monkeypatch.setattr(report, "read_manifest", lambda data: {"splits": {"train": {}, "query": {}}})
    metrics = write(tmp_path, monkeypatch, heads | {"train query": heads["reference"]}, "others")
    assert metrics["protocol"]["queries"] == metrics["protocol"]["references"]
    assert metrics["protocol"]["queries"]["patients"] == 8
    assert metrics["retrieval"]["oracle_whole"]["abnormal"]["whole_dice@1"]["mean"] < 1
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert "each among the slices of all patients but its own" in page.text


def test_a_table_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No patients, no anatomy, no heights, one lesion class, nothing lesion-free; the training images are searched."""
    changes = {"anatomy_classes": (), "lesion_classes": ("lesion",), "healthy": False}
    splits = {"query": Heads(3, 4, seed=0, prefix="q", **changes), "train": Heads(2, 4, seed=1, prefix="r", **changes)}
    for heads in splits.values():
        heads.rows["patient_id"] = [f"{heads.rows['patient_id'][0]}-{i}" for i in range(len(heads))]
        heads.rows["position_mm"] = np.nan
        heads.fields["label"] = heads.fields["label"].clip(max=1)
    metrics = write(tmp_path, monkeypatch, splits, "train")
    assert metrics["protocol"]["reference split"] == "train"
    assert metrics["retrieval"]["normal"].keys() == {"abnormal"}
    assert 0 < metrics["columns"]["tumour"]["random"]["map"]["mean"] < 1
    assert "slice_level" not in metrics["retrieval"]
    assert "images" not in metrics["counterfactual"]


def test_few_patients_claim_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: dict[str, Heads]) -> None:
    splits = {"query": Heads(1, 6, seed=0, prefix="q"), "reference": heads["reference"]}
    metrics = write(tmp_path, monkeypatch, splits)
    dice = metrics["retrieval"]["abnormal"]["abnormal"]["dice@5"]
    assert dice["mean"] > 0 and dice["low"] is dice["high"] is None
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert "too few patients to say which is higher" in page.text and "higher than" not in page.text
    assert not re.search(r"\b(nan|None)\b", page.text)
    with (tmp_path / "report" / "metrics.csv").open(newline="") as file:
        lines = {line["name"]: line for line in csv.DictReader(file)}
    assert lines["retrieval | abnormal | abnormal | dice@5"]["low"] == ""


def test_columns_are_scored_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of numbers tells no kinds; its name, which is anything, stays text on the page."""
    splits = {}
    for seed, split in enumerate(("query", "reference")):
        splits[split] = Heads(3, 4, seed=seed, prefix="<script>"[: 4 + seed])
        rows = splits[split].rows
        columns = {"<script>grade": np.arange(len(rows)) % 3.0, "site": np.full(len(rows), "A&B<i>")}
        splits[split].rows = append_fields(rows, list(columns), list(columns.values()), usemask=False)
    metrics = write(tmp_path, monkeypatch, splits)
    assert metrics["columns left out"].keys() == {"<script>grade", "site"} and "tumour" in metrics["columns"]
    text = (tmp_path / "report" / "index.html").read_text()
    page = Page(text)
    assert "<script" not in text and "<i>" not in text
    assert "<script>grade (holds numbers" in page.text and "site (has one value in all references)" in page.text


def test_hostile_names_are_text_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "<script>alert('x')</script>"
    splits = {
        split: Heads(3, 4, seed=seed, prefix=split[0], lesion_classes=(name, "ED"))
        for seed, split in enumerate(("query", "reference"))
    }
    for heads in splits.values():
        rows = heads.rows
        heads.rows = append_fields(rows, name, rows["tumour"], usemask=False)
        heads.rows["patient_id"] = np.char.add("<b>", rows["patient_id"])
    write(tmp_path, monkeypatch, splits)
    text = (tmp_path / "report" / "index.html").read_text()
    assert "<script" not in text
    assert f"Dice, {name}" in Page(text).text and f"Same {name}" in Page(text).text


def test_unlabelled_slices_are_left_out(decomposer: FakeDecomposer) -> None:
    heads = Heads(4, 4, seed=1)
    heads.rows["labelled"][:8] = False
    slices = SliceSet.encode(decomposer, heads, "reference")
    np.testing.assert_array_equal(slices.positions, np.arange(8, 16))
    np.testing.assert_array_equal(slices.label, heads.fields["label"][8:])
    assert len(slices.bank) == len(slices) == 8


def test_no_labels_at_all_leave_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"anatomy_classes": (), "healthy": False}
    splits = {
        split: Heads(2, 3, seed=i, prefix=split[0], **changes) for i, split in enumerate(("query", "reference"))
    }
    for heads in splits.values():
        heads.rows["labelled"], heads.fields["label"][:] = False, 0
    metrics = write(tmp_path, monkeypatch, splits)
    assert metrics["retrieval"] == {}
    assert (tmp_path / "report" / "figures" / "retrieval.png").exists()


def test_a_patient_in_both_splits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"query": Heads(2, 3, seed=0, prefix="p"), "reference": Heads(2, 3, seed=1, prefix="p")}
    with pytest.raises(UserError, match="patient p0 is in both query and reference"):
        write(tmp_path, monkeypatch, splits)


def test_data_prepared_otherwise_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"query": Heads(2, 3, seed=0, prefix="q"), "reference": Heads(2, 3, seed=1, prefix="r")}
    monkeypatch.setattr(report, "SliceDataset", lambda data, split: splits[split])
    other = FakeDecomposer(Heads(1, 1, seed=0, modalities=("t2",)).settings)
    monkeypatch.setattr(report.Decomposer, "restore", lambda workdir: other)
    with pytest.raises(UserError, match="modalities"):
        report.write_report(tmp_path, "data", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_an_interrupted_report_has_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: dict[str, Heads]
) -> None:
    """Nor does the page of an earlier report stay beside the new numbers."""
    write(tmp_path, monkeypatch, heads)

    def interrupted(path: Path, *_: object) -> None:
        path.write_text("<!doctype html>")
        raise SystemExit(143)

    monkeypatch.setattr(report, "write_page", interrupted)
    with pytest.raises(SystemExit):
        write(tmp_path, monkeypatch, heads)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"figures", "metrics.csv", "metrics.json"}
