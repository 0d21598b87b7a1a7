"""What is flushed, and in which order; names that are no paths."""

import os
from pathlib import Path

import pytest

from decomp_jax import files
from decomp_jax.errors import EXIT_USER_ERROR
from tests.conftest import run_python


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is flushed, and "replace"."""
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (
        seen.append(Path(os.readlink(f"/proc/self/fd/{number}")).name.rpartition("-")[2]), fsync(number)
    ))
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append("replace"), replace(*paths)))
    return seen


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, events):
    with files.replacing(tmp_path / "done.json") as file:
        file.write_text("{}")
    assert events == ["done.json", "replace", tmp_path.name.rpartition("-")[2]]


def test_a_folder_and_its_files_are_on_the_disk_before_it_has_its_name(tmp_path, events):
    with files.making(tmp_path / "bank") as folder:
        (folder / "bank.json").write_text("{}")
    assert events == ["bank.json", str(os.getpid()), "replace", tmp_path.name.rpartition("-")[2]]


@pytest.mark.parametrize("command", [
    ("train.py", "--config=configs/demo.py", "--workdir=gs://bucket/run"),
    ("evaluate.py", "search", "--bank", "s3://bucket/bank", "--queries=q", "--by=both", "--out=o"),
    ("-m", "data_prep", "phantom", "--out=gs://bucket/data"),
])
def test_urls_are_refused_by_name(command, tmp_path):
    done = run_python(*command)
    assert done.returncode == EXIT_USER_ERROR and len(done.stderr.splitlines()) == 1
    assert "bucket" in done.stderr and "mount the bucket" in done.stderr
    assert not Path("gs:").exists()
