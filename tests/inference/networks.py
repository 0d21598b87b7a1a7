"""A tiny network of random parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from decomp_jax.config import Config
from decomp_jax.data.schema import Settings
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.mesh import data_mesh
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training.state import create_state, make_optimizer

CONFIG = Config().replace({
    "model.widths": (4, 8), "model.own_blocks": 1, "model.code_dim": 8, "model.codebook_size": 12,
    "model.spade_width": 4, "model.dtype": "float32",
})


def random_network(settings: Settings, changes: Mapping[str, Any] = {}) -> Decomposer:
    config = CONFIG.replace(changes)
    model = DecompositionNet(config.model, size=settings.size, channels=len(settings.modalities), lesion_classes=3)
    shapes = jax.eval_shape(lambda: create_state(config, model, make_optimizer(config.train), data_mesh()))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(x.dtype), shapes.params)
    params["abnormal_codebook"][0] = 0
    statistics = jax.tree.map(lambda x: np.abs(rng.normal(1, 0.2, x.shape)).astype(x.dtype), shapes.batch_stats)
    return Decomposer({"params": params, "batch_stats": statistics}, config, settings, data_digest="", step=1)
