"""Arrays of many slices in temporary files: the system keeps in memory what is in use, and writes out the rest."""

import tempfile
from collections.abc import Callable, Iterator
from os import posix_fallocate

import numpy as np
from numpy.typing import DTypeLike

from decomp_jax.files import disk_space

BLOCK = 1024  # slices worked on at a time


def scratch(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of zeros in a file of its own under TMPDIR, which is gone with the array.

    Raises UserError if there is no room for it.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype)
    with disk_space(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
        posix_fallocate(file.fileno(), 0, size)  # a full disk is told here, and does not kill the program later
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))


def blocks(n: int) -> Iterator[slice]:
    """Slices of 0..n of `BLOCK` each."""
    return (slice(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK))


def map_blocks(function: Callable[[np.ndarray], np.ndarray], array: np.ndarray) -> np.ndarray:
    """`function` of an array of slices, block by block, in a scratch array."""
    result = None
    for block in blocks(len(array)):
        part = np.asarray(function(array[block]))
        if result is None:
            result = scratch((len(array), *part.shape[1:]), part.dtype)
        result[block] = part
    return result
