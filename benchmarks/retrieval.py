"""Retrieval beside what a user could pick instead: times, memory, exactness, and the speed of encoding.

    python benchmarks/retrieval.py [--sizes 100000 1000000] [--rounds 7] [--parts codes queries]
                                   [--write docs/retrieval.md]

Every method answers the same queries in turn, round after round in one process, so that a busy machine slows all alike;
given are medians of the rounds' ratios, with their quartiles. Needs faiss-cpu and torch. On a GPU, `--sizes 1000000
10000000` compares with torch on the GPU instead.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same GPU

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import spread, write_measured
from scipy.spatial.distance import cdist

from decomp_jax.retrieval import CodeBank, Queries, codes, latents, relative

CODES, WIDTH, GRID, SLICES = 512, 64, (8, 8), 110
# Dense float32 codes take 16 KiB each: methods that need them run up to this many.
MOST_DENSE = 200_000
# Least factor over a method, and the one aimed at, by (codes, queries, k).
GOALS = {
    (100_000, 1, 10): {"faiss flat": "20, 25", "faiss PQ": "1.5, 2"},
    (100_000, 256, 10): {"faiss flat": "5, 8", "faiss PQ": "10, 15"},
    (100_000, 256, 100): {"faiss PQ": "-, 5"},
    (1_000_000, 1, 10): {"faiss PQ": "2, 3"},
    (1_000_000, 64, 10): {"faiss PQ": "12, 20"},
    (1_000_000, 256, 10): {"faiss PQ": "12, 20"},
    (1_000_000, 64, 100): {"faiss PQ": "-, 5"},
}
Method = Callable[[np.ndarray, int], object]
PATIENT_SLICES, QUERY_SLICES = 100, 65


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


def product_quantiser(bank: CodeBank, path: str) -> faiss.IndexPQ:
    """FAISS PQ with our codebook in all 64 places: the same distance, from codes of 9 bits."""
    cells = GRID[0] * GRID[1]
    index = faiss.IndexPQ(cells * WIDTH, cells, 9)
    faiss.copy_array_to_vector(np.tile(getattr(bank, f"{path}_codebook").ravel(), cells), index.pq.centroids)

    def pack(codes: np.ndarray) -> np.ndarray:
        bits = (codes.reshape(len(codes), cells, 1) >> np.arange(9, dtype=np.uint16) & 1).astype(np.uint8)
        return np.packbits(bits.reshape(len(codes), -1), axis=1, bitorder="little")

    pieces = np.array_split(getattr(bank, f"{path}_indices"), -(-len(bank) // 10_000))
    faiss.copy_array_to_vector(np.concatenate([pack(codes) for codes in pieces]).ravel(), index.codes)
    index.is_trained, index.ntotal = True, len(bank)
    return index


def rivals(bank: CodeBank) -> dict[str, Method]:
    """What a user could pick instead, all exact but for float32 rounding."""
    quantiser = product_quantiser(bank, "normal")
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


def race(bank: CodeBank, methods: dict[str, Method], queries: int, k: int, rounds: int) -> dict[str, np.ndarray]:
    """Seconds [rounds] that each method, ours the first, takes for the same queries; a round before compiles."""
    methods = {"ours": lambda q, k: bank.search(normal=q, k=k), **methods}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for i in range(rounds + 1):
        q = make_queries(bank, "normal", queries, seed=i)
        for name, method in methods.items():
            times[name].append(seconds(lambda: method(q, k)))
    return {name: np.array(values[1:]) for name, values in times.items()}


def lines_of(times: dict[str, np.ndarray], *setting: int) -> Iterator[str]:
    """A table line a method, `setting` being (codes, queries, k)."""
    for name, values in times.items():
        cells = (*(f"{value:,}" for value in setting), name, f"{np.median(values) / setting[1] * 1e3:.2f}",
                 spread(values / times["ours"], 1), GOALS.get(setting, {}).get(name, ""))
        yield f"| {' | '.join(cells)} |"


def both_over_one(bank: CodeBank, queries: int, rounds: int) -> str:
    normal, abnormal = (make_queries(bank, part, queries) for part in ("normal", "abnormal"))
    ratios = []
    for _ in range(rounds + 1):
        one = seconds(lambda: bank.search(normal=normal))
        both = seconds(lambda: bank.search(normal=normal, abnormal=abnormal))
        other = seconds(lambda: bank.search(abnormal=abnormal))
        ratios.append(2 * both / (one + other))
    return (f"- Both codes over one, {len(bank):,} codes, {queries} queries: {spread(np.array(ratios[1:]), 2)} times "
            "the time (at most 2.1).")


def run_apart(*flags: str, **environment: str) -> dict[str, float]:
    """What this program, run with `flags` in a process of its own, prints."""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", **environment}
    run = subprocess.run([sys.executable, __file__, *flags], check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(run.stdout)


def fresh_process(directory: str, parts: list[str], patients: bool) -> None:
    """Opens a bank and searches it twice, for slices or for patients; prints what that took as JSON. Run in a process
    of its own.

    Memory in MB, as Linux counts it: what the process holds after the second search beyond what it held before it
    opened the bank, JAX being up; the most it held between; `mapped` is the part that is pages of files.
    """
    def memory(kind: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))

    jnp.zeros(1).block_until_ready()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    resident, mapped = memory("VmRSS"), memory("RssFile")
    opening = seconds(lambda: CodeBank.load(directory))
    bank = CodeBank.load(directory)
    rows = slice(QUERY_SLICES if patients else 1)
    queries = codes(**{part: getattr(bank, f"{part}_indices")[rows] for part in parts})

    def search() -> object:
        if patients:
            return bank.search_patients(queries, heights=bank.rows["slice_index"][rows])
        return bank.search(queries)

    first, second = (seconds(search) for _ in range(2))
    print(json.dumps({"open": opening, "first": first, "second": second, "resident": memory("VmRSS") - resident,
                      "mapped": memory("RssFile") - mapped, "peak": memory("VmHWM") - resident}))


def opening(bank: CodeBank) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        bank.save(f"{folder}/bank")
        one, both = (run_apart("--fresh", f"{folder}/bank", *parts) for parts in (["normal"], ["normal", "abnormal"]))
    yield (f"- A bank of {len(bank):,} codes in a fresh process: opened in {one['open'] * 1e3:.0f} ms (at most 50); "
           f"first search {one['first']:.1f} s (layout and compilation), second {one['second'] * 1e3:.0f} ms.")
    limit = f" (at most {256 * len(bank) // 1_000_000})" if len(bank) >= 1_000_000 else ""
    yield (f"- Memory for it: {one['resident']:.0f} MB{limit}, of which {one['mapped']:.0f} MB are pages of files; at "
           f"the peak {one['peak']:.0f} MB. By both codes, which are twice as long: {both['resident']:.0f} MB, peak "
           f"{both['peak']:.0f} MB.")


def count_wrong(n: int, queries: int) -> None:
    """Prints how many hits differ from float64 brute force or from those of one shard, over shards of fake devices."""
    wrong = {"hits": 0, "wrong": 0}
    for kind in ("volumes", "uniform", "duplicates"):
        bank = make_bank(kind, n)
        asked = {part: make_queries(bank, part, queries) for part in ("normal", "abnormal")}
        table = cdist(bank.normal_codebook.astype(np.float64), bank.normal_codebook.astype(np.float64), "sqeuclidean")
        square = {part: np.stack([table[one, getattr(bank, f"{part}_indices")].sum((1, 2)) for one in query])
                  for part, query in asked.items()}
        for parts in (("normal",), ("abnormal",), ("normal", "abnormal")):
            true = sum(square[part] for part in parts)
            for k in (1, 10, 100, 1000):
                nearest, rows = np.sort(true, 1)[:, :k], None
                for shards in (1, 2, 4, 8):
                    mesh = jax.sharding.Mesh(jax.devices()[:shards], ("data",))
                    hits = bank.search(**{part: asked[part] for part in parts}, k=k, mesh=mesh)
                    rows = hits.rows if rows is None else rows
                    bad = rows != hits.rows
                    for distance in (np.take_along_axis(true, hits.rows, 1), hits.distances):
                        bad |= np.abs(distance - nearest) > 1e-6 * nearest
                    wrong["hits"] += bad.size
                    wrong["wrong"] += int(bad.sum()) + sum(k - len(set(row)) for row in hits.rows)
    print(json.dumps(wrong))


def exactness(n: int) -> str:
    counts = run_apart("--exact", str(n), JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    return (f"- Exactness at {n:,} codes (volumes, uniform, duplicates; normal, abnormal, both; k 1, 10, 100, 1000; 1, "
            f"2, 4, 8 shards): {counts['wrong']} of {counts['hits']:,} hits differ from float64 brute force (relative "
            "1e-6) or between shards.")


def on_gpu(bank: CodeBank, rounds: int) -> Iterator[str]:
    """Lines for a GPU: torch beside ours, and how near ours comes to ceilings measured in the same run."""
    n = len(bank)
    book = torch.from_numpy(bank.normal_codebook).cuda()
    indices = torch.from_numpy(bank.normal_indices.astype(np.int32)).cuda().split(1 << 18)

    def dense(kind: torch.dtype) -> Callable[[], Iterable[torch.Tensor]]:
        """Codes [n,4096] in pieces: kept where they fit, made anew for each batch of queries where they don't."""
        def make() -> Iterator[torch.Tensor]:
            return (book[some].reshape(len(some), -1).to(kind) for some in indices)

        if n * 4096 * kind.itemsize > torch.cuda.mem_get_info()[0] / 2:
            return make
        kept = list(make())
        return lambda: kept

    def searcher(pieces: Callable, distance: Callable) -> Method:
        def method(q: np.ndarray, k: int) -> None:
            for some in torch.from_numpy(q).cuda().split(1024):
                query, start, near = book[some].reshape(len(some), -1), 0, []
                for piece in pieces():
                    top = torch.topk(distance(query, piece), k, largest=False)
                    near.append((top.values, top.indices + start))
                    start += len(piece)
                values, rows = (torch.cat(parts, 1) for parts in zip(*near))
                rows.gather(1, torch.topk(values, k, largest=False).indices).cpu()

        return method

    def by_matmul(query: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
        return piece.float().square().sum(1) - 2 * (query.bfloat16() @ piece.T).float()

    methods = {"torch bf16": searcher(dense(torch.bfloat16), by_matmul)}
    if n <= 1_000_000:
        methods["torch cdist"] = searcher(dense(torch.float32), torch.cdist)
    codes, square = jnp.zeros((n, 64), jnp.uint16), jnp.ones((8192, 8192), jnp.bfloat16)
    read, multiply = jax.jit(lambda x: x.astype(jnp.int32).sum()), jax.jit(lambda x: x @ x)
    ceilings = {"reading the codes once": lambda q, k: read(codes).block_until_ready(),
                "bf16 matmul": lambda q, k: multiply(square).block_until_ready()}
    for queries in (1, 256, 4096):
        times = race(bank, methods | ceilings, queries, 10, rounds)
        times["bf16 matmul"] *= queries * n * 4096 / 8192**3  # as many multiplications as a search by matmul
        yield from lines_of(times, n, queries, 10)


def make_sparse(bank: CodeBank) -> CodeBank:
    """The bank with lesions of 7 of 64 cells in the mean, round, and nothing (code 0, the zero vector) elsewhere."""
    rng, n = np.random.default_rng(5), len(bank)
    cells = np.stack(np.meshgrid(*(np.arange(side) + 0.5 for side in GRID), indexing="ij"), -1)
    centre, radius = rng.random((n, 1, 1, 2)) * GRID, rng.gamma(6, 0.26, (n, 1, 1))
    pieces = np.array_split(np.arange(n), -(-n // 100_000))
    lesion = np.concatenate([np.square(cells - centre[rows]).sum(-1) < radius[rows] ** 2 for rows in pieces])
    codebook = bank.abnormal_codebook.copy()
    codebook[0] = 0
    return CodeBank.from_arrays(
        normal_indices=bank.normal_indices, abnormal_indices=(bank.abnormal_indices % (CODES - 1) + 1) * lesion,
        normal_codebook=bank.normal_codebook, abnormal_codebook=codebook, rows=bank.rows,
    )


def make_dense(bank: CodeBank) -> CodeBank:
    """The same bank, moved so that no code is the zero vector: same distances, searched as a bank without "nothing"."""
    moved = bank.abnormal_codebook + np.float32(1)
    arrays = {name: getattr(bank, name) for name in ("normal_indices", "abnormal_indices", "normal_codebook", "rows")}
    return CodeBank.from_arrays(**arrays, abnormal_codebook=moved)


def ratio_line(name: str, first: Callable[[int], object], second: Callable[[int], object], queries: int, rounds: int,
               aim: str) -> str:
    """A table line: milliseconds a query of both, and the paired ratio first / second."""
    times = np.array([[seconds(lambda: work(i)) for work in (first, second)] for i in range(rounds + 1)][1:])
    one, other = np.median(times, 0) / queries * 1e3
    return f"| {name} | {queries} | {one:.2f} | {other:.2f} | {spread(times[:, 0] / times[:, 1])} | {aim} |"


def by_queries(bank: CodeBank, rounds: int) -> Iterator[str]:
    """Table lines: search by lesion, by both codes, and asymmetric, each beside what it is to be compared with."""
    sparse = make_sparse(bank)
    dense = make_dense(sparse)
    quantiser = product_quantiser(sparse, "abnormal")

    def by_faiss(indices: np.ndarray) -> None:
        quantiser.search(sparse.abnormal_codebook[indices].reshape(len(indices), -1), 10)

    def noisy(path: str, indices: np.ndarray) -> Queries:
        book = getattr(sparse, f"{path}_codebook")
        noise = np.random.default_rng(0).normal(size=(*indices.shape, WIDTH)).astype(np.float32)
        there = path == "normal" or indices.any((1, 2))[:, None, None, None]  # as `Decomposer.decompose` gives them
        return latents(**{path: book[indices] + 0.1 * there * noise})

    for count in (1, 64):
        rows = [np.random.default_rng(i).integers(0, len(bank), count) for i in range(rounds + 1)]
        normal = [make_queries(sparse, "normal", count, seed=i) for i in range(rounds + 1)]
        lesion = [sparse.abnormal_indices[some] for some in rows]
        pairs = {
            "lesion, sparse / dense": (lambda i: sparse.search(abnormal=lesion[i]),
                                       lambda i: dense.search(abnormal=lesion[i]), f"{1 / 4 if count == 1 else 1 / 2}"),
            "lesion, sparse / FAISS PQ": (lambda i: sparse.search(abnormal=lesion[i]), lambda i: by_faiss(lesion[i]),
                                          f"{1 / 20}" if count == 1 else ""),
            "both codes / normal": (lambda i: sparse.search(normal=normal[i], abnormal=lesion[i]),
                                    lambda i: sparse.search(normal=normal[i]), "1.3"),
            "normal, latents / codes": (lambda i: sparse.search(noisy("normal", normal[i])),
                                        lambda i: sparse.search(normal=normal[i]), ""),
            "lesion, relative / plain latents": (lambda i: sparse.search(relative(noisy("abnormal", lesion[i]))),
                                                 lambda i: sparse.search(noisy("abnormal", lesion[i])), ""),
            "normal, relative / plain latents": (lambda i: sparse.search(relative(noisy("normal", normal[i]))),
                                                 lambda i: sparse.search(noisy("normal", normal[i])), ""),
            "lesion, latents / codes": (lambda i: sparse.search(noisy("abnormal", lesion[i])),
                                        lambda i: sparse.search(abnormal=lesion[i]), ""),
        }
        for name, (first, second, aim) in pairs.items():
            yield ratio_line(f"{len(bank):,} codes: {name}", first, second, count, rounds, aim)


def bytes_a_code(bank: CodeBank) -> str:
    layout = make_sparse(bank)._index(("abnormal",), None).layout
    arrays = (*layout.codes, layout.members.rows, layout.members.starts, layout.patients)
    return (f"- By lesion, {len(bank):,} codes take {sum(array.nbytes for array in arrays) / len(bank):.0f} bytes each "
            "(at most 40), rows, patients and padding included.")


def by_patient(bank: CodeBank, rounds: int) -> Iterator[str]:
    """Seconds that a patient of 65 slices takes among patients of 100 slices, and what a process holds for it."""
    rows = bank.rows.copy()
    rows["patient_id"] = np.char.mod("p%d", np.arange(len(bank)) // PATIENT_SLICES)
    rows["slice_index"] = np.arange(len(bank)) % PATIENT_SLICES
    bank = dataclasses.replace(make_sparse(bank), rows=rows)
    times: dict[str, list[float]] = {"normal": [], "abnormal": [], "both": []}
    for i in range(rounds + 1):
        own = np.arange(QUERY_SLICES) + PATIENT_SLICES * i
        rng = np.random.default_rng(i)
        shape = (QUERY_SLICES, *GRID)
        changed = {path: np.where(rng.random(shape) < 0.2, rng.integers(0, CODES, shape),
                                  getattr(bank, f"{path}_indices")[own]) for path in ("normal", "abnormal")}
        for by, took in times.items():
            queries = codes(**(changed if by == "both" else {by: changed[by]}))
            took.append(seconds(lambda: bank.search_patients(
                queries, heights=rows["slice_index"][own], exclude=rows["patient_id"][own[:1]],
            )))
    texts = [f"{by} {spread(took[1:])}" for by, took in times.items()]
    yield (f"- A patient of {QUERY_SLICES} slices among {len(bank) // PATIENT_SLICES:,} patients of {PATIENT_SLICES}: "
           f"{', '.join(texts)} s (at most 1).")
    with tempfile.TemporaryDirectory() as folder:
        bank.save(f"{folder}/bank")
        size = sum(file.stat().st_size for file in Path(folder, "bank").iterdir()) / 2**20
        held = run_apart("--fresh", f"{folder}/bank", "normal", "abnormal", "--patients")
    limit = f" (at most {2 * size:.0f}, twice the bank's files)" if len(bank) >= 1_000_000 else ""
    yield (f"- Memory for it in a fresh process, by both codes: {held['resident']:.0f} MB, of which {held['mapped']:.0f} "
           f"MB are pages of files; at the peak {held['peak']:.0f} MB{limit}.")


def report_queries(sizes: list[int], rounds: int) -> Iterator[str]:
    yield (f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start. "
           "Ratios of times: median (quartiles).")
    yield "\n| search | queries | ms a query, first | ms a query, second | ratio | at most |"
    yield "|---|---|---|---|---|---|"
    banks = [make_bank("volumes", n) for n in sizes]
    for bank in banks:
        yield from by_queries(bank, rounds)
    yield ""
    for bank in banks:
        yield bytes_a_code(bank)
        yield from by_patient(bank, rounds)
    yield f"- Load at the end: {os.getloadavg()[0]:.1f}."


def report(sizes: list[int], rounds: int) -> Iterator[str]:
    device = jax.devices()[0]
    yield (f"{device.device_kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start. Times over "
           "ours: median (quartiles).")
    yield "\n| codes | queries | k | method | ms a query | time over ours | at least, aim |"
    yield "|---|---|---|---|---|---|---|"
    banks = [make_bank("volumes", n) for n in sizes]
    if device.platform == "gpu":
        for bank in banks:
            yield from on_gpu(bank, rounds)
        return
    for bank in banks:
        methods, small = rivals(bank), len(bank) <= MOST_DENSE
        for queries, k in ((1, 10), (256, 10), (256, 100)) if small else ((1, 10), (64, 10), (256, 10), (64, 100)):
            yield from lines_of(race(bank, methods, queries, k, rounds), len(bank), queries, k)
    yield ""
    for bank in banks:
        for queries in (1, 64):
            yield both_over_one(bank, queries, rounds)
        yield from opening(bank)
    yield exactness(min(60_000, *sizes))  # so many that 8 shards don't fall back on all distances at k = 100
    yield "\nEncoding, by `benchmarks/encoding.py`:\n"
    encoding = Path(__file__).with_name("encoding.py")
    yield subprocess.run([sys.executable, encoding], check=True, stdout=subprocess.PIPE, text=True).stdout
    yield f"Load at the end: {os.getloadavg()[0]:.1f}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000], help="codes in the banks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", choices=REPORTS, default=list(REPORTS), help="what to measure")
    parser.add_argument("--write", type=Path, help="document whose measured parts to replace")
    parser.add_argument("--fresh", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--patients", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--exact", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.fresh:
        return fresh_process(flags.fresh[0], flags.fresh[1:], flags.patients)
    if flags.exact:
        return count_wrong(flags.exact, queries=8)
    for part in flags.parts:
        lines = []
        for line in REPORTS[part](flags.sizes, flags.rounds):
            print(line, flush=True)
            lines.append(line)
        if flags.write:
            write_measured(flags.write, MARKS[part], lines)


REPORTS = {"codes": report, "queries": report_queries}
MARKS = {"codes": "retrieval", "queries": "queries"}


if __name__ == "__main__":
    main()
