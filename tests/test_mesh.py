import dataclasses
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
