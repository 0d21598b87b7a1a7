"""Trains variants of a model, each in a process of its own, and compares them.

    python -m decomp_jax.ablate --data=DATA --out=DIR --variants=recommended,no_layout,no_revival --jobs=2 \\
        --config.train.steps=1000

Variants are those of configs/ablations.py; the first is what the others are compared with. Any `--config.` flag goes to
all of them. Each leaves its run and train.log in DIR/VARIANT, the comparison is in DIR. The same command goes on where
a stopped one ended: finished runs are taken as they are. Start it in the repository's folder.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from configs.ablations import ABLATIONS, BASES, variants
from decomp_jax.errors import EXIT_FAULT, UserError, run_program
from decomp_jax.evaluation.compare import compare_runs

POLL_SECONDS = 0.2


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set with validation images")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs and of their comparison")
    parser.add_argument("--base", choices=BASES, default="demo", help="the model varied (default: %(default)s)")
    parser.add_argument("--variants", help="default: all that change the model")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; they share out CUDA_VISIBLE_DEVICES "
                        "if it is set (default: %(default)s)")
    args, settings = parser.parse_known_args()
    known = variants(args.base)
    args.variants = args.variants.split(",") if args.variants else known
    for flag in settings:
        if not flag.startswith("--config."):
            parser.error(f"{flag}: not a flag; those of train.py's that can be given are --config.PART.NAME=VALUE")
    if args.jobs < 1:
        parser.error(f"--jobs={args.jobs}: must be at least 1")
    for name in args.variants:
        if name not in known or args.variants.count(name) > 1:
            parser.error(f"--variants: {name} is unknown, changes nothing in {args.base}, or is there twice; use of "
                         f"{', '.join(known)}")
        for part, fields in ABLATIONS[name].items():
            for flag in (f"--config.{part}.{field}" for field in fields):
                if any(setting.split("=")[0] == flag for setting in settings):
                    parser.error(f"{flag}: this is what {name} varies; leave out the one or the other")
    return args, settings


def main() -> None:
    args, settings = parse_args()
    done = train_variants(args, settings)
    if done:
        compare_runs([args.out / name for name in done], args.data, args.out)
        print((args.out / "comparison.md").read_text(), end="")
    failed = [name for name in args.variants if name not in done]
    for name in failed:
        print(f"{name}: not trained to its end; see {args.out / name / 'train.log'}", file=sys.stderr)
    if failed:
        sys.exit(EXIT_FAULT)


def train_variants(args: argparse.Namespace, settings: list[str]) -> list[str]:
    """Runs all trainings, `args.jobs` at a time -> the variants that are done, in order.

    Stopped by a signal, it stops those under way, which save.
    """
    waiting, free, done = list(args.variants), list(range(args.jobs)), set()
    running: dict[int, tuple[str, subprocess.Popen]] = {}
    try:
        while waiting or running:
            while waiting and free:
                slot, name = free.pop(0), waiting.pop(0)
                running[slot] = name, _start(name, args, settings, _devices(slot, args.jobs))
                print(f"{name}: training", file=sys.stderr)
            time.sleep(POLL_SECONDS)
            for slot, (name, process) in list(running.items()):
                if process.poll() is not None:
                    if process.returncode == 0 and (args.out / name / "done.json").exists():
                        done.add(name)
                    print(f"{name}: {'done' if name in done else 'not done'}", file=sys.stderr)
                    del running[slot]
                    free.append(slot)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    return [name for name in args.variants if name in done]


def _start(name: str, args: argparse.Namespace, settings: list[str], devices: dict[str, str]) -> subprocess.Popen:
    """One training, in a session of its own so that Ctrl-C reaches it as the signal to save."""
    workdir = args.out / name
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train.py", "--distributed=off", f"--config=configs/ablations.py:{args.base}/{name}",
               f"--workdir={workdir}", f"--config.data.dir={args.data}", *settings]
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
