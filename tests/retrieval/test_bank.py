import dataclasses
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import faiss
import numpy as np
import pytest
from brute_force import make_bank, make_queries

from decomp_jax.errors import UserError
from decomp_jax.retrieval import BankWriter, CodeBank
from tests.conftest import full_disk

ARRAYS = ("normal_indices", "abnormal_indices", "normal_codebook", "abnormal_codebook", "rows")


@pytest.fixture
def bank() -> CodeBank:
    bank = make_bank("uniform", 300)
    return dataclasses.replace(bank, meta={"model_digest": "m", "data_digest": "d", "preprocessing": {"size": 64}})


@pytest.fixture
def saved(bank: CodeBank, tmp_path: Path) -> Path:
    bank.save(tmp_path / "bank")
    return tmp_path / "bank"


def test_saved_bank_is_the_bank(bank: CodeBank, saved: Path) -> None:
    loaded = CodeBank.load(saved, verify=True)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(bank, name))
        assert isinstance(getattr(loaded, name), np.memmap)
    assert bank.meta.items() <= loaded.meta.items() and loaded.meta["format_version"] == 1


def test_numpy_alone_reads_a_bank(bank: CodeBank, saved: Path) -> None:
    arrays = {name: np.load(saved / f"{name}.npy") for name in ARRAYS}
    assert arrays["normal_indices"].dtype == np.uint16 and arrays["normal_codebook"].dtype == np.float32
    codes = arrays["normal_codebook"][arrays["normal_indices"]]
    np.testing.assert_array_equal(codes, bank.normal_codebook[bank.normal_indices])
    assert arrays["rows"]["patient_id"][7] == bank.rows["patient_id"][7]


def test_faiss_reads_a_bank(bank: CodeBank, saved: Path) -> None:
    codes = np.load(saved / "normal_codebook.npy")[np.load(saved / "normal_indices.npy")]
    index = faiss.IndexFlatL2(codes[0].size)
    index.add(codes.reshape(len(codes), -1))
    distances, rows = index.search(codes[:4].reshape(4, -1), 5)
    hits = bank.search(normal=bank.normal_indices[:4], k=5)
    np.testing.assert_array_equal(rows, hits.rows)
    np.testing.assert_allclose(distances, hits.distances, rtol=1e-4, atol=1e-3)


def test_joined_banks(bank: CodeBank, saved: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(bank, meta={**bank.meta, "data_digest": "e"}, rows=bank.rows[::-1])
    joined = CodeBank.concat([CodeBank.load(saved), other])
    assert len(joined) == 600 and joined.meta["data_digest"] == "d+e" and joined.meta["model_digest"] == "m"
    np.testing.assert_array_equal(joined.rows, np.concatenate([bank.rows, bank.rows[::-1]]))
    hits = joined.search(normal=bank.normal_indices[5:6], k=2)
    assert hits.rows.tolist() == [[5, 305]] and hits.distances.tolist() == [[0, 0]]
    joined.save(tmp_path / "joined")
    assert len(CodeBank.load(tmp_path / "joined", verify=True)) == 600


@pytest.mark.parametrize("change, message", [
    ({"meta": {"model_digest": "other"}}, "bank.json: model_digest"),
    ({"meta": {"model_digest": "m", "preprocessing": {"size": 64}, "slab_mm": 4.0}}, "bank.json: slab_mm is 4"),
    ({"normal_codebook": np.zeros((64, 8), np.float32)}, "normal_codebook.npy: differs"),
    ({"rows": np.zeros(300, [("patient_id", "U8"), ("slice_index", "i4"), ("more", "i4")])}, "rows.npy: columns"),
    ({"normal_indices": np.zeros((300, 2, 8), np.uint16), "abnormal_indices": np.zeros((300, 2, 8), np.uint16)},
     "cells"),
])
def test_banks_of_other_models_are_not_joined(bank: CodeBank, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"stranger.*{message}"):
        CodeBank.concat([bank, dataclasses.replace(bank, **change, name="stranger")])


def damage(directory: Path, how: str) -> None:
    """Does to a bank what `how` says, checksums of the codebooks made good."""
    path = directory / "normal_indices.npy"
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "not npy":
        path.write_bytes(b"hello")
    elif how == "float":
        np.save(path, np.load(path).astype(np.float32))
    elif how == "short":
        np.save(path, np.load(path)[:-1])
    elif how == "out of range":
        np.save(path, np.load(path) + np.uint16(1))
    elif how == "codebook of another model":
        np.save(directory / "normal_codebook.npy", np.load(directory / "normal_codebook.npy") + 1)
    elif how == "no codebook":
        (directory / "abnormal_codebook.npy").unlink()
    elif how == "no patients":
        np.save(directory / "rows.npy", np.zeros(300, [("slice_index", "i4")]))
    elif how == "objects":
        np.save(directory / "rows.npy", np.array([("a", 1)] * 300, [("patient_id", "O"), ("slice_index", "i4")]))
    elif how == "no header":
        (directory / "bank.json").unlink()
    elif how == "header not json":
        (directory / "bank.json").write_text("{")
    elif how == "version":
        header = json.loads((directory / "bank.json").read_text())
        (directory / "bank.json").write_text(json.dumps({**header, "format_version": 99}))


@pytest.mark.parametrize("how, file", [
    ("missing", "normal_indices.npy: not found"), ("truncated", "normal_indices.npy: truncated"),
    ("not npy", "normal_indices.npy: truncated, damaged or no .npy"), ("float", "normal_indices.npy: holds float32"),
    ("short", "normal_indices.npy: shape"), ("out of range", "normal_indices hold"),
    ("codebook of another model", "normal_codebook.npy: checksum"), ("no codebook", "abnormal_codebook.npy: not found"),
    ("no patients", "rows.npy: columns"), ("objects", "rows.npy: truncated, damaged or no .npy"),
    ("no header", "bank.json: no such file"), ("header not json", "bank.json: not JSON that can be read"),
    ("version", "bank.json: format_version"),
])
def test_damaged_banks_are_refused(saved: Path, how: str, file: str) -> None:
    damage(saved, how)
    with pytest.raises(UserError, match=f"bank.*{file}"):
        CodeBank.load(saved)


@pytest.mark.parametrize("file", ["normal_indices.npy", "abnormal_indices.npy", "rows.npy"])
def test_files_of_another_bank_of_the_model_are_refused(bank: CodeBank, saved: Path, tmp_path: Path, file: str) -> None:
    backwards = {name: getattr(bank, name)[::-1] for name in ("normal_indices", "abnormal_indices", "rows")}
    dataclasses.replace(bank, **backwards).save(tmp_path / "other")
    (tmp_path / "other" / file).replace(saved / file)
    with pytest.raises(UserError, match=f"bank/{file}: checksum is not the one in bank.json.*; copy the bank whole"):
        CodeBank.load(saved)


def test_a_sorted_table_of_rows_is_refused(saved: Path) -> None:
    rows = np.load(saved / "rows.npy")
    np.save(saved / "rows.npy", np.sort(rows, order="slice_index"))
    with pytest.raises(UserError, match="rows.npy: checksum"):
        CodeBank.load(saved)


@pytest.mark.parametrize("change", [{"data_digest": "e"}, {"preprocessing": {"size": 32}}, {"checksums": None}, {"heads": 3}])
def test_an_edited_header_is_refused(saved: Path, change: dict) -> None:
    header = json.loads((saved / "bank.json").read_text())
    (saved / "bank.json").write_text(json.dumps(header | change))
    with pytest.raises(UserError, match="bank.json: damaged, edited"):
        CodeBank.load(saved)


def test_a_changed_byte_is_found_by_verify(saved: Path) -> None:
    path = saved / "normal_indices.npy"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="normal_indices.npy: checksum"):
        CodeBank.load(saved, verify=True)


def test_indices_out_of_range_are_found_at_the_latest_by_the_first_search(
    bank: CodeBank, saved: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    indices = np.load(saved / "normal_indices.npy")
    indices[-1] = 64
    np.save(saved / "normal_indices.npy", indices)
    monkeypatch.setattr("decomp_jax.retrieval.bank.CHECKED_ON_LOAD", 100)
    heads = json.loads((saved / "bank.json").read_text())["heads"]
    monkeypatch.setattr("decomp_jax.retrieval.bank._head", lambda path: heads[path.name])  # as if this were beyond them
    loaded = CodeBank.load(saved)
    with pytest.raises(UserError, match="normal_indices hold 0..64"):
        loaded.search(normal=indices[:1])


@pytest.mark.parametrize("change, message", [
    ({"normal_indices": np.full((300, 4, 4), 64)}, "normal_indices hold 64..64"),
    ({"normal_indices": np.zeros((300, 4, 4))}, "normal_indices: holds float64"),
    ({"normal_indices": np.zeros((299, 4, 4), int)}, "normal_indices: shape"),
    ({"abnormal_indices": np.zeros((300, 4, 5), int)}, "abnormal_indices: shape"),
    ({"normal_codebook": np.full((64, 8), np.nan)}, "normal_codebook: needs"),
    ({"normal_codebook": np.zeros(64)}, "normal_codebook: is"),
    ({"rows": np.zeros(300, [("patient_id", "i4"), ("slice_index", "i4")])}, "rows: patient_id"),
])
def test_bad_arrays(bank: CodeBank, change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CodeBank.from_arrays(**{**{name: getattr(bank, name) for name in ARRAYS}, **change})


def write(bank: CodeBank, out: Path, rows: int, then: type[BaseException] | None = None) -> None:
    writer = BankWriter(out, rows=bank.rows, normal_codebook=bank.normal_codebook,
                        abnormal_codebook=bank.abnormal_codebook, grid=bank.grid)
    with writer:
        for start in range(0, rows, 70):
            chunk = slice(start, min(start + 70, rows))
            writer.append(bank.normal_indices[chunk], bank.abnormal_indices[chunk])
        if then:
            raise then


def test_written_piece_by_piece(bank: CodeBank, tmp_path: Path) -> None:
    write(bank, tmp_path / "new" / "bank", 300)
    written = CodeBank.load(tmp_path / "new" / "bank", verify=True)
    np.testing.assert_array_equal(written.normal_indices, bank.normal_indices)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bank"]


def test_a_bank_larger_than_memory_can_be_written(bank: CodeBank, tmp_path: Path) -> None:
    rows = np.zeros(400_000, bank.rows.dtype)
    piece = np.zeros((4000, 4, 4), np.uint16)
    tracemalloc.start()
    with BankWriter(tmp_path / "bank", rows=rows, normal_codebook=bank.normal_codebook,
                    abnormal_codebook=bank.abnormal_codebook, grid=bank.grid) as writer:
        for _ in range(100):
            writer.append(piece, piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "bank" / "normal_indices.npy").stat().st_size > 12_800_000 > 10 * peak


def test_an_interrupted_writer_leaves_nothing(bank: CodeBank, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(bank, tmp_path / "bank", 140, KeyboardInterrupt)
    with pytest.raises(UserError, match="140 codes were appended for 300 rows"):
        write(bank, tmp_path / "bank", 140)
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_nothing_that_looks_whole(bank: CodeBank, tmp_path: Path) -> None:
    write_and_die = (
        "import os, sys, numpy as np; from decomp_jax.retrieval import BankWriter\n"
        "rows = np.zeros(2, [('patient_id', 'U1'), ('slice_index', 'i4')]); book = np.eye(2)\n"
        "books = {'normal_codebook': book, 'abnormal_codebook': book}\n"
        "with BankWriter(sys.argv[1], rows=rows, **books, grid=(1, 1)) as writer:\n"
        "    writer.append(np.zeros((2, 1, 1), int), np.zeros((2, 1, 1), int)); os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, "-c", write_and_die, tmp_path / "bank"], cwd=Path(__file__).parents[2])
    assert run.returncode == -9 and not (tmp_path / "bank").exists()
    for left in tmp_path.iterdir():
        with pytest.raises(UserError, match="bank.json"):
            CodeBank.load(left)


def test_an_existing_directory_is_kept(bank: CodeBank, saved: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        bank.save(saved)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_search_leaves_no_pages_of_the_bank_in_memory(bank: CodeBank, saved: Path) -> None:
    loaded = CodeBank.load(saved)
    loaded.search(normal=bank.normal_indices[:1], abnormal=bank.abnormal_indices[:1])
    mappings = Path("/proc/self/smaps").read_text().split("normal_indices.npy\n")[1:]
    assert len(mappings) == 2
    for mapping in mappings:
        assert "\nRss:                   0 kB" in mapping.split("VmFlags")[0]


def test_banks_are_immutable(bank: CodeBank, saved: Path) -> None:
    for some in (bank, CodeBank.load(saved), CodeBank.concat([bank, bank])):
        for name in ARRAYS:
            with pytest.raises(ValueError, match="read-only"):
                getattr(some, name)[0] = 0


def test_retrieval_needs_no_network_library() -> None:
    check = ("import sys, decomp_jax.retrieval; "
             "assert not {'flax', 'tensorflow', 'grain', 'optax', 'orbax'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])


def test_queries_may_be_device_arrays(bank: CodeBank) -> None:
    import jax.numpy as jnp

    query = make_queries(bank, 2)["normal"]
    np.testing.assert_array_equal(bank.search(normal=jnp.asarray(query)).rows, bank.search(normal=query).rows)


def test_a_full_disk_leaves_no_bank(bank: CodeBank, tmp_path: Path) -> None:
    with full_disk(1000), pytest.raises(UserError, match="bank: File too large; make room there"):
        bank.save(tmp_path / "bank")
    assert not list(tmp_path.iterdir())
