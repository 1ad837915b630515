"""One progress bar with an estimate of the time left, for every long step."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)


class _Bars(Progress):
    """Bars of steps that have something to do: of 0 of 0 rich would show 0%, and never an end."""

    def add_task(
        self,
        description: str,
        start: bool = True,
        total: float | None = 100.0,
        completed: int = 0,
        visible: bool = True,
        **fields: Any,
    ) -> TaskID:
        """Adds a step; one of a total of 0 is finished, and is not shown."""
        shown = visible and total != 0
        task = super().add_task(description, start, total, completed, shown, **fields)
        if total == 0:
            self.update(task, completed=completed)
        return task


def bar(extra: str = "") -> Progress:
    """A progress bar on stderr; `extra` is a further column such as '{task.fields[loss]}'."""
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    columns += [TextColumn(extra)] if extra else []
    return _Bars(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console)


def say(text: str) -> None:
    """A line on stderr, above any bar."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
