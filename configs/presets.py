"""Presets as data, for a network of any size: the paper's method, a sane reading of it, and ours in single steps.

A preset is the `recommended` settings of a size (`configs/demo.py`, `configs/brats.py`) with other values for some of
them, named as on the shell. Names are joined by "+":

    recommended                     all additions
    paper                           as printed
    paper_sane                      the same terms, so that they train
    paper_sane+nothing+layout       with single additions: those settings take the size's recommended values
    recommended+no_layout           with an ablation of `configs/ablations.py`; "no_layout" alone means the same
    recommended+batch_1024          with another batch, and learning rate and steps that go with it
"""

import math
from typing import Any

from ml_collections import ConfigDict

from configs.ablations import ABLATIONS
from decomp_jax.config import Config
from decomp_jax.errors import UserError

Settings = dict[str, Any]

# Sections 2 and C and Appendices A and D, as printed. What the paper leaves open is listed in docs/network.md.
PAPER: Settings = {
    "model.encoder_widening": 1,
    "model.full_resolution_block": False,
    "model.own_blocks": 0,
    "model.nothing_threshold": 0.0,
    "model.codebook_decay": 0.0,
    "model.revive_below": 0.0,
    "model.batch_norm_decay": 0.9,
    "model.normal_gain": 1.0,
    "model.output_gain": 1.0,
    "objective.codebook_normal.weight": 1.0,
    "objective.codebook_abnormal.weight": 1.0,
    "objective.commitment_normal.weight": 0.25,
    "objective.commitment_abnormal.weight": 0.25,
    "objective.nothing.weight": 0.0,
    "objective.layout.weight": 0.0,
    "objective.structure.weight": 0.0,
    "objective.discrimination.weight": 1.0,
    "objective.generalized_dice.weight": 1.0,
    "objective.soft_dice.weight": 0.0,
    "objective.cross_entropy.weight": 1.0,
    "objective.reconstruction_minus.weight": 1e4,
    "objective.reconstruction_minus.reduction": "sum",
    "objective.reconstruction_plus.weight": 1e4,
    "objective.reconstruction_plus.reduction": "sum",
    "objective.residual.weight": 1.0,
    "objective.residual.reduction": "sum",
    "augment.rotation": 12.0,
    "augment.scale": 0.12,
    "augment.transplant": 0.0,
    "augment.intensity": 0.0,
    "train.warmup_steps": 0,
    "train.ramp_steps": 0,
    "train.learning_rate": 5e-3,
    "train.final_rate": 1.0,
    "train.population_images": 0,
}

# What keeps the printed objective from training: the scale of its norms, and codebooks that follow by gradient alone.
SANE = (
    "model.codebook_decay",
    "model.revive_below",
    "objective.codebook_normal.weight",
    "objective.codebook_abnormal.weight",
    "objective.reconstruction_minus.weight",
    "objective.reconstruction_minus.reduction",
    "objective.reconstruction_plus.weight",
    "objective.reconstruction_plus.reduction",
    "objective.residual.reduction",
    "train.warmup_steps",
)

# Each addition: the settings that take the recommended values of the size. Together they lead from `paper_sane` to it.
ADDITIONS: dict[str, tuple[str, ...]] = {
    "schedule": ("train.learning_rate", "train.ramp_steps", "train.final_rate"),
    "gains": ("model.output_gain", "model.batch_norm_decay"),
    "population": ("train.population_images",),
    "dice": (
        "objective.generalized_dice.weight", "objective.soft_dice.weight", "objective.cross_entropy.weight",
    ),
    "encoder": ("model.encoder_widening", "model.full_resolution_block", "model.own_blocks"),
    "augment": ("augment.rotation", "augment.scale", "augment.intensity"),
    "transplant": ("augment.transplant",),
    "nothing": ("model.nothing_threshold", "objective.nothing.weight", "objective.discrimination.weight"),
    "layout": ("objective.layout.weight",),
    "structure": (
        "objective.structure.weight", "objective.commitment_normal.weight", "model.normal_gain",
    ),
}
BASES = ("recommended", "paper", "paper_sane")


def compose(recommended: Config, name: str) -> Config:
    """The settings that `name` stands for, at the size of `recommended`.

    Raises UserError for a name that is unknown or changes nothing.
    """
    base, *changes = name.split("+")
    if base not in BASES:
        base, changes = "recommended", [base, *changes]
    config = recommended.replace(_base(recommended, base))
    for change in changes:
        changed = _change(recommended, config, change)
        if changed == config:
            raise UserError(f"--config ...:{name}: {change} changes nothing here; leave it out")
        config = changed
    return config


def get_config(recommended: Config, name: str) -> ConfigDict:
    return compose(recommended, name).to_config_dict()


def _base(recommended: Config, base: str) -> Settings:
    if base == "recommended":
        return {}
    return PAPER if base == "paper" else PAPER | {setting: recommended.get(setting) for setting in SANE}


def _change(recommended: Config, config: Config, name: str) -> Config:
    if name in ADDITIONS:
        return config.replace({setting: recommended.get(setting) for setting in ADDITIONS[name]})
    if name in ABLATIONS:
        return config.replace(ABLATIONS[name])
    if name.startswith("batch_") and name.removeprefix("batch_").isdecimal():
        return at_batch(config, int(name.removeprefix("batch_")))
    raise UserError(
        f"--config ...:{name}: no such name; there are {', '.join((*BASES, *ADDITIONS, *ABLATIONS))}, batch_N"
    )


def at_batch(config: Config, batch_size: int) -> Config:
    """The same images in batches of another size: Adam's rate by the root of the batch, steps in proportion.

    Moving averages reach back over as many images as before. (Malladi et al. 2022 give the rule for Adam.)
    """
    ratio = batch_size / config.train.batch_size
    steps = ("steps", "warmup_steps", "ramp_steps", "checkpoint_every", "log_every", "eval_every")
    return config.replace({
        "train.batch_size": batch_size,
        "train.learning_rate": config.train.learning_rate * math.sqrt(ratio),
        **{f"train.{name}": _at_least_one(getattr(config.train, name), ratio) for name in steps},
        **{f"model.{name}": getattr(config.model, name) ** ratio for name in ("codebook_decay", "batch_norm_decay")},
    })


def _at_least_one(steps: int, ratio: float) -> int:
    return max(round(steps / ratio), 1) if steps else 0
