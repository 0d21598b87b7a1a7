"""Banks of discrete codes: a directory of memory-mappable .npy files that NumPy alone can read.

    normal_indices.npy, abnormal_indices.npy      uint16 [N,h,w], one code a row
    normal_codebook.npy, abnormal_codebook.npy    float32 [K,D]
    rows.npy                                      structured [N]: patient_id (text), slice_index (integer), ...
    bank.json                                     format_version, model_digest, data_digest, preprocessing, checksums,
                                                  heads, and a digest of itself
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Float64, Int, UInt16
from numpy.lib import format as npy

from decomp_jax.errors import UserError
from decomp_jax.files import making, map_array, read_json, read_sealed, sealed
from decomp_jax.retrieval.layout import leave_pages
from decomp_jax.retrieval.patients import PatientHits, PatientIndex, make_patient_index, search_patients
from decomp_jax.retrieval.queries import PATHS, Queries, codes, contributions, ratios
from decomp_jax.retrieval.relative import search_relative
from decomp_jax.retrieval.search import Hits, Index, make_index, search

FORMAT_VERSION = 1
CODEBOOK_FILES = tuple(f"{path}_codebook.npy" for path in PATHS)
INDEX_FILES = tuple(f"{path}_indices.npy" for path in PATHS)
FILES = (*INDEX_FILES, *CODEBOOK_FILES, "rows.npy")
# How far apart in height slices of two patients may be to be matched: about a slice's neighbours; a lesion may lie a
# little higher or lower.
WITHIN_MM = {"normal": 5.0, "abnormal": 10.0}
# Rows that `load` reads to check them; the rest are checked when a search first reads them.
CHECKED_ON_LOAD = 1 << 16
# Blocks of each file of indices whose checksum, its head, `load` compares: all that banks of up to 8 MiB have.
HEAD_BLOCKS, BLOCK = 128, 1 << 16
COPIED_AT_ONCE = 1 << 16


@dataclasses.dataclass(frozen=True, eq=False)
class CodeBank:
    """Codes of N images, immutable; build with `load`, `from_arrays` or `concat`.

    Attributes:
        normal_indices, abnormal_indices: uint16 [N,h,w], rows of the codebooks.
        normal_codebook, abnormal_codebook: float32 [K,D].
        rows: structured [N], at least `patient_id` and `slice_index`.
        meta: what bank.json holds beside its own keys (model_digest, data_digest, preprocessing, ...).
        name: directory the bank was read from, for error messages.
    """

    normal_indices: np.ndarray
    abnormal_indices: np.ndarray
    normal_codebook: np.ndarray
    abnormal_codebook: np.ndarray
    rows: np.ndarray
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = "bank"
    # What searches derive from the codes, kept between them.
    cache: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in (Path(file).stem for file in FILES):
            array = getattr(self, name)
            if array.flags.writeable:
                view = array.view()
                view.flags.writeable = False
                object.__setattr__(self, name, view)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def slab_mm(self) -> float:
        """Deviation of the slabs that abnormal codes are of (`decomp_jax.inference.slab`)."""
        return self.meta.get("slab_mm", 0.0)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width (h, w) of the code grid."""
        return self.normal_indices.shape[1:]

    def read(self, paths: Sequence[str], rows: slice, some: np.ndarray | slice) -> UInt16[np.ndarray, "n p"]:
        """Indices of the paths ("normal", "abnormal") side by side, of `some` of `rows`; checked to be below K."""
        cells = int(np.prod(self.grid))
        codes = []
        for path in paths:
            indices = getattr(self, f"{path}_indices")
            codes.append(np.array(indices[rows][some]).reshape(-1, cells))
            _check_range(self, path, codes[-1])
            leave_pages(indices)
        return np.concatenate(codes, 1)

    @classmethod
    def from_arrays(
        cls, *, normal_indices: np.ndarray, abnormal_indices: np.ndarray, normal_codebook: np.ndarray,
        abnormal_codebook: np.ndarray, rows: np.ndarray, meta: Mapping[str, Any] | None = None,
    ) -> "CodeBank":
        """Bank of arrays in memory: integer indices [N,h,w], codebooks [K,D], structured rows [N].

        Raises:
            UserError: naming the argument that doesn't fit.
        """
        codebooks = {"normal_codebook": normal_codebook, "abnormal_codebook": abnormal_codebook}
        codebooks = {name: np.asarray(codebook, np.float32) for name, codebook in codebooks.items()}
        indices = {"normal_indices": np.asarray(normal_indices), "abnormal_indices": np.asarray(abnormal_indices)}
        bank = cls(**indices, **codebooks, rows=np.asarray(rows), meta=dict(meta or {}))
        _check_shapes(bank, "")
        for path in PATHS:
            _check_range(bank, path, indices[f"{path}_indices"])
        narrow = {name: array.astype(np.uint16, copy=False) for name, array in indices.items()}
        return dataclasses.replace(bank, **narrow)

    @classmethod
    def load(cls, directory: str | os.PathLike, *, verify: bool = False) -> "CodeBank":
        """Maps the bank's files. Compares the checksums of bank.json, rows, codebooks and the heads of the indices.

        Args:
            verify: reads everything once, to compare all checksums and check that all indices are below K.

        Raises:
            UserError: naming the file that is missing, truncated, or doesn't fit the others.
        """
        directory = Path(directory)
        header = _read_header(directory)
        checksums, heads = header.pop("checksums"), header.pop("heads")
        arrays = {Path(file).stem: map_array(directory / file, "copy the bank whole or encode again") for file in FILES}
        bank = cls(**arrays, meta=header, name=str(directory))
        _check_shapes(bank, ".npy")
        for path in PATHS:
            _check_range(bank, path, arrays[f"{path}_indices"][:None if verify else CHECKED_ON_LOAD])
            leave_pages(arrays[f"{path}_indices"])
        for file in FILES if verify else (*CODEBOOK_FILES, "rows.npy"):
            _check_sum(directory / file, _sha256(directory / file), checksums[file])
        for file in INDEX_FILES:
            _check_sum(directory / file, _head(directory / file), heads[file])
        return bank

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the bank's files; `directory` must not exist. Raises `UserError` if it does."""
        writer = BankWriter(
            directory, rows=self.rows, normal_codebook=self.normal_codebook,
            abnormal_codebook=self.abnormal_codebook, grid=self.grid, meta=self.meta,
        )
        with writer:
            for start in range(0, len(self), COPIED_AT_ONCE):
                chunk = slice(start, start + COPIED_AT_ONCE)
                writer.append(self.normal_indices[chunk], self.abnormal_indices[chunk])

    @classmethod
    def concat(cls, banks: Sequence["CodeBank"]) -> "CodeBank":
        """Joins banks of the same model, in order; rows of the second follow those of the first.

        Raises:
            UserError: naming the bank whose model, preprocessing, grid, codebooks, slabs or columns differ from those
                of the first.
        """
        if not banks:
            raise UserError("banks: nothing to join; give at least one bank")
        for bank in banks[1:]:
            require_same_model(banks[0], bank)
            if bank.slab_mm != banks[0].slab_mm:
                raise UserError(f"{bank.name}/bank.json: slab_mm is {bank.slab_mm:g}, {banks[0].name}'s "
                                f"{banks[0].slab_mm:g}; encode both with one --slab_mm")
            if bank.rows.dtype.names != banks[0].rows.dtype.names:
                raise UserError(f"{bank.name}/rows.npy: columns {bank.rows.dtype.names} are not those of "
                                f"{banks[0].name}, {banks[0].rows.dtype.names}; encode both with the same program")
        arrays = {
            name: np.concatenate([getattr(bank, name) for bank in banks])
            for name in ("normal_indices", "abnormal_indices", "rows")
        }
        digests = dict.fromkeys(bank.meta["data_digest"] for bank in banks if "data_digest" in bank.meta)
        return dataclasses.replace(
            banks[0], **arrays, meta={**banks[0].meta, "data_digest": "+".join(digests)}, name="joined bank",
        )

    def search(
        self, queries: Queries | None = None, *, normal: Int[np.ndarray | jax.Array, "q h w"] | None = None,
        abnormal: Int[np.ndarray | jax.Array, "q h w"] | None = None, k: int = 10,
        exclude: Sequence[str] | np.ndarray | None = None, one_per_patient: bool = False,
        cells: Bool[np.ndarray | jax.Array, "h w"] | None = None, mesh: Mesh | None = None,
    ) -> Hits:
        """The k rows nearest to each query, exactly; ties go to the lower row.

        The answer doesn't depend on the number of shards, devices or processes. Memory stays bounded whatever N and Q.

        Args:
            queries: see `decomp_jax.retrieval.queries`. Without them:
            normal, abnormal: indices of the queries. Both: the distance is that of the concatenated codes, and the two
                may come from different images.
            k: number of hits a query.
            exclude: patient_id [Q] whose rows each query leaves out; [Q,2] leaves out two (those of a mixed query).
            one_per_patient: keeps the nearest row of each patient.
            cells: restricts the distance to the cells that are True.
            mesh: shards the bank over its axis "data"; in a multi-process run each process reads its rows alone, all
                must call with the same arguments, and all get the answer. None: the first local device, the whole bank.

        Raises:
            UserError: naming the argument, or the bank's file, that doesn't fit.
        """
        if queries is not None and (normal is not None or abnormal is not None):
            raise UserError("queries, normal, abnormal: give queries, or indices")
        _check_k(k)
        if cells is not None and (np.shape(cells) != self.grid or np.asarray(cells).dtype != bool):
            raise UserError(f"cells: needs a boolean mask {list(self.grid)}, not {np.asarray(cells).dtype} "
                            f"{list(np.shape(cells))}")
        queries = codes(normal=normal, abnormal=abnormal) if queries is None else queries
        queries.check(self.grid, self.codebooks)
        queries = queries if cells is None else cells * queries
        by_distance, options = functools.partial(search, self._index(queries.paths, mesh)), {
            "k": k, "exclude": exclude, "one_per_patient": one_per_patient
        }
        if not queries.relative:
            return by_distance(queries, **options)
        return search_relative(by_distance, self._ratios, queries, self.rows["patient_id"], **options)

    def search_patients(
        self, queries: Queries, *, heights: Float[np.ndarray, "q"], k: int = 10,
        within_mm: Mapping[str, float] = WITHIN_MM, exclude: Sequence[str] = (), mesh: Mesh | None = None,
    ) -> PatientHits:
        """The k patients nearest to one, exactly; see `decomp_jax.retrieval.patients` for the distance.

        Args:
            queries: a query for each of the patient's slices, without negative weights. Both paths: their two
                distances are added.
            heights: of the slices, in the unit of the bank's `heights`.
            within_mm: for each path how far apart in height matched slices may be.
            exclude: ids of patients to leave out.
            mesh: shards the bank over its axis "data"; each process searches the whole bank, on its own devices of the
                mesh. None: the first local device.

        Raises:
            UserError: naming the argument that doesn't fit.
        """
        if not len(queries) or np.shape(heights) != (len(queries),) or not np.isfinite(heights).all():
            raise UserError(f"heights: needs a finite height for each of {len(queries)} queries, at least one, not "
                            f"{list(np.shape(heights))}")
        if not set(within_mm) <= set(PATHS) or not all(within >= 0 for within in within_mm.values()):
            raise UserError(f"within_mm: needs numbers from 0 on for {', '.join(PATHS)}, not {dict(within_mm)}")
        if any((example.weights < 0).any() for example in queries.examples):
            raise UserError("queries: negative weights rank slices, not patients; leave them out")
        _check_k(k)
        queries.check(self.grid, self.codebooks)
        indices = {path: self._patient_index(path, _one_axis(mesh).local_mesh) for path in queries.paths}
        return search_patients(indices, self.codebooks, queries, heights=heights, within_mm={**WITHIN_MM, **within_mm},
                               k=k, exclude=exclude)

    def contributions(
        self, queries: Queries, rows: Int[np.ndarray, "q k"]
    ) -> dict[str, Float64[np.ndarray, "q k h w"]]:
        """What each cell of each hit adds to its distance, as `search` reports it, by path; 0 of no hit, row -1.

        Raises UserError if the queries don't fit, or a row is not the bank's.
        """
        queries.check(self.grid, self.codebooks)
        rows = np.asarray(rows)
        if rows.ndim != 2 or len(rows) != len(queries) or rows.size and not -1 <= rows.min() <= rows.max() < len(self):
            raise UserError(f"rows: needs rows [{len(queries)},k] of the bank's {len(self)}, not {list(rows.shape)}")
        codes = {path: getattr(self, f"{path}_indices")[rows] for path in queries.paths}
        there = (rows >= 0)[..., None, None]
        return {path: cells * there for path, cells in contributions(queries, codes, self.codebooks).items()}

    def _ratios(self, queries: Queries, rows: Int[np.ndarray, "q k"]) -> Float64[np.ndarray, "q k"]:
        """Relative distances of rows; infinite where a row is -1."""
        found = np.empty(rows.shape)
        for query, some in enumerate(rows):  # one at a time: many rows of large codes take memory
            indices = {path: getattr(self, f"{path}_indices")[some].reshape(len(some), -1) for path in queries.paths}
            found[query] = ratios(queries[query:query + 1], indices, self.codebooks)
        return np.where(rows >= 0, found, np.inf)

    @property
    def heights(self) -> Float[np.ndarray, "n"]:
        """Of the rows: `position_mm`, or `slice_index` where that is not there or not known, as of pictures."""
        return self.rows["position_mm"] if self.has_mm else self.rows["slice_index"].astype(np.float32)

    @property
    def has_mm(self) -> bool:
        """Whether `heights` are in mm."""
        return "position_mm" in self.rows.dtype.names and bool(np.isfinite(self.rows["position_mm"]).all())

    def _patient_index(self, path: str, mesh: Mesh) -> PatientIndex:
        if (path, mesh) not in self.cache:
            read = functools.partial(self.read, (path,), slice(None))
            self.cache[path, mesh] = make_patient_index(read, self.rows["patient_id"], self.heights, mesh)
            leave_pages(self.rows)
        return self.cache[path, mesh]

    @functools.cached_property
    def codebooks(self) -> dict[str, Float64[np.ndarray, "k d"]]:
        """By path, in float64, as distances are computed."""
        return {path: getattr(self, f"{path}_codebook").astype(np.float64) for path in PATHS}

    def _index(self, paths: tuple[str, ...], mesh: Mesh | None) -> Index:
        """The paths' codes on a mesh's devices, kept from one search to the next."""
        mesh = _one_axis(mesh)
        if (paths, mesh) not in self.cache:
            codebooks = {path: self.codebooks[path] for path in paths}
            read = functools.partial(self.read, paths)
            self.cache[paths, mesh] = make_index(read, codebooks, self.rows["patient_id"], mesh)
            leave_pages(self.rows)
        return self.cache[paths, mesh]


class BankWriter:
    """Writes a bank of any size piece by piece; the directory appears, whole, when the `with` block ends well.

    Args:
        out: directory to make; must not exist.
        rows: structured [N]; N rows must be appended.
        normal_codebook, abnormal_codebook: float32 [K,D].
        grid: (h, w) of the codes.
        meta: further keys of bank.json (model_digest, data_digest, preprocessing, ...).

    Raises:
        UserError: `out` exists, an argument doesn't fit, fewer or more than N rows are appended, or the disk is full.
    """

    def __init__(
        self, out: str | os.PathLike, *, rows: np.ndarray, normal_codebook: np.ndarray, abnormal_codebook: np.ndarray,
        grid: tuple[int, int], meta: Mapping[str, Any] | None = None,
    ) -> None:
        self._out = Path(out)
        empty = np.zeros((0, *grid), np.uint16)
        self._model = CodeBank.from_arrays(
            normal_indices=empty, abnormal_indices=empty, normal_codebook=normal_codebook,
            abnormal_codebook=abnormal_codebook, rows=rows[:0], meta=meta,
        )
        self._rows = rows
        self._written = 0

    def __enter__(self) -> "BankWriter":
        shape = (len(self._rows), *self._model.grid)
        with contextlib.ExitStack() as stack:
            self._partial = stack.enter_context(making(self._out))
            self._files = {path: _HashedFile(self._partial / f"{path}_indices.npy", shape) for path in PATHS}
            stack.push(self._close)
            self._stack = stack.pop_all()
        return self

    def append(self, normal_indices: np.ndarray, abnormal_indices: np.ndarray) -> None:
        """Adds the codes [n,h,w] of the next n rows."""
        piece = dataclasses.replace(
            self._model, normal_indices=np.asarray(normal_indices), abnormal_indices=np.asarray(abnormal_indices),
            rows=self._rows[self._written:self._written + len(normal_indices)],
        )
        _check_shapes(piece, "")
        for path in PATHS:
            _check_range(piece, path, getattr(piece, f"{path}_indices"))
            self._files[path].write(getattr(piece, f"{path}_indices").astype(np.uint16))
        self._written += len(piece)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _close(self, kind: type[BaseException] | None, *_: Any) -> None:
        sums = {f"{path}_indices.npy": file.close() for path, file in self._files.items()}
        if kind is None:
            self._finish(sums)

    def _finish(self, sums: dict[str, str]) -> None:
        if self._written != len(self._rows):
            raise UserError(f"{self._out}: {self._written} codes were appended for {len(self._rows)} rows")
        for file, array in zip((*CODEBOOK_FILES, "rows.npy"),
                               (self._model.normal_codebook, self._model.abnormal_codebook, self._rows)):
            np.save(self._partial / file, array, allow_pickle=False)
            sums[file] = _sha256(self._partial / file)
        heads = {file: _head(self._partial / file) for file in INDEX_FILES}
        header = {**self._model.meta, "format_version": FORMAT_VERSION, "checksums": sums, "heads": heads}
        (self._partial / "bank.json").write_text(json.dumps(sealed(header), indent=2) + "\n")


class _HashedFile:
    """A uint16 .npy file written in pieces, and its checksum."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self._file: BinaryIO = path.open("wb+")
        npy.write_array_header_1_0(self._file, {"descr": "<u2", "fortran_order": False, "shape": shape})
        self._file.seek(0)
        self._sum = hashlib.sha256(self._file.read())

    def write(self, piece: np.ndarray) -> None:
        data = np.ascontiguousarray(piece, "<u2").data
        self._file.write(data)
        self._sum.update(data)

    def close(self) -> str:
        self._file.close()
        return self._sum.hexdigest()


def require_same_model(bank: CodeBank, other: CodeBank) -> None:
    """Raises `UserError` naming what keeps codes of `other` from being compared with those of `bank`."""
    for key in ("model_digest", "preprocessing"):
        if bank.meta.get(key) != other.meta.get(key):
            raise UserError(f"{other.name}/bank.json: {key} is not that of {bank.name}; encode both with one model")
    if bank.grid != other.grid:
        raise UserError(f"{other.name}: codes of {other.grid} cells, but {bank.name} has {bank.grid}; "
                        "encode both with one model")
    for name in ("normal_codebook", "abnormal_codebook"):
        if not np.array_equal(getattr(bank, name), getattr(other, name)):
            raise UserError(f"{other.name}/{name}.npy: differs from {bank.name}'s; encode both with one model")


def _one_axis(mesh: Mesh | None) -> Mesh:
    """The mesh, or one of the first local device."""
    mesh = mesh or Mesh(jax.local_devices()[:1], ("data",))
    if mesh.axis_names != ("data",):
        raise UserError(f"mesh: needs one axis, \"data\", not {mesh.axis_names}")
    return mesh


def _check_k(k: int) -> None:
    if not isinstance(k, int | np.integer) or k < 1:
        raise UserError(f"k: must be a whole number, at least 1, not {k}")


def _check_range(bank: CodeBank, path: str, indices: np.ndarray) -> None:
    size = len(getattr(bank, f"{path}_codebook"))
    if indices.size and not 0 <= indices.min() <= indices.max() < size:
        raise UserError(f"{bank.name}: {path}_indices hold {indices.min()}..{indices.max()}, but {path}_codebook has "
                        f"{size} codes; the two belong to different models, encode again")


def _check_shapes(bank: CodeBank, suffix: str) -> None:
    prefix = f"{bank.name}/" if suffix else ""

    def require(right: bool, name: str, what: str) -> None:
        if not right:
            raise UserError(f"{prefix}{name}{suffix}: {what}")

    n = len(bank.rows)
    for path in PATHS:
        indices, codebook = getattr(bank, f"{path}_indices"), getattr(bank, f"{path}_codebook")
        right = indices.dtype == np.uint16 if suffix else np.issubdtype(indices.dtype, np.integer)
        require(right, f"{path}_indices", f"holds {indices.dtype}, not {'uint16' if suffix else 'integers'}")
        require(indices.ndim == 3 and len(indices) == n, f"{path}_indices", f"shape {indices.shape} is not [{n},h,w], "
                f"{n} being the number of rows")
        require(indices.shape == bank.normal_indices.shape, f"{path}_indices", f"shape {indices.shape} is not that of "
                f"normal_indices, {bank.normal_indices.shape}")
        require(codebook.dtype == np.float32 and codebook.ndim == 2, f"{path}_codebook",
                f"is {codebook.dtype} {codebook.shape}, not float32 [K,D]")
        require(0 < len(codebook) <= 1 << 16 and bool(np.isfinite(codebook).all()), f"{path}_codebook",
                "needs 1 to 65536 codes of finite numbers")
    names = bank.rows.dtype.names or ()
    require({"patient_id", "slice_index"} <= set(names), "rows", f"columns {names} lack patient_id or slice_index")
    require(bank.rows.dtype["patient_id"].kind == "U" and not bank.rows.dtype.hasobject, "rows",
            "patient_id must be fixed-width text, and no column may hold objects")
    require(bank.rows.ndim == 1, "rows", f"shape {bank.rows.shape} is not [N]")


def _read_header(directory: Path) -> dict[str, Any]:
    path, cure = directory / "bank.json", "copy the bank whole or encode again"
    if not path.exists():
        raise UserError(f"{path}: no such file; give a directory written by `evaluate.py encode`")
    if read_json(path, cure).get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: format_version is not {FORMAT_VERSION}; encode again with this version")
    return read_sealed(path, cure)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _head(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        for _ in range(HEAD_BLOCKS):
            total.update(file.read(BLOCK))
    return total.hexdigest()


def _check_sum(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(f"{path}: checksum is not the one in bank.json, so that it is damaged or another bank's; "
                        "copy the bank whole or encode again")
