import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from decomp_jax.errors import UserError
from decomp_jax.inference.search import search_banks
from decomp_jax.retrieval import CodeBank, codes, relative
from tests.retrieval.brute_force import make_bank, make_queries

OPTIONS = {"by": "both", "k": 4, "pairs": None, "exclude_same_patient": False, "one_per_patient": False}


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("banks")
    bank = make_bank("clustered", 200)
    bank.save(folder / "reference")
    indices = {f"{part}_indices": indices for part, indices in make_queries(bank, 6).items()}
    CodeBank.from_arrays(
        **indices, rows=bank.rows[:6], normal_codebook=bank.normal_codebook, abnormal_codebook=bank.abnormal_codebook,
    ).save(folder / "query")
    return folder


def run(folder: Path, out: Path, **options: object) -> list[dict[str, str]]:
    search_banks(folder / "reference", folder / "query", out=out / "hits.csv", **{**OPTIONS, **options})
    with (out / "hits.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("by", ["normal", "abnormal", "both"])
def test_hits(banks: Path, tmp_path: Path, by: str) -> None:
    lines = run(banks, tmp_path, by=by)
    assert list(lines[0]) == ["query", "rank", "row", "patient_id", "slice_index", "distance"]
    bank, queries = CodeBank.load(banks / "reference"), CodeBank.load(banks / "query")
    parts = ("normal", "abnormal") if by == "both" else (by,)
    hits = bank.search(**{part: getattr(queries, f"{part}_indices") for part in parts}, k=4)
    assert [int(line["row"]) for line in lines] == hits.rows.ravel().tolist()
    assert [int(line["query"]) for line in lines] == np.repeat(range(6), 4).tolist()
    assert [int(line["rank"]) for line in lines] == [1, 2, 3, 4] * 6
    np.testing.assert_array_equal([np.float32(line["distance"]) for line in lines], hits.distances.ravel())
    assert all(line["patient_id"] == bank.rows["patient_id"][int(line["row"])] for line in lines)


@pytest.mark.parametrize("by, told", [("normal", False), ("abnormal", True), ("both", True)])
def test_banks_of_different_slabs_are_told(
    banks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str, told: bool,
) -> None:
    slabs = dataclasses.replace(CodeBank.load(banks / "query"), meta={"slab_mm": 4.0})
    slabs.save(tmp_path / "slabs")
    search_banks(banks / "reference", tmp_path / "slabs", out=tmp_path / "hits.csv", **{**OPTIONS, "by": by})
    assert ("slabs of 4 mm" in capsys.readouterr().err) == told


def test_relative_distances(banks: Path, tmp_path: Path) -> None:
    lines = run(banks, tmp_path, by="abnormal", relative=True)
    bank, queries = CodeBank.load(banks / "reference"), CodeBank.load(banks / "query")
    hits = bank.search(relative(codes(abnormal=queries.abnormal_indices)), k=4)
    assert [int(line["row"]) for line in lines] == hits.rows.ravel().tolist()
    np.testing.assert_array_equal([np.float32(line["distance"]) for line in lines], hits.distances.ravel())


def test_pairs_leave_out_both_patients(banks: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("\ufeffnormal_row,abnormal_row\r\n0,1\r\n5,3\r\n")
    lines = run(banks, tmp_path, pairs=tmp_path / "pairs.csv", exclude_same_patient=True, k=500)
    queries = CodeBank.load(banks / "query").rows["patient_id"]
    own = {"0": {queries[0], queries[1]}, "1": {queries[5], queries[3]}}
    assert {line["query"] for line in lines} == {"0", "1"} and len(lines) < 400
    assert all(line["patient_id"] not in own[line["query"]] for line in lines)


def test_one_per_patient(banks: Path, tmp_path: Path) -> None:
    lines = run(banks, tmp_path, one_per_patient=True, k=500)
    hits = [(line["query"], line["patient_id"]) for line in lines]
    assert len(set(hits)) == len(hits) == 6 * len(set(CodeBank.load(banks / "reference").rows["patient_id"]))


@pytest.mark.parametrize("text, options, message", [
    ("normal_row,abnormal_row\n0,1\n", {"by": "normal"}, "--pairs: mixes two codes"),
    ("normal,abnormal\n0,1\n", {}, "pairs.csv: needs columns .*'normal,abnormal'"),
    ("normal_row;abnormal_row\n0;1\n", {}, "pairs.csv: needs columns .*'normal_row;abnormal_row'"),
    ("normal_row,abnormal_row\n0,\0", {}, "pairs.csv: can't be read"),
    ("normal_row,abnormal_row\n0,x\n", {}, "pairs.csv: can't be read"),
    ("normal_row,abnormal_row\n0\n", {}, "pairs.csv: can't be read"),
    ("normal_row,abnormal_row\n0,6\n", {}, "pairs.csv: names rows 0..6"),
])
def test_bad_pairs(banks: Path, tmp_path: Path, text: str, options: dict[str, object], message: str) -> None:
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        run(banks, tmp_path, pairs=tmp_path / "pairs.csv", **options)


@pytest.fixture(scope="module")
def patients(banks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same banks with heights; the queries are 60 rows of the reference."""
    folder = tmp_path_factory.mktemp("patients")
    bank = CodeBank.load(banks / "reference")
    rows = np.zeros(len(bank), [*bank.rows.dtype.descr, ("position_mm", "f4")])
    rows["patient_id"], rows["position_mm"] = bank.rows["patient_id"], np.arange(len(bank)) * 7 % 61
    bank = dataclasses.replace(bank, rows=rows)
    bank.save(folder / "reference")
    parts = {name: getattr(bank, name)[:60] for name in ("normal_indices", "abnormal_indices", "rows")}
    dataclasses.replace(bank, **parts).save(folder / "query")
    return folder


@pytest.mark.parametrize("options", [{"by": "normal"}, {"by": "both", "within_mm": 12.0, "exclude_same_patient": True}])
def test_patients(patients: Path, tmp_path: Path, options: dict[str, object]) -> None:
    lines = run(patients, tmp_path, level="patient", k=3, **options)
    assert list(lines[0]) == ["query", "rank", "patient_id", "distance"]
    bank, queries = CodeBank.load(patients / "reference"), CodeBank.load(patients / "query")
    names = np.unique(queries.rows["patient_id"])
    assert [line["query"] for line in lines] == np.repeat(names, 3).tolist()
    for patient in names:
        own = queries.rows["patient_id"] == patient
        indices = {"normal": queries.normal_indices[own]}
        if options["by"] == "both":
            indices["abnormal"] = queries.abnormal_indices[own]
        hits = bank.search_patients(
            codes(**indices), heights=queries.rows["position_mm"][own], k=3,
            within_mm={} if options["by"] == "normal" else {"normal": 12.0, "abnormal": 12.0},
            exclude=[patient] if "exclude_same_patient" in options else [],
        )
        found = [line for line in lines if line["query"] == patient]
        assert [line["patient_id"] for line in found] == hits.patients.tolist()
        assert [float(line["distance"]) for line in found] == hits.distances.tolist()
        assert (patient in hits.patients) == (options["by"] == "normal")  # rows of its own are nearest


@pytest.mark.parametrize("options, message", [
    ({"level": "patient", "pairs": Path("pairs.csv")}, "--pairs: names slices"),
    ({"level": "patient", "relative": True}, "--relative: distances of patients are"),
    ({"within_mm": 3.0}, "--within_mm: is of --level=patient"),
    ({"level": "patient", "within_mm": -1.0}, "within_mm: needs numbers from 0 on"),
])
def test_bad_patients(patients: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(patients, tmp_path, **options)
    assert not (tmp_path / "hits.csv").exists()


def test_heights_of_two_units_are_refused(banks: Path, patients: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "level": "patient", "out": tmp_path / "hits.csv"}
    for bank, query in ((banks, patients), (patients, banks)):
        with pytest.raises(UserError, match=f"^{banks}/.*/rows.npy: lacks heights in mm"):
            search_banks(bank / "reference", query / "query", **options)
    assert not (tmp_path / "hits.csv").exists()


def test_queries_of_another_model(banks: Path, tmp_path: Path) -> None:
    make_bank("uniform", 10, seed=5).save(tmp_path / "stranger")
    with pytest.raises(UserError, match="stranger/normal_codebook.npy: differs"):
        search_banks(banks / "reference", tmp_path / "stranger", out=tmp_path / "hits.csv", **OPTIONS)
    assert not (tmp_path / "hits.csv").exists()
