"""Devices: one mesh axis, "data", over all of them, and arrays split over it."""

import ctypes
import functools
import gc
import importlib.util
import platform
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from decomp_jax.errors import UserError
from decomp_jax.processes import one_task_a_node

# Options of glibc's mallopt, from malloc.h: one arena, no mappings of their own for large blocks, never trimmed.
KEEP_MEMORY = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}


def keep_host_memory() -> None:
    """With CPU devices: from now on glibc keeps what is freed for the next step, and does not return it to the kernel.

    XLA allocates the buffers of a CPU program anew in every call, and getting their pages from the kernel takes a
    quarter of a training step. To be called before the devices are first used: their threads choose their arenas then.
    So that accelerators are told by what is installed. Does nothing without glibc.
    """
    if not _may_have_accelerators() and platform.libc_ver()[0] == "glibc":
        for option, value in KEEP_MEMORY.values():
            ctypes.CDLL(None).mallopt(option, value)


def give_back_host_memory() -> None:
    """What is no longer used goes back to the kernel now, for programs that live long and rest often.

    JAX lets go of the arrays that a CPU program was called with at its next call or at a collection of garbage, the
    smallest of which does; glibc keeps what compiling and large arrays leave between what is used.
    """
    gc.collect(0)
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    """glibc's malloc_trim; without glibc nothing."""
    return ctypes.CDLL(None).malloc_trim if platform.libc_ver()[0] == "glibc" else lambda _: None


def _may_have_accelerators() -> bool:
    plugins = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return jax.config.jax_platforms != "cpu" and plugins


def data_mesh() -> Mesh:
    """All devices of all processes along "data", process by process: each process has adjacent rows of a batch."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def describe_devices() -> str:
    """Their number and kind, and how the processes share them."""
    count, processes = jax.device_count(), jax.process_count()
    text = f"{count} x {jax.devices()[0].device_kind}"
    if processes > 1:
        text += f", {jax.local_device_count()} in each of {processes} processes"
        text += " (Slurm: one task a node, which has all its GPUs)" if one_task_a_node() else ""
    return text


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
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


def place_like(like: Any, tree: Any) -> Any:
    """A tree of NumPy arrays that every process holds whole -> arrays with the shardings of `like`."""

    def place(leaf: jax.Array, value: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    return jax.tree.map(place, like, tree)


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
