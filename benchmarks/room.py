"""How long a reader waits in the reading room: questions and paintings at an archive of many slices, once warm.

    python benchmarks/room.py [--workdir models/phantom64] [--slices 100000] [--rounds 15] [--write docs/room.md]

The bank is made up: codes of phantom patients, of whose cells a seventh come from other slices, so that they differ.
Times are of `room/session.py`, on all cores, without browser and HTTP.
"""

import argparse
import base64
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import write_measured

from decomp_jax.data.records import SliceDataset
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.encode import encode_split
from decomp_jax.retrieval import CodeBank
from decomp_jax.room.session import Room

PATIENTS, SLICES_A_PATIENT, OTHER_CELLS = 40, 25, 0.15


def made_up(bank: CodeBank, slices: int) -> CodeBank:
    """A bank of so many slices that are like those of `bank`."""
    rng, rows = np.random.default_rng(0), np.resize(bank.rows, slices).copy()
    rows["patient_id"] = [f"p{i // SLICES_A_PATIENT}" for i in range(slices)]
    indices = {}
    for path in ("normal", "abnormal"):
        own, other = (np.asarray(getattr(bank, f"{path}_indices"))[rng.integers(len(bank), size=slices)] for _ in "ab")
        indices[f"{path}_indices"] = np.where(rng.random(own.shape) < OTHER_CELLS, other, own)
    books = {f"{path}_codebook": getattr(bank, f"{path}_codebook") for path in ("normal", "abnormal")}
    return CodeBank.from_arrays(**indices, **books, rows=rows, meta=bank.meta)


def milliseconds(run: Callable[[int], object], rounds: int) -> str:
    times = []
    for i in range(rounds):
        began = time.perf_counter()
        run(i)
        times.append(1000 * (time.perf_counter() - began))
    return f"{np.median(times):.0f} ({np.max(times):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("models/phantom64"))
    parser.add_argument("--slices", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, encoded = Path(folder) / "data", Path(folder) / "bank"
        subprocess.run([sys.executable, "-m", "data_prep", "phantom", "--out", data, "--patients", str(PATIENTS)],
                       check=True)
        encode_split(args.workdir, data, "train", encoded)
        images = SliceDataset(data, "query").stack(("image",))["image"]
        bank = made_up(CodeBank.load(encoded), args.slices)
    room = Room(Decomposer.restore(args.workdir), bank, None, bank_digest="")
    began = time.perf_counter()
    for step in room.warm_up():
        step()
    ready = time.perf_counter() - began
    size, brought = images.shape[1], [_brought(image) for image in images]
    half = size * size // 2

    def ask(share: float) -> Callable[[int], object]:
        return lambda i: room.ask({"anatomy": brought[i % len(brought)], "lesion": brought[-1 - i % len(brought)],
                                   "share": share})

    def drawing(i: int) -> list[int]:
        return [0, half, 1, 5 * size + i, 0, half - 5 * size - i]

    for run in (ask(0.5), lambda i: room.paint({"anatomy": brought[0], "drawing": drawing(i)})):
        run(0)
    rows = [
        ("hits by anatomy", milliseconds(ask(0), args.rounds)), ("hits by lesion", milliseconds(ask(1), args.rounds)),
        ("hits by both", milliseconds(ask(0.5), args.rounds)),
        ("hits by a drawing", milliseconds(lambda i: room.ask({"lesion": {"drawing": drawing(i)}, "share": 1}),
                                           args.rounds)),
        ("a painting after a stroke",
         milliseconds(lambda i: room.paint({"anatomy": brought[0], "drawing": drawing(i)}), args.rounds)),
    ]
    table = ["| | ms, median (longest) |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    lines = [*table, "", f"{len(bank):,} slices; ready {ready:.0f} s after the start."]
    print("\n".join(lines))
    if args.write:
        write_measured(args.write, "room", lines)


def _brought(image: np.ndarray) -> dict[str, str]:
    return {"pixels": base64.b64encode(image.astype("<f2").tobytes()).decode()}


if __name__ == "__main__":
    main()
