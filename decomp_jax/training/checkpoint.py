"""Checkpoints: written through orbax, named by a digest of their bytes, read back only when whole."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from decomp_jax.errors import UserError

KEPT = 2


def digest(tree: Any) -> str:
    """sha256 over the bytes of all leaves, in tree order."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


class Checkpoints:
    """The checkpoints of a run, under WORKDIR/checkpoints; the newest `KEPT` are kept."""

    def __init__(self, workdir: str | Path) -> None:
        self._folder = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=True),
        )

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copies the state from the devices and writes it while training goes on. A step saved before is left."""
        if step in self._manager.all_steps():
            return
        meta = {**meta, "step": step, "digest": digest(jax.device_get(state))}
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        )

    def newest(self, like: Any | None = None) -> tuple[Any, dict[str, Any]] | None:
        """(state, meta) of the newest whole checkpoint, or None; damaged ones are named, deleted and passed over.

        `like` gives the shapes and shardings to restore to; without it NumPy arrays come back.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._restore(step, like)
            except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
                logging.warning("%s: checkpoint %d is damaged (%s); taking an older one", self._folder, step, error)
                self._manager.delete(step)
        return None

    def _restore(self, step: int, like: Any | None) -> tuple[Any, dict[str, Any]]:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        target = ocp.args.StandardRestore(like) if like is not None else ocp.args.StandardRestore()
        state = self._manager.restore(step, args=ocp.args.Composite(state=target))["state"]
        if digest(jax.device_get(state)) != meta["digest"]:
            raise ValueError("its bytes do not match their digest")
        return state, meta

    def wait(self) -> None:
        """Returns when all saves are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def restore_for_inference(workdir: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """({"params", "batch_stats", ...} as NumPy arrays, meta) of a run's newest whole checkpoint.

    Raises UserError if the run has none.
    """
    if not (Path(workdir) / "checkpoints").is_dir():
        raise UserError(f"{workdir}: no checkpoints here; train with `python train.py --workdir={workdir}` first")
    checkpoints = Checkpoints(workdir)
    found = checkpoints.newest()
    checkpoints.close()
    if found is None:
        raise UserError(f"{workdir}/checkpoints: no whole checkpoint; train until the first one is written")
    return found
