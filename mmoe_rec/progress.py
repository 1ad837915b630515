"""Progress bars, printed lines and the log levels of libraries."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

_WIDE = 160  # Width of a console that isn't a terminal, in characters.


def open_console(stderr: bool = False) -> Console:
    """Open a console on stdout or stderr. Output to a file or a pipe has longer lines than rich's default of 80."""
    console = Console(stderr=stderr)
    # `console.file` works even if the stream is closed.
    if not console.file.isatty() and "COLUMNS" not in os.environ:
        console.width = _WIDE
    return console


console = open_console(stderr=True)


def bar(extra: str = "", shown: bool = True) -> Progress:
    """Build a progress bar on stderr, with an estimate of the remaining time.

    Args:
        extra: Format of another column in rich's syntax, such as '{task.fields[loss]}'. Empty for none.
        shown: Whether to show the bar.
    """
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    columns += [TextColumn(extra)] if extra else []
    return Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console, disable=not shown)


def say(text: str) -> None:
    """Print a line to stderr, above any progress bar."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def quiet_loggers(levels: Mapping[str, int]) -> Iterator[None]:
    """Hide messages below the given levels of loggers within the context, because users can't act on them."""
    loggers = {name: logging.getLogger(name) for name in levels}
    before = {name: logger.level for name, logger in loggers.items()}
    try:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(before[name])
