"""Pictures of the reading room in every state, by mouse and keys in Chromium.

    python benchmarks/screens.py --bank=BANK --out=FOLDER [--workdir models/phantom64] [--data DATA] [--size 1280x800]

Writes FOLDER/room-STATE.webp. docs/images has those of the demo's phantoms; the archive in them should be one that may be
shown.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from page import IMAGE, Page, add_room, open_room


class Room:
    """The page, and what a reader does to bring it into a state."""

    def __init__(self, page: Page) -> None:
        self._page = page

    def press(self, *keys: str) -> None:
        for key in keys:
            self._page.key(key)
            self._page.rest()

    def open_lesion(self) -> None:
        """The first patient with a lesion that can be seen, at the slice in which it is largest."""
        for i in range(1, 30):
            self._page.click(f".patients li:nth-child({i}) button")
            self._page.wait(f"document.querySelector('{IMAGE}') !== null")
            self._page.rest()
            if "no lesion" not in self._page.run(f"document.querySelector('{IMAGE}').parentElement.innerText"):
                return
        sys.exit("no lesion is seen in the first patients of this archive")

    def stroke(self, *places: tuple[float, float]) -> None:
        """Through places in the image, 0 to 1."""
        left, top, width, height = self._page.box(IMAGE)
        side = min(width, height)
        points = [(left + width / 2 + (x - 0.5) * side, top + height / 2 + (y - 0.5) * side) for x, y in places]
        self._page.mouse("mousePressed", *points[0])
        for point in points[1:]:
            self._page.mouse("mouseMoved", *point)
        self._page.mouse("mouseReleased", *points[-1])
        self._page.rest()

    def empty(self) -> None:
        """As the page opens."""

    def hits(self) -> None:
        self.open_lesion()
        self.press("3", "ArrowRight", "ArrowRight")

    def mix(self) -> None:
        self.press("ArrowDown", "ArrowDown", "a", "2")

    def patients(self) -> None:
        self.press("i", "4", "ArrowRight")

    def compare(self) -> None:
        self.press("3", "ArrowRight", "c", "ArrowDown", "x")

    def drawing(self) -> None:
        self.press("Escape", "d")
        self.stroke((0.38, 0.42), (0.42, 0.36), (0.46, 0.42), (0.42, 0.46), (0.38, 0.42), (0.42, 0.42))
        self.press("3")

    def error(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            scan = Path(folder) / "scan.nii.gz"
            scan.write_bytes(b"of another kind")
            self._page.key("v")
            self._page.choose("#file", scan)
            self._page.wait("document.querySelector('#status.error')", 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_room(parser)
    parser.add_argument("--size", default="1280x800", help="of the window")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with open_room(args, *map(int, args.size.split("x"))) as (page, _):
        page.wait("document.querySelector('progress')", 60)
        page.picture(args.out / "room-loading.webp")
        page.enter()
        room = Room(page)
        states: tuple[Callable[[], None], ...] = (
            room.empty, room.hits, room.mix, room.patients, room.compare, room.drawing, room.error)
        for state in states:
            state()
            page.picture(args.out / f"room-{state.__name__}.webp")


if __name__ == "__main__":
    main()
