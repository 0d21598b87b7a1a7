import sys

import pytest

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
