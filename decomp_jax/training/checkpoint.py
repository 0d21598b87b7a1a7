"""Checkpoints: written through orbax, named by digests of their bytes, read back only when whole."""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from decomp_jax.errors import UserError
from decomp_jax.files import FULL, no_space, read_sealed, sealed
from decomp_jax.mesh import place_like
from decomp_jax.processes import agreed, gather, require_equal
from decomp_jax.training.state import State

KEPT = 2
META_FILE = "metadata"  # orbax's name for the file of a JSON item
PARAMETERS, META = "parameters.npz", "meta.json"  # an exported run
EXPORTED = ("params", "batch_stats", "codebook_stats")


def digest(tree: Any) -> str:
    """sha256 over the bytes of all leaves, in tree order."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return total.hexdigest()


class Checkpoints:
    """Writes the checkpoints of a run, under WORKDIR/checkpoints; the newest `KEPT` are kept. A context.

    What a killed run left half-written there is removed.
    """

    def __init__(self, workdir: str | Path) -> None:
        self._folder = _folder(workdir)
        with _disk_space(self._folder):
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEPT, enable_async_checkpointing=True, cleanup_tmp_directories=True
                ),
                item_names=("state", "meta"),
                item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": _MetaHandler()},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        with _disk_space(self._folder):
            self._manager.close()

    def save(self, state: State, meta: dict[str, Any]) -> None:
        """Copies the state from the devices and writes it while training goes on. One of the same step is left.

        Raises what kept the save before this one from the disk: UserError if that is full.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        # A copy, because the next step donates the state's buffers, of which a CPU's arrays would be views.
        host = jax.tree.map(np.array, jax.device_get(state)) if jax.process_index() == 0 else None
        items = {"state": ocp.args.StandardSave(state), "meta": _MetaSave({**meta, "step": step}, host)}
        with _disk_space(self._folder):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def check(self) -> None:
        """Raises what made a save fail that has ended by now: UserError if the disk is full. Waits for nothing."""
        if not self._manager.is_saving_in_progress():
            with _disk_space(self._folder):
                self._manager.wait_until_finished()


class _MetaHandler(ocp.JsonCheckpointHandler):
    """Writes meta with digests, which are taken of a copy of the state in orbax's background thread of process 0."""

    async def async_save(self, directory: Any, item: Any = None, args: "_MetaSave | None" = None) -> list:
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(directory, args), name="meta")]

    async def _write(self, directory: Any, args: "_MetaSave") -> None:
        if args.state is not None:
            digests = {name: digest(getattr(args.state, name)) for name in State.__dataclass_fields__}
            (directory / META_FILE).write_text(json.dumps(sealed({**args.meta, "digests": digests})))


@ocp.args.register_with_handler(_MetaHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _MetaSave(ocp.args.CheckpointArgs):
    """What is written of a checkpoint beside its state; `state` [NumPy arrays] in process 0 alone."""

    meta: dict[str, Any]
    state: State | None


def restore_state(workdir: str | Path, like: State, accept: Callable[[dict[str, Any]], None]) -> State | None:
    """The newest whole state of a run, with the shapes and shardings of `like`; None if there are no checkpoints.

    Damaged checkpoints are renamed to N.damaged. All processes get the state of the same step.

    Args:
        accept: sees a checkpoint's meta before its state is read, and raises to refuse it.

    Raises:
        UserError: there are checkpoints, but none is whole, or one can't be read for a reason that is no damage.
    """

    def read(folder: Path) -> State:
        meta = _read_meta(folder)
        accept(meta)
        return _read_state(folder, meta, like)

    state = _newest(_folder(workdir), read, set_aside=True)
    return state if state is None else place_like(like, state)


def restore_for_inference(workdir: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """({"params", "batch_stats", "codebook_stats", ...} as NumPy arrays, meta) of a run's newest whole checkpoint, or
    of an exported run; the same in all processes.

    Raises UserError if there is none.
    """
    with agreed():
        exported = _read_exported(Path(workdir)) if (Path(workdir) / PARAMETERS).is_file() else None
        if exported is None and not _folder(workdir).is_dir():
            raise UserError(f"{workdir}: no checkpoints here; train with `python train.py --workdir={workdir}` first")
    restored = exported or _newest(_folder(workdir), _read_for_inference)
    if restored is None:
        raise UserError(f"{_folder(workdir)}: no whole checkpoint; train until the first one is written")
    require_equal({"the network": restored[1]["digests"]["params"]})
    return restored


def _newest(folder: Path, read: Callable[[Path], Any], *, set_aside: bool = False) -> Any:
    """What `read` makes of the newest checkpoint that is whole for all processes; None if there are no checkpoints.

    Process 0 says which checkpoints there are, so that all try the same ones.
    """
    names = json.loads(gather(json.dumps(_steps(folder)))[0])
    for name in names:
        checkpoint, damage, result = folder / name, "", None
        with agreed():
            if not checkpoint.is_dir():
                raise UserError(f"{checkpoint}: process 0 has it, this one not; --workdir must be one shared folder")
            try:
                result = _read(read, checkpoint)
            except Damage as error:
                damage = str(error)
        damages = [text for text in gather(damage) if text]
        if not damages:
            return result
        if jax.process_index() == 0:
            logging.warning("%s: damaged (%s); taking an older checkpoint", checkpoint, damages[0])
            if set_aside:
                _set_aside(checkpoint)
    if names:
        raise UserError(f"{folder}: no whole checkpoint; copy one there from a backup, or take another --workdir")
    return None


def has_checkpoints(workdir: str | Path) -> bool:
    """As process 0 sees it."""
    return json.loads(gather(json.dumps(bool(_steps(_folder(workdir)))))[0])


def _steps(folder: Path) -> list[str]:
    """Names of the checkpoints, newest first; those being written and those set aside have other names."""
    if not folder.is_dir():
        return []
    return sorted((path.name for path in folder.iterdir() if path.name.isdigit()), key=int, reverse=True)


def _set_aside(checkpoint: Path) -> None:
    names = (checkpoint.with_name(f"{checkpoint.name}.damaged{count or ''}") for count in itertools.count())
    checkpoint.rename(next(name for name in names if not name.exists()))


class Damage(Exception):
    """Files of a checkpoint are missing, cut short or hold other bytes than were written."""


# tensorstore's and orbax's errors for files that are missing, cut short or altered.
DAMAGE_STATUS = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION")


def _read(read: Callable[[Path], Any], checkpoint: Path) -> Any:
    """Raises Damage for what is damage for sure, and UserError for other troubles of reading, which may pass."""
    try:
        return read(checkpoint)
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Damage(_first_line(error)) from error
    except (OSError, MemoryError, ValueError, jax.errors.JaxRuntimeError) as error:
        status = _status(error)
        if isinstance(error, ValueError) and not status:
            raise UserError(f"{checkpoint}: not a state of this version ({_first_line(error)}); go on with the version "
                            "that wrote it, or take another --workdir") from error
        if status in DAMAGE_STATUS and _system_error(error) in (None, errno.ENOENT):
            raise Damage(_first_line(error)) from error
        raise UserError(f"{checkpoint}: can't be read now ({_first_line(error)}); it is left as it is: mend the cause "
                        "and give the same command again") from error


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta" / META_FILE
    path.read_bytes()  # a disk that fails is no damage
    try:
        return read_sealed(path, "")
    except UserError as error:
        raise Damage(str(error)) from error


def _read_state(folder: Path, meta: dict[str, Any], like: State) -> State:
    """As NumPy arrays. Read by each process alone: none waits for another that can't."""
    _shapes(folder)  # says more clearly what is missing
    state = _restore(folder, like)
    _check_digests({name: getattr(state, name) for name in meta["digests"]}, meta["digests"])
    return state


def _read_for_inference(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and meta; whatever optimiser the run had, and on whatever devices."""
    meta = _read_meta(folder)
    state = _restore(folder, _shapes(folder))
    # The optimiser's tuples come back as other containers, in another order.
    _check_digests(state, {name: value for name, value in meta["digests"].items() if name != "opt_state"})
    return state, meta


def _shapes(folder: Path) -> Any:
    """Shapes and types of a state, by orbax's JSON, which has no checksums: what orbax stumbles over is damage."""
    try:
        tree = ocp.StandardCheckpointHandler().metadata(folder / "state").tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    except Exception as error:
        if isinstance(error, (OSError, MemoryError, jax.errors.JaxRuntimeError)) or _status(error):
            raise
        raise Damage(f"metadata of its state: {_first_line(error)}") from error


def _restore(folder: Path, like: Any) -> Any:
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    return ocp.StandardCheckpointHandler().restore(folder / "state", args=ocp.args.StandardRestore(target))


def _check_digests(state: dict[str, Any], digests: dict[str, str]) -> None:
    for name, expected in digests.items():
        if digest(state[name]) != expected:
            raise Damage(f"the bytes of {name} do not match their digest")


def _folder(workdir: str | Path) -> Path:
    return Path(workdir).absolute() / "checkpoints"


@contextlib.contextmanager
def _disk_space(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if (number := _system_error(error)) in FULL:
            raise no_space(folder, os.strerror(number)) from error
        raise


def _status(error: Exception) -> str:
    """Tensorstore's and JAX's word for what went wrong, with which their messages begin."""
    match = re.match(r"([A-Z_]+): ", str(error))
    return match[1] if match else ""


def _system_error(error: Exception) -> int | None:
    """The operating system's number of an error, which tensorstore has in its text."""
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return error.errno if isinstance(error, OSError) else int(match[1]) if match else None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


def _not_a_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs at length what it then raises."""
    return not (record.exc_info and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_not_a_traceback_of_orbax)


def write_exported(folder: str | Path, state: dict[str, Any], meta: dict[str, Any]) -> None:
    """A run that `restore_for_inference` reads, without its optimiser: NumPy arrays and JSON, a few MB.

    Paths of this machine stay here: the digest names the data, and its folder's name the run it started from.
    """
    train = meta["config"]["train"]
    train = {**train, "init_from": Path(train["init_from"]).name}
    meta = {**meta, "config": {**meta["config"], "data": {**meta["config"]["data"], "dir": ""}, "train": train}}
    kept = {name: state[name] for name in EXPORTED}
    np.savez_compressed(Path(folder) / PARAMETERS, **flatten_dict(kept, sep="/"))
    (Path(folder) / META).write_text(json.dumps(sealed(meta), indent=1) + "\n")


def _read_exported(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    meta = read_sealed(folder / META, "export or copy it again")
    try:
        with np.load(folder / PARAMETERS, allow_pickle=False) as arrays:
            state = unflatten_dict(dict(arrays), sep="/")
        whole = all(digest(state.get(name, {})) == meta["digests"][name] for name in EXPORTED)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, EOFError, NotImplementedError, MemoryError,
            zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{folder / PARAMETERS}: damaged ({error}); export or copy it again") from error
    if not whole:
        raise UserError(f"{folder}: {PARAMETERS} and {META} do not belong together; export or copy it again")
    return state, meta
