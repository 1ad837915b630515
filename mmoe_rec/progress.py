"""One progress bar with an estimate of the time left, for every long step."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


def bar(extra: str = "") -> Progress:
    """A progress bar on stderr; `extra` is a further column such as '{task.fields[loss]}'."""
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    columns += [TextColumn(extra)] if extra else []
    return Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console)


def say(text: str) -> None:
    """A line on stderr, above any bar."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
