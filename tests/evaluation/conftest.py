import pytest

from decomp_jax.evaluation.slices import SliceSet
from tests.evaluation.fakes import FakeDecomposer, Heads


@pytest.fixture(scope="session")
def heads() -> dict[str, Heads]:
    return {"query": Heads(5, 6, seed=0, prefix="q"), "reference": Heads(8, 6, seed=1, prefix="r")}


@pytest.fixture(scope="session")
def decomposer(heads: dict[str, Heads]) -> FakeDecomposer:
    return FakeDecomposer(heads["query"].settings)


@pytest.fixture(scope="session")
def query(heads: dict[str, Heads], decomposer: FakeDecomposer) -> SliceSet:
    return SliceSet.encode(decomposer, heads["query"], "query", slab_mm=0)


@pytest.fixture(scope="session")
def reference(heads: dict[str, Heads], decomposer: FakeDecomposer) -> SliceSet:
    return SliceSet.encode(decomposer, heads["reference"], "reference", slab_mm=0)
