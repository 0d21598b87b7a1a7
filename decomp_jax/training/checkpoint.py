"""Checkpoints: written through orbax, named by digests of their bytes, read back only when whole."""

import hashlib
import json
import logging
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from decomp_jax.errors import UserError
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
    """The checkpoints of a run, under WORKDIR/checkpoints; the newest `KEPT` are kept."""

    def __init__(self, workdir: str | Path) -> None:
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=True),
        )
        self._damaged: set[int] = set()

    def save(self, state: State, meta: dict[str, Any]) -> None:
        """Copies the state from the devices and writes it while training goes on. A whole one of its step is left."""
        for step in self._damaged:
            self._manager.delete(step)
        self._damaged.clear()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        host = jax.device_get(state)
        digests = {name: digest(getattr(host, name)) for name in State.__dataclass_fields__}
        items = {
            "state": ocp.args.StandardSave(state),
            "meta": ocp.args.JsonSave({**meta, "step": step, "digests": digests}),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: State, accept: Callable[[dict[str, Any]], None]) -> State | None:
        """The newest whole state, with the shapes and shardings of `like`; None if there is none.

        `accept` sees a checkpoint's meta before its state is read, and raises to refuse it.
        """
        return self._newest(lambda step, meta: (accept(meta), self._state(step, meta, like))[1])

    def restore_host(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(state as a dictionary of NumPy arrays, meta) of the newest whole checkpoint; None if there is none."""
        return self._newest(lambda step, meta: (self._state(step, meta, None), meta))

    def wait(self) -> None:
        """Returns when all saves are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _newest(self, read: Callable[[int, dict[str, Any]], Any]) -> Any:
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
                return read(step, meta)
            except UserError:
                raise
            except Exception as error:  # damaged files surface as many kinds of error in orbax and tensorstore
                reason = str(error).partition("\n")[0][:200]
                logging.warning("%s/%d: damaged (%s); taking an older checkpoint", self.folder, step, reason)
                self._damaged.add(step)
        return None

    def _shapes(self, step: int) -> Any:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.metadata(self.folder / str(step) / "state").item_metadata.tree

    def _state(self, step: int, meta: dict[str, Any], like: State | None) -> Any:
        # As NumPy arrays, whatever devices it was written by.
        target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), self._shapes(step)) if like is None else like
        state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
        get = state.get if like is None else lambda name: getattr(state, name)
        # Without `like` the optimiser's tuples come back as other containers: parameters are what is read then.
        for name in ("params", "batch_stats") if like is None else meta["digests"]:
            if digest(jax.device_get(get(name))) != meta["digests"][name]:
                raise ValueError(f"the bytes of {name} do not match their digest")
        return state


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
    Path(folder).mkdir(parents=True)
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
