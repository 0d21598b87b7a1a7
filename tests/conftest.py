"""Checks the shapes in annotations while tests run, and gives tests a tiny data set."""

from jaxtyping import install_import_hook

install_import_hook(["decomp_jax.models", "decomp_jax.losses"], "beartype.beartype")

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # configs/ and the two programs are not installed


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten phantom patients of 64x64 slices, in all four splits."""
    from data_prep.__main__ import main

    out = tmp_path_factory.mktemp("data") / "phantom"
    main(["phantom", "--out", str(out), "--patients", "10", "--size", "64", "--seed", "3", "--workers", "1"])
    return out
