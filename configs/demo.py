"""A small model for 64x64 slices that two CPU cores train in minutes: what `make demo` runs.

Other names, and how they combine: `configs/presets.py`.
"""

from ml_collections import ConfigDict

from configs import presets
from decomp_jax.config import AugmentConfig, Config, ModelConfig, TrainConfig

# Half the paper's code size and four times its codes: on so small an image it is quantisation that costs the normal
# code its last few hundredths of Dice. An encoder as wide as the decoders is an eighth of a step's cost and limits
# detection, so that it is twice as wide and looks at single pixels. No rotation and scaling: resampling smooths pixels
# of 4 mm, and the network would never see the noise of the images that it is to judge.
RECOMMENDED = Config(
    model=ModelConfig(
        widths=(16, 32, 64),
        encoder_widening=2,
        full_resolution_block=True,
        code_dim=32,
        codebook_size=2048,
        own_blocks=1,
        spade_width=32,
        dtype="float32",
    ),
    augment=AugmentConfig(rotation=0.0, scale=0.0),
    train=TrainConfig(
        steps=1400,
        warmup_steps=100,
        ramp_steps=60,
        batch_size=16,
        checkpoint_every=350,
        log_every=20,
        eval_every=700,
    ),
)


def get_config(name: str = "recommended") -> ConfigDict:
    return presets.get_config(RECOMMENDED, name)
