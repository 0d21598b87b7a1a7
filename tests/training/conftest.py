"""Runs of one network share their compiled step: most tests of runs ask what surrounds it."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import pytest
from jax.sharding import Mesh

from decomp_jax.config import Config, DataConfig
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training import loop
from decomp_jax.training.state import make_optimizer

UNREAD = {name.removeprefix("--config.train."): None for name in loop.FREE}  # by a step


@pytest.fixture(scope="package", autouse=True)
def compiled_once() -> Iterator[None]:
    compile_train_step = loop.compile_train_step

    @functools.cache
    def compiled(model: DecompositionNet, config: Config, mesh: Mesh) -> Callable:
        return compile_train_step(model, make_optimizer(config.train), config, mesh)

    def compile_once(model: DecompositionNet, tx: object, config: Config, mesh: Mesh) -> Callable:
        train = dataclasses.replace(config.train, init_from="", **UNREAD)
        return compiled(model, dataclasses.replace(config, data=DataConfig(""), train=train), mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_train_step", compile_once)
        yield
