import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from brute_force import KINDS, assert_exact, make_bank, make_queries

from decomp_jax.errors import UserError
from decomp_jax.retrieval import CodeBank, codes, distance, search

REQUESTS = ("normal", "abnormal", "both", "exclude", "exclude two", "one per patient", "cells")


def make_request(bank: CodeBank, name: str, count: int) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    queries = make_queries(bank, count)
    patients = bank.rows["patient_id"][np.arange(count) * 7 % len(bank)]
    if name in queries:
        return {name: queries[name]}, {}
    options = {
        "both": {},
        "exclude": {"exclude": patients},
        "exclude two": {"exclude": np.stack([patients, np.roll(patients, 1)], 1)},
        "one per patient": {"one_per_patient": True, "exclude": patients},
        "cells": {"cells": np.arange(16).reshape(bank.grid) % 3 == 0},
    }
    return queries if name in ("both", "exclude two") else {"abnormal": queries["abnormal"]}, options[name]


@pytest.fixture(scope="module", params=KINDS)
def bank(request: pytest.FixtureRequest) -> CodeBank:
    return make_bank(request.param, 5000)


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("k", [1, 10])
def test_equals_brute_force(bank: CodeBank, name: str, k: int) -> None:
    queries, options = make_request(bank, name, 7)
    assert_exact(bank, bank.search(**queries, k=k, **options), queries, k=k, **options)


@pytest.mark.parametrize("k", [100, 1000])
def test_many_hits(bank: CodeBank, k: int) -> None:
    queries, options = make_request(bank, "exclude", 5)
    assert_exact(bank, bank.search(**queries, k=k, **options), queries, k=k, **options)


@pytest.mark.parametrize("one_per_patient", [False, True])
def test_codes_of_excluded_patients_alone(one_per_patient: bool) -> None:
    """The nearest codes are shared by just the two patients left out, so that more must be taken."""
    bank = make_bank("uniform", 4000)
    rows, abnormal = bank.rows.copy(), bank.abnormal_indices.copy()
    rows["patient_id"][:80] = ["p0", "p1"] * 40
    abnormal[:80] = abnormal[np.arange(80) // 2 * 2] % 4
    bank = dataclasses.replace(bank, abnormal_indices=abnormal, rows=rows)
    queries, options = {"abnormal": abnormal[:80:10]}, {"exclude": np.array([["p0", "p1"]] * 8), "k": 10}
    hits = bank.search(**queries, **options, one_per_patient=one_per_patient)
    assert_exact(bank, hits, queries, **options, one_per_patient=one_per_patient)


def test_full_size_codes_and_several_blocks_of_queries() -> None:
    bank = make_bank("clustered", 6000, codes=512, grid=(8, 8))
    queries = make_queries(bank, 70)
    assert_exact(bank, bank.search(**queries, k=5), queries, k=5)


@pytest.mark.parametrize("n", [0, 1, 6])
def test_fewer_rows_than_hits(n: int) -> None:
    whole = make_bank("uniform", 6)
    bank = CodeBank.from_arrays(
        normal_indices=whole.normal_indices[:n], abnormal_indices=whole.abnormal_indices[:n], rows=whole.rows[:n],
        normal_codebook=whole.normal_codebook, abnormal_codebook=whole.abnormal_codebook,
    )
    queries = make_queries(whole, 3)
    for options in ({}, {"exclude": ["p0", "", "unknown"], "one_per_patient": True}):
        assert_exact(bank, bank.search(**queries, k=9, **options), queries, k=9, **options)


def test_no_queries() -> None:
    bank = make_bank("uniform", 6)
    hits = bank.search(normal=np.zeros((0, 4, 4), int), k=3, exclude=[])
    assert hits.rows.shape == hits.distances.shape == (0, 3)


def test_nearly_equal_codes_are_told_apart() -> None:
    """Distances a million times below the largest one still come out to float32's last digits."""
    bank = make_bank("uniform", 3000, codes=16)
    codebook = bank.normal_codebook.copy()
    codebook[1:8] = codebook[0] + np.random.default_rng(0).normal(size=(7, 8)) * 1e-4
    bank = CodeBank.from_arrays(
        normal_indices=bank.normal_indices % 8, abnormal_indices=bank.abnormal_indices, rows=bank.rows,
        normal_codebook=codebook, abnormal_codebook=bank.abnormal_codebook,
    )
    queries = {"normal": bank.normal_indices[:5]}
    assert_exact(bank, bank.search(**queries, k=20), queries, k=20)


def test_padding_is_never_found() -> None:
    """Layouts are padded with code 0: a query of zeros is nearest to the padding."""
    bank = make_bank("uniform", 3000)
    queries = {"normal": np.zeros((2, 4, 4), int)}
    assert_exact(bank, bank.search(**queries, k=10), queries, k=10)


class Spy:
    """Counts the queries given to a compiled search."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.queries = 0
        compiled = getattr(search, name)
        monkeypatch.setattr(search, name, lambda *options: lambda *values: self._run(compiled(*options), values))

    def _run(self, function: object, values: tuple) -> object:
        self.queries += len(values[1].lines)
        return function(*values)


def test_certain_answers_need_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, nearest, every = make_bank("clustered", 5000), Spy(monkeypatch, "nearest"), Spy(monkeypatch, "every")
    bank.search(normal=bank.normal_indices[:8], k=1)
    assert (nearest.queries, every.queries) == (8, 0)


def test_ties_beyond_the_candidates_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, nearest, every = make_bank("uniform", 9000), Spy(monkeypatch, "nearest"), Spy(monkeypatch, "every")
    cells = np.zeros((4, 4), bool)
    cells[0, 0] = True
    queries = {"normal": bank.normal_indices[:4]}
    assert_exact(bank, bank.search(**queries, k=10, cells=cells), queries, k=10, cells=cells)
    assert nearest.queries == 8 and every.queries == 4


def test_certificate_is_sound() -> None:
    """With few groups looked at, every answer said to be certain is right; some are, some aren't."""
    bank = make_bank("clustered", 5000)
    queries = make_queries(bank, 64)["normal"]
    mesh = jax.sharding.Mesh(jax.local_devices()[:1], ("data",))
    index = bank._index(("normal",), mesh)
    tables, _, _ = index.tables(codes(normal=queries))
    with jax.enable_x64(True):
        arguments = (index.layout.codes, tables, np.full((64, 2), -1, np.int32))
        few = distance.nearest(mesh, index.layout.buckets, 3, 25)(*arguments)
        every = distance.every(mesh, index.layout.buckets)(*arguments)
    certain = np.asarray(few.certain)[:, 0]
    right = (np.asarray(few.distances) == np.sort(np.asarray(every), 1)[:, :25]).all(1)
    assert right[certain].all() and 0 < certain.sum() and 0 < (~right).sum()


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scan as accelerators do it, in blocks of which these banks fill several."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(distance, "BLOCKS", 2)
    distance.nearest.cache_clear()
    yield
    distance.nearest.cache_clear()


@pytest.mark.parametrize("name", ["normal", "exclude", "both"])
def test_accelerators_give_the_same_answers(bank: CodeBank, name: str, accelerator: None) -> None:
    bank = dataclasses.replace(bank)  # without the layout that CPUs have searched
    queries, options = make_request(bank, name, 7)
    assert_exact(bank, bank.search(**queries, k=10, **options), queries, k=10, **options)


@pytest.mark.parametrize(("backend", "lengths"), [("cpu", (0,)), ("cpu", (2, 6)), ("tpu", (0,))])
def test_bounds_of_a_batch_are_never_held_at_once(
    backend: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    n, queries, dense, sparse = 2**22, 64, 4, 16 if lengths[0] else 0
    count = n // len(lengths)
    buckets = distance.Buckets(dense, sparse, tuple((count, length) for length in lengths))
    shapes = [((n, dense), "uint16"), ((count * sum(lengths),), "uint16"), ((n,), "int32"), ((n,), "int32")]
    codes = distance.DistinctCodes(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    lower = jax.ShapeDtypeStruct((512, 512), "uint8")
    lines = jax.ShapeDtypeStruct((queries, dense + sparse), "int32")
    scan = functools.partial(distance.group_minima, buckets=buckets)  # a new function: none traced before is taken
    program = str(jax.make_jaxpr(scan)(codes, lower, lines))
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", program)]
    assert 2 * n <= max(sizes) < n * queries / 4


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_bounds_are_below_exact_entries(sparse: bool, scale: float) -> None:
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(64, 40)) * scale, rng.exponential(size=(64, 30)) * 5 * scale]
    with jax.enable_x64(True):
        quantised = jax.tree.map(np.asarray, distance.quantise(tables, (False, sparse), 128))
    lower = quantised.lower.astype(np.int64)
    lower[64:] -= distance.zero(128) * sparse
    assert (lower << quantised.shift <= quantised.exact).all() and np.ptp(lower) > 200
    assert int(np.abs(quantised.exact).max()) * 128 < 2**62
    for i, table in enumerate(tables):
        some = slice(64 * i, 64 * i + 64)
        exact = quantised.exact[some, :table.shape[1]] * quantised.unit + quantised.base[some, None]
        np.testing.assert_allclose(exact, table, rtol=1e-12, atol=1e-14 * scale)


@pytest.mark.parametrize("bad, message", [
    ({"k": 0}, "k: must be a whole number, at least 1, not 0"),
    ({"k": 2.5}, "k: must be a whole number"),
    ({"normal": None}, "normal, abnormal: give one"),
    ({"normal": np.zeros((2, 5, 4), int)}, r"normal: needs integer indices \[Q,4,4\]"),
    ({"normal": np.zeros((2, 4, 4))}, "normal: needs integer indices"),
    ({"normal": np.full((2, 4, 4), 64)}, "normal: holds 64..64"),
    ({"abnormal": np.zeros((3, 4, 4), int)}, "normal, abnormal: 2 and 3 queries"),
    ({"exclude": ["p0"]}, "exclude: needs a patient_id a query"),
    ({"exclude": [1, 2]}, "exclude: needs a patient_id a query"),
    ({"cells": np.ones((3, 4), bool)}, "cells: needs a boolean mask"),
    ({"cells": np.ones((4, 4), int)}, "cells: needs a boolean mask"),
    ({"mesh": jax.sharding.Mesh(jax.local_devices()[:1], ("model",))}, "mesh: needs one axis"),
])
def test_bad_arguments(bad: dict[str, object], message: str) -> None:
    bank = make_bank("uniform", 6)
    with pytest.raises(UserError, match=message):
        bank.search(**{"normal": np.zeros((2, 4, 4), int), **bad})
