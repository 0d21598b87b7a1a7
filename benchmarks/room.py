"""How long a reader of the reading room waits at an archive of many slices, once warm; and a hundred at a time.

    python benchmarks/room.py [--workdir models/phantom64] [--slices 1470 100000] [--rounds 15]
                              [--write docs/reading_room.md]

The banks are made up: codes of phantom patients, of whose cells a seventh come from other slices, so that they differ.
Times of single questions are of `room/session.py`, on all cores, without browser and HTTP (`reader.py` has these). Of a
hundred at a time, asked of the last bank, each comes by HTTP as a page of its own, and again where the room says that it
is busy.
"""

import argparse
import base64
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from common import write_measured

from decomp_jax.data.records import SliceDataset
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.encode import encode_split
from decomp_jax.retrieval import CodeBank
from decomp_jax.room.http import make_app
from decomp_jax.room.session import Room

PATIENTS, SLICES_A_PATIENT, OTHER_CELLS = 40, 25, 0.15
AT_A_TIME = 100
BUSY = 429


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


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def milliseconds(name: str, run: Callable[[int], object], rounds: int) -> str:
    """The median and the longest; the first round, which may compile, is not in it."""
    times = []
    for i in range(rounds + 1):
        began = time.perf_counter()
        run(i)
        times.append(1000 * (time.perf_counter() - began))
    found = f"{np.median(times[1:]):.0f} ({np.max(times[1:]):.0f})"
    tell(f"{name}: {found}")
    return found


def memory(name: str) -> int:
    """Of this process, in bytes: VmRSS, now, or VmHWM, the most since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def at_a_time(room: Room, questions: list[dict[str, Any]]) -> str:
    """What it took until each of the questions, asked at once over HTTP, was answered."""
    token = "benchmark"
    server = uvicorn.Server(uvicorn.Config(make_app(room, token), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.1)
    port = server.servers[0].sockets[0].getsockname()[1]

    def post(path: str, body: dict[str, Any] | None, page: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "X-Page": page}
        connection.request("GET" if body is None else "POST", f"/api/{path}", body and json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def ask(i: int) -> int:
        for attempt in range(10_000):
            status, _ = post("ask", questions[i], f"page {i}")
            if status != BUSY:
                assert status == 200, status
                return attempt
            time.sleep(0.2)
        raise TimeoutError("the room was busy all the time")

    while not json.loads(post("about", None, "")[1])["ready"]:
        time.sleep(0.5)
    ask(0)
    before = memory("VmRSS")
    forget_peak()
    began = time.perf_counter()
    with ThreadPoolExecutor(len(questions)) as pool:
        attempts = sum(pool.map(ask, range(len(questions))))
    seconds = time.perf_counter() - began
    grown = (memory("VmHWM") - before) / 2**20
    server.should_exit = True
    thread.join()
    line = (f"{len(questions)} questions at a time, by {len(questions)} pages: all answered after {seconds:.1f} s, "
            f"{attempts} times told to come again; peak memory {before / 2**20:,.0f} MiB + {grown:.0f} MiB.")
    tell(line)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("models/phantom64"))
    parser.add_argument("--slices", type=int, nargs="+", default=[1470, 100_000])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    decomposer = Decomposer.restore(args.workdir)
    with tempfile.TemporaryDirectory() as folder:
        tell("phantom patients")
        data, encoded = Path(folder) / "data", Path(folder) / "bank"
        subprocess.run([sys.executable, "-m", "data_prep", "phantom", "--out", data, "--patients", str(PATIENTS),
                        "--size", str(decomposer.settings.size)], check=True)
        encode_split(args.workdir, data, "train", encoded)
        images = SliceDataset(data, "query").stack(("image",))["image"]
        bank = CodeBank.load(encoded)
    found, ready = {}, []
    for slices in args.slices:
        room = Room(decomposer, made_up(bank, slices), None, bank_digest="")
        began = time.perf_counter()
        for step in room.warm_up():
            step()
        ready.append(f"{time.perf_counter() - began:.0f} s")
        tell(f"{slices:,} slices: ready after {ready[-1]}")
        one = brought(images)
        for name, run in actions(room, one, images.shape[1], args.rounds):
            found.setdefault(name, []).append(milliseconds(name, run, args.rounds))
    many = at_a_time(room, [{"anatomy": next(one), "lesion": next(one)} for _ in range(AT_A_TIME)])
    lines = [
        "| ms, median (longest) | " + " | ".join(f"{slices:,} slices" for slices in args.slices) + " |",
        "|---" * (1 + len(args.slices)) + "|",
        *(f"| {name} | " + " | ".join(times) + " |" for name, times in found.items()), "",
        f"{os.cpu_count()} cores; ready {' and '.join(ready)} after the start.", "", many,
    ]
    print("\n".join(lines))
    if args.write:
        write_measured(args.write, "room", lines)


def brought(images: np.ndarray) -> Iterator[dict[str, str]]:
    """Pictures, each once, so that none is known already."""
    for i in range(len(images) - 1):
        for share in np.linspace(0.02, 0.98, 25):
            mixed = (share * images[i] + (1 - share) * images[i + 1]).astype("<f2")
            yield {"pixels": base64.b64encode(mixed.tobytes()).decode()}


def actions(
    room: Room, one: Iterator[dict[str, str]], side: int, rounds: int
) -> Iterator[tuple[str, Callable[[int], object]]]:
    """Of a reader, by name, each a function of the round."""

    def ask(share: float) -> Callable[[int], object]:
        return lambda _: room.ask({"anatomy": next(one), "lesion": next(one), "share": share})

    def drawing(i: int) -> list[int]:
        return [0, side**2 // 2, 1, 5 * side + i, 0, side**2 // 2 - 5 * side - i]

    anatomy = next(one)
    patient = [SLICES_A_PATIENT * i for i in range(rounds + 1)]
    yield "hits by anatomy", ask(0)
    yield "hits by lesion", ask(1)
    yield "hits by the anatomy of one and the lesion of another", ask(0.5)
    yield "hits by a drawing", lambda i: room.ask({"lesion": {"drawing": drawing(i)}, "share": 1})
    yield "200 hits", lambda _: room.ask({"anatomy": next(one), "share": 0, "k": 200})
    yield "patients", lambda i: room.ask_patients({"row": patient[i]})
    yield "an image on the desk", lambda _: room.look({"image": next(one)})
    yield "a painting after a stroke", lambda i: room.paint({"anatomy": anatomy, "drawing": drawing(i)})
    yield "60 thumbnails, painted", lambda i: room.thumbnails(list(range(60 * i, 60 * i + 60)))


if __name__ == "__main__":
    main()
