"""Imports run one way; a table says who may import what."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    ("errors", "types", "provenance"), ("config", "files", "mesh"), ("losses", "models", "data", "retrieval"),
    ("training",), ("evaluation",), ("ablate",),
)
FORBIDDEN = {
    "decomp_jax": {"tensorflow"},
    "decomp_jax/losses": {"flax", "decomp_jax.models"},
    "decomp_jax/models": {"decomp_jax.losses", "decomp_jax.data"},
    "decomp_jax/retrieval": {"flax", "grain", "tensorflow_datasets", "decomp_jax.models", "decomp_jax.data"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_forbidden_imports(folder):
    for path in files(folder):
        for name in imports(path):
            assert not any(name == no or name.startswith(no + ".") for no in FORBIDDEN[folder]), f"{path}: {name}"


def layer(part: str) -> int:
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


def test_layers_import_downwards():
    for path in files("decomp_jax"):
        part = path.relative_to(ROOT / "decomp_jax").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for name in imports(path):
            if name.startswith("decomp_jax."):
                assert layer(name.split(".")[1]) <= layer(part), f"{path}: {name}"


def test_only_checkpoint_imports_orbax():
    users = {path.name for path in files("decomp_jax") if any(name.startswith("orbax") for name in imports(path))}
    assert users == {"checkpoint.py"}
