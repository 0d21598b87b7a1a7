"""The reading room in Chromium, for those who time it or take its picture."""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator

import common  # by which `tests` is found

from tests.conftest import start_python
from tests.room.browser import Browser

IMAGE = "canvas[data-tile=image]"
IDLE = "window.pending === 0 && !document.getElementById('status').textContent.endsWith('…')"


class Page(Browser):
    """A page that knows when it has nothing under way."""

    def enter(self) -> None:
        """Waits until the room is ready."""
        self.wait("document.querySelector('.patients button')", 600)
        self.run("window.pending = 0; const own = window.fetch;"
                 "window.fetch = (...all) => { pending++; return own(...all).finally(() => pending--); }; 0")

    def rest(self) -> None:
        """Waits until the page has drawn and nothing is under way."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))")
        self.wait(IDLE, 300)


def add_room(parser: argparse.ArgumentParser) -> None:
    """The options that say which room is opened."""
    parser.add_argument("--workdir", default="models/phantom64")
    parser.add_argument("--bank", required=True)
    parser.add_argument("--data")


@contextlib.contextmanager
def start_room(args: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a room of its own, and the room's program, which ends with it."""
    data = [f"--data={args.data}"] if args.data else []
    program = start_python("evaluate.py", "serve", f"--workdir={args.workdir}", f"--bank={args.bank}", *data)
    try:
        address = program.stdout.readline().strip()
        if not address:
            sys.exit(program.stderr.read())
        yield address, program
    finally:
        program.terminate()
        program.communicate(timeout=60)


@contextlib.contextmanager
def open_room(args: argparse.Namespace, *size: int) -> Iterator[tuple[Page, subprocess.Popen]]:
    """A page of `size` pixels on its way into a room of its own, and the room's program."""
    with start_room(args) as (address, program), Page(*size) as page:
        page.open(address)
        yield page, program
