import dataclasses
import platform
import sys
from types import SimpleNamespace

import jax
import pytest

from decomp_jax import mesh
from tests.conftest import run_python


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
@pytest.mark.parametrize("keep", [False, True])
def test_host_memory_is_kept(keep):
    """Page faults of a large block that is freed and allocated again: none once memory is kept."""
    code = f"""
import resource
from decomp_jax.mesh import keep_host_memory
if {keep}: keep_host_memory()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"x") * 2**26
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[1:]))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) < 1000) == keep


def test_rows_of_a_process_are_adjacent(monkeypatch):
    """Whatever order JAX lists the devices in."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        process_index: int

    devices = [Device(0, 0), Device(1, 1), Device(3, 1), Device(2, 0)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    meshes = []
    monkeypatch.setattr(mesh, "Mesh", lambda devices, *_, **__: meshes.append(devices))
    mesh.data_mesh()
    assert [(device.process_index, device.id) for device in meshes[0]] == [(0, 0), (0, 2), (1, 1), (1, 3)]


@pytest.mark.parametrize(("platforms", "kept"), [(None, False), ("cuda,cpu", False), ("cpu", True)])
def test_memory_of_accelerator_hosts_is_given_back(monkeypatch, platforms, kept):
    """And this is known before the devices are used."""
    calls = []
    monkeypatch.setattr(mesh.importlib.util, "find_spec", lambda name: name == "jax_plugins" or None)
    monkeypatch.setattr(mesh.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(mesh.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *option: calls.append(option)))
    # JAX as far as it may be asked before devices are used
    monkeypatch.setattr(mesh, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=platforms)))
    mesh.keep_host_memory()
    assert bool(calls) == kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone")
def test_host_memory_is_given_back():
    """What lies free between blocks in use, and what JAX was called with."""
    code = """
import weakref
from pathlib import Path
import jax
import numpy as np
from decomp_jax.mesh import give_back_host_memory
from decomp_jax.retrieval.layout import aligned

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])

array = aligned((2**20,), np.dtype(np.float32))
seen = weakref.ref(array.base)
jax.jit(lambda values: values.sum())(array).block_until_ready()
del array
blocks = [b"x" * 50_000 for _ in range(4_000)]
before, used = resident(), blocks[::50]
del blocks
give_back_host_memory()
print(before - resident(), seen() is None)
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    freed, let_go = done.stdout.split()
    assert int(freed) > 150_000 and let_go == "True"
