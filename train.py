"""Trains the decomposition network.

    python train.py --config=configs/demo.py --workdir=runs/demo/train --config.data.dir=runs/demo/data

The same command goes on where a stopped run ended. Several processes: --coordinator=HOST:PORT --processes=P
--process=I, or nothing on a TPU pod slice or under Slurm (docs/pods.md).
"""

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


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"{argv[1]}: flags only; see --help")
    mesh.initialize_distributed(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    loop.run(Config.from_dict(_CONFIG.value.to_dict()), _WORKDIR.value)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(lambda argv: run_program(lambda: main(argv)))
