"""Time and memory of the report's numbers as the references grow: every method ranked, every measure taken.

    python benchmarks/evaluation.py [--queries 500] [--references 1000 3000] [--size 256] [--write docs/evaluation.md]

Synthetic slices go through the report's own code: rankers, scores, mixed queries, tables. Encoding and drawing, which
grow with the slices and not with their pairs, are left out. Each size runs in a process of its own; memory is the peak
of what only the process can use, slices included; scratch files hold what the system may write out. Growth is told by
the processor's time, which a busy machine disturbs less. The last line extrapolates from the two largest sizes: time by
the pairs of slices, memory and files by the slices.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from common import write_measured

from decomp_jax.data.schema import ANATOMY_CLASSES, Settings
from decomp_jax.evaluation import scores, tables
from decomp_jax.evaluation.rankers import Search, rankers
from decomp_jax.evaluation.scratch import map_blocks, scratch
from decomp_jax.evaluation.slices import SliceSet, shrink
from decomp_jax.retrieval import CodeBank
from decomp_jax.retrieval.statistics import Bootstrap

GRID, CODES, WIDTH, PER_PATIENT = 8, 512, 64, 25
FULL = (17_500, 35_000)  # BraTS 2023: slices of the query and of the reference patients


def draw_slices(n: int, size: int, *, prefix: str, seed: int) -> SliceSet:
    """Slices of random heads: an ellipse in six regions, in two of three a round lesion of three classes, any codes."""
    rng = np.random.default_rng(seed)
    y, x = (axis.astype(np.float32) for axis in np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j])
    fields = {name: scratch((n, size, size), np.uint8) for name in ("label", "anatomy", "segmentation")}
    thumbnail = scratch((n, *shrink(np.zeros((1, size, size, 1), np.float16)).shape[1:]), np.float16)
    for i in range(n):
        brain = np.hypot(x / rng.uniform(0.5, 0.9), y / rng.uniform(0.5, 0.9)) < 1
        fields["anatomy"][i] = brain * (1 + (x > 0) + 2 * np.digitize(y, (-0.3, 0.3)))
        distance = np.hypot(x - rng.uniform(-0.5, 0.5), y - rng.uniform(-0.5, 0.5)) / rng.uniform(0.1, 0.4)
        fields["label"][i] = brain * np.digitize(-distance, (-1, -0.6, -0.3)) * (rng.random() < 2 / 3)
        fields["segmentation"][i] = np.roll(fields["label"][i], rng.integers(-2, 3, 2), (0, 1))
        image = 0.5 * brain + 0.1 * fields["label"][i] + 0.05 * rng.random(x.shape)
        thumbnail[i] = shrink(image[None, ..., None].astype(np.float16))[0]
    rows = np.zeros(n, [("patient_id", "U16"), ("slice_index", "i4"), ("position_mm", "f4"), ("labelled", "?")])
    patient, rows["slice_index"] = np.divmod(np.arange(n), PER_PATIENT)
    rows["patient_id"] = np.char.mod(f"{prefix}%d", patient)
    rows["position_mm"], rows["labelled"] = 4.0 * rows["slice_index"], True
    codebook = np.random.default_rng(0).normal(size=(CODES, WIDTH)).astype(np.float32)
    codes = rng.integers(0, CODES, (2, n, GRID, GRID))
    normal, abnormal = codes[0], np.where(rng.random(codes[1].shape) < 0.1, codes[1], 0)
    bank = CodeBank.from_arrays(
        normal_indices=normal, abnormal_indices=abnormal, rows=rows,
        normal_codebook=codebook, abnormal_codebook=codebook,
    )
    return SliceSet(
        dataset=None, rows=rows, positions=np.arange(n), thumbnail=thumbnail, bank=bank,
        z_e_normal=map_blocks(codebook.__getitem__, normal), z_e_abnormal=map_blocks(codebook.__getitem__, abnormal),
        abnormality=rng.random(n), lesion_probability=rng.random(n), **fields,
    )


@contextlib.contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """Peak bytes of a block: `memory` that only this process can use, and `files`, its scratch files."""
    peak, ended = {"memory": 0, "files": 0}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            for name, size in (("memory", private_bytes() - before), ("files", scratch_bytes())):
                peak[name] = max(peak[name], size)

    before, thread = private_bytes(), threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def private_bytes() -> int:
    """Memory without the pages of mapped files, which the system drops or writes out when it needs room."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def scratch_bytes() -> int:
    """Size of the mapped files that have no name any more."""
    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    ranges = (line[0].split("-") for line in lines if line[-1] == "(deleted)")
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)


def measure(queries: int, references: int, size: int) -> dict[str, float]:
    """Seconds of the parts, and peaks of memory, slices included. The first block compiles and is part of it."""
    settings = Settings("phantom", size, anatomy_classes=ANATOMY_CLASSES)
    jax.devices()
    with peaks() as peak:
        query = draw_slices(queries, size, prefix="q", seed=0)
        reference = draw_slices(references, size, prefix="r", seed=1)
        start, worked = time.perf_counter(), time.process_time()
        search = Search(query, reference, settings)
        slice_scores = scores.score(search, rankers(search))
        scored = time.perf_counter()
        bootstrap = Bootstrap.draw(query.rows["patient_id"])
        summary = tables.Summary.average(slice_scores, bootstrap)
        tables.retrieval_tables(summary), tables.comparisons(summary), tables.strata(slice_scores, query, bootstrap)
        tabled = time.perf_counter()
        tables.mixed_table(tables.mixed_queries(search), query)
        end = time.perf_counter()
    return {
        "score": scored - start, "tables": tabled - scored, "mixed": end - tabled, "total": end - start,
        "work": time.process_time() - worked, "device": jax.devices()[0].device_kind, **peak,
    }


def _run_apart(queries: int, references: int, size: int) -> dict[str, float]:
    numbers = (f"--queries={queries}", f"--references={references}", f"--size={size}")
    command = (sys.executable, __file__, "--one", *numbers)
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _prediction(queries: int, references: list[int], runs: list[dict[str, float]]) -> str:
    """A prediction for `FULL`: time by pairs from the last run; memory and files on the line through the last two."""
    pairs = FULL[0] * FULL[1] / (queries * references[-1])
    hours = (pairs * runs[-1][name] / 3600 for name in ("total", "work"))
    text = "{:,} queries among {:,} references (predicted): {:.1f} h, {:.1f} h of processor time".format(*FULL, *hours)
    if len(runs) == 1:
        return text
    for name in ("memory", "files"):
        slope = (runs[-1][name] - runs[-2][name]) / (references[-1] - references[-2])
        full = runs[-1][name] + slope * (sum(FULL) - queries - references[-1])
        text += f"; {full / 2**30:.1f} GiB of {name} ({slope / 2**10:.0f} KiB a reference)"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--references", type=int, nargs="+", default=[1000, 3000])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--write", type=Path, help="document whose measured part to replace")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.queries, args.references[0], args.size)))
        return
    runs = [_run_apart(args.queries, references, args.size) for references in args.references]
    lines = []
    for references, run, before in zip(args.references, runs, (None, *runs)):
        times = " | ".join(f"{run[name]:.0f} s" for name in ("score", "tables", "mixed", "total", "work"))
        growth = f"{run['work'] / before['work']:.1f}" if before else ""
        sizes = " | ".join(f"{run[name] / 2**30:.2f} GiB" for name in ("memory", "files"))
        lines.append(f"| {references:,} | {times} | {growth} | {sizes} |")
    report = [
        f"{args.queries:,} queries, {args.size} px, {runs[-1]['device']}, {os.cpu_count()} cores\n",
        "| references | rank and score | tables | mixed queries | total | processor | times the line above | memory |"
        " scratch files |",
        "|---|---|---|---|---|---|---|---|---|",
        *lines,
        f"\n{_prediction(args.queries, args.references, runs)}",
    ]
    print(*report, sep="\n")
    if args.write:
        write_measured(args.write, "evaluation", report)


if __name__ == "__main__":
    main()
