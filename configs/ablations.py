"""Named changes to a model, one question each, as data.

    python train.py --config=configs/ablations.py:no_layout --workdir=RUN --config.data.dir=DATA        the demo model
    python train.py --config=configs/ablations.py:brats/no_layout --workdir=RUN --config.data.dir=DATA

`python -m decomp_jax.ablate` trains a list of them and compares them.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from configs.demo import DEMO
from decomp_jax.config import Config, LossWeights
from decomp_jax.errors import UserError

# variant -> section -> field -> value
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "recommended": {},
    "seed_1": {"train": {"seed": 1}},  # what differences mean nothing
    "seed_2": {"train": {"seed": 2}},
    **{f"no_{name}": {"weights": {name: 0.0}} for name, weight in dataclasses.asdict(LossWeights()).items() if weight},
    "no_nothing_code": {"model": {"nothing_threshold": 0.0}, "weights": {"nothing": 0.0, "layout": 0.0}},
    "discrimination": {"weights": {"discrimination": 1.0}},
    "generalized_dice": {"weights": {"generalized_dice": 5.0, "soft_dice": 0.0}},
    "encoder_as_wide": {"model": {"encoder_widening": 1}},
    "no_full_resolution_block": {"model": {"full_resolution_block": False}},
    "shared_encoder": {"model": {"own_blocks": 0}},
    "no_transplant": {"augment": {"transplant": 0.0}},
    "no_intensity": {"augment": {"intensity": 0.0}},
    "rotation": {"augment": {"rotation": 12.0, "scale": 0.12}},
    "no_revival": {"model": {"revive_below": 0.0}},
    "no_warmup": {"train": {"warmup_steps": 0}},
    "gradient_codebook": {
        "model": {"codebook_decay": 0.0, "revive_below": 0.0},
        "weights": {"codebook_normal": 1.0, "codebook_abnormal": 1.0},
    },
    "rotation_trick": {"model": {"rotation_trick": True}},
    "constant_rate": {"train": {"final_rate": 1.0}},
    "half_rate": {"train": {"learning_rate": 1e-3}},
    "codebook_512": {"model": {"codebook_size": 512}},
    "codebook_128": {"model": {"codebook_size": 128}},
    "spade_8": {"model": {"spade_width": 8}},
    "spade_stop_gradient": {"model": {"spade_stop_gradient": True}},
}


BASES = {"demo": DEMO, "brats": Config()}


def ablation(name: str, base: str = "demo") -> Config:
    """A model of `BASES` with the changes of one variant."""
    for given, known, what in ((name, ABLATIONS, "variant"), (base, BASES, "model")):
        if given not in known:
            raise UserError(f"--config=configs/ablations.py:{base}/{name}: no such {what}; use one of {', '.join(known)}")
    if name not in variants(base):
        raise UserError(f"--config=configs/ablations.py:{base}/{name}: {base} is so already; use another variant")
    return _vary(BASES[base], ABLATIONS[name])


def variants(base: str) -> list[str]:
    """Those that change something in a model; "recommended" is the model itself."""
    return [name for name, changes in ABLATIONS.items() if not changes or _vary(BASES[base], changes) != BASES[base]]


def _vary(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    parts = {part: dataclasses.replace(getattr(config, part), **fields) for part, fields in changes.items()}
    return dataclasses.replace(config, **parts)


def get_config(name: str = "recommended") -> ConfigDict:
    """`name` is a variant of the demo model, or MODEL/VARIANT."""
    base, _, variant = name.rpartition("/")
    return ablation(variant, base or "demo").to_config_dict()
