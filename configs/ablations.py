"""Named changes, one question each, as data: settings and their values, named as on the shell.

They apply to any base and combine (`configs/presets.py`):

    python train.py --config=configs/demo.py:no_layout --workdir=RUN --config.data.dir=DATA
    python train.py --config=configs/brats.py:paper_sane+nothing+half_rate --workdir=RUN --config.data.dir=DATA

`python -m decomp_jax.ablate` trains a list of them and compares them.
"""

from typing import Any

TERMS = (
    "commitment_normal", "commitment_abnormal", "nothing", "layout", "structure", "discrimination", "generalized_dice",
    "soft_dice", "cross_entropy", "reconstruction_minus", "reconstruction_plus", "residual",
)

SCANNER = {"contrast": 0.3, "bias": 0.1, "sharpness": 0.5, "noise": 0.03}

ABLATIONS: dict[str, dict[str, Any]] = {
    **{f"no_{name}": {f"objective.{name}.weight": 0.0} for name in TERMS},
    "no_nothing_code": {
        "model.nothing_threshold": 0.0, "objective.nothing.weight": 0.0, "objective.layout.weight": 0.0,
    },
    "discrimination": {"objective.discrimination.weight": 1.0},
    "generalized_dice": {"objective.generalized_dice.weight": 5.0, "objective.soft_dice.weight": 0.0},
    "encoder_as_wide": {"model.encoder_widening": 1},
    "no_full_resolution_block": {"model.full_resolution_block": False},
    "shared_encoder": {"model.own_blocks": 0},
    "no_transplant": {"augment.transplant": 0.0},
    "no_intensity": {"augment.intensity": 0.0},
    "scanner": {f"augment.{name}": value for name, value in SCANNER.items()},
    **{f"scanner_{name}": {f"augment.{name}": value} for name, value in SCANNER.items()},
    "drop_channel": {"augment.drop_channel": 0.4},
    "rotation": {"augment.rotation": 12.0, "augment.scale": 0.12},
    "no_revival": {"model.revive_below": 0.0},
    "no_warmup": {"train.warmup_steps": 0},
    "no_population": {"train.population_images": 0},
    "gradient_codebook": {
        "model.codebook_decay": 0.0, "model.revive_below": 0.0,
        "objective.codebook_normal.weight": 1.0, "objective.codebook_abnormal.weight": 1.0,
    },
    "rotation_trick": {"model.rotation_trick": True},
    "constant_rate": {"train.final_rate": 1.0},
    "half_rate": {"train.learning_rate": 1e-3},
    "codebook_2048": {"model.codebook_size": 2048},
    "codebook_512": {"model.codebook_size": 512},
    "codebook_128": {"model.codebook_size": 128},
    "spade_8": {"model.spade_width": 8},
    "spade_stop_gradient": {"model.spade_stop_gradient": True},
}
