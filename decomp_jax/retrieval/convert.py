"""The `evaluate.py convert` command: a bank as one file that other programs search.

Parquet, for DuckDB, Polars, Spark and the like: the bank's columns, and the indices of each path as a list of fixed
size, row by row of the grid. The schema's metadata has `bank`, JSON of the grid and of what bank.json holds, and each
codebook, a .npy file in base64.

FAISS: an IndexPQ with the codebook in all places, which computes the bank's distances; its ids are the bank's rows.
"""

import base64
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np

from decomp_jax.errors import UserError
from decomp_jax.files import replacing
from decomp_jax.retrieval.bank import CodeBank
from decomp_jax.retrieval.layout import chunks
from decomp_jax.retrieval.queries import PATHS


def convert(
    bank: str | os.PathLike, *, to: Literal["parquet", "faiss"], by: Literal["normal", "abnormal", "both"],
    out: str | os.PathLike,
) -> None:
    """Writes the codes of the bank by the path or both paths to the file `out`.

    Raises:
        UserError: the bank can't be read or the library for this format isn't installed.
    """
    write = WRITERS[to]
    loaded, paths = CodeBank.load(bank), PATHS if by == "both" else (by,)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        write(loaded, paths, partial)


def write_parquet(bank: CodeBank, paths: tuple[str, ...], file: Path) -> None:
    """Rows and indices of the paths as Parquet. Raises UserError without pyarrow."""
    pa, parquet = _library("pyarrow"), _library("pyarrow.parquet")
    kinds = {path: pa.list_(pa.uint16(), int(np.prod(bank.grid))) for path in paths}
    metadata = {"bank": json.dumps({**bank.meta, "grid": bank.grid})}
    metadata |= {f"{path}_codebook": _npy_text(getattr(bank, f"{path}_codebook")) for path in paths}

    def table(rows: slice) -> "pa.Table":
        columns = {name: pa.array(bank.rows[name][rows].copy()) for name in bank.rows.dtype.names}
        for path, kind in kinds.items():
            indices = pa.array(bank.read((path,), rows, slice(None)).ravel())
            columns[f"{path}_indices"] = pa.FixedSizeListArray.from_arrays(indices, type=kind)
        return pa.table(columns)

    schema = table(slice(0)).schema.with_metadata(metadata)
    with parquet.ParquetWriter(file, schema) as writer:
        for rows in chunks(len(bank)):
            writer.write_table(table(rows).replace_schema_metadata(metadata))


def write_faiss(bank: CodeBank, paths: tuple[str, ...], file: Path) -> None:
    """Codes of the paths as an IndexPQ. Raises UserError without FAISS, and for codebooks of different dimensions."""
    faiss = _library("faiss")
    codebooks, cells = [getattr(bank, f"{path}_codebook") for path in paths], int(np.prod(bank.grid))
    if len({codebook.shape[1] for codebook in codebooks}) > 1:
        raise UserError(f"{bank.name}: its codebooks have different dimensions, and FAISS takes one; use --by=normal or"
                        " --by=abnormal")
    bits = max(1, *(int(len(codebook) - 1).bit_length() for codebook in codebooks))
    index = faiss.IndexPQ(cells * len(paths) * codebooks[0].shape[1], cells * len(paths), bits)
    # Repeated, the last code fills a codebook up to a power of two.
    filled = [np.pad(codebook, ((0, 2**bits - len(codebook)), (0, 0)), mode="edge") for codebook in codebooks]
    faiss.copy_array_to_vector(np.repeat(filled, cells, axis=0).ravel(), index.pq.centroids)
    index.is_trained = True
    for rows in chunks(len(bank)):
        index.add_sa_codes(faiss.pack_bitstrings(bank.read(paths, rows, slice(None)).astype(np.int32), bits))
    faiss.write_index(index, str(file))


WRITERS: dict[str, Callable[[CodeBank, tuple[str, ...], Path], None]] = {"parquet": write_parquet, "faiss": write_faiss}


def _library(name: str) -> ModuleType:
    try:
        return __import__(name, fromlist=["*"])
    except ImportError as error:
        raise UserError(f"--to: needs {name.partition('.')[0]}, which isn't installed ({error}); "
                        'pip install -e ".[convert]"') from None


def _npy_text(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()
