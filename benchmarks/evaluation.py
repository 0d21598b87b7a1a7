"""Time and memory of the report's numbers as the references grow: every method ranked, every measure taken.

    python benchmarks/evaluation.py [--queries 1000] [--references 1000 4000 16000] [--size 64] [--write docs/evaluation.md]

Synthetic slices go through the report's own code: rankers, scores, mixed queries, tables. Encoding and drawing, which
grow with the slices and not with their pairs, are left out. Each size runs in a process of its own; memory is what
its peak rose by over what it held with the slices loaded. Growth is told by the processor's time, which a busy machine
disturbs less. The last line extrapolates to 30,000 queries among 30,000 references from the largest size, by the pairs
of slices.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from common import write_measured

from decomp_jax.data.schema import ANATOMY_CLASSES, Settings
from decomp_jax.evaluation import scores, tables
from decomp_jax.evaluation.rankers import rankers
from decomp_jax.evaluation.slices import SliceSet
from decomp_jax.retrieval import CodeBank
from decomp_jax.retrieval.statistics import Bootstrap

GRID, CODES, WIDTH, PER_PATIENT = 8, 512, 64, 25
FULL = 30_000


def draw_slices(n: int, size: int, *, prefix: str, seed: int) -> SliceSet:
    """Slices of random heads: an ellipse in six regions, in two of three a round lesion of three classes, any codes."""
    rng = np.random.default_rng(seed)
    y, x = (axis.astype(np.float32) for axis in np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j])
    fields = {name: np.empty((n, size, size), np.uint8) for name in ("label", "anatomy", "segmentation")}
    image = np.empty((n, size, size, 1), np.float16)
    for i in range(n):
        brain = np.hypot(x / rng.uniform(0.5, 0.9), y / rng.uniform(0.5, 0.9)) < 1
        fields["anatomy"][i] = brain * (1 + (x > 0) + 2 * np.digitize(y, (-0.3, 0.3)))
        distance = np.hypot(x - rng.uniform(-0.5, 0.5), y - rng.uniform(-0.5, 0.5)) / rng.uniform(0.1, 0.4)
        fields["label"][i] = brain * np.digitize(-distance, (-1, -0.6, -0.3)) * (rng.random() < 2 / 3)
        fields["segmentation"][i] = np.roll(fields["label"][i], rng.integers(-2, 3, 2), (0, 1))
        image[i, ..., 0] = 0.5 * brain + 0.1 * fields["label"][i] + 0.05 * rng.random(x.shape)
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
        rows=rows, positions=np.arange(n), image=image, bank=bank, z_e_normal=codebook[normal],
        z_e_abnormal=codebook[abnormal], abnormality=rng.random(n), lesion_probability=rng.random(n), **fields,
    )


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(queries: int, references: int, size: int) -> dict[str, float]:
    """Seconds of the parts, and the bytes by which the peak rose. The first block compiles and is part of it."""
    settings = Settings("phantom", size, anatomy_classes=ANATOMY_CLASSES)
    query = draw_slices(queries, size, prefix="q", seed=0)
    reference = draw_slices(references, size, prefix="r", seed=1)
    before, start, worked = peak_bytes(), time.perf_counter(), time.process_time()
    depth = min(scores.DEPTH, references)
    methods = rankers(query, reference, depth=depth, lesion_classes=len(settings.lesion_classes))
    overlap = scores.label_overlap(query, reference, settings)
    found = scores.score(query, reference, methods, overlap)
    scored = time.perf_counter()
    bootstrap = Bootstrap.of(query.rows["patient_id"])
    summary = tables.Summary.of(found, bootstrap)
    tables.retrieval_tables(summary), tables.comparisons(summary), tables.strata(found, query, bootstrap)
    tabled = time.perf_counter()
    tables.mixed_table(tables.mixed_queries(query, reference, overlap), query)
    end = time.perf_counter()
    return {
        "score": scored - start, "tables": tabled - scored, "mixed": end - tabled, "total": end - start,
        "work": time.process_time() - worked, "bytes": peak_bytes() - before, "device": jax.devices()[0].device_kind,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--references", type=int, nargs="+", default=[1000, 4000, 16_000])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--write", type=Path, help="document whose measured part to replace")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.queries, args.references[0], args.size)))
        return
    lines, last = [], None
    for references in args.references:
        command = (sys.executable, __file__, "--one", f"--queries={args.queries}", f"--references={references}",
                   f"--size={args.size}")
        taken = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        times = " | ".join(f"{taken[name]:.0f} s" for name in ("score", "tables", "mixed", "total", "work"))
        growth = f"{taken['work'] / last:.1f}" if last else ""
        lines.append(f"| {references:,} | {times} | {growth} | {taken['bytes'] / 2**30:.2f} GiB |")
        last = taken["work"]
    hours = (taken[name] * FULL**2 / (args.queries * args.references[-1]) / 3600 for name in ("total", "work"))
    report = [
        f"{args.queries:,} queries, {args.size} px, {taken['device']}, {os.cpu_count()} cores\n",
        "| references | rank and score | tables | mixed queries | total | processor | times the line above | memory |",
        "|---|---|---|---|---|---|---|---|",
        *lines,
        "\n{:,} queries among as many references: {:.1f} h, {:.1f} h of processor time".format(FULL, *hours),
    ]
    print(*report, sep="\n")
    if args.write:
        write_measured(args.write, "evaluation", report)


if __name__ == "__main__":
    main()
