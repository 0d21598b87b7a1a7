"""The full model for BraTS slices of 256x256.

    python train.py --config=configs/brats.py --workdir=RUN --config.data.dir=DATA          # what we recommend
    python train.py --config=configs/brats.py:paper --workdir=RUN --config.data.dir=DATA    # the paper's, as printed

Other names, and how they combine: `configs/presets.py`.
"""

from ml_collections import ConfigDict

from configs import presets
from decomp_jax.config import Config

# The defaults of decomp_jax/config.py are those of this model.
RECOMMENDED = Config()


def get_config(name: str = "recommended") -> ConfigDict:
    if name == "paper":  # Appendix D; `paper` at another size keeps that size's batch and steps
        printed = {"model.dtype": "float32", "train.batch_size": 240, "train.epochs": 300.0}
        return presets.compose(RECOMMENDED, name).replace(printed).to_config_dict()
    return presets.get_config(RECOMMENDED, name)
