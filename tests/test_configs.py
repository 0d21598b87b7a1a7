"""Every preset builds its network and takes a step, presets compose, and mistakes in one are told in a line."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import brats, demo, presets
from configs.ablations import ABLATIONS, TERMS
from decomp_jax.config import RANGES, Config, ObjectiveConfig, Term, TrainConfig
from decomp_jax.errors import UserError
from decomp_jax.losses import terms
from decomp_jax.mesh import data_mesh
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training.state import State, create_state, make_optimizer
from decomp_jax.training.step import train_step
from tests.conftest import run_python

TINY = demo.RECOMMENDED.replace({
    "model.widths": (4, 8), "model.code_dim": 8, "model.codebook_size": 12, "model.spade_width": 4,
    "train.batch_size": 2, "train.steps": 8,
})
BASES = ("paper", "paper_sane")  # `recommended` takes steps in tests/training/test_step.py
# Traced here, compiled in tests marked `long`: single additions, and each ablation of the base that has what it takes away.
OTHERS = (
    "recommended",
    "paper_sane+nothing+layout",
    *(f"paper_sane+{name}" for name in presets.ADDITIONS if name != "layout"),
    *(f"paper_sane+{name}" if name in ("no_discrimination", "no_generalized_dice") else name for name in ABLATIONS),
)


@pytest.mark.parametrize("config", [brats.get_config(), brats.get_config("paper")], ids=["recommended", "paper"])
def test_full_model_builds(config):
    config = Config.from_dict(config.to_dict())
    model = DecompositionNet(config.model, size=256, channels=1, lesion_classes=3)
    image = jnp.zeros((1, 256, 256, 1))
    outputs = jax.eval_shape(
        lambda key: model.init_with_output(key, image, quantised=1.0, train=False)[0], jax.random.key(0)
    )
    assert outputs.codes.normal_indices.shape == (1, 8, 8)


@functools.cache
def shapes_of(model: DecompositionNet) -> State:
    """The shapes of a state, which no setting of the training changes."""
    return jax.eval_shape(lambda: create_state(Config(model.config), model, make_optimizer(TrainConfig()), data_mesh()))


class Step:
    """A training step of a tiny network, and what it steps from."""

    def __init__(self, name: str) -> None:
        self.config = presets.compose(TINY, name)
        model = DecompositionNet(self.config.model, size=16, channels=1, lesion_classes=3)
        tx = make_optimizer(self.config.train)
        rng = np.random.default_rng(0)
        self.state = jax.tree.map(
            lambda x: jnp.asarray(np.abs(rng.normal(0, 0.1, x.shape)), x.dtype) if x.dtype == jnp.float32
            else jnp.full(x.shape, 4, x.dtype),  # counts of steps: at the first one the learning rate may be 0
            shapes_of(model),
        )
        label = np.zeros((2, 16, 16), np.uint8)
        label[0, 4:10, 4:10] = np.arange(1, 4).repeat(2)
        self.batch = {"image": rng.random((2, 16, 16, 1)).astype(np.float16), "label": label}
        self.function = functools.partial(train_step, model=model, tx=tx, config=self.config)

    @property
    def terms(self) -> set[str]:
        return {f"term/{name}" for name in self.config.objective.terms}


@pytest.mark.parametrize("name", [*BASES, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_a_step_gives_finite_terms_and_moves_the_network(name):
    step = Step(name)
    after, metrics = jax.jit(step.function)(step.state, step.batch)
    assert {name for name in metrics if name.startswith("term/")} == step.terms
    assert all(np.isfinite(value) for value in metrics.values())
    without_codebooks = [{name: tree for name, tree in params.items() if "codebook" not in name}
                         for params in (step.state.params, after.params)]
    moved = jax.tree.map(lambda before, now: float(jnp.abs(before - now).sum()), *without_codebooks)
    assert min(sum(jax.tree.leaves(module)) for module in moved.values()) > 0


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_of_each_preset_has_its_terms(name):
    """Traced, not compiled, which takes a tenth of the time; compiled in a test marked `long`."""
    step = Step(name)
    after, metrics = jax.eval_shape(step.function, step.state, step.batch)
    assert {name for name in metrics if name.startswith("term/")} == step.terms
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, step.state)


@pytest.mark.parametrize("recommended", [demo.RECOMMENDED, brats.RECOMMENDED], ids=["demo", "brats"])
def test_additions_lead_from_the_sane_paper_to_what_we_recommend(recommended):
    assert presets.compose(recommended, "+".join(["paper_sane", *presets.ADDITIONS])) == recommended


def test_names_compose_and_say_what_is_wrong():
    compose = functools.partial(presets.compose, demo.RECOMMENDED)
    assert compose("no_layout") == compose("recommended+no_layout") != compose("recommended")
    both = compose("no_layout+half_rate")
    assert both.objective.layout.weight == 0 and both.train.learning_rate == 1e-3
    with pytest.raises(UserError, match="no_such: no such name; there are recommended, paper"):
        compose("no_such")
    with pytest.raises(UserError, match="codebook_2048 changes nothing here"):
        compose("codebook_2048")


def test_paper_is_as_printed():
    paper = Config.from_dict(brats.get_config("paper").to_dict())
    weights = {name: term.weight for name, term in paper.objective.terms.items()}
    assert weights == {
        "codebook_normal": 1, "codebook_abnormal": 1, "commitment_normal": 0.25, "commitment_abnormal": 0.25,
        "discrimination": 1, "generalized_dice": 1, "cross_entropy": 1,
        "reconstruction_minus": 1e4, "reconstruction_plus": 1e4, "residual": 1,
    }
    assert paper.objective.discrimination.margin == 10 and paper.train.batch_size == 240
    assert paper.train.learning_rate == 5e-3 and paper.train.epochs == 300 and paper.train.warmup_steps == 0
    assert paper.model.normal_gain == paper.model.output_gain == 1 and paper.train.population_images == 0
    assert (paper.model.codebook_size, paper.model.code_dim) == (512, 64)


def test_every_number_has_a_range():
    numbers = {
        f"{section.name}.{name}" for section in dataclasses.fields(Config)
        for name, value in flatten_dict(dataclasses.asdict(getattr(Config(), section.name)), sep=".").items()
        if type(value) in (int, float, tuple)
    }
    assert {name for name in numbers if not name.endswith(".weight")} == {*RANGES}


def test_epochs_set_the_steps():
    config = brats.RECOMMENDED.replace({"train.epochs": 3.0, "train.batch_size": 10})
    assert config.with_steps(1_000).train.steps == 300
    assert brats.RECOMMENDED.with_steps(1_000) == brats.RECOMMENDED


def test_another_batch_keeps_the_images():
    four = presets.compose(brats.RECOMMENDED, "batch_1024")
    before, after = brats.RECOMMENDED.train, four.train
    assert after.steps * after.batch_size == before.steps * before.batch_size
    assert after.learning_rate == 2 * before.learning_rate
    assert four.model.codebook_decay == pytest.approx(0.99**4)


def test_ablations_name_every_term():
    fields = {field.name for field in dataclasses.fields(ObjectiveConfig) if isinstance(field.default, Term)}
    assert fields == set(terms.TERMS)
    assert set(TERMS) == {name for name in fields if not name.startswith("codebook")}


def test_config_survives_json_and_config_dict():
    for config in (presets.compose(brats.RECOMMENDED, "paper"), demo.RECOMMENDED):
        assert Config.from_dict(config.to_config_dict().to_dict()) == config


@pytest.mark.parametrize("name, value, says", [
    ("train.stepz", 3, "config.train.stepz: no such setting"),
    ("objective.layout.size", 3, "config.objective.layout.size: no such setting"),
    ("model.own_blocks", 5, "config.model.own_blocks"),
    ("objective.layout.weight", -1.0, "config.objective"),
    ("objective.residual.reduction", "median", "config.objective.residual.reduction"),
    ("model.codebook_decay", 0.0, "config.model.codebook_decay"),  # nothing would train the codebooks
    ("model.nothing_threshold", 0.0, "config.model.nothing_threshold"),
    ("augment.rotation", 60.0, "config.augment.rotation"),  # two passes would need ever wider images
    ("train.seed", -1, "--config.train.seed=-1: must be at least 0"),
    ("train.seed", 1.5, "--config.train.seed=1.5: must be a whole number"),
    ("train.steps", True, "--config.train.steps=True: must be a whole number"),
    ("model.widths", (16, -4), "--config.model.widths=.*: must be at least 1"),
    ("model.widths", (16, 1.5), "--config.model.widths=1.5: must be a whole number"),
    ("model.widths", 16, "--config.model.widths=16: must be whole numbers"),
    ("model.widths", (16,), "own_blocks=2: must be below the number of widths, and --config.model.widths=16 are 1"),
    ("model.dtype", "float16", "--config.model.dtype=float16: must be one of float32, bfloat16"),
    ("augment.flip", float("nan"), "--config.augment.flip=nan: must be a finite number"),
    ("augment.opacity", 1.5, "--config.augment.opacity=1.5: must be at least 0 and at most 1"),
    ("objective.layout.weight", float("inf"), "--config.objective.layout.weight=inf: must be a finite number"),
    ("train.learning_rate", 0.0, "--config.train.learning_rate=0.0: must be above 0"),
    ("model.batch_norm_decay", 1.0, "--config.model.batch_norm_decay=1.0: must be above 0 and below 1"),
    ("augment", 3, "--config.augment=3: holds settings"),
])
def test_unknown_and_impossible_settings_are_named(name, value, says):
    with pytest.raises(UserError, match=says):
        Config().replace({name: value})


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--config=configs/demo.py", "--config.train.stepz=3"], "stepz"),
        (["--config=configs/demo.py", "--config.train.steps=many"], "many"),
        (["--config=configs/none.py"], "none.py"),
        (["--config=configs/brats.py:papre"], "papre"),
        (["--config=configs/demo.py", "--config.train.batch_size=0"], "batch_size"),
    ],
)
def test_mistaken_flags_are_told_in_one_line(tmp_path, flags, says):
    done = run_python("train.py", *flags, f"--workdir={tmp_path}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert says in done.stderr.strip().splitlines()[-1]
