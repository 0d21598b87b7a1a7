"""Files that are whole or absent, JSON that tells if it was changed, disks that are full, and folders in use."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from decomp_jax.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What NumPy raises for a file that is no .npy file or has a damaged header.
UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, EOFError, MemoryError, OverflowError, SyntaxError, tokenize.TokenError,
)
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for a JSON file, with a digest of themselves; `read_sealed` reads it."""
    return {**values, "digest": _digest(values)}


def read_json(path: str | os.PathLike, cure: str) -> dict[str, Any]:
    """The object of a JSON file. Raises UserError with the cure where there is none."""
    try:
        values = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {cure}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be read ({error}); {cure}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object; {cure}")
    return values


def read_sealed(path: str | os.PathLike, cure: str) -> dict[str, Any]:
    """What `sealed` was given, unchanged. Raises UserError with the cure for a file that was edited or damaged."""
    values = read_json(path, cure)
    if values.pop("digest", None) != _digest(values):
        raise UserError(f"{path}: damaged, edited, or of an older version: its digest does not hold; {cure}")
    return values


def map_array(path: str | os.PathLike, cure: str) -> np.ndarray:
    """The array of a .npy file, mapped. Raises UserError with the cure where there is none."""
    try:
        return npy.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {cure}") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: truncated, damaged or no .npy file ({error}); {cure}") from None


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` when the block ends well, else it is removed.

    It is on the disk when the block ends, so that it survives a power cut. Raises UserError if the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        with disk_space(path):
            yield partial
            _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def making(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder beside `folder` to write into; it takes that name when the block ends well, else it is removed.

    It and its files are on the disk when the block ends. Raises UserError if `folder` exists, or the disk is full.
    """
    folder = Path(folder)
    require_absent(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        with disk_space(folder):
            partial.mkdir(parents=True)
            yield partial
            for path in (*partial.rglob("*"), partial):
                _flush(path)
            try:
                os.replace(partial, folder)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another program has made it meanwhile
                    require_absent(folder)
                raise
            _flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_absent(folder: str | os.PathLike) -> None:
    """Raises UserError if the folder to be made exists."""
    if os.path.exists(folder):
        raise UserError(f"{folder}: exists already; remove it or name another directory")


def _flush(path: Path) -> None:
    """Waits until a file, or the list of names of a folder, is on the disk; some file systems can't for folders."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(number)


@contextlib.contextmanager
def disk_space(path: str | os.PathLike) -> Iterator[None]:
    """For blocks that write to `path`: an OSError of a full disk becomes a UserError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise no_space(path, os.strerror(error.errno)) from error
        raise


@contextlib.contextmanager
def in_use(folder: str | os.PathLike) -> Iterator[None]:
    """Keeps a second program from writing to `folder`, until the block or the process ends.

    Raises UserError if another has it. A file system without locks is trusted.
    """
    with open(os.path.join(folder, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: in use by another program; wait for its end, or take another folder") from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        yield


def no_space(path: str | os.PathLike, reason: str) -> UserError:
    """What to raise where `path` could not be written for want of space."""
    return UserError(f"{path}: {reason}; make room there and give the same command again")
