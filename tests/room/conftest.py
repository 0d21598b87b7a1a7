import dataclasses

import pytest

from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.room.session import Room
from tests.evaluation.conftest import decomposer, heads, query, reference
from tests.evaluation.fakes import FakeDecomposer, Heads

__all__ = ["decomposer", "heads", "query", "reference"]


@pytest.fixture(scope="session")
def room(decomposer: FakeDecomposer, heads: dict[str, Heads], reference: SliceSet) -> Room:
    """Over drawn heads, eight patients of six slices, whose images are at hand."""
    return Room(decomposer, reference.bank, heads["reference"], bank_digest="b" * 64)


@pytest.fixture(scope="session")
def painted_room(decomposer: FakeDecomposer, reference: SliceSet) -> Room:
    """The same where the images are gone."""
    bank = dataclasses.replace(reference.bank)
    return Room(decomposer, bank, None, bank_digest="b" * 64)
