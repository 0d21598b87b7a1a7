"""Trains variants of a model, each in a process of its own, and compares them.

    python -m decomp_jax.ablate --data=DATA --out=DIR --config=configs/demo.py \\
        --variants=recommended,no_layout,paper_sane+nothing --seeds=0,1,2 --jobs=2 --config.train.steps=1000

A variant is what may stand behind the colon of --config=configs/demo.py:VARIANT (configs/presets.py); the first is what
the others are compared with. Any `--config.` flag goes to all of them. Each leaves its run and train.log in
DIR/VARIANT, or DIR/VARIANT-SEED, and the comparison is in DIR. The same command goes on where a stopped one ended:
finished runs are taken as they are. Start it in the repository's folder.
"""

import argparse
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from decomp_jax.config import Config
from decomp_jax.errors import EXIT_FAULT, UserError, run_program
from decomp_jax.evaluation.compare import compare_runs

POLL_SECONDS = 0.2


class Training(NamedTuple):
    """One run: a variant and, where there are several, its seed."""

    variant: str
    seed: int | None

    @property
    def name(self) -> str:
        return self.variant if self.seed is None else f"{self.variant}-{self.seed}"

    @property
    def flags(self) -> list[str]:
        return [] if self.seed is None else [f"--config.train.seed={self.seed}"]


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Raises UserError for variants that can't be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set with validation images")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs and of their comparison")
    parser.add_argument("--config", default="configs/demo.py", help="the model varied (default: %(default)s)")
    parser.add_argument("--variants", required=True, type=lambda text: text.split(","), help="names joined by commas")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[None],
                        metavar="SEED,...", help="train each variant once a seed")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; they share out CUDA_VISIBLE_DEVICES "
                        "if it is set (default: %(default)s)")
    args, flags = parser.parse_known_args()
    for flag in flags:
        if not flag.startswith("--config."):
            parser.error(f"{flag}: not a flag; those of train.py's that can be given are --config.PART.NAME=VALUE")
    if args.jobs < 1:
        parser.error(f"--jobs={args.jobs}: must be at least 1")
    if len(set(args.variants)) < len(args.variants) or len(set(args.seeds)) < len(args.seeds):
        parser.error("--variants, --seeds: one of them is there twice")
    _refuse_varied(load_variants(args.config, args.variants), flags)
    return args, flags


def load_variants(file: str, names: list[str]) -> dict[str, Config]:
    """The settings of each variant. Raises UserError for a file without `get_config` and for an unknown name."""
    try:
        get_config = runpy.run_path(file)["get_config"]
    except (OSError, KeyError, ImportError) as error:
        raise UserError(f"--config={file}: no configuration file ({error}); name one of configs/") from error
    return {name: Config.from_dict(get_config(name).to_dict()) for name in names}


def _refuse_varied(variants: dict[str, Config], flags: list[str]) -> None:
    """Raises UserError for a flag that sets what the variants differ in: it would undo the difference."""
    for flag in flags:
        setting = flag.removeprefix("--config.").partition("=")[0]
        if len({str(_setting(config, setting)) for config in variants.values()}) > 1:
            raise UserError(f"--config.{setting}: the variants differ in it; leave out the flag or the variant")


def _setting(config: Config, name: str) -> object:
    try:
        return config.get(name)
    except AttributeError as error:
        raise UserError(f"--config.{name}: no such setting; see decomp_jax/config.py") from error


def main() -> None:
    args, flags = parse_args()
    trainings = [Training(variant, seed) for variant in args.variants for seed in args.seeds]
    done = train_all(trainings, args, flags)
    if done:
        compare_runs([args.out / training.name for training in done], args.data, args.out)
        print((args.out / "comparison.md").read_text(), end="")
    failed = [training.name for training in trainings if training not in done]
    for name in failed:
        print(f"{name}: not trained to its end; see {args.out / name / 'train.log'}", file=sys.stderr)
    if failed:
        sys.exit(EXIT_FAULT)


def train_all(trainings: list[Training], args: argparse.Namespace, flags: list[str]) -> list[Training]:
    """Runs them, `args.jobs` at a time -> those that are done, in order.

    Stopped by a signal, it stops those under way, which save.
    """
    waiting, free, done = list(trainings), list(range(args.jobs)), set()
    running: dict[int, tuple[Training, subprocess.Popen]] = {}
    try:
        while waiting or running:
            while waiting and free:
                slot, training = free.pop(0), waiting.pop(0)
                running[slot] = training, _start(training, args, flags, _devices(slot, args.jobs))
                print(f"{training.name}: training", file=sys.stderr)
            time.sleep(POLL_SECONDS)
            for slot, (training, process) in list(running.items()):
                if process.poll() is not None:
                    if process.returncode == 0 and (args.out / training.name / "done.json").exists():
                        done.add(training)
                    print(f"{training.name}: {'done' if training in done else 'not done'}", file=sys.stderr)
                    del running[slot]
                    free.append(slot)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    return [training for training in trainings if training in done]


def _start(
    training: Training, args: argparse.Namespace, flags: list[str], devices: dict[str, str]
) -> subprocess.Popen:
    """One training, in a session of its own so that Ctrl-C reaches it as the signal to save."""
    workdir = args.out / training.name
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train.py", "--distributed=off", f"--config={args.config}:{training.variant}",
               f"--workdir={workdir}", f"--config.data.dir={args.data}", *training.flags, *flags]
    with open(workdir / "train.log", "a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **devices}, start_new_session=True
        )


def _devices(slot: int, jobs: int) -> dict[str, str]:
    """The environment of a slot: every `jobs`-th of the GPUs that are visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible or jobs == 1:
        return {}
    mine = visible.split(",")[slot::jobs]
    if not mine:
        raise UserError(f"--jobs={jobs}: more than the GPUs of CUDA_VISIBLE_DEVICES={visible}; take fewer")
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


if __name__ == "__main__":
    run_program(main)
