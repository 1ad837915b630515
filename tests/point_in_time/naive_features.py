"""What counters and histories say of each row of a log, by plain loops over pandas rows.

This is the reference for the engine, so nothing of the package is used here. Settings are the plain `columns`, `tasks`
and `features` of a settings file; times are whole microseconds; None is a missing value.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

DAY = 86_400_000_000
Row = dict[str, Any]


class NaiveFeatures:
    """A log (one row a candidate) and logs of events, by name."""

    def __init__(self, settings: Row, log: pd.DataFrame, events: dict[str, pd.DataFrame]) -> None:
        self.columns, self.tasks, self.features = settings["columns"], settings["tasks"], settings["features"]
        self.event_times = {name: each["time"] for name, each in settings.get("events", {}).items()}
        self.rows = _rows(log)
        self.events = {name: _rows(each) for name, each in events.items()}
        self._give_each_request_its_first_time()

    def _give_each_request_its_first_time(self) -> None:
        time = self.columns["time"]
        first: dict[Any, int] = {}
        for row in self.rows:
            request = self.request(row)
            first[request] = min(first.get(request, row[time]), row[time])
        requests = [self.request(row) for row in self.rows]
        for row, request in zip(self.rows, requests, strict=True):
            row[time] = first[request]

    def request(self, row: Row) -> Any:
        """What identifies a row's request."""
        user = row[self.columns["user"]]
        if "request" not in self.columns:
            return user, row[self.columns["time"]]
        request = row[self.columns["request"]]
        return (user, request) if self.columns.get("request_scope") == "user" else request

    def label(self, row: Row, name: str) -> float | None:
        """A row's label of a task, whenever it becomes known; None where it has none."""
        task = self.tasks[name]
        if task.get("given") is not None and self.label(row, task["given"]) != 1:
            return None
        rule = task.get("observed_when")
        if rule is not None and row[rule["column"]] != rule["equals"]:
            return None
        return row[task["label"]]

    def matures_after(self, name: str) -> int:
        """Microseconds until a label is known: a satisfaction's, not before its engagement's."""
        task = self.tasks[name]
        own = round(task.get("matures_after_days", 0) * DAY)
        return own if task.get("given") is None else max(own, self.matures_after(task["given"]))

    def overall_mean(self, name: str, start: int | None, end: int) -> float:
        """The mean label of the training rows, of labels that were known by their end; 0 without any."""
        labels = []
        for row in self.rows:
            time, label = row[self.columns["time"]], self.label(row, name)
            known = time + self.matures_after(name) <= end
            if (start is None or start <= time) and time < end and label is not None and known:
                labels.append(label)
        return sum(labels) / len(labels) if labels else 0.0

    def later(self, rows: int, moments: list[int]) -> list[Row]:
        """The log's first rows, at each of some moments."""
        return [{**row, self.columns["time"]: moment} for moment in moments for row in self.rows[:rows]]

    def _remembered(self, feature: Row) -> list[tuple[Row, int, float]]:
        """Rows, the moments from which they are known, and labels."""
        if feature.get("events") is not None:
            time = self.event_times[feature["events"]]
            return [(row, row[time] + 1, 1.0) for row in self.events[feature["events"]]]
        found = []
        for row in self.rows:
            label = self.label(row, feature["task"])
            if label is not None:
                known = row[self.columns["time"]] + max(1, self.matures_after(feature["task"]))
                found.append((row, known, label))
        return found

    def counter(
        self, name: str, overall_mean: float, asking: list[Row] | None = None
    ) -> list[dict[tuple[str, float | None], float | None]]:
        """For each row that asks, or of the log, (output, days of the window) -> value; a recency has no window."""
        feature = self.features[name]
        remembered = self._remembered(feature)
        return [self._count(feature, remembered, row, overall_mean) for row in (asking or self.rows)]

    def _count(
        self, feature: Row, remembered: list[tuple[Row, int, float]], row: Row, overall_mean: float
    ) -> dict[tuple[str, float | None], float | None]:
        now = row[self.columns["time"]]
        same = [
            (known, label)
            for other, known, label in remembered
            if known <= now and all(_same(other[column], row[column]) for column in feature["by"])
        ]
        same = _not_forgotten(same, now, feature.get("forget_after_days"))
        result: dict[tuple[str, float | None], float | None] = {}
        for days in feature.get("window_days", [None]):
            labels = [label for known, label in same if days is None or known > now - round(days * DAY)]
            smoothing = feature.get("smoothing", 20.0)
            result["rows", days] = math.log1p(len(labels))
            result["positives", days] = math.log1p(max(sum(labels), 0.0))
            result["rate", days] = (sum(labels) + smoothing * overall_mean) / (len(labels) + smoothing)
        positive = [known for known, label in same if label > 0]
        result["recency", None] = math.log1p((now - max(positive)) / DAY) if positive else None
        return result

    def history(self, name: str, table_row: dict[Any, int], asking: list[Row] | None = None) -> list[list[int]]:
        """For each row that asks, table rows of the last candidates, oldest first; of one instant, by table row."""
        feature = self.features[name]
        user, item = self.columns["user"], self.features[feature["of"]]["column"]
        remembered = self._remembered(feature)
        result = []
        for row in asking or self.rows:
            now = row[self.columns["time"]]
            known = [
                (known, table_row[other[item]])
                for other, known, label in remembered
                if known <= now and label >= feature.get("at_least", 1.0) and _same(other[user], row[user])
            ]
            known = _not_forgotten(known, now, feature.get("forget_after_days"))
            result.append([each for _, each in sorted(known)][-feature.get("length", 20) :])
        return result


def _not_forgotten(events: list[Any], now: int, days: float | None) -> list[Any]:
    """Of tuples that begin with the moment from which they are known, those after the last gap of more than `days`."""
    if days is None:
        return events
    kept: list[Any] = []
    later = now
    for event in sorted(events, key=lambda event: event[0], reverse=True):
        if later - event[0] > round(days * DAY):
            break
        kept.append(event)
        later = event[0]
    return kept


def _rows(table: pd.DataFrame) -> list[Row]:
    return [{name: _none_if_missing(value) for name, value in row.items()} for row in table.to_dict("records")]


def _none_if_missing(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _same(one: Any, other: Any) -> bool:
    """Missing values are one value."""
    return (one is None and other is None) or one == other
