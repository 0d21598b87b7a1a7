"""Trains the decomposition network.

    python train.py --config=configs/demo.py --workdir=runs/demo/train --config.data.dir=runs/demo/data

The same command goes on where a stopped run ended. Every setting of decomp_jax/config.py is a flag:
--config.PART.NAME=VALUE. Exit codes: 0 done; 75 stopped by a signal and saved; 2 a mistake, told in the last line; 1 a
fault. Several processes: docs/pods.md.
"""

import argparse
import sys
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from decomp_jax import mesh, processes
from decomp_jax.config import Config
from decomp_jax.errors import EXIT_UNFINISHED, UserError, refuse_urls, run_program
from decomp_jax.training import loop


def parse_args() -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="e.g. configs/brats.py")
    parser.add_argument("--workdir", required=True, type=Path, help="the run's folder: checkpoints, metrics, done.json")
    processes.add_flags(parser)
    args, settings = parser.parse_known_args()
    return args, read_config(args.config, settings)


def read_config(file: str, settings: list[str]) -> Config:
    """The configuration of a file, with `--config.PART.NAME=VALUE` put in. Raises UserError for what can't be read."""
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    try:
        rest = values([sys.argv[0], f"--config={file}", *settings])
        fields = config.value.to_dict()
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"--config={' '.join([file, *settings])}: {error}; see decomp_jax/config.py") from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: not a flag; see --help")
    return Config.from_dict(fields)


def main() -> None:
    args, config = parse_args()
    refuse_urls([config.data.dir, config.train.init_from])
    mesh.keep_host_memory()
    processes.join(args)
    if not loop.run(config, args.workdir):
        sys.exit(EXIT_UNFINISHED)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    run_program(main)
