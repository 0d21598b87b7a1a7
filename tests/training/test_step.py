"""Parts of a training step by hand: keys, the switch to codes, the learning rate, codebooks; and golden losses."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import demo
from decomp_jax.config import TrainConfig
from decomp_jax.mesh import data_mesh
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training import step as module
from decomp_jax.training.state import State, create_state, make_optimizer
from decomp_jax.types import Codes, CodebookStats, Latents, Outputs, Targets

CONFIG = demo.RECOMMENDED.replace({
    "model.widths": (4, 8), "model.code_dim": 8, "model.codebook_size": 12, "model.spade_width": 4,
    "train.batch_size": 4, "train.steps": 60, "train.warmup_steps": 4, "train.ramp_steps": 2,
})
SIZE = 16
GOLDEN = Path(__file__).parent / "golden_losses.json"


def batch(seed: int) -> dict[str, np.ndarray]:
    """Four discs, two of them with a bright lesion."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2 + 0.5
    image = np.where(np.hypot(y, x) < 7, rng.uniform(0.3, 0.5, (4, 1, 1)) + 0.05 * rng.random((4, SIZE, SIZE)), 0)
    label = np.zeros((4, SIZE, SIZE), np.uint8)
    label[0, 4:9, 4:9], label[2, 8:12, 6:11] = 1, 3
    image = np.where(label > 0, 0.9, image)
    return {"image": image[..., None].astype(np.float16), "label": label}


@pytest.fixture(scope="module")
def start() -> tuple[State, functools.partial]:
    model = DecompositionNet(CONFIG.model, size=SIZE, channels=1, lesion_classes=3)
    tx = make_optimizer(CONFIG.train)
    state = create_state(CONFIG, model, tx, data_mesh())
    return state, jax.jit(functools.partial(module.train_step, model=model, tx=tx, config=CONFIG))


def test_golden_losses_of_three_steps(start):
    """Any change of the step changes them. When it is meant: remove the file, run this test, and look at the difference."""
    state, step = start
    losses = []
    for seed in range(3):
        state, metrics = step(state, batch(seed))
        losses.append({name: float(value) for name, value in metrics.items() if name.startswith(("term/", "loss/"))})
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    for golden, values in zip(json.loads(GOLDEN.read_text()), losses, strict=True):
        assert golden.keys() == values.keys()
        for name in golden:
            np.testing.assert_allclose(values[name], golden[name], rtol=2e-3, err_msg=name)


def test_it_learns_one_batch_by_heart(start):
    state, step = start
    first, last = [], []
    for i in range(CONFIG.train.steps):
        state, metrics = step(state, batch(0))
        (first if i < 3 else last).append({name: float(value) for name, value in metrics.items()})
    for name, share in (("term/reconstruction_plus", 0.8), ("term/cross_entropy", 0.5), ("term/layout", 0.7)):
        early, late = (np.mean([line[name] for line in lines]) for lines in (first, last[-5:]))
        assert late < share * early, name


def test_every_step_has_a_key_of_its_own(start, monkeypatch):
    state, _ = start
    keys = []

    class Enough(Exception):
        pass

    def augment(key, *_):
        keys.append(jax.random.key_data(key).tolist())
        raise Enough

    monkeypatch.setattr(module, "augment", augment)
    for config, number in ((CONFIG, 0), (CONFIG, 1), (CONFIG.replace({"train.seed": 1}), 0), (CONFIG, 0)):
        with pytest.raises(Enough):
            module.train_step(state.replace(step=jnp.asarray(number)), batch(0), model=None, tx=None, config=config)
    assert keys[0] == keys[3] and len({str(key) for key in keys}) == 3


def test_codes_are_switched_on_after_the_warm_up():
    config = TrainConfig(steps=1000, warmup_steps=100)
    shares = [float(module.quantisation(jnp.asarray(step), config)) for step in (0, 100, 150, 200, 999)]
    assert shares == [0, 0, 0.5, 1, 1]
    short = TrainConfig(steps=8, warmup_steps=100)  # the warm-up is clamped to a quarter
    assert [float(module.quantisation(jnp.asarray(step), short)) for step in (2, 3, 4)] == [0, 0.5, 1]
    assert float(module.quantisation(jnp.asarray(0), TrainConfig(warmup_steps=0))) == 1


@pytest.mark.parametrize("final_rate, expected", [(0.0, [0.0, 0.5, 1.0, 0.5, 0.0]), (1.0, [0.0, 0.5, 1.0, 1.0, 1.0])])
def test_the_rate_rises_linearly_and_falls_as_a_cosine(final_rate, expected):
    """Adam moves a parameter of constant gradient by the learning rate."""
    tx = make_optimizer(TrainConfig(steps=100, ramp_steps=20, learning_rate=1.0, final_rate=final_rate))
    state = tx.init(jnp.zeros(()))

    def move(state: optax.OptState, _: None) -> tuple[optax.OptState, jax.Array]:
        update, state = tx.update(jnp.ones(()), state)
        return state, -update

    _, moves = jax.lax.scan(move, state, None, 101)
    np.testing.assert_allclose(moves[jnp.array([0, 10, 20, 60, 100])], expected, atol=1e-3)


def test_codebooks_learn_from_their_cells():
    """The normal one from all, the abnormal one from lesion cells; code 0 of the latter stays "nothing"."""
    rng = np.random.default_rng(0)
    z_e = jnp.asarray(rng.normal(size=(1, 2, 2, 3)), jnp.float32)
    ones = jnp.ones((1, 2, 2), jnp.int32)
    codes = Codes(ones, ones, ones, *[z_e] * 5)
    outputs = Outputs(Latents(z_e, 2 * z_e), codes, *[jnp.zeros((1, 8, 8, 1))] * 3)
    label = np.zeros((1, 8, 8), np.int32)
    label[0, :4, :4] = 1
    label[0, 4, 4] = 1  # one pixel of 16: 6 %, above the 4 % of a lesion cell
    config = CONFIG.replace({"model.codebook_size": 4, "model.code_dim": 3, "model.revive_below": 0.0})
    zeros = {path: CodebookStats.zeros(4, 3) for path in ("normal", "abnormal")}
    params = {f"{path}_codebook": jnp.full((4, 3), 9.0) for path in zeros}
    update = functools.partial(module.update_codebooks, jax.random.key(0), params, zeros, outputs)
    targets = Targets(*[jnp.asarray(x) for x in (label, label, label, label)])
    moved, _ = update(targets, jnp.asarray(0), config)
    np.testing.assert_allclose(moved["normal_codebook"][1], z_e.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(moved["abnormal_codebook"][1], (z_e[0, 0, 0] + z_e[0, 1, 1]), rtol=1e-5)
    moved, _ = update(targets, jnp.asarray(0), config.replace({"objective.lesion_cell": 0.1}))
    np.testing.assert_allclose(moved["abnormal_codebook"][1], 2 * z_e[0, 0, 0], rtol=1e-5)
    to_nothing = dataclasses.replace(outputs, codes=dataclasses.replace(codes, lesion_indices=0 * ones))
    moved, _ = module.update_codebooks(jax.random.key(0), params, zeros, to_nothing, targets, jnp.asarray(0), config)
    np.testing.assert_array_equal(moved["abnormal_codebook"], params["abnormal_codebook"])


def test_codebooks_are_revived_until_they_settle():
    config = CONFIG.replace({"model.codebook_size": 4, "model.code_dim": 3, "train.steps": 100, "train.revive_until": 0.5})
    z_e, ones = jnp.ones((1, 2, 2, 3)), jnp.ones((1, 2, 2), jnp.int32)
    outputs = Outputs(Latents(z_e, z_e), Codes(ones, ones, ones, *[z_e] * 5), *[jnp.zeros((1, 8, 8, 1))] * 3)
    targets = Targets(*[jnp.ones((1, 8, 8), jnp.int32)] * 4)
    params = {f"{path}_codebook": jnp.zeros((4, 3)) for path in ("normal", "abnormal")}
    zeros = {path: CodebookStats.zeros(4, 3) for path in ("normal", "abnormal")}
    for step, alive in ((49, 4), (50, 1)):
        moved, _ = module.update_codebooks(
            jax.random.key(0), params, zeros, outputs, targets, jnp.asarray(step), config
        )
        assert int((moved["normal_codebook"] != 0).any(1).sum()) == alive
