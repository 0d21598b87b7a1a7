"""A few damaged inputs of each kind; `benchmarks/fuzz.py` runs thousands."""

import sys

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import fuzz


@pytest.fixture(autouse=True)
def logging_as_before():
    yield
    fuzz.logging.disable(fuzz.logging.NOTSET)


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_damage_is_refused_in_a_line_or_harmless(tmp_path, name):
    fuzz.quiet()
    tally, faults = fuzz.run(name, 20, 1, tmp_path)
    assert not faults and sum(tally.values()) == 20
    assert tally["refused"] or name == "checkpoints"  # of which an older one is taken


def test_what_is_wrong_is_counted(tmp_path):
    """The checks can fail: a reader that doesn't compare, one that breaks, and one that hangs."""
    def breaks(folder):
        raise KeyError(folder)

    def hangs(folder):
        while True:
            pass

    def forgets(folder):
        return {"digest": ""}

    (tmp_path / "records").mkdir()
    fuzz.make_records(tmp_path / "records", 0)
    known = fuzz.KINDS["records"]
    fuzz.SECONDS, seconds = 1, fuzz.SECONDS
    try:
        for use, expected in ((breaks, "traceback"), (hangs, "hang"), (forgets, "silently wrong")):
            right = fuzz.as_whole(fuzz.use_records)
            result, _ = fuzz.outcome(known._replace(use=use, right=right), tmp_path / "records", tmp_path / "records")
            assert result == expected
    finally:
        fuzz.SECONDS = seconds
