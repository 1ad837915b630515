"""One progress bar with an estimate of the time left, for every long step; and quiet libraries beside it."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

_WIDE = 160  # columns


def open_console(stderr: bool = False) -> Console:
    """A console on stdout or stderr. What goes into a file or a pipe is not cut as on a narrow terminal."""
    console = Console(stderr=stderr)
    if not console.file.isatty() and "COLUMNS" not in os.environ:  # of rich, as Python has no stream where it is closed
        console.width = _WIDE
    return console


console = open_console(stderr=True)


def bar(extra: str = "", shown: bool = True) -> Progress:
    """A progress bar on stderr; `extra` is a further column such as '{task.fields[loss]}'."""
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    columns += [TextColumn(extra)] if extra else []
    left = TimeRemainingColumn(elapsed_when_finished=True)
    return Progress(*columns, left, console=console, disable=not shown)


def say(text: str) -> None:
    """A line on stderr, above any bar."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def quiet_loggers(levels: Mapping[str, int]) -> Iterator[None]:
    """Within it, each logger says nothing below its level, on which a user cannot act."""
    loggers = {name: logging.getLogger(name) for name in levels}
    before = {name: logger.level for name, logger in loggers.items()}
    try:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(before[name])
