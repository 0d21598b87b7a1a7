"""Mistakes a user can mend, told in one line."""

import signal
import sys
from collections.abc import Callable
from typing import Any

EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_SIGNAL = 128  # plus the signal's number, as shells have it


class UserError(Exception):
    """The user's input can't be used; the message names the file or flag and the cure."""


def run_program(main: Callable[[], None]) -> None:
    """Runs `main`; a `UserError`, or a path that can't be written, becomes one line on stderr and exit code 2.

    SIGTERM and Ctrl-C unwind it, so that what is half-written is removed, and end it with 143 and 130.
    """
    unwind_on_signals()
    try:
        main()
    except UserError as error:
        _refuse(str(error))
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _refuse(f"{error.filename}: {error.strerror}; name another path")


def unwind_on_signals() -> None:
    """Makes SIGTERM and SIGINT raise SystemExit; a second signal ends the program at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _unwind)


def _unwind(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
    sys.exit(EXIT_SIGNAL + number)


def _refuse(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
