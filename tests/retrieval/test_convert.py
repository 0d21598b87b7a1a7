"""A bank's Parquet and FAISS files, read back and searched by DuckDB and FAISS."""

import base64
import dataclasses
import io
import json
import sys
from pathlib import Path

import duckdb
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from brute_force import make_bank, make_queries
from scipy.spatial.distance import cdist

from decomp_jax.errors import UserError
from decomp_jax.retrieval import CodeBank
from decomp_jax.retrieval.convert import convert


@pytest.fixture
def bank(tmp_path: Path) -> CodeBank:
    """Of 64 normal and 72 abnormal codes; patient ids beyond ASCII."""
    bank = make_bank("sparse", 300)
    rows = bank.rows.copy()
    rows["patient_id"] = np.char.replace(rows["patient_id"], "p", "é")
    meta = {"model_digest": "m", "data_digest": "d", "preprocessing": {"size": 64}}
    dataclasses.replace(bank, rows=rows, meta=meta).save(tmp_path / "bank")
    return CodeBank.load(tmp_path / "bank")


def test_parquet_is_the_bank(bank: CodeBank, tmp_path: Path) -> None:
    convert(bank.name, to="parquet", by="both", out=tmp_path / "new" / "bank.parquet")
    table = pq.read_table(tmp_path / "new" / "bank.parquet")
    meta = {key.decode(): value for key, value in table.schema.metadata.items()}
    header = json.loads(meta["bank"])
    assert header["model_digest"] == "m" and header["data_digest"] == "d" and header["preprocessing"] == {"size": 64}
    for path in ("normal", "abnormal"):
        column = table[f"{path}_indices"].combine_chunks()
        assert column.type == pa.list_(pa.uint16(), 16)
        indices = column.flatten().to_numpy().reshape(-1, *header["grid"])
        np.testing.assert_array_equal(indices, getattr(bank, f"{path}_indices"))
        codebook = np.load(io.BytesIO(base64.b64decode(meta[f"{path}_codebook"])))
        np.testing.assert_array_equal(codebook, getattr(bank, f"{path}_codebook"))
    for name in bank.rows.dtype.names:
        assert table[name].to_pylist() == bank.rows[name].tolist()


def test_duckdb_finds_the_same_hits(bank: CodeBank, tmp_path: Path) -> None:
    """Distances by SQL: the codes of each row joined with what each code in each cell adds."""
    convert(bank.name, to="parquet", by="abnormal", out=tmp_path / "bank.parquet")
    query = make_queries(bank, 1)["abnormal"]
    codebook = bank.abnormal_codebook.astype(np.float64)
    added = cdist(codebook[query.ravel()], codebook, "sqeuclidean")
    cell, code = (part.ravel() for part in np.indices(added.shape))
    connection = duckdb.connect()
    connection.register("added", pa.table({"cell": cell, "code": code, "distance": added.ravel()}))
    hits = connection.execute(f"""
        SELECT row, patient_id, sum(distance) AS total FROM (
            SELECT file_row_number AS row, patient_id,
                   generate_subscripts(abnormal_indices::USMALLINT[], 1) - 1 AS cell,
                   unnest(abnormal_indices::USMALLINT[]) AS code
            FROM read_parquet('{tmp_path}/bank.parquet', file_row_number = true)
        ) JOIN added USING (cell, code) GROUP BY row, patient_id ORDER BY round(total, 6), row LIMIT 7
    """).fetchnumpy()
    expected = bank.search(abnormal=query, k=7)
    np.testing.assert_array_equal(hits["row"], expected.rows[0])
    np.testing.assert_allclose(hits["total"], expected.distances[0], rtol=1e-5, atol=1e-4)
    assert hits["patient_id"].tolist() == bank.rows["patient_id"][expected.rows[0]].tolist()


@pytest.mark.parametrize("by", ["normal", "abnormal", "both"])
def test_faiss_finds_the_same_hits(bank: CodeBank, tmp_path: Path, by: str) -> None:
    paths = ("normal", "abnormal") if by == "both" else (by,)
    if by == "both":  # codebooks of one dimension and of different lengths
        same = dataclasses.replace(bank, normal_codebook=np.ascontiguousarray(bank.normal_codebook[:, :6]))
        same.save(tmp_path / "same")
        bank = CodeBank.load(tmp_path / "same")
    convert(bank.name, to="faiss", by=by, out=tmp_path / "bank.faiss")
    index = faiss.read_index(str(tmp_path / "bank.faiss"))
    assert isinstance(index, faiss.IndexPQ) and index.pq.nbits == (6 if by == "normal" else 7)
    queries = {path: codes for path, codes in make_queries(bank, 5).items() if path in paths}
    vectors = [getattr(bank, f"{path}_codebook")[codes].reshape(5, -1) for path, codes in queries.items()]
    found, rows = index.search(np.concatenate(vectors, 1), len(bank))
    hits = bank.search(**queries, k=len(bank))
    np.testing.assert_allclose(found, hits.distances, rtol=1e-4, atol=1e-3)
    # Each row at its distance; the order of rows that are equally far is free.
    by_row = np.take_along_axis(found, np.argsort(rows), 1)
    expected = np.take_along_axis(hits.distances, np.argsort(hits.rows), 1)
    np.testing.assert_allclose(by_row, expected, rtol=1e-4, atol=1e-3)
    assert index.sa_code_size() == -(-16 * len(paths) * index.pq.nbits // 8)


def test_vectors_become_the_banks_codes(bank: CodeBank, tmp_path: Path) -> None:
    """What FAISS itself encodes with the padded codebook decodes to the bank's codes."""
    convert(bank.name, to="faiss", by="abnormal", out=tmp_path / "bank.faiss")
    index = faiss.read_index(str(tmp_path / "bank.faiss"))
    codes = bank.abnormal_codebook[bank.abnormal_indices].reshape(len(bank), -1)
    np.testing.assert_array_equal(index.sa_decode(index.sa_encode(codes)), codes)
    np.testing.assert_array_equal(index.reconstruct_n(0, len(bank)), codes)


def test_vectors_become_codes_that_there_are(bank: CodeBank, tmp_path: Path) -> None:
    """Not what fills a codebook of 72 up to 128: a vector far from all codes is decoded to one of them."""
    dataclasses.replace(bank, abnormal_codebook=bank.abnormal_codebook + np.float32(50)).save(tmp_path / "far")
    convert(tmp_path / "far", to="faiss", by="abnormal", out=tmp_path / "bank.faiss")
    index = faiss.read_index(str(tmp_path / "bank.faiss"))
    decoded = index.sa_decode(index.sa_encode(np.zeros((1, index.d), np.float32))).reshape(16, -1)
    assert (decoded[:, None] == CodeBank.load(tmp_path / "far").abnormal_codebook).all(2).any(1).all()


def test_an_empty_bank(bank: CodeBank, tmp_path: Path) -> None:
    empty = {name: getattr(bank, name)[:0] for name in ("normal_indices", "abnormal_indices", "rows")}
    dataclasses.replace(bank, **empty).save(tmp_path / "empty")
    convert(tmp_path / "empty", to="parquet", by="both", out=tmp_path / "bank.parquet")
    convert(tmp_path / "empty", to="faiss", by="normal", out=tmp_path / "bank.faiss")
    assert pq.read_table(tmp_path / "bank.parquet").num_rows == 0
    assert faiss.read_index(str(tmp_path / "bank.faiss")).ntotal == 0


@pytest.mark.parametrize(("to", "library"), [("parquet", "pyarrow"), ("faiss", "faiss")])
def test_a_missing_library_is_named(
    bank: CodeBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}, .*pip install -e \"\.\[convert\]\""):
        convert(bank.name, to=to, by="both", out=tmp_path / "bank.out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank"]


def test_codebooks_of_two_dimensions_need_two_files(bank: CodeBank, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use --by=normal or --by=abnormal"):
        convert(bank.name, to="faiss", by="both", out=tmp_path / "bank.faiss")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank"]
