"""Whole runs of a tiny model: done, resumed, interrupted, refused."""

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from decomp_jax.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig
from decomp_jax.data.pipeline import split_batches
from decomp_jax.data.records import SliceDataset
from decomp_jax.data.schema import Settings
from decomp_jax.errors import EXIT_UNFINISHED, UserError
from decomp_jax.mesh import data_mesh
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training import checkpoint, grow, loop, population, validation
from decomp_jax.training.checkpoint import Checkpoints, digest, restore_for_inference
from decomp_jax.training.metrics import MetricWriter, NotFinite, check_finite
from decomp_jax.training.state import create_state, make_optimizer
from tests.conftest import fake_devices, finish, full_disk, run_python, start_python

# Little to compile. Rotation, scaling and pasting have tests of their own.
TINY = Config(
    model=ModelConfig(widths=(4, 4), code_dim=4, codebook_size=8, own_blocks=0, spade_width=4, dtype="float32"),
    augment=AugmentConfig(flip=0.5, rotation=0.0, scale=0.0, transplant=0.0, intensity=0.0),
    train=TrainConfig(
        steps=8, warmup_steps=3, ramp_steps=2, batch_size=8, checkpoint_every=4, log_every=2, eval_every=0
    ),
)


def config_for(phantom: Path, **train) -> Config:
    return dataclasses.replace(
        TINY, data=DataConfig(str(phantom), read_threads=2), train=dataclasses.replace(TINY.train, **train)
    )


def done(workdir: Path) -> dict:
    return json.loads((workdir / "done.json").read_text())


def test_a_run_leaves_what_it_promises(finished):
    assert done(finished)["steps"] == 8 and len(done(finished)["params_sha256"]) == 64
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for line in lines:
        assert {"train/loss/total", "train/term/soft_dice", "train/codebook/normal_perplexity"} <= set(line)
        assert line["time/step_seconds"] > line["time/data_wait_seconds"] >= 0
    assert {"val/loss/total", "val/segmentation_dice/ET"} <= set(lines[-1])


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_resume_is_exact(phantom, finished, tmp_path, monkeypatch, stop_at):
    """Stopped in the warm-up, at the codebooks' first step and after: the same bytes as the run that went through."""
    add = loop.StepLog.add

    def stop(self, step, metrics):
        add(self, step, metrics)
        if step == stop_at:
            raise Stop

    monkeypatch.setattr(loop.StepLog, "add", stop)
    with pytest.raises(Stop):
        loop.run(config_for(phantom, checkpoint_every=1), tmp_path)
    monkeypatch.undo()
    loop.run(config_for(phantom, checkpoint_every=1), tmp_path)
    assert done(tmp_path) == done(finished)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8]


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        middle = slice(len(data) // 2, len(data) // 2 + len(data) // 10 + 1)
        data[middle] = bytes(byte ^ 1 for byte in data[middle])  # a single byte may lie between the arrays
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[: len(data) // 10])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(phantom, finished, tmp_path, caplog, how):
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "8" / "state").rglob("d/*"):  # of one process, and merged
        damage(path, how)
    (tmp_path / "run" / "done.json").unlink()
    loop.run(config_for(phantom, eval_every=8), tmp_path / "run")
    assert "8: damaged" in caplog.text and "older checkpoint" in caplog.text
    assert (tmp_path / "run" / "checkpoints" / "8.damaged").is_dir()
    assert done(tmp_path / "run") == done(finished)
    assert restore_for_inference(tmp_path / "run")[1]["step"] == 8


def test_damage_to_any_one_file_is_noticed_or_harmless(finished, tmp_path):
    """Whatever file of the newest checkpoint is damaged: its very state is read, or the one before."""
    whole = {step: digest(tree) for step, tree in states(finished).items()}
    newest = finished / "checkpoints" / "8"
    files = sorted(filter(Path.is_file, newest.rglob("*")))
    kinds = {path.parent if path.parent.name == "d" else path: path for path in files}
    taken = []
    for path, how in zip(kinds.values(), itertools.cycle(["flip", "cut", "remove"])):
        shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
        damage(tmp_path / "checkpoints" / "8" / path.relative_to(newest), how)
        state, meta = restore_for_inference(tmp_path)
        assert digest(without_optimiser(state)) == whole[meta["step"]], f"{path} {how}"
        taken.append(meta["step"])
        shutil.rmtree(tmp_path / "checkpoints")
    assert 4 in taken


@pytest.mark.parametrize("name", ["_METADATA", "_sharding"])
@pytest.mark.parametrize("value", [3.5, {"a": 1}, "{}"])
def test_json_of_orbax_that_is_no_longer_what_it_wrote_is_damage(finished, tmp_path, caplog, name, value):
    """It has no checksum, and what orbax raises then is of many kinds."""
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "8" / "state" / name
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), value)))
    assert restore_for_inference(tmp_path)[1]["step"] == 4
    assert "8: damaged (metadata of its state: " in caplog.text


def test_a_leaf_that_orbax_would_pass_over_is_damage(finished, tmp_path, caplog):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "8" / "state" / "_METADATA"
    path.write_text(path.read_text().replace('"skip_deserialize": false', '"skip_deserialize": true'))
    assert restore_for_inference(tmp_path)[1]["step"] == 4
    assert "8: damaged (metadata of its state: " in caplog.text


def without_optimiser(state: dict) -> dict:
    return {name: value for name, value in state.items() if name != "opt_state"}


def states(workdir: Path) -> dict[int, dict]:
    """The states of both checkpoints of a run."""
    folder = workdir / "checkpoints"
    return {step: without_optimiser(checkpoint._read_for_inference(folder / str(step))[0]) for step in (4, 8)}


def test_a_run_without_a_whole_checkpoint_does_not_start_over(phantom, finished, tmp_path):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints").glob("*/meta/metadata"):
        damage(path, "flip")
    with pytest.raises(UserError, match="checkpoints: no whole checkpoint; copy one"):
        loop.run(config_for(phantom, eval_every=8), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4.damaged", "8.damaged"]


@pytest.mark.parametrize("error, says", [
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "can't be read now .RESOURCE_EXHAUSTED"),
    (OSError(errno.ESTALE, "Stale file handle"), "can't be read now .*Stale file handle"),
    (PermissionError(errno.EACCES, "Permission denied"), "can't be read now .*Permission denied"),
    (ValueError("FAILED_PRECONDITION: Error reading [os_error_code='116']"), "can't be read now"),
    (ValueError("tree structures do not match"), "not a state of this version"),
])
def test_what_is_no_damage_costs_no_checkpoint(phantom, finished, tmp_path, monkeypatch, error, says):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "done.json").unlink()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "restore", fail)
    with pytest.raises(UserError, match=f"8: {says}"):
        loop.run(config_for(phantom, eval_every=8), tmp_path / "run")
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"4", "8"}
    assert restore_for_inference(tmp_path / "run")[1]["step"] == 8


@pytest.mark.parametrize("where", [population, validation])
def test_sigterm_in_a_validation_costs_nothing(phantom, finished, tmp_path, monkeypatch, where):
    """In the statistics pass and in the validation itself: the step is saved, and the validation made again."""
    split_batches = where.split_batches

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from split_batches(*arguments, **options)

    monkeypatch.setattr(where, "split_batches", interrupted)
    config = config_for(phantom, eval_every=4, checkpoint_every=100)
    assert not loop.run(config, tmp_path)
    monkeypatch.undo()
    assert restore_for_inference(tmp_path)[1]["step"] == 4
    assert loop.run(config, tmp_path) and done(tmp_path) == done(finished)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert {"train/loss/total", "val/loss/total"} <= set(lines[1])


def test_a_full_disk_is_told_in_a_line_and_costs_no_checkpoint(phantom, finished, tmp_path, monkeypatch):
    """The disk is full from step 6 on: the save of step 8 fails in the background."""
    save = Checkpoints.save
    full = contextlib.ExitStack()

    def fill(self, state, meta):
        if int(state.step) == 8:
            full.enter_context(full_disk(2048))
        save(self, state, meta)

    monkeypatch.setattr(Checkpoints, "save", fill)
    with full, pytest.raises(UserError, match="checkpoints: File too large; make room there"):
        loop.run(config_for(phantom, eval_every=8), tmp_path)
    monkeypatch.undo()
    assert restore_for_inference(tmp_path)[1]["step"] == 4 and not (tmp_path / "done.json").exists()
    loop.run(config_for(phantom, eval_every=8), tmp_path)
    assert done(tmp_path) == done(finished)
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_a_failed_save_is_raised_by_the_next_check(finished, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    like = create_state(TINY, DecompositionNet(TINY.model, size=64, channels=1, lesion_classes=3),
                        make_optimizer(TINY.train), data_mesh())
    with full_disk(64):
        checkpoints.save(like, {})
        with pytest.raises(UserError, match="File too large"):
            while True:
                checkpoints.check()
                time.sleep(0.01)


def test_a_full_disk_keeps_the_lines_written(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    with full_disk(100), pytest.raises(UserError, match="metrics.jsonl: File too large; make room there"):
        for step in range(10):
            writer.write(step, {"loss": 0.5})
    with pytest.raises(UserError), full_disk(100):
        writer.__exit__()
    MetricWriter(tmp_path, 9).__exit__()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(len(steps))) and steps


SLOW = """
import sys
from pathlib import Path
from decomp_jax.errors import run_program
from decomp_jax.training import loop
from tests.training.test_run import config_for
add = loop.StepLog.add
def slow(self, step, metrics):
    add(self, step, metrics)
    print(step, flush=True)
    if step == 5:
        sys.stdin.readline()
loop.StepLog.add = slow
run_program(lambda: sys.exit(0 if loop.run(config_for(Path(sys.argv[1]), checkpoint_every=100), sys.argv[2]) else 75))
"""


def start_slow(phantom: Path, workdir: Path) -> subprocess.Popen:
    """A run that waits at step 5 for a line on stdin."""
    process = start_python("-c", SLOW, phantom, workdir)
    while (line := process.stdout.readline().strip()) != "5":
        assert line or process.poll() is None, process.stderr.read()
    return process


def test_sigterm_saves_and_the_same_command_goes_on(phantom, finished, tmp_path):
    process = start_slow(phantom, tmp_path)
    with pytest.raises(UserError, match="in use by another program"):
        loop.run(config_for(phantom, checkpoint_every=100), tmp_path)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    _, errors = process.communicate("go on\n", timeout=200)
    assert process.returncode == EXIT_UNFINISHED, errors
    assert "stopped by a signal at step 5" in errors and not (tmp_path / "done.json").exists()
    loop.run(config_for(phantom, checkpoint_every=100), tmp_path)
    assert done(tmp_path) == done(finished)


def catches(process: subprocess.Popen, number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for a signal."""
    caught = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_second_signal_ends_the_run_at_once(phantom, tmp_path):
    process = start_slow(phantom, tmp_path)
    process.send_signal(signal.SIGUSR1)
    while catches(process, signal.SIGTERM):  # until the first is answered
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM
    assert not list((tmp_path / "checkpoints").iterdir())


def test_settings_younger_than_a_run_have_their_defaults(phantom, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    meta = json.loads(path.read_text())
    del meta["config"]["model"]["rotation_trick"], meta["config"]["train"]["final_rate"]
    path.write_text(json.dumps(meta))
    loop.run(config_for(phantom, eval_every=8), tmp_path / "run")
    younger = dataclasses.replace(config_for(phantom), model=dataclasses.replace(TINY.model, rotation_trick=True))
    with pytest.raises(UserError, match="rotation_trick=True: this run was started with False"):
        loop.run(younger, tmp_path / "run")


def test_another_model_or_other_data_is_refused(phantom, finished):
    other = dataclasses.replace(config_for(phantom), model=dataclasses.replace(TINY.model, code_dim=5))
    with pytest.raises(UserError, match="config.model.code_dim=5.*started with 4"):
        loop.run(other, finished)
    with pytest.raises(UserError, match="config.train.steps=9"):
        loop.run(config_for(phantom, steps=9), finished)


@pytest.mark.parametrize("model, message", [
    ({"widths": (4,) * 7}, "divisible by 128.*64-pixel"), ({"code_dim": 3}, "code_dim: must be at least 4"),
])
def test_a_model_that_does_not_fit_the_data_is_refused(phantom, tmp_path, model, message):
    unfit = dataclasses.replace(config_for(phantom), model=dataclasses.replace(TINY.model, **model))
    with pytest.raises(UserError, match=message):
        loop.run(unfit, tmp_path)


@pytest.mark.parametrize("train, says", [
    ({"batch_size": 1024}, "--config.train.batch_size=1024: the train split has only .* take a smaller batch"),
    ({"init_from": "nowhere"}, "nowhere: no checkpoints here"),
    ({"init_from": "models/phantom64"}, "--config.train.init_from=models/phantom64: its network has another shape"),
])
def test_what_can_not_start_is_told_before_anything_is_compiled(phantom, tmp_path, monkeypatch, train, says):
    monkeypatch.setattr(loop, "create_state", functools.partial(_only_traced, loop.create_state))
    with pytest.raises(UserError, match=says):
        loop.run(config_for(phantom, **train), tmp_path)


def _only_traced(create: Callable, config: Config, model: DecompositionNet, *others: object) -> object:
    state = create(config, model, *others)
    assert isinstance(state.step, jax.core.Tracer), "compiled"
    return state


@pytest.mark.parametrize("name, text", [("config.json", "{"), ("config.json", "{}"), ("config.json", '{"config": [], "data_digest": 1}'),
                                        ("done.json", "[]")])
def test_files_of_a_finished_run_that_were_edited_are_named(phantom, finished, tmp_path, name, text):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / name).write_text(text)
    with pytest.raises(UserError, match=name if "data_digest" not in text else "not the data this run was trained on"):
        loop.run(config_for(phantom, eval_every=8), workdir)


def test_not_finite_names_term_and_step(phantom, tmp_path, monkeypatch):
    with pytest.raises(NotFinite, match=r"step 7: term/soft_dice is nan"):
        check_finite(7, {"loss/total": float("nan"), "term/residual": 1.0, "term/soft_dice": float("nan")})
    batches = loop.train_batches

    def broken_from_step_4(*arguments, **options):
        for step, batch in enumerate(batches(*arguments, **options)):
            yield batch if step < 4 else {**batch, "image": batch["image"] * np.float16("nan")}

    monkeypatch.setattr(loop, "train_batches", broken_from_step_4)
    with pytest.raises(NotFinite, match=r"step [5-8]: "):
        loop.run(config_for(phantom, checkpoint_every=1), tmp_path)
    state, meta = restore_for_inference(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["params"])), meta["step"]


def test_init_from_takes_the_parameters(phantom, finished, tmp_path):
    run = loop.Run.prepare(config_for(phantom, init_from=str(finished), steps=1), tmp_path)
    state, trained = loop.start_state(run), restore_for_inference(finished)[0]
    for name in checkpoint.EXPORTED:
        assert digest(jax.device_get(getattr(state, name))) == digest(trained[name])
    assert state.step == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def export_fresh(folder: Path, config: Config, model: DecompositionNet, settings: Settings) -> dict:
    """Writes a network as it is at the start -> its parameters, statistics and codebooks."""
    trained = jax.device_get(create_state(config, model, make_optimizer(config.train), data_mesh()))
    trained = {name: getattr(trained, name) for name in checkpoint.EXPORTED}
    trained["codebook_stats"] = {path: dataclasses.asdict(stats) for path, stats in trained["codebook_stats"].items()}
    folder.mkdir(exist_ok=True)
    checkpoint.write_exported(folder, trained, {
        "config": config.to_dict(), "digests": {name: digest(tree) for name, tree in trained.items()}, "step": 0,
        "settings": settings.to_json(),
    })
    return trained


def test_init_from_takes_all_but_what_depends_on_classes(phantom, tmp_path, capsys):
    """Of a network for one class and two modalities, whose seed is another."""
    config = config_for(phantom, init_from=str(tmp_path / "other"), steps=1)
    run = loop.Run.prepare(config, tmp_path / "run")
    settings = dataclasses.replace(run.dataset.settings, lesion_classes=("lesion",), modalities=("t1ce", "flair"))
    trained = export_fresh(tmp_path / "other", config.replace({"train.seed": 5}),
                           run.model.clone(lesion_classes=1, channels=2), settings)
    state, fresh = loop.start_state(run), create_state(config, run.model, run.tx, run.mesh)
    afresh = {"encoder/conv", "segmentation_decoder/conv", "image_decoder/conv"} | {
        f"image_decoder/res_blocks_{block}/Spade_{spade}/shared" for block in range(2) for spade in range(2)
    }
    line, = (line for line in capsys.readouterr().err.splitlines() if "begin afresh" in line)
    assert line.endswith(f"is for other classes or channels; {', '.join(sorted(afresh))} begin afresh")
    params, theirs, ours = (flatten_dict(tree, sep="/") for tree in (state.params, trained["params"], fresh.params))
    for name, value in params.items():
        if value.shape != theirs[name].shape:
            assert name.rpartition("/")[0] in afresh
        np.testing.assert_array_equal(value, (theirs if value.shape == theirs[name].shape else ours)[name])


def test_init_from_grows_a_network_for_images_of_half_the_size(phantom, tmp_path):
    """It is written as an export, whose paths stay here."""
    config = config_for(phantom, init_from=str(tmp_path), steps=1)
    config = config.replace({"model.widths": (4, 4, 8), "model.full_resolution_block": True})
    smaller = config.replace({"model.widths": (4, 8)})
    dataset = SliceDataset(str(phantom), "train")
    trained = export_fresh(tmp_path, smaller, loop.make_model(smaller, dataset),
                           dataclasses.replace(dataset.settings, size=dataset.settings.size // 2))
    assert str(tmp_path) not in (tmp_path / "meta.json").read_text()

    state = loop.start_state(loop.Run.prepare(config, tmp_path / "run"))
    for name in ("params", "batch_stats"):
        fresh = getattr(create_state(config, loop.make_model(config, dataset), make_optimizer(config.train), data_mesh()), name)
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), grow.grown(trained[name], fresh, levels=2))
    np.testing.assert_array_equal(state.params["normal_codebook"], trained["params"]["normal_codebook"])


def test_a_run_ends_with_population_statistics(phantom, finished):
    """Taken once more they are the same, for they do not depend on those before."""
    config, dataset = config_for(phantom), SliceDataset(str(phantom), "train")
    model = loop.make_model(config, dataset)
    restored, _ = restore_for_inference(finished)
    state = create_state(config, model, make_optimizer(config.train), data_mesh())
    state = state.replace(params=restored["params"])
    settled = population.with_population_statistics(
        state, dataset, model=model, mesh=data_mesh(), batch_size=config.train.batch_size,
        images=config.train.population_images, drop_channel=0.0,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), settled.batch_stats, restored["batch_stats"]
    )


def test_population_statistics_are_what_moving_averages_come_to(phantom, finished, monkeypatch):
    """For one batch, moved over until it no longer moves."""
    config, dataset = config_for(phantom), SliceDataset(str(phantom), "train")
    config = config.replace({"model.batch_norm_decay": 0.5})
    model = loop.make_model(config, dataset)
    state = create_state(config, model, make_optimizer(config.train), data_mesh())
    seen = []

    def seen_batches(*arguments, **options):
        for batch, count in split_batches(*arguments, **options):
            seen.append(np.asarray(batch["image"]))
            yield batch, count

    monkeypatch.setattr(population, "split_batches", seen_batches)
    settled = population.with_population_statistics(
        state, dataset, model=model, mesh=data_mesh(), batch_size=32, images=32, drop_channel=0.0
    )

    @jax.jit
    def move(batch_stats):
        variables = {"params": state.params, "batch_stats": batch_stats}
        image = jnp.asarray(seen[0], jnp.float32)
        return model.apply(variables, image, quantised=1.0, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    moving = state.batch_stats
    for _ in range(30):
        moving = move(moving)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), settled.batch_stats, moving)
    assert len(seen) == 1


JOB = """
import sys
from pathlib import Path
from decomp_jax.training import loop
from tests.training.test_run import config_for
loop.run(config_for(Path(sys.argv[1]), eval_every=8), sys.argv[2])
"""


def train_on(devices: int, phantom: Path, workdir: Path) -> None:
    [ended] = finish(start_python("-c", JOB, phantom, workdir, **fake_devices(devices)))
    assert ended.returncode == 0, ended.stderr


def assert_same_run(workdir: Path, expected: Path) -> None:
    """Equal within rounding, which decides some codes and, through Adam, steps of parameters without a gradient."""
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (workdir, expected)
    )
    assert len(ours) == len(theirs) and ours[-1].keys() == theirs[-1].keys()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["train/loss/total"], b["train/loss/total"], rtol=2e-3)
    np.testing.assert_allclose(ours[0]["train/gradient_norm"], theirs[0]["train/gradient_norm"], rtol=1e-2)
    a, b = (restore_for_inference(folder)[0]["params"] for folder in (workdir, expected))
    differences = np.concatenate([np.ravel(d) for d in jax.tree.leaves(jax.tree.map(lambda x, y: abs(x - y), a, b))])
    assert np.median(differences) < 1e-5 and np.mean(differences) < 1e-3


@pytest.fixture(scope="module")
def by_eight(phantom, tmp_path_factory):
    """The run of eight devices."""
    workdir = tmp_path_factory.mktemp("runs") / "eight"
    train_on(8, phantom, workdir)
    return workdir


def test_eight_devices_equal_one(finished, by_eight):
    assert_same_run(by_eight, finished)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_checkpoint_of_eight_devices_is_read_by_fewer(phantom, finished, by_eight, tmp_path, devices):
    run = shutil.copytree(by_eight, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "8")
    (run / "done.json").unlink()
    train_on(devices, phantom, run)
    assert_same_run(run, finished)


def test_missing_data_is_the_users_mistake(tmp_path):
    done = run_python("train.py", "--config=configs/demo.py", f"--workdir={tmp_path}", "--config.data.dir=/nowhere")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: /nowhere/manifest.json: not found")


def test_the_newest_checkpoints_are_kept(finished):
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["4", "8"]
    assert restore_for_inference(finished)[1]["step"] == 8
