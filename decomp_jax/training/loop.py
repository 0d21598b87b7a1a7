"""The run: restore, step, log, save, stop cleanly."""

import contextlib
import functools
import json
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from decomp_jax.config import Config
from decomp_jax.data.pipeline import train_batches
from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError
from decomp_jax.files import in_use, replacing
from decomp_jax.mesh import check_batch_size, data_mesh
from decomp_jax.models.network import DecompositionNet
from decomp_jax.provenance import source_commit
from decomp_jax.training.checkpoint import Checkpoints, digest, restore_for_inference
from decomp_jax.training.metrics import MetricWriter, check_finite
from decomp_jax.training.population import with_population_statistics
from decomp_jax.training.state import State, create_state, make_optimizer
from decomp_jax.training.step import compile_train_step
from decomp_jax.training.validation import Validation

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def run(config: Config, workdir: str | Path) -> None:
    """Trains until `config.train.steps`, going on from the newest checkpoint in `workdir` if there is one.

    Writes config.json, metrics.jsonl, checkpoints/ and, at the end, done.json. SIGTERM and SIGUSR1 save and return.
    Raises UserError for data or settings that can't be used, for a `workdir` that holds another run or in which another
    program trains, and for a disk that is full.
    """
    stop = StopSignal()
    workdir = Path(workdir)
    dataset = SliceDataset(config.data.dir, "train")
    config = config.with_steps(int(dataset.rows["labelled"].sum()))
    mesh = data_mesh()
    check_batch_size(config.train.batch_size)
    model = make_model(config, dataset)
    meta = {
        "config": config.to_dict(),
        "settings": dataset.settings.to_json(),
        "data_digest": dataset.digest,
        "commit": source_commit(),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compiled"))
    if (workdir / "done.json").exists():
        _refuse_other_run(meta, json.loads((workdir / "config.json").read_text()))
        print(f"{workdir}: done already", file=sys.stderr)
        return
    with in_use(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        _run(config, workdir, dataset, mesh, model, meta, stop)


def _run(
    config: Config,
    workdir: Path,
    dataset: SliceDataset,
    mesh: Mesh,
    model: DecompositionNet,
    meta: dict[str, Any],
    stop: "StopSignal",
) -> None:
    checkpoints = Checkpoints(workdir, writing=True)
    state = start_state(config, model, mesh, checkpoints, meta)
    if jax.process_index() == 0:
        with replacing(workdir / "config.json") as file:
            file.write_text(json.dumps(meta, indent=1))
    writer = MetricWriter(workdir, int(state.step), tensorboard=config.train.tensorboard)
    validation = Validation.of(config, model, mesh)
    try:
        state = _train(config, model, mesh, dataset, state, checkpoints, writer, validation, meta, stop)
    finally:
        checkpoints.close()
        writer.close()
    if int(state.step) == config.train.steps and jax.process_index() == 0:
        done = {"steps": config.train.steps, "params_sha256": digest(jax.device_get(state.params))}
        with replacing(workdir / "done.json") as file:
            file.write_text(json.dumps(done) + "\n")


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


def start_state(
    config: Config, model: DecompositionNet, mesh: Mesh, checkpoints: Checkpoints, meta: dict[str, Any]
) -> State:
    """The newest whole state of this run; for a new run a fresh one, or one with the parameters of `init_from`."""
    state = create_state(config, model, make_optimizer(config.train), mesh)
    restored = checkpoints.restore(state, functools.partial(_refuse_other_run, meta))
    if restored is not None:
        logging.info("resuming at step %d", int(restored.step))
        return restored
    if config.train.init_from:
        return _with_parameters_of(config.train.init_from, state)
    return state


def _refuse_other_run(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    if ours["data_digest"] != theirs["data_digest"]:
        raise UserError(
            f"--config.data.dir={ours['config']['data']['dir']}: not the data this run was trained on; "
            "take another --workdir"
        )
    started = Config.from_dict(theirs["config"]).to_dict()  # settings that are younger than the run have their defaults
    for part in ("model", "objective", "augment", "train"):
        for name, value in ours["config"][part].items():
            before = started[part][name]
            free = name in ("checkpoint_every", "log_every", "eval_every", "tensorboard")
            if not free and value != before:
                raise UserError(
                    f"--config.{part}.{name}={value}: this run was started with {before}; take another --workdir"
                )


def _with_parameters_of(workdir: str, state: State) -> State:
    """`state` with the parameters, statistics and codebooks of another run; its optimiser starts afresh."""
    theirs, _ = restore_for_inference(workdir)
    placed = {}
    for name in ("params", "batch_stats", "codebook_stats"):
        ours, structure = jax.tree.flatten(getattr(state, name))
        values = jax.tree.leaves(theirs[name])
        if [value.shape for value in values] != [leaf.shape for leaf in ours]:
            raise UserError(
                f"--config.train.init_from={workdir}: its network has another shape; use the same config.model and "
                "data of as many classes and channels"
            )
        leaves = [jax.device_put(value, leaf.sharding) for value, leaf in zip(values, ours, strict=True)]
        placed[name] = jax.tree.unflatten(structure, leaves)
    return state.replace(**placed)


def _train(
    config: Config,
    model: DecompositionNet,
    mesh: Mesh,
    dataset: SliceDataset,
    state: State,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    validation: Validation | None,
    meta: dict[str, Any],
    stop: "StopSignal",
) -> State:
    train = config.train
    step = int(state.step)
    train_step = compile_train_step(model, make_optimizer(train), config, mesh)
    batches = train_batches(
        dataset, config.data, mesh, batch_size=train.batch_size, seed=train.seed, start_step=step
    )
    settled = functools.partial(
        with_population_statistics, dataset=dataset, model=model, mesh=mesh, batch_size=train.batch_size,
        images=train.population_images,
    )
    log = StepLog()
    bar = tqdm(total=train.steps, initial=step, unit="step", desc="train", disable=jax.process_index() > 0)
    with bar:
        while step < train.steps and not stop.requested(step):
            waiting = time.perf_counter()
            batch = next(batches)
            log.waited(time.perf_counter() - waiting)
            state, metrics = train_step(state, batch)
            step += 1
            log.add(step, metrics)
            checkpoints.check()
            bar.update()
            last = step == train.steps
            evaluate = validation and (step % train.eval_every == 0 or last)
            if last:
                state = settled(state)
            if step % train.log_every == 0 or evaluate or last:
                line = log.take(train.batch_size)
                bar.set_postfix(loss=f"{line['train/loss/total']:.3f}")
                if evaluate:
                    evaluated = state if last else settled(state)
                    line |= validation(evaluated)
                    if train.tensorboard:
                        writer.write_images(step, validation.panels(evaluated))
                writer.write(step, line)
                log.restart_clock()
            if step % train.checkpoint_every == 0 or last:
                log.check()
                checkpoints.save(state, meta)
        if step < train.steps:
            log.check()
            checkpoints.save(state, meta)
            print(f"stopped by a signal at step {step}; the same command goes on from here", file=sys.stderr)
    return state


class StepLog:
    """Metrics stay on the device until a step is logged, so that nothing waits for them."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._data_wait = 0.0
        self._steps = 0
        self._since = time.perf_counter()

    def waited(self, seconds: float) -> None:
        self._data_wait += seconds

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for the step before the last, so that the host is ahead of the devices by one step and no more."""
        jax.block_until_ready(self._pending[-1:])
        self._pending.append((step, metrics))
        self._steps += 1

    def check(self) -> dict[str, float]:
        """Fetches what is pending. Raises NotFinite at the first step that has a term which is no number."""
        values: dict[str, float] = {}
        for step, metrics in jax.device_get(self._pending):
            values = {name: float(value) for name, value in metrics.items()}
            check_finite(step, values)
        self._pending = self._pending[-1:]
        return values

    def take(self, batch_size: int) -> dict[str, float]:
        """The newest step's metrics, and the times since the clock was restarted."""
        values = self.check()
        seconds = (time.perf_counter() - self._since) / max(self._steps, 1)
        self._pending = []
        return {f"train/{name}": value for name, value in values.items()} | {
            "time/step_seconds": seconds,
            "time/data_wait_seconds": self._data_wait / max(self._steps, 1),
            "time/images_per_second": batch_size / seconds,
        }

    def restart_clock(self) -> None:
        self._steps, self._data_wait, self._since = 0, 0.0, time.perf_counter()


class StopSignal:
    """Whether SIGTERM or SIGUSR1 asked the run to stop; a second signal ends the process at once.

    Several processes must stop at the same step: JAX's preemption service, which has SIGTERM then, agrees on it.
    """

    def __init__(self) -> None:
        self._signalled = False
        if jax.process_count() == 1:
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    def requested(self, step: int) -> bool:
        if jax.process_count() > 1 and not self._signalled and multihost_utils.reached_preemption_sync_point(step):
            self._on_signal()
        return self._signalled

    def _on_signal(self, *_: Any) -> None:
        self._signalled = True
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
