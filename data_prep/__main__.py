"""`python -m data_prep phantom|brats|images`: makes a data set of TFRecords."""

import argparse
import functools
import os
import signal
import sys
from pathlib import Path

from data_prep import splits
from data_prep.slices import write_dataset
from decomp_jax.errors import run_program


def phantom(flags: argparse.Namespace) -> None:
    from data_prep import phantom

    write_dataset(
        flags.out,
        settings=phantom.settings(flags.size),
        splits=splits.split_by_hash(phantom.patient_ids(flags.patients), splits.PHANTOM_SHARES, seed=flags.seed),
        prepare=functools.partial(phantom.prepare, seed=flags.seed, size=flags.size),
        workers=flags.workers,
        on_error="stop",
        source={"seed": flags.seed},
    )


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, metavar="DIR", help="data set to make; must not exist")
    common.add_argument("--seed", type=int, default=0, help="seed of the splits, and of phantoms (default: %(default)s)")
    common.add_argument("--workers", type=positive, default=os.cpu_count(), metavar="N",
                        help="processes; the bytes written do not depend on it (default: all cores, %(default)s)")
    top = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="phantom|brats|images")

    command = commands.add_parser("phantom", parents=[common], help="synthetic patients, no download")
    command.set_defaults(run=phantom)
    command.add_argument("--patients", type=positive, default=200, metavar="N", help="default: %(default)s")
    command.add_argument("--size", type=int, default=64, choices=(64, 128, 256), help="pixels (default: %(default)s)")
    return top


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    flags = parser().parse_args()
    flags.run(flags)


if __name__ == "__main__":
    run_program(main)
