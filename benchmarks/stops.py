"""Stops preparations, or lets them fail, at random moments, and checks that each ends at once and leaves nothing.

    python benchmarks/stops.py [--n=200] [--size=256] [--workers=4] [--seed=0] [--write=docs/robustness.md]

Each prepares random slices of that size; it gets SIGTERM or Ctrl-C, or a patient that can't be used, or a worker that is
killed. Processes are forked from one that has imported TensorFlow, which saves most of the time that a start takes.
"""

import argparse
import collections
import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import write_measured

from data_prep import shards
from data_prep.slices import PatientSlices, write_dataset
from decomp_jax.data.schema import Settings
from decomp_jax.errors import UserError, run_program

SECONDS = 10
FAULTS = ("SIGTERM", "SIGINT", "broken file", "killed worker")
CODES = {"SIGTERM": 143, "SIGINT": 130, "broken file": 2, "killed worker": 2}
SLICES, PATIENTS = 40, 60


def prepare(patient_id: str, *, size: int, fault: str, at: int, failed: Path) -> PatientSlices:
    """A patient of random slices; the `at`-th can't be used, or ends its worker, and `failed` says when."""
    number = int(patient_id[1:])
    if number == at and not fault.startswith("SIG"):
        failed.write_text(str(time.time()))
        if fault == "killed worker":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError(f"{patient_id}: broken; mend it")
    image = np.random.default_rng(number).random((SLICES, size, size, 1), np.float32).astype(np.float16)
    return PatientSlices(
        patient_id, image, np.zeros(image.shape[:3], np.uint8), np.arange(SLICES, dtype=np.int32),
        np.arange(SLICES, dtype=np.float32),
    )


def preparation(out: Path, size: int, workers: int, fault: str, at: int) -> None:
    write_dataset(
        out, settings=Settings("phantom", size), splits={f"p{i:03d}": "train" for i in range(PATIENTS)},
        prepare=functools.partial(prepare, size=size, fault=fault, at=at, failed=out.parent / "failed"), workers=workers,
        on_error="stop",
    )


def job(log: int, *preparing: Any) -> None:
    """The forked process: it writes its messages to `log` and ends as a program does."""
    os.dup2(log, 2)
    run_program(functools.partial(preparation, *preparing))


def stop(fault: str, rng: np.random.Generator, work: Path, args: argparse.Namespace) -> float:
    """Seconds from the signal, or from when a patient failed, to the end. Exits where something is wrong or left."""
    out, failed, at = work / "out", work / "failed", int(rng.integers(4, PATIENTS // 2))
    with (work / "log").open("w") as log:
        process = multiprocessing.get_context("fork").Process(
            target=job, args=(log.fileno(), out, args.size, args.workers, fault, at)
        )
        process.start()
    while not (failed.exists() or list(work.glob(".out.partial-*/slices/train-00000")) and fault.startswith("SIG")):
        if not process.is_alive():
            break
        time.sleep(0.01)
    if fault.startswith("SIG"):
        time.sleep(rng.uniform(0, 2))
        failed.write_text(str(time.time()))
        os.kill(process.pid, getattr(signal, fault))
    process.join(12 * SECONDS)
    if process.is_alive():
        process.kill()
        sys.exit(f"FAILED: {fault}: still there after {12 * SECONDS} s")
    text = (work / "log").read_text()
    if process.exitcode != CODES[fault] or "Traceback" in text:
        sys.exit(f"FAILED: {fault}: exit code {process.exitcode}\n{text[-2000:]}")
    seconds = time.time() - float(failed.read_text())
    if left := {path.name for path in work.iterdir()} - {"failed", "log"}:
        sys.exit(f"FAILED: {fault}: left {left}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="document whose measured part to replace")
    args = parser.parse_args()
    shards.tf.io.TFRecordWriter  # loads TensorFlow
    rng, seconds = np.random.default_rng(args.seed), collections.defaultdict(list)
    for i in range(args.n):
        fault = FAULTS[i % len(FAULTS)]
        with tempfile.TemporaryDirectory() as folder:
            seconds[fault].append(stop(fault, rng, Path(folder), args))
        print(f"{i + 1}: {fault}, {seconds[fault][-1]:.1f} s", file=sys.stderr, flush=True)
    every = sum(seconds.values(), [])
    report = (f"{args.n} preparations of {args.size} pixels with {args.workers} workers, "
              + ", ".join(f"{len(values)} by {fault}" for fault, values in seconds.items())
              + f": all ended, the slowest {max(every):.1f} s after the signal or the failure (median {np.median(every):.1f} s), "
              "with the right exit code, and left nothing.")
    print(report)
    if args.write:
        write_measured(args.write, "stops", [report])
    sys.exit(max(every) > SECONDS)


if __name__ == "__main__":
    main()
