"""A log of interactions as a list of rows: requests, labels, and when labels become known.

Settings are the plain `columns`, `tasks`, `features` and `events` of a settings file. A row is a dictionary, a time is
whole microseconds, None is a missing value.
"""

import math
from typing import Any

import pandas as pd

DAY = 86_400_000_000
Row = dict[str, Any]
Window = tuple[int | None, int | None]


class Log:
    """An interaction log (one row a candidate) and the logs of events beside it, by name."""

    def __init__(self, settings: Row, log: pd.DataFrame, events: dict[str, pd.DataFrame] | None = None) -> None:
        self.columns, self.tasks, self.features = settings["columns"], settings["tasks"], settings["features"]
        self.event_times = {name: item["time"] for name, item in settings.get("events", {}).items()}
        self.rows = rows_of(log)
        self.events = {name: rows_of(item) for name, item in (events or {}).items()}
        self._give_each_request_its_first_time()

    def _give_each_request_its_first_time(self) -> None:
        first: dict[Any, int] = {}
        requests = [self.request(row) for row in self.rows]
        for row, request in zip(self.rows, requests, strict=True):
            first[request] = min(first.get(request, self.time(row)), self.time(row))
        for row, request in zip(self.rows, requests, strict=True):
            row[self.columns["time"]] = first[request]

    def time(self, row: Row) -> int:
        """When a row's request was made."""
        return row[self.columns["time"]]

    def request(self, row: Row) -> Any:
        """What identifies a row's request."""
        user = row[self.columns["user"]]
        if "request" not in self.columns:
            return user, self.time(row)
        request = row[self.columns["request"]]
        return (user, request) if self.columns.get("request_scope") == "user" else request

    def label(self, row: Row, name: str) -> float | None:
        """A row's label of a task, whenever it becomes known; None if it has none."""
        task = self.tasks[name]
        if task.get("conditional_on") is not None and self.label(row, task["conditional_on"]) != 1:
            return None
        rule = task.get("observed_when")
        if rule is not None and row[rule["column"]] != rule["equals"]:
            return None
        return row[task["label"]]

    def matures_after(self, name: str) -> int:
        """Microseconds until a label is known; a label with `conditional_on` is not known before the label that it is
        given."""
        task = self.tasks[name]
        own = round(task.get("label_delay_days", 0) * DAY)
        return own if task.get("conditional_on") is None else max(own, self.matures_after(task["conditional_on"]))

    def label_known_by(self, row: Row, name: str, moment: int) -> float | None:
        """A row's label of a task, None if it is not known at `moment`."""
        return self.label(row, name) if self.time(row) + self.matures_after(name) <= moment else None

    def overall_mean(self, name: str, training: Window) -> float:
        """The mean of counters' labels of the training rows, of labels known when training ends; 0 without any."""
        labels = [
            self.label_known_by(row, name, training[1] or 0) for row in self.rows if inside(self.time(row), training)
        ]
        there = [in_units(label) for label in labels if label is not None]
        return math.fsum(there) / len(there) if there else 0.0

    def at_moments(self, rows: int, moments: list[int]) -> list[Row]:
        """The log's first rows, asked at each of some moments."""
        return [{**row, self.columns["time"]: moment} for moment in moments for row in self.rows[:rows]]


def in_units(label: float) -> float:
    """A label as counters sum it: the nearest multiple of 2^-20."""
    return round(label * 2**20) / 2**20


def inside(time: int, window: Window) -> bool:
    """start <= time < end; either may be open."""
    start, end = window
    return (start is None or start <= time) and (end is None or time < end)


def rows_of(table: pd.DataFrame) -> list[Row]:
    """A dictionary for each row, None for what is missing."""
    return [{name: _none_if_missing(value) for name, value in row.items()} for row in table.to_dict("records")]


def _none_if_missing(value: Any) -> Any:
    return None if value is pd.NaT or (isinstance(value, float) and math.isnan(value)) else value
