"""Whether the reading room's memory is flat: a reader's questions by HTTP, without a page, which takes less time.

    python benchmarks/memory.py --bank=BANK [--workdir models/phantom64] [--data DATA] [--scan SCAN.nii.gz ...]
                                [--actions 3000] [--write docs/reading_room.md]

Actions are drawn by chance, about as often as `reader.py` has them. Memory is the program's, resident, after each
answer; its slope is that of a line through the medians of the parts after the first `WARM` of them, in which programs
are still compiled.
"""

import argparse
import base64
import http.client
import json
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from common import write_measured
from page import add_room, start_room
from scipy import stats

PARTS, WARM = 30, 10
SHOWN = 3  # every so many parts are told
THUMBNAILS = 60


class Reader:
    """Questions of a reader, each as often as its weight."""

    def __init__(self, address: str, scans: list[Path], seed: int) -> None:
        parts = urlsplit(address)
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=600)
        self._token, self._rng = parts.fragment, np.random.default_rng(seed)
        self._scans, self._brought = [path.read_bytes() for path in scans], []
        while not (about := self._send("GET", "about", b"", "application/json"))["ready"]:
            time.sleep(0.5)
        self._rows, self._size = about["slices"], about["size"]
        self._image_bytes = 2 * self._size**2 * len(about["modalities"])
        actions: dict[str, tuple[int, Callable[[], object]]] = {
            "look": (30, lambda: self._post("look", image=self._row())),
            "by anatomy": (6, lambda: self._ask(anatomy=self._row(), share=0)),
            "by lesion": (6, lambda: self._ask(lesion=self._row(), share=1)),
            "by both": (6, lambda: self._ask(anatomy=self._row(), lesion=self._row())),
            "200 hits": (1, lambda: self._ask(anatomy=self._row(), share=0, k=200)),
            "one a patient": (1, lambda: self._ask(anatomy=self._row(), share=0, one_per_patient=True)),
            "examples": (3, lambda: self._ask(anatomy=self._row(), lesion=self._row(), like=self._some(),
                                              unlike=self._some())),
            "region": (2, lambda: self._ask(anatomy=self._row(), share=0, region=self._drawing())),
            "draw": (4, self._draw),
            "open a patient": (8, self._open),
            "patients": (1, lambda: self._post("ask_patients", row=self._row()["row"], share=self._share())),
        }
        if scans:
            actions |= {"bring a scan": (2, self._bring), "ask with a scan": (3, self._ask_scan),
                        "patients like a scan": (1, self._scan_patients)}
        self._names, self._acts = [*actions], {name: act for name, (_, act) in actions.items()}
        weights = np.array([weight for weight, _ in actions.values()], float)
        self._shares = weights / weights.sum()

    def act(self) -> str:
        """The name of an action that is done."""
        name = str(self._rng.choice(self._names, p=self._shares))
        self._acts[name]()
        return name

    def _send(self, method: str, path: str, body: bytes, kind: str) -> Any:
        self._connection.request(method, f"/api/{path}", body, {"Authorization": f"Bearer {self._token}",
                                                                "Content-Type": kind})
        answer = self._connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            sys.exit(f"{path}: {answer.status} {data[:300]!r}")
        if answer.headers["content-type"] != "application/octet-stream":
            return json.loads(data)
        length, = struct.unpack("<I", data[:4])
        return json.loads(data[4:4 + length])["data"] | {"bytes": data[4 + length:]}

    def _post(self, path: str, **request: Any) -> Any:
        return self._send("POST", path, json.dumps(request).encode(), "application/json")

    def _ask(self, **question: Any) -> None:
        self._post("thumbnails", rows=self._post("ask", **question)["rows"][:THUMBNAILS])

    def _row(self) -> dict[str, int]:
        return {"row": int(self._rng.integers(self._rows))}

    def _some(self) -> list[dict[str, int]]:
        return [self._row() for _ in range(self._rng.integers(3))]

    def _share(self) -> float:
        return float(self._rng.choice([0, 0.5, 1]))

    def _drawing(self) -> list[int]:
        """Some whole rows."""
        first, count = (int(number) for number in self._rng.integers(2, self._size // 3, 2))
        before, drawn = first * self._size, count * self._size
        return [0, before, 1, drawn, 0, self._size**2 - before - drawn]

    def _draw(self) -> None:
        anatomy, drawing = self._row(), self._drawing()
        self._post("paint", anatomy=anatomy, drawing=drawing)
        self._ask(anatomy=anatomy, lesion={"drawing": drawing})

    def _open(self) -> None:
        self._post("patients", text="")
        rows = self._post("slices", row=self._row()["row"])["rows"]
        self._post("thumbnails", rows=rows)

    def _bring(self) -> None:
        data = self._scans[self._rng.integers(len(self._scans))]
        head = json.dumps([[len(data)]]).encode()
        answer = self._send("PUT", "bring", struct.pack("<I", len(head)) + head + data, "application/octet-stream")
        self._brought = [*self._brought[-3:], answer]

    def _a_scan(self) -> Any:
        if not self._brought:
            self._bring()
        return self._brought[self._rng.integers(len(self._brought))]

    def _ask_scan(self) -> None:
        scan = self._a_scan()
        answer = self._post("slice_of", id=scan["id"], slice=int(self._rng.choice(scan["slices"])))["bytes"]
        parts = {"pixels": answer[:self._image_bytes], "slab": answer[self._image_bytes:]}
        image = {name: base64.b64encode(part).decode() for name, part in parts.items()}
        self._post("look", image=image)
        self._ask(anatomy=image, share=0)

    def _scan_patients(self) -> None:
        self._post("ask_patients", scan=self._a_scan()["id"], share=self._share())


def resident(pid: int) -> float:
    """MiB"""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def slope(sizes: list[float], step: float) -> str:
    """Of a line through what was measured each `step` actions, with its 95% interval."""
    line = stats.linregress(step * np.arange(len(sizes)) / 1000, sizes)
    half = stats.t.ppf(0.975, len(sizes) - 2) * line.stderr
    return f"{line.slope:+.1f} MiB in 1,000 actions ({line.slope - half:+.1f} to {line.slope + half:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_room(parser)
    parser.add_argument("--scan", type=Path, nargs="+", default=[])
    parser.add_argument("--actions", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    counts, rows, middles = Counter(), [], []
    began, size = time.monotonic(), args.actions // PARTS
    with start_room(args) as (address, program):
        reader = Reader(address, args.scan, args.seed)
        rows.append(f"| 0 | {resident(program.pid):,.0f} | |")
        print(rows[-1], file=sys.stderr, flush=True)
        for part in range(1, PARTS + 1):
            sizes = []
            for _ in range(size):
                counts[reader.act()] += 1
                sizes.append(resident(program.pid))
            middles.append(float(np.median(sizes)))
            line = f"| {part * size:,} | {middles[-1]:,.0f} | {max(sizes):,.0f} |"
            print(line, file=sys.stderr, flush=True)
            rows += [line] * (part % SHOWN == 0)
    done = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    lines = [
        f"{size * PARTS:,} actions in {(time.monotonic() - began) / 60:.0f} minutes: {done}.", "",
        "| actions | MiB, median | MiB, most |", "|---|---|---|", *rows, "",
        f"After {WARM * size:,} actions: {slope(middles[WARM:], size)}.",
    ]
    print("\n".join(lines))
    if args.write:
        write_measured(args.write, "memory", lines)


if __name__ == "__main__":
    main()
