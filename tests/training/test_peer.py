"""The whole step beside the same network and objective written in PyTorch (benchmarks/torch_peer.py)."""

import sys

import jax
import numpy as np
import pytest

from configs import demo
from decomp_jax.mesh import data_mesh
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training.state import create_state, make_optimizer
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

SIZE = 16
CONFIG = demo.RECOMMENDED.replace({
    "model.widths": (4, 8), "model.code_dim": 32, "model.codebook_size": 24, "model.spade_width": 4,
    "model.revive_below": 0.0,
})


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    from torch_peer import largest_differences

    model = DecompositionNet(CONFIG.model, size=SIZE, channels=1, lesion_classes=3)
    state = jax.eval_shape(lambda: create_state(CONFIG, model, make_optimizer(CONFIG.train), data_mesh()))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), state)
    state = state.replace(
        batch_stats=jax.tree.map(np.abs, state.batch_stats), codebook_stats=jax.tree.map(np.zeros_like, state.codebook_stats)
    )
    image = rng.random((3, SIZE, SIZE, 1)).astype(np.float32)
    label = np.zeros((3, SIZE, SIZE), np.int32)
    label[0, 2:9, 3:9] = rng.integers(0, 4, (7, 6))
    label[1, 9:14, 2:6] = 2
    return largest_differences(CONFIG, model, state, image, label)


@pytest.mark.parametrize("what, most", [("outputs", 1e-4), ("losses", 1e-5), ("gradients", 1e-3), ("codebooks", 1e-4)])
def test_it_equals_pytorch(differences, what, most):
    assert differences[what] < most
