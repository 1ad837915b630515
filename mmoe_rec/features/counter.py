"""The `counter` feature: trailing counts and smoothed rates of a task's label per key, point in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
import pyarrow as pa

from mmoe_rec.features.encoder import Encoder, Inputs, Outline, State
from mmoe_rec.features.events import EventParts, KnownEvents, known_at
from mmoe_rec.features.numbers import NumberHistogram, Standardiser
from mmoe_rec.features.numeric import DenseNumber
from mmoe_rec.features.rows import MICROSECONDS_PER_DAY, LogRows, maturity
from mmoe_rec.schema import CounterFeature, Task

_FOREVER = np.iinfo(np.int64).max
_NEVER = np.iinfo(np.int64).min


class CounterEncoder(Encoder):
    """Statistics over all earlier rows with the same key whose label was known at the request."""

    def __init__(self, name: str, feature: CounterFeature, task: Task) -> None:
        self.source = feature.events
        self.name, self.feature, self.task = name, feature, task
        self.prior = 0.0
        self._labels = NumberHistogram()
        self._parts = EventParts()
        self.numbers = {each: DenseNumber(each) for each in self._raw_names()}
        self._forget()

    def _raw_names(self) -> list[str]:
        names = []
        for window in self.feature.window_days:
            names += [
                f"{self.name}_{output}{_suffix(window)}" for output in self.feature.outputs if output != "recency"
            ]
        return names + ([f"{self.name}_recency"] if "recency" in self.feature.outputs else [])

    def _set_events(self, events: KnownEvents, totals: Sequence[np.ndarray]) -> None:
        self.events = events
        self.rows, self.label_sum, self.last_positive = totals

    def _forget(self) -> None:
        none = np.empty(0, np.int64)
        self._set_events(KnownEvents(np.empty(0, np.uint64), none), (none, np.empty(0), none))

    def learn(self, rows: LogRows, known_by: int) -> None:
        """Counts the training rows' labels for the overall mean; a sum of fractions would depend on the rows' order."""
        if self.source is None:
            self._labels.add(rows.labels(self.task, known_by))

    def finish(self) -> None:
        """Makes the overall mean."""
        self.prior = self._labels.standardiser().mean

    def remember(self, rows: LogRows) -> None:
        """Collects labelled rows; each becomes visible only when its label is known."""
        labels = rows.labels(self.task, _FOREVER)
        observed = np.flatnonzero(~np.isnan(labels))
        known = known_at(rows.times()[observed], maturity(self.task))
        self._parts.add(rows.hashes(self.feature.by)[observed], known, labels[observed])

    def finish_memory(self) -> None:
        """Running totals per key, one event for each moment at which a key's totals change."""
        key, known, label = self._parts.sorted()
        self._parts = EventParts()
        if not len(key):
            self._forget()
            return
        rows = _running(key, np.ones(len(key)))
        label_sum = (_running_fractions if self.task.kind == "regression" else _running)(key, label)
        last_positive = _running_last(key, np.where(label > 0, known, _NEVER))
        end_of_moment = np.append((key[1:] != key[:-1]) | (known[1:] != known[:-1]), True)
        totals = (rows.astype(np.int64), label_sum, last_positive)
        events = KnownEvents(key[end_of_moment], known[end_of_moment])
        self._set_events(events, [each[end_of_moment] for each in totals])

    def learn_numbers(self, rows: LogRows) -> None:
        """Counts the training rows' statistics, so that they can be standardised."""
        for name, values in self.raw(rows).items():
            self.numbers[name].histogram.add(values)

    def finish_numbers(self) -> None:
        """Makes means and deviations."""
        for number in self.numbers.values():
            number.finish()

    def raw(self, rows: LogRows) -> dict[str, np.ndarray]:
        """Statistics before standardising: name -> (N,) float64. A column of that name in `rows` wins."""
        groups = self.events.groups(rows.hashes(self.feature.by))
        now = self.events.as_of(rows.times())
        last = self.events.last(groups, now)
        result: dict[str, np.ndarray] = {}
        for window in self.feature.window_days:
            count, label_sum = self._totals(last)
            if window is not None:
                before = self.events.last(groups, now - round(window * MICROSECONDS_PER_DAY))
                count_before, sum_before = self._totals(before)
                count, label_sum = count - count_before, label_sum - sum_before
            statistics = {
                "positives": np.log1p(np.maximum(label_sum, 0.0)),
                "rows": np.log1p(count),
                "rate": (label_sum + self.feature.smoothing * self.prior) / (count + self.feature.smoothing),
            }
            shown = [output for output in self.feature.outputs if output in statistics]
            result |= {f"{self.name}_{output}{_suffix(window)}": statistics[output] for output in shown}
        if "recency" in self.feature.outputs:
            result[f"{self.name}_recency"] = self._recency(last, now)
        return {name: rows.numbers(name) if rows.has(name) else values for name, values in result.items()}

    def _totals(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(self.events):
            return np.zeros(len(index)), np.zeros(len(index))
        found = index >= 0
        return np.where(found, self.rows[index], 0), np.where(found, self.label_sum[index], 0.0)

    def _recency(self, index: np.ndarray, now: np.ndarray) -> np.ndarray:
        if not len(self.events):
            return np.full(len(index), np.nan)
        last = np.where(index >= 0, self.last_positive[index], _NEVER)
        days = (now - last.astype(np.float64)) / MICROSECONDS_PER_DAY
        return np.where(last == _NEVER, np.nan, np.log1p(np.maximum(days, 0.0)))

    def outline(self) -> Outline:
        """Dense inputs only."""
        return Outline(dense=tuple(each for number in self.numbers.values() for each in number.inputs()))

    def encode(self, rows: LogRows) -> Inputs:
        """The standardised statistics."""
        dense: dict[str, np.ndarray] = {}
        for name, values in self.raw(rows).items():
            dense |= self.numbers[name].encode(values)
        return Inputs(dense=dense)

    def state(self) -> State:
        """Running totals, the overall mean, and the statistics' means and deviations."""
        table = pa.table(
            {
                "key": self.events.key,
                "known": self.events.known,
                "rows": self.rows,
                "label_sum": self.label_sum,
                "last_positive": self.last_positive,
            }
        )
        numbers = {name: asdict(number.standardiser) for name, number in self.numbers.items()}
        return State({"prior": self.prior, "floor": self.events.floor, "numbers": numbers}, {"events": table})

    def restore(self, state: State) -> None:
        """Takes saved totals and statistics."""
        self.prior = state.values["prior"]
        for name, values in state.values["numbers"].items():
            self.numbers[name].standardiser = Standardiser(**values)
        table = state.tables["events"]
        key, known, *totals = (
            table[name].to_numpy() for name in ("key", "known", "rows", "label_sum", "last_positive")
        )
        self._set_events(KnownEvents(key, known, state.values["floor"]), totals)

    def latest(self, moment: int) -> State:
        """The totals that requests at `moment` or later can ask for."""
        windows = [window for window in self.feature.window_days if window is not None]
        since = moment - round(max(windows, default=0.0) * MICROSECONDS_PER_DAY)
        state = self.state()
        table = state.tables["events"].filter(pa.array(self.events.needed_since(since)))
        return State({**state.values, "floor": self.events.later_floor(moment)}, {"events": table})


def _suffix(window: float | None) -> str:
    """End of an output's name: nothing for all of the past, `_7d`, `_0p5d`."""
    return "" if window is None else f"_{window:g}d".replace(".", "p")


def _running(key: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(E,) sum of whole `values` so far within each run of equal keys."""
    total = np.cumsum(values)
    starts = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    before = np.repeat(total[starts] - values[starts], np.diff(np.append(starts, len(key))))
    return total - before


def _running_fractions(key: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The same of any `values`: fractions are rounded as they are added, so each run is summed by itself."""
    runs = np.cumsum(np.append(False, key[1:] != key[:-1]))
    return pd.Series(values).groupby(runs).cumsum().to_numpy()


def _running_last(key: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """(E,) last of the rising `moments` so far within each run of equal keys, the least int64 where there is none."""
    positive = moments != _NEVER
    starts = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    start = np.repeat(starts, np.diff(np.append(starts, len(key))))
    index = np.maximum.accumulate(np.where(positive, np.arange(len(key)), -1))
    return np.where(index >= start, moments[index], _NEVER)
