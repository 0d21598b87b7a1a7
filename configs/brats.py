"""The full model for BraTS slices of 256x256.

    python train.py --config=configs/brats.py --workdir=RUN --config.data.dir=DATA          what we recommend
    python train.py --config=configs/brats.py:paper --workdir=RUN --config.data.dir=DATA    the paper's own settings
"""

from ml_collections import ConfigDict

from decomp_jax.config import AugmentConfig, Config, LossWeights, ModelConfig, TrainConfig
from decomp_jax.errors import UserError

# Sections 2 and D and Appendix A. Codebooks by gradient, lambda_3 = 1e4: docs/network.md says what came of that.
PAPER = Config(
    model=ModelConfig(own_blocks=0, nothing_threshold=0.0, codebook_decay=0.0, revive_below=0.0, dtype="float32"),
    weights=LossWeights(
        codebook_normal=1.0,
        codebook_abnormal=1.0,
        commitment_normal=0.25,
        nothing=0.0,
        layout=0.0,
        structure=0.0,
        discrimination=1.0,
        generalized_dice=1.0,
        soft_dice=0.0,
        cross_entropy=1.0,
        reconstruction_minus=1e4,
        reconstruction_plus=1e4,
        residual=1.0,
    ),
    augment=AugmentConfig(transplant=0.0, intensity=0.0),
    train=TrainConfig(warmup_steps=0, ramp_steps=0, learning_rate=5e-3, final_rate=1.0),
)


def get_config(variant: str = "recommended") -> ConfigDict:
    variants = {"recommended": Config(), "paper": PAPER}
    if variant not in variants:
        raise UserError(f"--config=configs/brats.py:{variant}: no such variant; use {' or '.join(variants)}")
    return variants[variant].to_config_dict()
