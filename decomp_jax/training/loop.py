"""The run: restore, step, log, save, validate, stop cleanly."""

import contextlib
import dataclasses
import functools
import json
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from decomp_jax.config import Config
from decomp_jax.data.pipeline import check_slices, train_batches
from decomp_jax.data.records import SliceDataset
from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError
from decomp_jax.files import in_use, read_json, replacing
from decomp_jax.mesh import check_batch_size, data_mesh, describe_devices, place_like
from decomp_jax.models.network import DecompositionNet
from decomp_jax.processes import agreed, gather, require_equal
from decomp_jax.provenance import source_commit
from decomp_jax.training import grow
from decomp_jax.training.checkpoint import (
    EXPORTED, Checkpoints, digest, has_checkpoints, restore_for_inference, restore_state
)
from decomp_jax.training.metrics import MetricWriter, StepLog
from decomp_jax.training.population import with_population_statistics
from decomp_jax.training.state import State, create_state, make_optimizer
from decomp_jax.training.step import compile_train_step
from decomp_jax.training.validation import Validation

# Settings that may change when a run goes on.
FREE = tuple(
    f"--config.train.{name}" for name in ("checkpoint_every", "log_every", "eval_every", "eval_slices", "tensorboard")
)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same throughout a run.

    Attributes:
        dataset: the split that is trained on.
        meta: what checkpoints and config.json say of the run: settings, data and code.
    """

    config: Config
    workdir: Path
    dataset: SliceDataset
    mesh: Mesh
    model: DecompositionNet
    tx: optax.GradientTransformation
    meta: dict[str, Any]

    @classmethod
    def prepare(cls, config: Config, workdir: Path) -> Self:
        """Raises UserError for data or settings that can't be used."""
        dataset = SliceDataset(config.data.dir, "train")
        config = config.with_steps(int(dataset.rows["labelled"].sum()))
        check_batch_size(config.train.batch_size)
        check_slices(dataset, config.train.batch_size)
        meta = {
            "config": config.to_dict(),
            "settings": dataset.settings.to_json(),
            "data_digest": dataset.digest,
            "commit": source_commit(),
        }
        return cls(
            config, workdir, dataset, data_mesh(), make_model(config, dataset), make_optimizer(config.train), meta
        )

    @property
    def done(self) -> Path:
        """The file that says that the run is done."""
        return self.workdir / "done.json"


def run(config: Config, workdir: str | Path) -> bool:
    """Trains until `config.train.steps`, going on from the newest checkpoint in `workdir` if there is one.

    Writes config.json, metrics.jsonl, checkpoints/ and, at the end, done.json. SIGTERM and SIGUSR1 save and return.
    Raises UserError, in all processes, for data or settings that can't be used or that differ between processes, for a
    `workdir` that holds another run or in which another program trains, and for a disk that is full.

    Returns:
        True if the run is done, False if a signal stopped it.
    """
    stop = StopSignal()
    with contextlib.ExitStack() as lock:
        with agreed():
            run = Run.prepare(config, Path(workdir))
            done = _check_folder(run)
            if not done and jax.process_index() == 0:
                lock.enter_context(in_use(run.workdir))
        _require_same_run(run)
        _require_one_folder(run.workdir)
        if gather(str(done))[0] == str(True):
            _print(f"{workdir}: done already")
            return True
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", str(run.workdir.absolute() / "compiled"))
        state = start_state(run)
        _print(_start_line(run, int(state.step)))
        state = _train(run, state, stop)
        if state is None:
            return False
        _write_json(run.done, {"steps": run.config.train.steps, "params_sha256": digest(jax.device_get(state.params))})
        return True


def _check_folder(run: Run) -> bool:
    """Makes the folder -> whether the run is done already. Raises UserError if that is another run."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    if not run.done.exists():
        return False
    cure = "copy it from a backup, or take another --workdir"
    read_json(run.done, cure)
    _refuse_other_run(run.meta, read_json(run.workdir / "config.json", cure), str(run.workdir / "config.json"))
    return True


def _require_same_run(run: Run) -> None:
    """Raises UserError if a process has other settings, data or code. Where its data are may differ."""
    require_equal({
        **_settings(run.meta), "the content of --config.data.dir": run.dataset.digest,
        "the code's commit": run.meta["commit"],
    })


def _require_one_folder(workdir: Path) -> None:
    """Raises UserError, in all processes, if one has another folder: it would wait for the first save for ever."""
    if jax.process_count() == 1:
        return
    mark = workdir / f".shared-{gather(uuid.uuid4().hex)[0]}"  # a name that no network file system can know yet
    with contextlib.ExitStack() as finish:
        with agreed():
            if jax.process_index() == 0:
                mark.touch()
                finish.callback(mark.unlink)
        with agreed():
            if not mark.exists():
                raise UserError(f"--workdir={workdir}: is another folder than process 0's; name one that all share")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        with replacing(path) as file:
            file.write_text(json.dumps(values, indent=1) + "\n")


def _print(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr)


def _start_line(run: Run, step: int) -> str:
    train, devices = run.config.train, run.mesh.size
    epoch = np.count_nonzero(run.dataset.rows["labelled"]) / train.batch_size
    return (
        f"train: {describe_devices()}; batch {train.batch_size}, {train.batch_size // devices} a device; "
        f"{train.steps} steps, {epoch:.1f} an epoch, {train.steps / epoch:.1f} epochs; "
        + (f"resumed at step {step}" if step else "a new run")
    )


def make_model(config: Config, dataset: SliceDataset) -> DecompositionNet:
    """The network for a data set. Raises UserError if its images can't be halved as often as the widths ask."""
    size, levels = dataset.settings.size, len(config.model.widths)
    if size % 2**levels:
        raise UserError(
            f"--config.model.widths: {levels} levels need a size divisible by {2**levels}; "
            f"{config.data.dir} has {size}-pixel images"
        )
    classes = len(dataset.settings.lesion_classes)
    channels = len(dataset.settings.modalities)
    terms = config.objective.terms
    least = max("layout" in terms and 1 + classes, "structure" in terms and channels)
    if config.model.code_dim < least:
        raise UserError(
            f"--config.model.code_dim: must be at least {least}, for the lesion classes and modalities of "
            f"{config.data.dir}"
        )
    return DecompositionNet(config.model, size=size, channels=channels, lesion_classes=classes)


def start_state(run: Run) -> State:
    """The newest whole state of this run; for a new run a fresh one, or one with the parameters of `init_from`."""
    make = functools.partial(create_state, run.config, run.model, run.tx, run.mesh)
    trained, start = None, run.config.train.init_from
    if start and not has_checkpoints(run.workdir):
        trained = _parameters_of(start, run)  # before anything is compiled
    state = make()
    restored = restore_state(run.workdir, state, functools.partial(_refuse_other_run, run.meta))
    if restored is not None:
        return restored
    return state if trained is None else _taking(state, trained, start)


def _taking(state: State, trained: dict[str, Any], start: str) -> State:
    """The state with the parameters of another network; what depends on classes or channels that differ stays fresh."""
    afresh = set()

    def take(path: tuple[Any, ...], ours: jax.Array, theirs: np.ndarray) -> jax.Array:
        if ours.shape == theirs.shape:
            return place_like(ours, theirs)
        afresh.add(jax.tree_util.keystr(path[:-1], simple=True, separator="/"))
        return ours

    taken = {name: jax.tree.map_with_path(take, getattr(state, name), tree) for name, tree in trained.items()}
    if afresh:
        _print(f"--config.train.init_from={start}: is for other classes or channels; {', '.join(sorted(afresh))} begin "
               "afresh")
    return state.replace(**taken)


def _refuse_other_run(meta: dict[str, Any], started: dict[str, Any], where: str = "the checkpoint") -> None:
    """Raises UserError if the meta of a run, `started` (read from `where`), is not that of this command."""
    if not {"data_digest", "config"} <= started.keys():
        raise UserError(f"{where}: lacks data_digest or config; copy it from a backup, or take another --workdir")
    if meta["data_digest"] != started["data_digest"]:
        raise UserError(
            f"--config.data.dir={meta['config']['data']['dir']}: not the data this run was trained on; "
            "take another --workdir"
        )
    # Settings that are younger than the run have their defaults.
    before = _settings({"config": Config.from_dict(started["config"]).to_dict()})
    for name, value in _settings(meta).items():
        if name not in FREE and value != before[name]:
            raise UserError(f"{name}={value}: this run was started with {before[name]}; take another --workdir")


def _settings(meta: dict[str, Any]) -> dict[str, Any]:
    """Flag and value of all settings but where and how the data are read."""
    sections = {name: fields for name, fields in meta["config"].items() if name != "data"}
    return {f"--config.{name}": value for name, value in flatten_dict(sections, sep=".").items()}


def _parameters_of(workdir: str, run: Run) -> dict[str, Any]:
    """Parameters, statistics and codebooks of another run, for its classes and channels; a smaller network is grown.

    The optimiser starts afresh.
    """
    trained, meta = restore_for_inference(workdir)
    settings, smaller = Settings.from_json(meta["settings"]), Config.from_dict(meta["config"]).model
    model = run.model.clone(channels=len(settings.modalities), lesion_classes=len(settings.lesion_classes))
    make = functools.partial(create_state, run.config, model, run.tx, run.mesh)
    if grow.grows(smaller, run.config.model) and 2 * settings.size == run.model.size:
        state = make()
        levels = len(smaller.widths)
        trained |= {name: grow.grown(trained[name], getattr(state, name), levels) for name in ("params", "batch_stats")}
    else:
        state = jax.eval_shape(make)
    found = {}
    for name in EXPORTED:
        fresh, leaves = getattr(state, name), jax.tree.leaves(trained.get(name, {}))
        if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in jax.tree.leaves(fresh)]:
            raise UserError(
                f"--config.train.init_from={workdir}: its network has another shape; use the same config.model (or one "
                f"level more, config.model.widths={(smaller.widths[0], *smaller.widths)}, for images of twice the size)"
            )
        found[name] = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
    return found


def _train(run: Run, state: State, stop: "StopSignal") -> State | None:
    """Steps, and after each what is due: a line, a checkpoint, a validation. -> the last state; None if stopped."""
    train, step = run.config.train, int(state.step)
    train_step = compile_train_step(run.model, run.tx, run.config, run.mesh)
    batches = train_batches(
        run.dataset, run.config.data, run.mesh, batch_size=train.batch_size, seed=train.seed, start_step=step
    )
    with agreed():
        _write_json(run.workdir / "config.json", run.meta)
        writer = MetricWriter(run.workdir, step, tensorboard=train.tensorboard)
    with (
        Checkpoints(run.workdir) as checkpoints,
        writer,
        tqdm(total=train.steps, initial=step, unit="step", desc="train", disable=jax.process_index() > 0) as bar,
    ):
        log, evaluation = StepLog(), Evaluation(run, writer, stop.check)
        try:
            if evaluation.due(step):
                evaluation(_settled(run, state, stop.check))  # what a stop or a kill may have cut short
                log.restart_clock()
            while step < train.steps:
                stop.check()
                state, metrics = train_step(state, log.next(batches))
                step += 1
                log.add(step, metrics)
                checkpoints.check()
                bar.update()
                logs = step % train.log_every == 0 or evaluation.due(step) or step == train.steps
                if logs:
                    writer.write(step, line := log.take(train.batch_size))
                    bar.set_postfix(loss=f"{line['train/loss/total']:.3f}")
                if step % train.checkpoint_every == 0 and step < train.steps:
                    log.check()
                    checkpoints.save(state, run.meta)
                if evaluation.due(step):
                    evaluation(_settled(run, state, stop.check))
                if logs:
                    log.restart_clock()
            state = _settled(run, state)
            checkpoints.save(state, run.meta)
            evaluation(state)
        except Stopped:
            log.check()
            checkpoints.save(state, run.meta)
            _print(f"stopped by a signal at step {step}; the same command goes on from here")
            return None
    return state


def _settled(run: Run, state: State, check: Callable[[], None] = lambda: None) -> State:
    """`state` with the statistics of whole training images; `check` may raise between batches."""
    return with_population_statistics(
        state, run.dataset, model=run.model, mesh=run.mesh, batch_size=run.config.train.batch_size,
        images=run.config.train.population_images, drop_channel=run.config.augment.drop_channel, check=check,
    )


class Evaluation:
    """Validation in the midst of a run and at its end; its values join the line of their step."""

    def __init__(self, run: Run, writer: MetricWriter, check: Callable[[], None]) -> None:
        self._train, self._writer = run.config.train, writer
        self._validation = Validation.create(run.config, run.model, run.mesh, check)

    def due(self, step: int) -> bool:
        """After a step before the last."""
        return self._validation is not None and 0 < step < self._train.steps and step % self._train.eval_every == 0

    def __call__(self, state: State) -> None:
        if self._validation is None:
            return
        step = int(state.step)
        self._writer.write(step, self._validation(state))
        if self._train.tensorboard:
            self._writer.write_images(step, self._validation.panels(state))


class Stopped(Exception):
    """A signal asked the run to stop."""


class StopSignal:
    """Whether SIGTERM or SIGUSR1 asked the run to stop; a second signal ends the process at once.

    Several processes must stop at the same place: JAX's preemption service, which has SIGTERM then, agrees on the
    number of a check. All processes check equally often.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._checks = 0
        if jax.process_count() == 1:
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    def check(self) -> None:
        """Raises Stopped if a signal came."""
        self._checks += 1
        if jax.process_count() > 1 and not self._signalled:
            if multihost_utils.reached_preemption_sync_point(self._checks):
                self._on_signal()
        if self._signalled:
            raise Stopped

    def _on_signal(self, *_: Any) -> None:
        self._signalled = True
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
