"""Checks the shapes in annotations while tests run, and makes a tiny data set."""

import concurrent.futures
import contextlib
import functools
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).parent.parent
# Little is run of what tests compile, so that optimising it costs more than it saves.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def fake_devices(count: int) -> dict[str, str]:
    """The environment of a process with so many CPU devices.

    A collective holds one of XLA's threads a device, of which there are as many as devices: what else wants one then,
    such as the copy of a batch to the last device, would be waited for without end.
    """
    flags = f"{FAST_COMPILE} --xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(4 * count)}


sys.path.insert(0, str(ROOT))  # configs/ and the two programs are not installed
os.environ.setdefault("XLA_FLAGS", FAST_COMPILE)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "compiled"))  # compile each step once
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # and what is small: there is much of it
install_import_hook(["decomp_jax.models", "decomp_jax.losses"], "beartype.beartype")


def run_python(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    """A program of the repository in a process of its own; `options` go to subprocess.run."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, **options)


def start_python(*arguments: str | Path, **environment: str) -> subprocess.Popen:
    """The same, under way, with pipes; with further variables of the environment."""
    command = [sys.executable, *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def finish(*processes: subprocess.Popen) -> list[subprocess.CompletedProcess]:
    """Waits for all at a time: one whose pipe is full would keep the others waiting."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        try:
            outputs = list(pool.map(functools.partial(subprocess.Popen.communicate, timeout=600), processes))
        finally:
            for process in processes:
                process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(processes, outputs, strict=True)
    ]


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: writes fail as on a full disk, with another number."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten phantom patients of 64x64 slices, in all four splits."""
    out = tmp_path_factory.mktemp("data") / "phantom"
    done = run_python("-m", "data_prep", "phantom", "--out", out, "--patients", 10, "--seed", 3, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return out
