"""Mistakes a user can mend, told in one line, and how programs end."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_UNFINISHED = os.EX_TEMPFAIL  # 75: stopped by a signal and saved; the same command goes on
EXIT_SIGNAL = 128  # plus the signal's number, as shells have it


class UserError(Exception):
    """The user's input can't be used; the message names the file or flag and the cure."""


def run_program(main: Callable[[], None]) -> None:
    """Runs `main`; a `UserError`, or a path that can't be written, becomes one line on stderr and exit code 2.

    SIGTERM and Ctrl-C unwind it, so that what is half-written is removed, and end it with 143 and 130.
    """
    unwind_on_signals()
    try:
        refuse_urls(sys.argv[1:])
        main()
    except UserError as error:
        _refuse(str(error))
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _refuse(f"{error.filename}: {error.strerror}; name another path")


def refuse_urls(arguments: Iterable[str]) -> None:
    """Raises UserError for a path such as gs://bucket/run: files are mapped into memory, locked and renamed."""
    for argument in arguments:
        if "://" in argument:
            raise UserError(
                f"{argument}: not a path of this machine; mount the bucket (for a run) or copy it to a local disk (for "
                "data), and name that path"
            )


def unwind_on_signals() -> None:
    """Makes SIGTERM and SIGINT raise SystemExit; a second signal ends the program at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _unwind)


def tell(message: str) -> None:
    """The last line of a program that ends with `EXIT_USER_ERROR`."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _unwind(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
    sys.exit(EXIT_SIGNAL + number)


def _refuse(message: str) -> None:
    tell(message)
    sys.exit(EXIT_USER_ERROR)
