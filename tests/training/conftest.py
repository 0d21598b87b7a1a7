"""Runs of one network share their compiled step: most tests of runs ask what surrounds it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jax.sharding import Mesh

from decomp_jax.config import Config, DataConfig
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training import loop
from decomp_jax.training.state import make_optimizer
from tests.training.test_run import config_for

UNREAD = {name.removeprefix("--config.train."): None for name in loop.FREE}  # by a step


@contextlib.contextmanager
def shared_compilation() -> Iterator[None]:
    """In it a step is compiled once a process."""
    compile_train_step = loop.compile_train_step

    @functools.cache
    def compiled(model: DecompositionNet, config: Config, mesh: Mesh) -> Callable:
        return compile_train_step(model, make_optimizer(config.train), config, mesh)

    def compile_once(model: DecompositionNet, tx: object, config: Config, mesh: Mesh) -> Callable:
        train = dataclasses.replace(config.train, init_from="", **UNREAD)
        return compiled(model, dataclasses.replace(config, data=DataConfig("unread"), train=train), mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_train_step", compile_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def compiled_once() -> Iterator[None]:
    with shared_compilation():
        yield


@pytest.fixture(scope="session")
def finished(phantom: Path, compiled_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps, validated at its end."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    loop.run(config_for(phantom, eval_every=8), workdir)
    return workdir
