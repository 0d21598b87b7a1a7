import sys

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


@pytest.mark.parametrize(
    "tasks, nodes, gpus, devices",
    [("1", "1", "0,1", "alone"), ("4", "4", "0,1", [0, 1]), ("8", "4", "0,1", None), ("4", "4", "", None)],
)
def test_tasks_of_slurm(monkeypatch, tasks, nodes, gpus, devices):
    """The only task of a node has all its GPUs; of several, each has the one that JAX gives it."""
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: joined.append(options["local_device_ids"]))
    for name, value in (("STEP_NUM_TASKS", tasks), ("STEP_NUM_NODES", nodes)):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    mesh.initialize_distributed(None, None, None)
    assert joined == ([] if devices == "alone" else [devices])


def test_half_a_cluster_is_refused():
    with pytest.raises(mesh.UserError, match="give all three, or none"):
        mesh.initialize_distributed("host:1", 2, None)
