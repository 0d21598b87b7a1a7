"""What the TPU compiler makes of the search and the step. Needs libtpu (the extra `tpu`), and no TPU."""

import os
import re

import pytest

from tests.conftest import ROOT, run_python

pytest.importorskip("libtpu", reason='needs `pip install -e ".[tpu]"`')
pytestmark = pytest.mark.long


def measured(*flags: str) -> dict[str, str]:
    """Lines of the table that benchmarks/aot.py prints."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    flags = ("--topology=v5e:2x2", "--chips=1", *flags)
    done = run_python(ROOT / "benchmarks/aot.py", *flags, env=environment | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", done.stdout, re.MULTILINE))


def test_search_uses_the_matrix_unit_and_little_memory() -> None:
    table = measured("--what=search", "--batch=64", "--codes=100000")
    assert float(table["work a chip"].split()[0]) == pytest.approx(2 * 100_352 * 64 * 64 * 512 / 1e12, abs=0.01)
    assert float(table["memory a chip: temporary + arguments"].split()[0]) < 0.5
    assert float(table["single entries looked up"].split()[0]) < 20


def test_a_step_moves_hardly_any_padding() -> None:
    """Ten minutes of compiling. With rows as they are, not folded, it moves 0.09 GB an image, half of it padding."""
    table = measured("--what=train", "--size=64", "--batch=30")
    assert float(table["traffic an image"].split()[0]) < 0.07
    traffic, unpadded = re.match(r"([\d.]+) GB \(([\d.]+) without", table["traffic a chip"]).groups()
    assert float(traffic) < 1.3 * float(unpadded)
