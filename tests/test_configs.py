"""Every configuration builds its network, and mistakes in one are told in a line."""

import jax
import jax.numpy as jnp
import pytest

from configs import ablations, brats, demo
from decomp_jax.config import Config
from decomp_jax.errors import UserError
from decomp_jax.models.network import DecompositionNet
from tests.conftest import run_python


CONFIGS = {
    "brats": (brats.get_config(), 256),
    "paper": (brats.get_config("paper"), 256),
    "demo": (demo.get_config(), 64),
    **{name: (ablations.get_config(name), 64) for name in ablations.ABLATIONS},
}


@pytest.mark.parametrize("config, size", CONFIGS.values(), ids=CONFIGS)
def test_config_builds(config, size):
    config = Config.from_dict(config.to_dict())
    model = DecompositionNet(config.model, size=size, channels=1, lesion_classes=3)
    image = jnp.zeros((1, size, size, 1))
    outputs = jax.eval_shape(
        lambda key: model.init_with_output(key, image, quantised=1.0, train=False)[0], jax.random.key(0)
    )
    assert outputs.codes.normal_indices.shape == (1, 8, 8)


def test_config_survives_json_and_config_dict():
    for config in (brats.PAPER, demo.DEMO):
        assert Config.from_dict(config.to_config_dict().to_dict()) == config


def test_unknown_and_impossible_settings_are_named():
    values = Config().to_dict()
    values["train"]["stepz"] = 3
    with pytest.raises(UserError, match="config.train.stepz: no such setting"):
        Config.from_dict(values)
    values = Config().to_dict()
    values["model"]["own_blocks"] = 5
    with pytest.raises(UserError, match="config.model.own_blocks"):
        Config.from_dict(values)


def test_each_ablation_changes_something():
    variants = [ablations.ablation(name) for name in ablations.ABLATIONS]
    assert all(a != b for i, a in enumerate(variants) for b in variants[:i])
    assert ablations.variants("demo") == list(ablations.ABLATIONS)


def test_a_variant_that_a_model_has_already_is_refused():
    assert "codebook_512" not in ablations.variants("brats") and "recommended" in ablations.variants("brats")
    with pytest.raises(UserError, match="brats/codebook_512: brats is so already"):
        ablations.get_config("brats/codebook_512")


def test_codebooks_that_nothing_trains_are_refused():
    values = demo.DEMO.to_dict()
    values["model"]["codebook_decay"] = 0.0
    with pytest.raises(UserError, match="config.model.codebook_decay"):
        Config.from_dict(values)


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
