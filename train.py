"""Trains the decomposition network.

    python train.py --config=configs/demo.py --workdir=runs/demo/train --config.data.dir=runs/demo/data

The same command goes on where a stopped run ended. Several processes: --coordinator=HOST:PORT --processes=P
--process=I, or nothing on a TPU pod slice or under Slurm (docs/pods.md).
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from decomp_jax import mesh
from decomp_jax.config import Config
from decomp_jax.errors import UserError, run_program
from decomp_jax.training import loop

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/brats.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, done.json")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for runs of several processes")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes")
_PROCESS = flags.DEFINE_integer("process", None, "Index of this process")


def parse(argv: list[str]) -> Config:
    """Reads the flags and the configuration file. Raises UserError for what can't be read."""
    if {"--help", "--helpfull", "-h"} & set(argv):
        app.parse_flags_with_usage(argv)
    try:
        rest = flags.FLAGS(argv)
        values = _CONFIG.value.to_dict()
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{' '.join(argv[1:])}: {error}; see --help and decomp_jax/config.py") from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: not a flag; see --help")
    return Config.from_dict(values)


def main() -> None:
    config = parse(sys.argv)
    mesh.keep_host_memory()
    mesh.initialize_distributed(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    loop.run(config, _WORKDIR.value)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    flags.mark_flags_as_required(["config", "workdir"])
    run_program(main)
