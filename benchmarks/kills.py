"""Kills training and encoding at random moments, and checks that nothing is lost.

    python benchmarks/kills.py [--kills=100] [--lanes=2] [--seed=0] [--data=DIR] [--write=docs/pods.md]

A tiny model trains and encodes in processes that are killed by SIGKILL or SIGTERM and started again, over and over.
Every run must end with the parameters of a run that nobody disturbed, to the byte; no checkpoint may be found damaged;
every bank must be absent or whole, and equal in the end; what SIGTERM stops may leave no partial folder. Processes are
forked from one that has imported JAX, which saves most of the time that a start takes.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from common import write_measured

from decomp_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from decomp_jax.data import pipeline
from decomp_jax.errors import EXIT_UNFINISHED, run_program
from decomp_jax.inference import encode
from decomp_jax.retrieval import CodeBank
from decomp_jax.training import loop

CONFIG = Config(
    model=ModelConfig(widths=(4, 4), code_dim=4, codebook_size=8, own_blocks=1, spade_width=4, dtype="float32"),
    train=TrainConfig(
        steps=40, warmup_steps=10, ramp_steps=5, batch_size=4, checkpoint_every=3, log_every=1, eval_every=0
    ),
)
SPLIT = "train"  # encoded: the most slices
POLL_SECONDS = 0.002
EARLY, SAVING = 0.1, 0.4  # shares of a training's kills that come while it is starting, and while it saves
SAVE_SECONDS = 0.03
TRAIN_KILLS, ENCODE_KILLS = 8, 4  # of each run and of its bank


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What a run comes to that nobody disturbs, and the seconds it took to begin and to end."""

    params: str
    bank: dict[str, bytes]
    start: float
    train: float
    encode: float


@dataclasses.dataclass
class Life:
    """A forked process that does `job`."""

    job: Callable[[], None]
    log: Path

    def __post_init__(self) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            self._child()

    def _child(self) -> None:
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            run_program(self.job)
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(self, until: Callable[[], bool], seconds: float = 600.0) -> int | None:
        """Its exit code if it ends before `until` holds or the time is over."""
        end = time.perf_counter() + seconds
        while not until() and time.perf_counter() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(POLL_SECONDS)
        return None

    def kill(self, number: int) -> int:
        os.kill(self.pid, number)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def never() -> bool:
    return False


def now() -> bool:
    return True


def train(config: Config, workdir: Path) -> None:
    if not loop.run(config, workdir):
        sys.exit(EXIT_UNFINISHED)


def write_bank(workdir: Path, data: str, out: Path) -> None:
    pipeline.IMAGES_PER_DEVICE = 2  # so that writing takes long enough to be hit
    encode.encode_split(workdir, data, SPLIT, out)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def partial_banks(out: Path) -> list[Path]:
    return list(out.parent.glob(f".{out.name}.partial-*"))


def read_bank(out: Path) -> dict[str, bytes]:
    CodeBank.load(out, verify=True)
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def require(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"FAILED: {what}")


def undisturbed(config: Config, work: Path) -> Undisturbed:
    """Trains and encodes twice: the first time compiles."""
    for name in ("compiles", "undisturbed"):
        workdir, begun, started = work / name, work / name / "metrics.jsonl", time.perf_counter()
        life = Life(functools.partial(train, config, workdir), work / f"{name}.log")
        life.wait(lambda: size(begun) > 0)
        start = time.perf_counter() - started
        require(life.wait(never) == 0, f"training ends, see {life.log}")
        trained, out = time.perf_counter() - started - start, work / f"{name}.bank"
        life = Life(functools.partial(write_bank, workdir, config.data.dir, out), work / f"{name}.log")
        life.wait(lambda: bool(partial_banks(out)))
        began = time.perf_counter()
        require(life.wait(never) == 0, f"encoding ends, see {life.log}")
        encoded = time.perf_counter() - began
    return Undisturbed(params(workdir), read_bank(out), start, trained, encoded)


def params(workdir: Path) -> str:
    return json.loads((workdir / "done.json").read_text())["params_sha256"]


def strike(life: Life, until: Callable[[], bool], rng: np.random.Generator, span: float) -> tuple[int, int] | None:
    """Kills a process at a random moment of `span` seconds after `until` -> (signal, exit code); None if it ended first."""
    code = life.wait(until)
    if code is None:
        code = life.wait(never, rng.uniform(0, span))
    if code is not None:
        require(code == 0, f"a process that nobody killed ends well, see {life.log}")
        return None
    number = int(rng.choice([signal.SIGKILL, signal.SIGTERM]))
    return number, life.kill(number)


def lane(seed: int, kills: int, config: Config, work: Path, expected: Undisturbed) -> collections.Counter:
    """Runs, one after another, until `kills` processes were killed; after `TRAIN_KILLS` a run is let through to its end."""
    rng, tally = np.random.default_rng(seed), collections.Counter()

    def count(phase: str, number: int) -> None:
        tally[phase] += 1
        tally[signal.Signals(number).name] += 1
        tally["kills"] += 1
        print(f"lane {seed}: kill {tally['kills']}, {phase}, {signal.Signals(number).name}", file=sys.stderr)

    while tally["kills"] < kills:
        name = f"lane{seed}-run{tally['runs']}"
        workdir, log = work / name, work / f"{name}.log"
        metrics, saves, kills_before = workdir / "metrics.jsonl", workdir / "checkpoints", tally["kills"]
        while not (workdir / "done.json").exists():
            life, before = Life(functools.partial(train, config, workdir), log), time.time_ns()
            begun = lambda: metrics.exists() and metrics.stat().st_mtime_ns > before and size(metrics) > 0
            if tally["kills"] >= min(kills, kills_before + TRAIN_KILLS):
                require(life.wait(never) == 0, f"a run that is let through ends, see {log}")
                continue
            saving = lambda: begun() and any(saves.glob("*.orbax-checkpoint-tmp"))
            hit: list[str] = []
            kill = life.kill

            def note(number: int) -> int:  # the phase, as it is the moment before
                hit.append("starting" if not begun() else "saves" if saving() else "steps")
                return kill(number)

            life.kill = note
            moments = [(now, expected.start), (saving, SAVE_SECONDS), (begun, expected.train / 4)]
            moment = moments[rng.choice(3, p=(EARLY, SAVING, 1 - EARLY - SAVING))]
            if struck := strike(life, moment[0], rng, moment[1]):
                number, code = struck
                count(hit[0], number)
                allowed = (-number,) if number == signal.SIGKILL else (0, EXIT_UNFINISHED, 128 + number, -number)
                require(code in allowed, f"{hit[0]}: exit code {code} after {number}, see {log}")
        require(params(workdir) == expected.params, f"{workdir}: parameters of a run that nobody disturbed")
        require("damaged" not in log.read_text(), f"no damaged checkpoint, see {log}")
        tally["runs"] += 1

        out = work / f"{name}.bank"
        for last in [False] * ENCODE_KILLS + [True]:
            life = Life(functools.partial(write_bank, workdir, config.data.dir, out), log)
            known = set(partial_banks(out))
            begun = lambda: bool(set(partial_banks(out)) - known)
            if last:
                require(life.wait(never) == 0, f"encoding ends, see {log}")
            elif struck := strike(life, begun, rng, expected.encode):
                number, code = struck
                count("encode", number)
                new = set(partial_banks(out)) - known
                require(number == signal.SIGKILL or not new, f"SIGTERM leaves no partial bank, but {new}")
                require(code in (-number, 128 + number, 0), f"encode: exit code {code} after {number}, see {log}")
            if out.exists():
                require(read_bank(out) == expected.bank, f"{out}: the bank of a run that nobody disturbed")
                tally["banks"] += 1
                break
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--lanes", type=int, default=2, help="runs side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="a data set of 64 px slices; default: a phantom of ten patients is made")
    parser.add_argument("--write", type=Path, help="document whose measured part to replace")
    args = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        jax.config.update("jax_compilation_cache_dir", str(work / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        data = args.data or str(work / "phantom")
        if not args.data:
            command = [sys.executable, "-m", "data_prep", "phantom", "--out", data, "--patients=10"]
            subprocess.run(command, check=True)
        config = dataclasses.replace(CONFIG, data=DataConfig(data, read_threads=2))
        expected = undisturbed(config, work)
        print(f"undisturbed: {expected.start:.1f} s to start, {expected.train:.1f} s of steps, "
              f"{expected.encode:.1f} s of encoding", flush=True)
        share = [args.kills // args.lanes + (i < args.kills % args.lanes) for i in range(args.lanes)]
        seeds = [args.lanes * args.seed + i for i in range(args.lanes)]
        with concurrent.futures.ProcessPoolExecutor(args.lanes, multiprocessing.get_context("fork")) as pool:
            tallies = pool.map(functools.partial(lane, config=config, work=work, expected=expected), seeds, share)
            tally = sum(tallies, collections.Counter())
    report = (
        f"{tally['kills']} kills ({tally['SIGKILL']} SIGKILL, {tally['SIGTERM']} SIGTERM): {tally['starting']} while "
        f"starting, {tally['steps']} in steps, {tally['saves']} in saves, {tally['encode']} in encode; {tally['runs']} "
        f"runs ended, all with the undisturbed parameters to the byte; {tally['banks']} banks, none half-written, all "
        f"with the undisturbed bytes; no checkpoint found damaged; {time.perf_counter() - begin:.0f} s."
    )
    print(report)
    if args.write:
        write_measured(args.write, "kills", [report])


if __name__ == "__main__":
    main()
