"""What a replay found, for people: a table of what differs, and the first examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mmoe_rec.report.formatting import NONE

_EQUAL_TOLD = "counters and histories are equal to the last bit, predictions and scores within {tolerance:g}"
_LONGEST = 60  # characters of a value that is shown


def show(found: dict[str, Any]) -> Iterator[RenderableType]:
    """What `rich` prints of a replay's JSON: kinds of values, then those that differ, with examples."""
    values: list[dict[str, Any]] = found["values"]
    yield _kinds(values)
    wrong = [each for each in values if each["mismatches"]]
    if not wrong:
        yield Text(_EQUAL_TOLD.format(tolerance=found["tolerance"]), style="bold green")
        return
    wrong.sort(key=lambda each: -each["mismatches"])
    yield _mismatches(wrong)
    for each in wrong:
        yield Text.assemble((each["name"], "bold red"), f" ({each['source']})")
        for example in each["examples"]:
            yield Text(
                f"  request {example['request']}, candidate {example['candidate']}, at {example['time']}: served "
                f"{_short(example['served'])}, offline {_short(example['offline'])}"
            )


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _kinds(values: Sequence[dict[str, Any]]) -> Table:
    table = _table("Served against offline", ["values"], ["names", "compared", "mismatches", "largest difference"])
    for kind in dict.fromkeys(each["kind"] for each in values):
        some = [each for each in values if each["kind"] == kind]
        largest = max((each["largest"] for each in some if each["largest"] is not None), default=None)
        total, wrong = (sum(each[what] for each in some) for what in ("compared", "mismatches"))
        table.add_row(kind, f"{len(some):,}", f"{total:,}", f"{wrong:,}", _difference(largest))
    return table


def _mismatches(wrong: Sequence[dict[str, Any]]) -> Table:
    table = _table("Mismatches", ["value"], ["compared", "mismatches", "largest difference"])
    for each in wrong:
        numbers = f"{each['compared']:,}", f"{each['mismatches']:,}", _difference(each["largest"])
        table.add_row(Text(each["name"]), *numbers)
    return table


def _difference(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"


def _short(value: Any) -> str:
    text = "missing" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
