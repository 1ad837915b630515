"""One progress bar with an estimate of the time left, for every long step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

console = Console(stderr=True)
Item = TypeVar("Item", bound=Sized)


def bar(extra: str = "") -> Progress:
    """A progress bar on stderr; `extra` is a further column such as '{task.fields[loss]}'."""
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    columns += [TextColumn(extra)] if extra else []
    return Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console)


def over_rows(batches: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Passes batches on, counting their rows up to `total`."""
    with bar() as progress:
        task = progress.add_task(what, total=total)
        for batch in batches:
            yield batch
            progress.advance(task, len(batch))
