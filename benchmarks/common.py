"""What the benchmarks share: configurations by path, medians with their spread, and documents' measured parts."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from decomp_jax.config import Config

# Benchmarks are run as files: what is beside their folder, configurations and helpers of tests, is to be found, too.
sys.path.insert(1, str(Path(__file__).parents[1]))


def load_config(path: str) -> Config:
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Config.from_dict(module.get_config().to_dict())


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (quartiles)."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def write_measured(document: Path, name: str, lines: Sequence[str]) -> None:
    """Replaces what stands between the marks of `name` in a document. Raises ValueError where there are none."""
    begin, end = f"<!-- measured {name}: begin -->\n", f"<!-- measured {name}: end -->\n"
    before, found, rest = document.read_text().partition(begin)
    if not found:
        raise ValueError(f"{document}: no line {begin!r}")
    document.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2])
