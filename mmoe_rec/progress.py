"""Progress bars, printed lines and the log levels of libraries."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

_WIDE = 160  # columns


def open_console(stderr: bool = False) -> Console:
    """Open a console on stdout or stderr. Lines that go to a file or a pipe are not wrapped at 80 columns."""
    console = Console(stderr=stderr)
    if not console.file.isatty() and "COLUMNS" not in os.environ:  # rich's `file` also works if the stream is closed
        console.width = _WIDE
    return console


console = open_console(stderr=True)


def bar(extra: str = "", shown: bool = True) -> Progress:
    """Build a progress bar on stderr, with an estimate of the remaining time.

    Args:
        extra: Another column, such as '{task.fields[loss]}'.
        shown: Whether to show the bar.
    """
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    columns += [TextColumn(extra)] if extra else []
    remaining = TimeRemainingColumn(elapsed_when_finished=True)
    return Progress(*columns, remaining, console=console, disable=not shown)


def say(text: str) -> None:
    """Print a line to stderr, above any progress bar."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def quiet_loggers(levels: Mapping[str, int]) -> Iterator[None]:
    """Raise the levels of loggers within the context. Users can't act on the messages of lower levels."""
    loggers = {name: logging.getLogger(name) for name in levels}
    before = {name: logger.level for name, logger in loggers.items()}
    try:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(before[name])
