"""A small model for 64x64 slices that two CPU cores train in minutes: what `make demo` runs."""

from ml_collections import ConfigDict

from decomp_jax.config import Config, ModelConfig, TrainConfig

DEMO = Config(
    model=ModelConfig(
        widths=(16, 32, 64), code_dim=32, codebook_size=128, own_blocks=1, spade_width=32, dtype="float32"
    ),
    train=TrainConfig(
        steps=900,
        warmup_steps=120,
        ramp_steps=60,
        batch_size=32,
        checkpoint_every=300,
        log_every=20,
        eval_every=150,
    ),
)


def get_config() -> ConfigDict:
    return DEMO.to_config_dict()
