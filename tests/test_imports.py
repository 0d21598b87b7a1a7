"""Imports run one way; tables say who may import what."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up: a part imports its own layer and those above it in this list.
LAYERS = (
    ("errors", "types", "provenance"),
    ("config", "files", "mesh", "processes"),
    ("losses", "models", "data", "retrieval"),
    ("preparation", "training"),
    ("inference",),
    ("evaluation", "room"),
    ("ablate",),
)
FORBIDDEN = {
    "decomp_jax": {"tensorflow", "tensorflow_datasets", "data_prep", "configs"},
    "data_prep": {"jax", "flax", "configs", "decomp_jax.training", "decomp_jax.inference", "decomp_jax.evaluation"},
    "configs": {"data_prep", "decomp_jax.training", "decomp_jax.inference", "decomp_jax.evaluation"},
    "decomp_jax/losses": {"flax", "decomp_jax.models"},
    "decomp_jax/models": {"decomp_jax.losses", "decomp_jax.data"},
    "decomp_jax/preparation": {"jax", "flax"},
    "decomp_jax/retrieval": {"flax", "grain", "decomp_jax.models", "decomp_jax.data"},
}
PACKAGES = ("decomp_jax", "data_prep", "configs")


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


def test_no_circle_of_files():
    """Neither of files nor, above the bottom layers, of packages; imports for type checking count."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for folder in PACKAGES for path in files(folder)
    }
    graph = {
        name: {part for full in imports(path) for part in (full, full.rpartition(".")[0]) if part in modules}
        for name, path in modules.items()
    }
    visited, open_ = set(), []

    def visit(name: str) -> None:
        assert name not in open_, f"a circle: {' -> '.join([*open_[open_.index(name):], name])}"
        if name not in visited:
            open_.append(name)
            for other in sorted(graph[name] - {name}):
                visit(other)
            open_.pop()
            visited.add(name)

    for name in graph:
        visit(name)


def test_only_checkpoint_imports_orbax():
    users = {path.name for path in files("decomp_jax") if any(name.startswith("orbax") for name in imports(path))}
    assert users == {"checkpoint.py"}
