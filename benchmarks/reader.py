"""A reader at work in the reading room, by mouse and keys in Chromium: what actions take, and whether memory is flat.

    python benchmarks/reader.py --bank=BANK [--workdir models/phantom64] [--data DATA] [--scan SCAN.nii.gz]
                                [--actions 1000] [--pause 0] [--write docs/reading_room.md]

An action ends when the page has nothing under way; `--pause` seconds are waited then (1,000 actions and 3 seconds: an
hour). Memory is the program's, and the page's after its garbage is collected.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import write_measured
from page import IMAGE, Page, add_room, open_room

PARTS = 10  # memory is looked at so many times
ERROR = "document.querySelector('#status.error')?.textContent ?? ''"


class Reader:
    """Actions of a reader, drawn by chance, each as often as its weight."""

    def __init__(self, page: Page, scan: Path | None, seed: int) -> None:
        self._page, self._rng = page, np.random.default_rng(seed)
        keys = {
            "slice up": ("PageUp", 8), "slice down": ("PageDown", 8), "by anatomy": ("1", 6), "by both": ("2", 6),
            "by lesion": ("3", 6), "patients": ("4", 2), "the image alone": ("i", 3), "next hit": ("ArrowRight", 8),
            "next patient": ("ArrowDown", 4), "mark": ("m", 3), "anatomy of it": ("a", 2), "lesion of it": ("l", 2),
            "more like it": ("p", 1), "less like it": ("n", 1), "flicker": ("f", 3), "codes": ("g", 2),
            "labels": ("t", 2), "why": ("w", 2), "zoom": ("+", 2), "first view": ("0", 3), "large": ("z", 2),
        }
        self._weights: dict[str, int] = {name: weight for name, (_, weight) in keys.items()}
        self._actions: dict[str, Callable[[], object]] = {
            name: lambda key=key: page.key(key) for name, (key, _) in keys.items()}
        for name, weight, action in (
            ("open a patient", 8, self._open), ("draw", 4, lambda: self._stroke("d")),
            ("region", 2, lambda: self._stroke("r")), ("take back", 3, lambda: page.key("z", modifiers=2)),
            ("window", 3, self._window), ("compare", 3, self._compare), ("drag into the question", 3, self._drag),
            *([("bring a scan", 2, lambda: page.choose("#file", scan))] if scan else []),
        ):
            self._weights[name], self._actions[name] = weight, action

    def act(self) -> tuple[str, float]:
        """Name of an action and the seconds until nothing was under way."""
        if not self._page.run(f"document.querySelector('{IMAGE}') !== null"):  # all was taken back
            self._open()
            self._page.rest()
        shares = np.array([*self._weights.values()], float)
        name = str(self._rng.choice([*self._weights], p=shares / shares.sum()))
        began = time.perf_counter()
        self._actions[name]()
        self._page.rest()
        return name, time.perf_counter() - began

    def _any(self, selector: str) -> str:
        """A selector of one of the elements, marked for it; "" if there are none."""
        count = self._page.run(f"document.querySelectorAll({selector!r}).length")
        if count:
            one = f"document.querySelectorAll({selector!r})[{self._rng.integers(count)}]"
            return f"[data-any='{self._page.run(f'{one}.dataset.any = ++window.any')}']"
        return ""

    def _open(self) -> None:
        self._page.click(self._any(".patients li button"))

    def _stroke(self, tool: str) -> None:
        self._page.key("v")
        self._page.run("import('/state.js').then(({change}) => change((now) => { now.view.large = null; }))")
        self._page.key(tool)
        left, top, width, height = self._page.box(IMAGE)
        places = [(left + x * width, top + y * height) for x, y in self._rng.uniform(0.35, 0.65, (6, 2))]
        self._page.mouse("mousePressed", *places[0])
        for place in places[1:]:
            self._page.mouse("mouseMoved", *place)
        self._page.mouse("mouseReleased", *places[-1])
        self._page.key("v")

    def _window(self) -> None:
        left, top, width, height = self._page.box("#tiles .tile:not([hidden]) canvas")
        x, y = left + width / 2, top + height / 2
        self._page.mouse("mousePressed", x, y)
        for step in range(5):
            self._page.mouse("mouseMoved", x + 5 * step, y - 3 * step)
        self._page.mouse("mouseReleased", x + 20, y - 12)

    def _compare(self) -> None:
        for key in ("c", "f", "s", "x", "ArrowDown", "ArrowDown", "Escape"):
            self._page.key(key)

    def _drag(self) -> None:
        if thumb := self._any("#answers .thumb[draggable]"):
            self._page.drag(thumb, f"[data-key={self._rng.choice(['anatomy', 'lesion'])}]")


def memory(pid: int, page: Page) -> tuple[float, float, int]:
    """MiB of the program and of the page's objects, and the page's nodes."""
    page.send("HeapProfiler.collectGarbage")
    found = {one["name"]: one["value"] for one in page.send("Performance.getMetrics")["metrics"]}
    resident = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]
    return int(resident) / 1024, found["JSHeapUsedSize"] / 2**20, int(found["Nodes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_room(parser)
    parser.add_argument("--scan", type=Path)
    parser.add_argument("--actions", type=int, default=1000)
    parser.add_argument("--pause", type=float, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    seconds, rows, errors = defaultdict(list), [], []
    began = time.monotonic()
    with open_room(args) as (page, program):
        page.send("Performance.enable")
        page.enter()
        page.run("window.any = 0")
        reader = Reader(page, args.scan, args.seed)
        for i in range(args.actions):
            name, took = reader.act()
            seconds[name].append(took)
            if error := page.run(ERROR):
                errors.append(f"{name}: {error}")
                page.key("Escape")
            time.sleep(args.pause)
            if (i + 1) % max(args.actions // PARTS, 1) == 0:
                resident, heap, nodes = memory(program.pid, page)
                rows.append(f"| {i + 1:,} | {resident:,.0f} | {heap:.1f} | {nodes:,} |")
                print(rows[-1], file=sys.stderr, flush=True)
        # Chromium tells of answers that the page gave up for newer ones.
        errors += [problem for problem in page.problems if "409" not in problem]
    lines = [
        f"{args.actions:,} actions in {(time.monotonic() - began) / 60:.0f} minutes, {len(errors)} errors.", "",
        "| actions | program, MiB | page, MiB | nodes |", "|---|---|---|---|", *rows, "",
        "| action | times | ms, median (longest) |", "|---|---|---|",
        *(f"| {name} | {len(took)} | {1000 * np.median(took):.0f} ({1000 * max(took):.0f}) |"
          for name, took in sorted(seconds.items())),
    ]
    print("\n".join(lines), *errors, sep="\n")
    if args.write:
        write_measured(args.write, "reader", lines)


if __name__ == "__main__":
    main()
