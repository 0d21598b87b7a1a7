"""Mistakes a user can mend, told in one line."""

import sys
from collections.abc import Callable

EXIT_FAULT = 1
EXIT_USER_ERROR = 2


class UserError(Exception):
    """The user's input can't be used; the message names the file or flag and the cure."""


def run_program(main: Callable[[], None]) -> None:
    """Runs `main`; a `UserError`, or a path that can't be written, becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        _refuse(str(error))
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _refuse(f"{error.filename}: {error.strerror}; name another path")


def _refuse(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
