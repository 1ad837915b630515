"""Errors that are the user's to fix: one clear sentence and exit code 2, never a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 2


class UserError(Exception):
    """One sentence for the user: which file, column, setting or row, what was expected, what was found, what to do."""


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2; any other exception passes with its traceback.

    Works as a decorator, `@exit_with_message()` on a command's `main`, and as a context, `with exit_with_message():`.
    """
    try:
        yield
    except UserError as error:
        one_line = " ".join(str(error).splitlines())
        print(f"error: {one_line}", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None
