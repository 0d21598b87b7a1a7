"""Retrieval beside what a user could pick instead: times, memory and exactness, in one table.

    python benchmarks/retrieval.py [--sizes 100000 1000000] [--rounds 7] [--write docs/retrieval.md]

Every method answers the same queries in turn, round after round in one process, so that a busy machine slows all alike;
given are medians of the rounds' ratios, with their quartiles. Needs faiss-cpu and torch.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import torch
from scipy.spatial.distance import cdist

from decomp_jax.retrieval import CodeBank

CODES, WIDTH, GRID, SLICES = 512, 64, (8, 8), 110
# Dense float32 codes take 16 KiB each: methods that need them run up to this many.
MOST_DENSE = 200_000
MARKS = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
Method = Callable[[np.ndarray, int], object]


def make_bank(kind: str, n: int, seed: int = 0) -> CodeBank:
    """A bank of volumes (each slice the one before with a tenth of its cells moved to a near code), or of noise."""
    rng = np.random.default_rng(seed)
    codebook = rng.normal(size=(CODES, WIDTH)).astype(np.float32)
    near = np.argsort(cdist(codebook, codebook), 1)[:, 1:9]

    def volumes() -> np.ndarray:
        indices = np.empty((-(-n // SLICES), SLICES, *GRID), np.uint16)
        code = np.where(rng.random(indices[:, 0].shape) < 0.5, rng.integers(0, CODES, indices[:, 0].shape), 7)
        for i in range(SLICES):
            moved = near[code, rng.integers(0, near.shape[1], code.shape)]
            indices[:, i] = code = np.where(rng.random(code.shape) < 0.1, moved, code)
        indices = indices.reshape(-1, *GRID)[:n]
        if kind == "duplicates":
            indices[rng.random(n) < 0.3] = 0
            indices = indices[rng.integers(0, n, n)]
        return indices

    rows = np.zeros(n, [("patient_id", "U8"), ("slice_index", "i4")])
    rows["patient_id"] = np.char.mod("p%d", np.arange(n) // SLICES)
    noise = {"size": (n, *GRID), "low": 0, "high": CODES}
    normal, abnormal = (rng.integers(**noise) if kind == "uniform" else volumes() for _ in range(2))
    return CodeBank.from_arrays(
        normal_indices=normal, abnormal_indices=abnormal, rows=rows,
        normal_codebook=codebook, abnormal_codebook=codebook,
    )


def make_queries(bank: CodeBank, part: str, count: int, seed: int = 1) -> np.ndarray:
    """Codes of the bank with every twentieth cell replaced."""
    rng = np.random.default_rng(seed)
    codes = getattr(bank, f"{part}_indices")[rng.integers(0, len(bank), count)]
    return np.where(rng.random(codes.shape) < 0.05, rng.integers(0, CODES, codes.shape), codes)


def product_quantiser(bank: CodeBank) -> faiss.IndexPQ:
    """FAISS PQ with our codebook in all 64 places: the same distance, from codes of 9 bits."""
    cells = GRID[0] * GRID[1]
    index = faiss.IndexPQ(cells * WIDTH, cells, 9)
    faiss.copy_array_to_vector(np.tile(bank.normal_codebook.ravel(), cells), index.pq.centroids)

    def pack(codes: np.ndarray) -> np.ndarray:
        bits = (codes.reshape(len(codes), cells, 1) >> np.arange(9, dtype=np.uint16) & 1).astype(np.uint8)
        return np.packbits(bits.reshape(len(codes), -1), axis=1, bitorder="little")

    pieces = np.array_split(bank.normal_indices, -(-len(bank) // 10_000))
    faiss.copy_array_to_vector(np.concatenate([pack(codes) for codes in pieces]).ravel(), index.codes)
    index.is_trained, index.ntotal = True, len(bank)
    return index


def rivals(bank: CodeBank) -> dict[str, Method]:
    """What a user could pick instead, all exact but for float32 rounding."""
    quantiser = product_quantiser(bank)
    book = bank.normal_codebook
    methods: dict[str, Method] = {"faiss PQ": lambda q, k: quantiser.search(book[q].reshape(len(q), -1), k)}
    if len(bank) > MOST_DENSE:
        return methods
    dense = book[bank.normal_indices].reshape(len(bank), -1)
    norms = np.square(dense).sum(1)
    flat = faiss.IndexFlatL2(dense.shape[1])
    flat.add(dense)
    dense_torch, norms_torch = torch.from_numpy(dense), torch.from_numpy(norms)

    def by_numpy(q: np.ndarray, k: int) -> np.ndarray:
        distance = norms - 2 * book[q].reshape(len(q), -1) @ dense.T
        near = np.argpartition(distance, k, axis=1)[:, :k]
        return np.take_along_axis(near, np.argsort(np.take_along_axis(distance, near, 1), 1), 1)

    def by_torch(q: np.ndarray, k: int) -> torch.Tensor:
        query = torch.from_numpy(book[q].reshape(len(q), -1))
        return torch.topk(torch.addmm(norms_torch, query, dense_torch.T, alpha=-2), k, largest=False).indices

    return methods | {
        "faiss flat": lambda q, k: flat.search(book[q].reshape(len(q), -1), k), "numpy matmul": by_numpy,
        "torch matmul": by_torch,
    }


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float], digits: int = 1) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def compare(bank: CodeBank, methods: dict[str, Method], queries: int, k: int, rounds: int) -> Iterator[str]:
    """A table line a method: its time over ours."""
    ours: Method = lambda q, k: bank.search(normal=q, k=k)  # noqa: E731
    times: dict[str, list[float]] = {name: [] for name in ("ours", *methods)}
    for i in range(rounds + 1):
        q = make_queries(bank, "normal", queries, seed=i)
        for name, method in {"ours": ours, **methods}.items():
            times[name].append(seconds(lambda: method(q, k)))
    for name, values in times.items():
        ratios = np.divide(values, times["ours"])[1:]  # the first round compiles
        per_query = np.median(values[1:]) / queries * 1e3
        yield f"| {len(bank):,} | {queries} | {k} | {name} | {per_query:.2f} | {spread(list(ratios))} |"


def both_over_one(bank: CodeBank, queries: int, rounds: int) -> str:
    normal, abnormal = (make_queries(bank, part, queries) for part in ("normal", "abnormal"))
    ratios = []
    for _ in range(rounds + 1):
        one = seconds(lambda: bank.search(normal=normal))
        both = seconds(lambda: bank.search(normal=normal, abnormal=abnormal))
        other = seconds(lambda: bank.search(abnormal=abnormal))
        ratios.append(2 * both / (one + other))
    return f"- Both codes over one, {len(bank):,} codes, {queries} queries: {spread(ratios[1:], 2)} times the time."


def run_apart(*flags: str, **environment: str) -> dict[str, float]:
    """What this program, run with `flags` in a process of its own, prints."""
    run = subprocess.run([sys.executable, __file__, *flags], check=True, stdout=subprocess.PIPE,
                         env={**os.environ, **environment})
    return json.loads(run.stdout)


def fresh_process(directory: str) -> None:
    """Opens a bank and searches it twice; prints what that took as JSON. Run in a process of its own."""
    def memory(kind: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))

    CodeBank.load(directory)
    query = np.load(f"{directory}/normal_indices.npy", mmap_mode="r")[:1] + 0
    jnp.zeros(1).block_until_ready()
    opening = seconds(lambda: CodeBank.load(directory))
    bank, before = CodeBank.load(directory), memory("RssAnon")
    first, second = (seconds(lambda: bank.search(normal=query)) for _ in range(2))
    print(json.dumps({"open": opening, "first": first, "second": second, "anonymous": memory("RssAnon") - before,
                      "mapped": memory("RssFile")}))


def opening(bank: CodeBank) -> str:
    with tempfile.TemporaryDirectory() as folder:
        bank.save(f"{folder}/bank")
        cost = run_apart("--fresh", f"{folder}/bank")
    return (f"- A bank of {len(bank):,} codes in a fresh process: opened in {cost['open'] * 1e3:.0f} ms; first search "
            f"{cost['first']:.1f} s (layout and compilation), second {cost['second'] * 1e3:.0f} ms; a distance adds "
            f"{cost['anonymous']:.0f} MB ({cost['mapped']:.0f} MB more are mapped files, which the system can drop).")


def count_wrong(n: int, queries: int) -> None:
    """Prints how many answers differ from float64 brute force, over shards of fake devices."""
    wrong = {"answers": 0, "wrong": 0}
    for kind in ("volumes", "uniform", "duplicates"):
        bank = make_bank(kind, n)
        asked = {part: make_queries(bank, part, queries) for part in ("normal", "abnormal")}
        table = cdist(bank.normal_codebook.astype(np.float64), bank.normal_codebook.astype(np.float64), "sqeuclidean")
        square = {part: np.stack([table[one, getattr(bank, f"{part}_indices")].sum((1, 2)) for one in query])
                  for part, query in asked.items()}
        for parts in (("normal",), ("abnormal",), ("normal", "abnormal")):
            true = sum(square[part] for part in parts)
            for k in (1, 10, 100, 1000):
                nearest = np.sort(true, 1)[:, :k]
                for shards in (1, 2, 4, 8):
                    mesh = jax.sharding.Mesh(jax.devices()[:shards], ("data",))
                    hits = bank.search(**{part: asked[part] for part in parts}, k=k, mesh=mesh)
                    found = np.take_along_axis(true, hits.rows, 1)
                    wrong["answers"] += found.size
                    wrong["wrong"] += int((np.abs(found - nearest) > 1e-6 * nearest).sum())
                    wrong["wrong"] += int(sum(len(set(row)) < k for row in hits.rows))
    print(json.dumps(wrong))


def exactness(n: int) -> str:
    counts = run_apart("--exact", str(n), XLA_FLAGS="--xla_force_host_platform_device_count=8")
    return (f"- Exactness at {n:,} codes (volumes, uniform, duplicates; normal, abnormal, both; k 1, 10, 100, 1000; 1, "
            f"2, 4, 8 shards): {counts['wrong']} of {counts['answers']:,} hits differ from float64 brute force.")


def on_gpu(n: int, rounds: int) -> Iterator[str]:
    """Lines for a GPU: torch in bfloat16 and float32 beside ours, and ceilings measured in the same run."""
    bank = make_bank("volumes", n)
    book = torch.from_numpy(bank.normal_codebook).cuda()
    indices = torch.from_numpy(bank.normal_indices.astype(np.int32)).cuda()
    dense = torch.cat([book[some].reshape(len(some), -1).bfloat16() for some in indices.split(1 << 18)])
    norms = torch.cat([some.float().square().sum(1) for some in dense.split(1 << 18)])
    stream = jnp.zeros((n, 64), jnp.uint16)
    read = jax.jit(lambda x: x.astype(jnp.int32).sum())
    square = jnp.ones((8192, 8192), jnp.bfloat16)
    multiply = jax.jit(lambda x: x @ x)
    for queries in (1, 256, 4096):
        q = make_queries(bank, "normal", queries)

        def by_torch() -> None:
            for some in torch.from_numpy(q).cuda().split(64):
                query = book[some].reshape(len(some), -1).bfloat16()
                torch.topk(norms - 2 * (query @ dense.T).float(), 10, largest=False).indices.cpu()

        def by_cdist() -> None:
            for some in torch.from_numpy(q).cuda().split(64):
                distance = torch.cdist(book[some].reshape(len(some), -1), dense.float())
                torch.topk(distance, 10, largest=False).indices.cpu()

        methods = {"ours": lambda: bank.search(normal=q), "torch bf16": by_torch,
                   "read codes once": lambda: read(stream).block_until_ready(),
                   "bf16 matmul": lambda: multiply(square).block_until_ready()}
        methods |= {"torch cdist": by_cdist} if n <= 1_000_000 else {}
        times = {name: [seconds(work) for _ in range(rounds + 1)][1:] for name, work in methods.items()}
        scale = 2 * queries * n * 4096 / (2 * 8192**3)  # the ceiling of a search by matmul
        times["bf16 matmul"] = [value * scale for value in times["bf16 matmul"]]
        for name, values in times.items():
            yield (f"| {n:,} | {queries} | 10 | {name} | {np.median(values) / queries * 1e3:.3f} | "
                   f"{spread(list(np.divide(values, times['ours'])))} |")


def report(sizes: list[int], batch: int, rounds: int) -> Iterator[str]:
    device = jax.devices()[0]
    yield (f"{device.device_kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start. Times over "
           "ours: median (quartiles).")
    yield "\n| codes | queries | k | method | ms a query | time over ours |\n|---|---|---|---|---|---|"
    if device.platform == "gpu":
        for n in sizes:
            yield from on_gpu(n, rounds)
        return
    banks = [make_bank("volumes", n) for n in sizes]
    for bank in banks:
        methods = rivals(bank)
        for queries, k in ((1, 10), (batch if len(bank) <= MOST_DENSE else min(batch, 64), 10), (min(batch, 64), 100)):
            yield from compare(bank, methods, queries, k, rounds)
    yield ""
    for bank in banks:
        yield both_over_one(bank, min(batch, 64), rounds)
        yield opening(bank)
    yield exactness(min(20_000, *sizes))
    yield f"- Load at the end: {os.getloadavg()[0]:.1f}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000], help="codes in the banks")
    parser.add_argument("--batch", type=int, default=256, help="queries in a batch (at most 64 above 200,000 codes)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", type=Path, help="document whose measured part to replace")
    parser.add_argument("--fresh", help=argparse.SUPPRESS)
    parser.add_argument("--exact", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.fresh:
        return fresh_process(flags.fresh)
    if flags.exact:
        return count_wrong(flags.exact, queries=8)
    lines = []
    for line in report(flags.sizes, flags.batch, flags.rounds):
        print(line, flush=True)
        lines.append(line)
    if flags.write:
        before, _, rest = flags.write.read_text().partition(MARKS[0])
        flags.write.write_text(before + MARKS[0] + "\n".join(lines) + "\n" + MARKS[1] + rest.partition(MARKS[1])[2])


if __name__ == "__main__":
    main()
