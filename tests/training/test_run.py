"""Whole runs of a tiny model: done, resumed, interrupted, refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decomp_jax.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig
from decomp_jax.errors import UserError
from decomp_jax.training import loop
from decomp_jax.training.checkpoint import Checkpoints, restore_for_inference
from decomp_jax.training.metrics import NotFinite, check_finite
from tests.conftest import ROOT, run_python

TINY = Config(
    model=ModelConfig(widths=(4, 4, 8), code_dim=4, codebook_size=8, own_blocks=1, spade_width=4, dtype="float32"),
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


@pytest.fixture(scope="module")
def finished(phantom, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    loop.run(config_for(phantom, eval_every=8), workdir)
    return workdir


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


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(phantom, finished, tmp_path, monkeypatch, caplog, damage):
    loop.run(config_for(phantom), tmp_path)
    for path in (tmp_path / "checkpoints" / "8" / "state" / "ocdbt.process_0" / "d").iterdir():
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        elif damage == "cut":
            path.write_bytes(data[: len(data) // 2])
        else:
            path.unlink()
    (tmp_path / "done.json").unlink()
    loop.run(config_for(phantom), tmp_path)
    assert "8: damaged" in caplog.text
    assert done(tmp_path) == done(finished)
    assert restore_for_inference(tmp_path)[1]["step"] == 8


def test_sigterm_saves_and_the_same_command_goes_on(phantom, finished, tmp_path):
    script = f"""
import sys
from pathlib import Path
from decomp_jax.training import loop
from tests.training.test_run import config_for
add = loop.StepLog.add
def slow(self, step, metrics):
    add(self, step, metrics)
    print(step, flush=True)
    if step == 5:
        sys.stdin.readline()
loop.StepLog.add = slow
loop.run(config_for(Path({str(phantom)!r}), checkpoint_every=100), {str(tmp_path)!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=ROOT, env=environment,
    )
    while process.stdout.readline().strip() != "5":
        pass
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    _, errors = process.communicate("go on\n", timeout=200)
    assert process.returncode == 0, errors
    assert "stopped by a signal at step 5" in errors and not (tmp_path / "done.json").exists()
    loop.run(config_for(phantom, checkpoint_every=100), tmp_path)
    assert done(tmp_path) == done(finished)


def test_another_model_or_other_data_is_refused(phantom, finished):
    other = dataclasses.replace(config_for(phantom), model=dataclasses.replace(TINY.model, code_dim=5))
    with pytest.raises(UserError, match="config.model.code_dim=5.*started with 4"):
        loop.run(other, finished)
    with pytest.raises(UserError, match="config.train.steps=9"):
        loop.run(config_for(phantom, steps=9), finished)


def test_not_finite_names_term_and_step(phantom, tmp_path):
    with pytest.raises(NotFinite, match=r"step 7: term/soft_dice is nan"):
        check_finite(7, {"loss/total": float("nan"), "term/residual": 1.0, "term/soft_dice": float("nan")})
    with pytest.raises(NotFinite, match=r"step \d+: "):
        loop.run(config_for(phantom, learning_rate=1e30, checkpoint_every=1, steps=40), tmp_path)
    state, meta = restore_for_inference(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["params"])), meta["step"]


def test_init_from_takes_the_parameters(phantom, finished, tmp_path):
    loop.run(config_for(phantom, init_from=str(finished), steps=1, learning_rate=1e-9), tmp_path)
    ours, theirs = (restore_for_inference(folder)[0] for folder in (tmp_path, finished))
    network = lambda state: {name: value for name, value in state["params"].items() if "codebook" not in name}
    close = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, atol=1e-6)), network(ours), network(theirs))
    assert jax.tree.all(close)
    counts = [state["codebook_stats"]["normal"]["count"] for state in (ours, theirs)]
    assert abs(counts[0] - 0.99 * counts[1]).max() <= 0.01 * 8 * 64 + 1


def test_eight_devices_equal_one(phantom, finished, tmp_path):
    script = f"""
from pathlib import Path
import jax
from decomp_jax.training import loop
from tests.training.test_run import config_for
assert jax.device_count() == 8
loop.run(config_for(Path({str(phantom)!r})), {str(tmp_path)!r})
"""
    flags = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = run_python("-c", script, env=flags)
    assert run.returncode == 0, run.stderr
    assert restore_for_inference(tmp_path)[1]["step"] == 8  # written by eight devices, read by one
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (tmp_path, finished)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["train/loss/total"], b["train/loss/total"], rtol=2e-3)
    np.testing.assert_allclose(ours[0]["train/gradient_norm"], theirs[0]["train/gradient_norm"], rtol=1e-2)


def test_missing_data_is_the_users_mistake(tmp_path):
    done = run_python("train.py", "--config=configs/demo.py", f"--workdir={tmp_path}", "--config.data.dir=/nowhere")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: /nowhere/manifest.json: not found")


def test_checkpoints_keep_the_newest(finished):
    checkpoints = Checkpoints(finished)
    assert checkpoints.restore_host()[1]["step"] == 8
    checkpoints.close()


def test_augmentation_can_be_switched_off(phantom, tmp_path):
    plain = AugmentConfig(flip=0.0, rotation=0.0, scale=0.0, transplant=0.0)
    loop.run(dataclasses.replace(config_for(phantom, steps=1), augment=plain), tmp_path)
    assert done(tmp_path)["steps"] == 1
