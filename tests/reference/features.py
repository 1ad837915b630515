"""Features of rows: what was known of a key when a request was made, vocabularies, and standardised numbers."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tests.reference.log import DAY, Log, Row, Window, in_units, inside

Event = tuple[Any, int, float]
"""What it is counted for, the moment from which it is known, and its label, or the item of a history."""
Statistic = tuple[str, float | None]
"""An output of a counter and the days of its window; a recency has no window."""
MIN_FREQUENT_ROWS = 8
"""Rows that a value of a number needs for an embedding. Logs of these tests are too small for 100 rows of a value."""


# Point in time


def visible_events(events: Iterable[Event], key: Any, now: int) -> list[Event]:
    """The events of a key that are known at `now`, the oldest first."""
    return sorted((event for event in events if event[0] == key and event[1] <= now), key=lambda event: event[1:])


def totals(events: Iterable[Event], now: int, window: int | None = None) -> tuple[int, float]:
    """The number and the sum of labels of events that became known within the window, which ends `now`."""
    labels = [label for _, known, label in events if window is None or known > now - window]
    return len(labels), math.fsum(labels)


def last_positive(events: Iterable[Event], never: Any = None) -> Any:
    """The last moment at which a positive label became known."""
    return max((known for _, known, label in events if label > 0), default=never)


def counter(log: Log, name: str, overall_mean: float, rows: list[Row] | None = None) -> list[dict[Statistic, Any]]:
    """For each row of the log, or of `rows`, the statistics of a feature of the kind `counter`."""
    feature, result = log.features[name], []
    events = [(_key(row, feature["by"]), known, in_units(label)) for row, known, label in _remembered(log, feature)]
    smoothing = feature.get("smoothing", 20.0)
    for row in log.rows if rows is None else rows:
        now = log.time(row)
        visible = visible_events(events, _key(row, feature["by"]), now)
        statistics: dict[Statistic, Any] = {}
        for days in feature.get("window_days", [None]):
            count, labels = totals(visible, now, _microseconds(days))
            statistics["log_count", days] = math.log1p(count)
            statistics["log_sum", days] = math.log1p(max(labels, 0.0))
            statistics["rate", days] = (labels + smoothing * overall_mean) / (count + smoothing)
        last = last_positive(visible)
        statistics["recency", None] = None if last is None else math.log1p((now - last) / DAY)
        result.append(statistics)
    return result


def history(
    log: Log, name: str, table_rows: dict[str, dict[Any, int]], rows: list[Row] | None = None
) -> dict[str, list[list[int]]]:
    """For each row, the table rows of the user's last candidates, the oldest first; of one moment, by table row; and
    the same of each attribute's. table_rows: of each id feature."""
    feature = log.features[name]
    user, ids = log.columns["user"], [feature["of"], *feature.get("attributes", [])]
    least, length = feature.get("min_label", 1.0), feature.get("length", 20)
    events = [
        (row[user], known, (number, row))
        for number, (row, known, label) in enumerate(_remembered(log, feature))
        if label >= least
    ]
    names = [name, *(f"{name}_{item}" for item in ids[1:])]
    result: dict[str, list[list[int]]] = {item: [] for item in names}
    for row in log.rows if rows is None else rows:
        now = log.time(row)
        seen = []
        for _, known, (_, event) in visible_events(events, row[user], now):
            seen.append((known, *(table_rows[item][event[log.features[item]["column"]]] for item in ids)))
        for place, item in enumerate(names, 1):
            result[item].append([held[place] for held in sorted(seen)[-length:]])
    return result


def cooccurrence(log: Log, name: str, codes: dict[Any, int], rows: list[Row] | None = None) -> list[dict[str, float]]:
    """For each row, log(1 + x) of the sum, the largest and the normalized sum of the counts of the candidate after the
    user's last candidates. codes: of each candidate, which order those of one moment."""
    feature, user, item = log.features[name], log.columns["user"], log.columns["candidate"]
    last, most, window = feature["last"], feature["max_events"], _microseconds(feature.get("window_days"))
    events = [
        (row[user], known, row[item])
        for row, known, label in _remembered(log, feature)
        if label >= feature.get("min_label", 1.0) and row[user] is not None and row[item] is not None
    ]
    result = []
    for row in log.rows if rows is None else rows:
        now, pairs, popularity = log.time(row), Counter[Any](), Counter[Any]()
        own: list[Any] = []
        for each in {event[0] for event in events}:
            seen = [event for event in events if event[0] == each and event[1] <= now]
            seen = sorted(seen, key=lambda event: (event[1], codes[event[2]]))[-most:]
            seen = [event for event in seen if window is None or event[1] > now - window]
            for place, (_, known, second) in enumerate(seen):
                popularity[second] += 1
                for _, before, first in seen[max(0, place - last) : place]:
                    pairs[first, second] += 1
                    if before == known:
                        pairs[second, first] += 1
            if each == row[user]:
                own = [event[2] for event in seen[-last:]]
        candidate = row[item]
        counts = [(pairs[first, candidate], popularity[first]) for first in own if pairs[first, candidate]]
        normalized = [count / math.sqrt(other * popularity[candidate]) for count, other in counts]
        plain = [count for count, _ in counts]
        values = {"sum": sum(plain), "max": max(plain, default=0), "normalized": math.fsum(normalized)}
        result.append({output: math.log1p(value) for output, value in values.items()})
    return result


def _remembered(log: Log, feature: Row) -> list[tuple[Row, int, float]]:
    """Rows, the moments from which they are known, and labels. Nothing is known at the moment of its own request."""
    if feature.get("events") is not None:
        time = log.event_times[feature["events"]]
        return [(row, row[time] + 1, 1.0) for row in log.events[feature["events"]]]
    after = max(1, log.matures_after(feature["task"]))
    labels = [(row, log.label(row, feature["task"])) for row in log.rows]
    return [(row, log.time(row) + after, label) for row, label in labels if label is not None]


def _key(row: Row, columns: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row[column] for column in columns)


def _microseconds(days: float | None) -> int | None:
    return None if days is None else round(days * DAY)


# Inputs of the model


def vocabulary(values: Iterable[Any], min_count: int, oov_buckets: int) -> dict[Any, int]:
    """The table row of each frequent id, the most frequent first: row 0 is a missing id, then come the buckets."""
    counts = Counter(value for value in values if value is not None)
    frequent = sorted((value for value in counts if counts[value] >= min_count), key=lambda each: (-counts[each], each))
    return {value: 1 + oov_buckets + place for place, value in enumerate(frequent)}


def mean_and_deviation(values: Iterable[float | None]) -> tuple[float, float]:
    """Of the values that are there; the deviation of equal values is 1."""
    there = [value for value in values if value is not None]
    mean = math.fsum(there) / len(there) if there else 0.0
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in there) / max(len(there), 1))
    return mean, std if std > 1e-15 * max(map(abs, there), default=0.0) else 1.0


def standardized(value: float | None, mean: float, std: float) -> float:
    """(value - mean) / deviation within +-10; 0, the mean, for a missing value."""
    return 0.0 if value is None else min(10.0, max(-10.0, (value - mean) / std))


def encode_number(name: str, values: list[float | None], training: list[bool]) -> dict[str, list[float]]:
    """The dense inputs of a number: standardised by training rows, and an indicator if one of those was missing."""
    training_values = [value for value, trains in zip(values, training, strict=True) if trains]
    mean, std = mean_and_deviation(training_values)
    inputs = {name: [standardized(value, mean, std) for value in values]}
    return inputs | ({f"{name}_missing": [float(value is None) for value in values]} if None in training_values else {})


def encode(log: Log, training: Window) -> tuple[dict[str, list[list[int]]], dict[str, list[float]]]:
    """Table rows (a list for each row) and dense inputs of the kinds id, numeric, counter and history.

    Every id of a column has to be frequent or missing: rows of unknown ids follow from hashes.
    """
    is_training = [inside(log.time(row), training) for row in log.rows]
    ids: dict[str, list[list[int]]] = {}
    dense: dict[str, list[float]] = {}
    rows_of: dict[str, dict[Any, int]] = {}
    for name, feature in log.features.items():
        column = [row[feature["column"]] for row in log.rows] if "column" in feature else []
        if feature["kind"] == "id":
            training_values = [value for value, trains in zip(column, is_training, strict=True) if trains]
            least, buckets = feature.get("min_count", 2), feature.get("oov_buckets", 16)
            rows_of[name] = {None: 0} | vocabulary(training_values, least, buckets)
            ids[name] = [[rows_of[name][value]] for value in column]
        elif feature["kind"] == "numeric":
            if feature.get("values") == "auto":
                frequent = vocabulary(
                    [x for x, trains in zip(column, is_training, strict=True) if trains], MIN_FREQUENT_ROWS, 0
                )
                ids[f"{name}_value"] = [[frequent.get(value, 0)] for value in column]
            if feature.get("transform") == "log":
                column = [None if x is None else math.copysign(math.log1p(abs(x)), x) for x in column]
            dense |= encode_number(name, column, is_training)
        elif feature["kind"] == "counter":
            mean = 0.0 if "task" not in feature else log.overall_mean(feature["task"], training)
            statistics = counter(log, name, mean)
            for output, days in statistics[0]:
                if output in feature["outputs"]:
                    title = f"{name}_{output}" + ("" if days is None else f"_{days:g}d".replace(".", "p"))
                    dense |= encode_number(title, [statistic[output, days] for statistic in statistics], is_training)
        elif feature["kind"] == "history":
            ids |= history(log, name, rows_of)
    return ids, dense
