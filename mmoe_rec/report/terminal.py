"""The health of a data set on the terminal: 120 columns show all, 80 the most important."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mmoe_rec.inspection.findings import DRIFT, LEAK_AUC, STRONG_DRIFT, flags_of, shown_and_folded
from mmoe_rec.report.explanations import CHECKS
from mmoe_rec.report.formatting import (
    NONE,
    count,
    day,
    fixed,
    percent,
    rate,
    requests_told,
    size,
    unmatured_told,
)

_WIDE = 110  # fewer columns do not hold all that there is to say of a feature
_NAME = 32  # letters of a name before it may be broken
_TASK_COLUMNS = 2  # more tasks share one column with the best AUC


def show(health: dict[str, Any], width: int) -> Iterator[RenderableType]:
    """What `rich` prints on a terminal of that width: splits, features, tables, then findings."""
    overview = health["overview"]
    times = f"{day(overview['first_request'])} to {day(overview['last_request'])} UTC"
    yield Text(
        f"{overview['files'] or 0:,} file{'s' * (overview['files'] != 1)}, {overview['rows'] or 0:,} rows, "
        f"{times if overview['first_request'] else 'without times'}"
    )
    if told := requests_told(overview["requests"]):
        yield Text(told, style="yellow")
    yield _splits(overview["splits"])
    yield _labels(overview["splits"])
    for name, split in overview["splits"].items():
        for task, number in split["unmatured"].items():
            yield Text(f"{name}: {unmatured_told(task, number, split['labels_known_by'])}", style="yellow")
    yield _features(health, narrow=width < _WIDE)
    yield _tables(health["tables"])
    yield from _findings(health)


def _table(title: str, left: list[str], right: list[str], caption: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = caption, "left"
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _splits(splits: dict[str, Any]) -> Table:
    columns = ["rows", "requests", "users", "candidates"]
    estimated = any(not each[name]["exact"] for each in splits.values() for name in columns[1:])
    table = _table("Splits", ["split"], columns, "~ an estimate, good to 0.4%" if estimated else None)
    for split, each in splits.items():
        table.add_row(split, f"{each['rows']:,}", *(count(each[name]) for name in columns[1:]))
    return table


def _labels(splits: dict[str, Any]) -> Table:
    table = _table("Labels", ["task"], list(splits), "rate (or mean) of the observed labels")
    for name in next(iter(splits.values()))["tasks"]:
        tasks = [each["tasks"][name] for each in splits.values()]
        told = (f"{rate(task['rate'], task['kind'])} of {task['observed']:,}" for task in tasks)
        table.add_row(Text(name), *told)
    return table


def _features(health: dict[str, Any], narrow: bool) -> Table:
    tasks = list(next(iter(health["overview"]["splits"].values()))["tasks"])
    alone = [f"AUC\n{task}" for task in tasks] if len(tasks) <= _TASK_COLUMNS else ["best\nAUC"]
    described = [] if narrow else ["kind", "role"]
    columns = ["has\nvalue", "in\ntest", "distinct", "unknown\nin test", "PSI", *alone]
    caption = (
        "unknown: test ids without a row of their own; PSI: drift train to test; AUC: the feature alone, validation"
    )
    shown = [name for name in columns if not (narrow and name in ("in\ntest", "distinct"))]
    table = _table("Features", ["feature", *described], shown, caption)
    table.columns[0].min_width = min(_NAME, max(len(each["name"]) for each in health["features"]))
    table.add_column("flags", style="yellow", overflow="fold")
    for each in health["features"]:
        inputs = len(each["inputs"])
        wide = [percent(each["coverage"]["test"]), count(each["distinct"]) if inputs == 1 else f"{inputs} inputs"]
        table.add_row(
            Text(each["name"]),
            *(each[name] for name in described),
            percent(each["coverage"]["train"]),
            *([] if narrow else wide),
            percent(each["unknown"]["test"]),
            _drift(each["psi"]),
            *_alone(each["auc"]),
            ", ".join(flags_of(health, each["name"])),
        )
    return table


def _drift(psi: float | None) -> Text:
    strong = psi is not None and psi > STRONG_DRIFT
    some = psi is not None and psi > DRIFT
    return Text(fixed(psi, 2), style="bold yellow" if strong else "yellow" if some else "")


def _alone(auc: dict[str, float | None]) -> list[Text]:
    cells = [Text(fixed(value), style="bold red" if (value or 0) > LEAK_AUC else "") for value in auc.values()]
    if len(cells) <= _TASK_COLUMNS:
        return cells
    known = {task: value for task, value in auc.items() if value is not None}
    if not known:
        return [Text(NONE)]
    best = max(known, key=lambda task: known[task])
    return [Text(f"{best} ") + cells[list(auc).index(best)]]


def _tables(tables: list[dict[str, Any]]) -> Table:
    total = sum(each["bytes"] + each["optimizer_bytes"] for each in tables)
    shown = sorted(tables, key=lambda each: -each["bytes"])[:8]
    title = f"Embedding tables: {len(tables)}, {size(total)} with the optimizer's state" + (
        f"; the {len(shown)} largest" if len(shown) < len(tables) else ""
    )
    table = _table(title, ["table", "inputs"], ["rows", "dim", "float32", "optimizer", "seen in training"])
    table.columns[0].min_width = min(_NAME, max((len(each["name"]) for each in shown), default=0))
    for each in shown:
        table.add_row(
            Text(each["name"]),
            Text(", ".join(each["inputs"])),
            f"{each['rows']:,}",
            str(each["dim"]),
            size(each["bytes"]),
            size(each["optimizer_bytes"]),
            percent(1 - each["never_seen"]),
        )
    return table


def _findings(health: dict[str, Any]) -> Iterator[RenderableType]:
    for each in health["overview"]["left_out"]:
        yield Text(f"left out: {each['file']}: {each['reason']}", style="bold red")
    if not health["findings"]:
        yield Text("nothing suspicious found", style="bold green")
    shown, folded = shown_and_folded(health["findings"])
    for each in shown:
        style = "bold red" if each["severity"] == "problem" else "yellow"
        yield Text.assemble((f"{each['severity']}: ", style), each["message"])
    if folded:
        kinds = Counter(CHECKS[each["check"]][0].lower() for each in folded)
        named = ", ".join(f"{name} ({number})" for name, number in kinds.most_common())
        yield Text(f"{len(folded)} more warnings, which cost less: {named}; the report has them", style="dim")
