"""Named changes to the demo model, one question each, as data.

    python train.py --config=configs/ablations.py:no_layout --workdir=RUN --config.data.dir=DATA
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
    **{f"no_{name}": {"weights": {name: 0.0}} for name, weight in dataclasses.asdict(LossWeights()).items() if weight},
    "no_nothing_code": {"model": {"nothing_threshold": 0.0}, "weights": {"nothing": 0.0, "layout": 0.0}},
    "discrimination": {"weights": {"discrimination": 1.0}},
    "generalized_dice": {"weights": {"generalized_dice": 5.0, "soft_dice": 0.0}},
    "shared_encoder": {"model": {"own_blocks": 0}},
    "no_transplant": {"augment": {"transplant": 0.0}},
    "no_intensity": {"augment": {"intensity": 0.0}},
    "no_revival": {"model": {"revive_below": 0.0}},
    "no_warmup": {"train": {"warmup_steps": 0}},
    "gradient_codebook": {
        "model": {"codebook_decay": 0.0, "revive_below": 0.0},
        "weights": {"codebook_normal": 1.0, "codebook_abnormal": 1.0},
    },
    "codebook_512": {"model": {"codebook_size": 512}},
    "codebook_128": {"model": {"codebook_size": 128}},
    "spade_8": {"model": {"spade_width": 8}},
    "spade_stop_gradient": {"model": {"spade_stop_gradient": True}},
}


def ablation(name: str, base: Config = DEMO) -> Config:
    """`base` with the changes of one variant."""
    if name not in ABLATIONS:
        raise UserError(f"--config=configs/ablations.py:{name}: no such variant; use one of {', '.join(ABLATIONS)}")
    changes = ABLATIONS[name]
    parts = {part: dataclasses.replace(getattr(base, part), **fields) for part, fields in changes.items()}
    return dataclasses.replace(base, **parts)


def get_config(name: str = "recommended") -> ConfigDict:
    return ablation(name).to_config_dict()
