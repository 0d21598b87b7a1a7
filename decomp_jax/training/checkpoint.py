"""Checkpoints: written through orbax, named by digests of their bytes, read back only when whole."""

import contextlib
import hashlib
import json
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from decomp_jax.errors import UserError
from decomp_jax.files import FULL, no_space
from decomp_jax.training.state import State

KEPT = 2
PARAMETERS, META = "parameters.npz", "meta.json"  # an exported run


def digest(tree: Any) -> str:
    """sha256 over the bytes of all leaves, in tree order."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


class Checkpoints:
    """The checkpoints of a run, under WORKDIR/checkpoints; the newest `KEPT` are kept.

    Args:
        writing: removes what a killed run left half-written. False to read beside a run that may be training.
    """

    def __init__(self, workdir: str | Path, *, writing: bool = False) -> None:
        self.folder = Path(workdir).absolute() / "checkpoints"
        with self._disk_space():
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEPT, enable_async_checkpointing=True, cleanup_tmp_directories=writing
                ),
                item_names=("state", "meta"),
                item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
            )
        self._damaged: set[int] = set()

    def save(self, state: State, meta: dict[str, Any]) -> None:
        """Copies the state from the devices and writes it while training goes on. A whole one of its step is left.

        Raises what kept the save before this one from the disk: UserError if that is full.
        """
        step = int(state.step)
        if step in self._manager.all_steps() and step not in self._damaged:
            return
        host = jax.device_get(state)
        digests = {name: digest(getattr(host, name)) for name in State.__dataclass_fields__}
        meta = {**meta, "step": step, "digests": digests}
        items = {
            "state": ocp.args.StandardSave(state),
            "meta": ocp.args.JsonSave({**meta, "digest": _meta_digest(meta)}),
        }
        with self._disk_space():
            for damaged in self._damaged:
                self._manager.delete(damaged)
            self._damaged.clear()
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: State, accept: Callable[[dict[str, Any]], None]) -> State | None:
        """The newest whole state, with the shapes and shardings of `like`; None if there are no checkpoints.

        `accept` sees a checkpoint's meta before its state is read, and raises to refuse it. Raises UserError if there
        are checkpoints, but none is whole.
        """
        return self._newest(lambda step, meta: (accept(meta), self._state(step, meta, like))[1])

    def restore_host(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(state as a dictionary of NumPy arrays, meta) of the newest whole checkpoint; None if there are none.

        Raises UserError if there are checkpoints, but none is whole.
        """
        return self._newest(lambda step, meta: (self._state(step, meta, None), meta))

    def check(self) -> None:
        """Raises what made a save fail that has ended by now: UserError if the disk is full. Waits for nothing."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when all saves are on disk. Raises as `check` does."""
        with self._disk_space():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._disk_space():
            self._manager.close()

    @contextlib.contextmanager
    def _disk_space(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore has the number in its text
            found = re.search(r"os_error_code='(\d+)'", str(error))
            number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
            if number in FULL:
                raise no_space(self.folder, os.strerror(number)) from error
            raise

    def _newest(self, read: Callable[[int, dict[str, Any]], Any]) -> Any:
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return read(step, self._meta(step))
            except UserError:
                raise
            except Exception as error:  # damaged files surface as many kinds of error in orbax and tensorstore
                reason = str(error).partition("\n")[0][:200]
                logging.warning("%s/%d: damaged (%s); taking an older checkpoint", self.folder, step, reason)
                self._damaged.add(step)
        if steps:
            raise UserError(f"{self.folder}: no whole checkpoint; remove the folder to start over, or copy it whole")
        return None

    def _meta(self, step: int) -> dict[str, Any]:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta.pop("digest", None) != _meta_digest(meta):
            raise ValueError("the bytes of meta do not match their digest")
        return meta

    def _state(self, step: int, meta: dict[str, Any], like: State | None) -> Any:
        # As NumPy arrays, whatever devices it was written by.
        target = like
        if like is None:
            shapes = self._manager.item_metadata(step)["state"].tree
            target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
        state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
        get = state.get if like is None else lambda name: getattr(state, name)
        for name, expected in meta["digests"].items():
            # Without `like` the optimiser's tuples come back as other containers, in another order.
            if (like is not None or name != "opt_state") and digest(jax.device_get(get(name))) != expected:
                raise ValueError(f"the bytes of {name} do not match their digest")
        return state


def _meta_digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _not_a_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs at length what it then raises."""
    return not (record.exc_info and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_not_a_traceback_of_orbax)


def restore_for_inference(workdir: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """({"params", "batch_stats", "codebook_stats", ...} as NumPy arrays, meta) of a run's newest whole checkpoint, or
    of an exported run.

    Raises UserError if there is none.
    """
    if (Path(workdir) / PARAMETERS).is_file():
        return _read_exported(Path(workdir))
    if not (Path(workdir) / "checkpoints").is_dir():
        raise UserError(f"{workdir}: no checkpoints here; train with `python train.py --workdir={workdir}` first")
    checkpoints = Checkpoints(workdir)
    found = checkpoints.restore_host()
    checkpoints.close()
    if found is None:
        raise UserError(f"{workdir}/checkpoints: no whole checkpoint; train until the first one is written")
    return found


def write_exported(folder: str | Path, state: dict[str, Any], meta: dict[str, Any]) -> None:
    """A run that `restore_for_inference` reads, without its optimiser: NumPy arrays and JSON, a few MB."""
    kept = {name: state[name] for name in ("params", "batch_stats", "codebook_stats")}
    np.savez_compressed(Path(folder) / PARAMETERS, **flatten_dict(kept, sep="/"))
    (Path(folder) / META).write_text(json.dumps(meta, indent=1) + "\n")


def _read_exported(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with np.load(folder / PARAMETERS) as arrays:
            state = unflatten_dict(dict(arrays), sep="/")
        meta = json.loads((folder / META).read_text())
        whole = all(digest(state[name]) == meta["digests"][name] for name in ("params", "batch_stats"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{folder}: damaged ({error}); export or copy it again") from error
    if not whole:
        raise UserError(f"{folder}: {PARAMETERS} and {META} do not belong together; export or copy it again")
    return state, meta
