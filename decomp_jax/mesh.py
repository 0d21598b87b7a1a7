"""Devices and processes: one mesh axis, "data", over all of them."""

import ctypes
import os
import platform
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from decomp_jax.errors import UserError

# Set on the hosts of a TPU pod slice.
POD_VARIABLES = ("TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")

# Options of glibc's mallopt, from malloc.h: one arena, no mappings of their own for large blocks, never trimmed.
KEEP_MEMORY = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}


def keep_host_memory() -> None:
    """From now on glibc keeps what is freed, for the next step, instead of giving it back to the kernel.

    XLA allocates the buffers of a CPU program anew in every call: getting their pages from the kernel takes a quarter of
    a training step. To be called before the devices are first used; does nothing without glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        for option, value in KEEP_MEMORY.values():
            ctypes.CDLL(None).mallopt(option, value)


def initialize_distributed(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the processes of a run. Without arguments: automatic where a cluster is found (TPU pod, Slurm), else alone.

    Raises UserError if only some of the three are given.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --processes, --process: give all three, or none")
    if all(given):
        jax.distributed.initialize(coordinator, processes, process, cluster_detection_method="deactivate")
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        jax.distributed.initialize(local_device_ids=_devices_of_slurm_task())
    elif any(name in os.environ for name in POD_VARIABLES):
        jax.distributed.initialize()


def _devices_of_slurm_task() -> list[int] | None:
    """All GPUs of the node for the only task there, of which JAX would take one; None: JAX's choice, a GPU a task."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and os.environ["SLURM_STEP_NUM_TASKS"] == os.environ.get("SLURM_STEP_NUM_NODES"):
        return list(range(len(visible.split(","))))
    return None


def data_mesh() -> Mesh:
    """All devices of all processes along "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def to_global(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch -> the global batch, split over all devices."""
    return {name: jax.make_array_from_process_local_data(sharded(mesh), value) for name, value in local.items()}


def split_over(mesh: Mesh, batch: np.ndarray) -> jax.Array:
    """A batch that every process holds whole -> split over all devices."""
    return jax.make_array_from_callback(batch.shape, sharded(mesh), lambda index: batch[index])


def to_host(tree: Any) -> Any:
    """Global arrays -> whole NumPy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def check_batch_size(batch_size: int) -> None:
    """Raises UserError if the devices can't share the batch evenly."""
    if batch_size % jax.device_count():
        raise UserError(
            f"--config.train.batch_size={batch_size}: {jax.device_count()} devices can't share it evenly; "
            f"take a multiple of {jax.device_count()}"
        )
