"""The `counter` feature: trailing counts and smoothed rates of a task's label per key, point in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from mmoe_rec.features.encoded import Ragged
from mmoe_rec.features.encoder import Answers, Inputs, MemoryEncoder, Outline, State
from mmoe_rec.features.events import known_at
from mmoe_rec.features.memory import NEVER, CounterMemory
from mmoe_rec.features.numbers import NumberHistogram, Standardiser
from mmoe_rec.features.numeric import DenseNumber
from mmoe_rec.features.rows import MICROSECONDS_PER_DAY, LogRows, maturity
from mmoe_rec.schema import CounterFeature, Task

_FOREVER = np.iinfo(np.int64).max


class CounterEncoder(MemoryEncoder[CounterMemory]):
    """Statistics over all earlier rows with the same key whose label was known at the request."""

    def __init__(self, name: str, feature: CounterFeature, task: Task) -> None:
        self.source = feature.events
        self.name, self.feature, self.task = name, feature, task
        self.prior = 0.0
        self.counts = NumberHistogram()
        self.numbers = {each: DenseNumber(each) for each in self._answer_names()}
        self.memory = CounterMemory.empty("recency" in feature.outputs)

    def _answer_names(self) -> list[str]:
        names = []
        for window in self.feature.window_days:
            names += [
                f"{self.name}_{output}{_suffix(window)}" for output in self.feature.outputs if output != "recency"
            ]
        return names + ([f"{self.name}_recency"] if "recency" in self.feature.outputs else [])

    def learn(self, rows: LogRows, known_by: int) -> None:
        """Counts the training rows' labels for the overall mean; a sum of fractions would depend on the rows' order."""
        if self.source is None:
            self.counts.add(rows.labels(self.task, known_by))

    def finish(self) -> None:
        """Makes the overall mean."""
        self.prior = self.counts.standardiser().mean

    def events(self, rows: LogRows) -> pa.Table:
        """Labelled rows; each becomes visible only when its label is known."""
        return self.labelled(self.keys(rows), rows.times(), self.labels(rows))

    @property
    def has_labels(self) -> bool:
        """Of the interaction log, not of a log of events."""
        return self.source is None

    def labels(self, rows: LogRows) -> np.ndarray:
        """(N,) labels: int8 of a binary task, -1 where unobserved, or float64, NaN where unobserved."""
        labels = rows.labels(self.task, _FOREVER)
        return labels if self.task.kind == "regression" else np.where(np.isnan(labels), -1, labels).astype(np.int8)

    def labelled(self, key: np.ndarray, times: np.ndarray, labels: np.ndarray) -> pa.Table:
        """The rows whose label is observed."""
        observed = np.flatnonzero(labels >= 0 if labels.dtype == np.int8 else ~np.isnan(labels))
        if len(observed) < len(key):
            key, times, labels = key[observed], times[observed], labels[observed]
        known = known_at(times, maturity(self.task))
        return pa.table({"key": key, "known": known, "label": labels.astype(np.float64)})

    def keys(self, rows: LogRows) -> np.ndarray:
        """The combinations of the columns in `by`."""
        return rows.hashes(self.feature.by)

    def extended(self, memory: CounterMemory, events: pa.Table) -> CounterMemory:
        """Further labels."""
        key, known, label = (events[name].to_numpy() for name in ("key", "known", "label"))
        return memory.extended(key, known, label, fractions=self.task.kind == "regression")

    def compacted(self, memory: CounterMemory, moment: int) -> CounterMemory:
        """The totals of each key as of `moment` and within the longest window before it, and what comes later."""
        windows = [window for window in self.feature.window_days if window is not None]
        return memory.compacted(moment, round(max(windows, default=0.0) * MICROSECONDS_PER_DAY))

    def memory_from(self, columns: Mapping[str, np.ndarray], floor: int | None) -> CounterMemory:
        """A saved memory."""
        return CounterMemory.from_columns(columns, floor)

    def answers(self, memory: CounterMemory, keys: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray | Ragged]:
        """Statistics before they are standardised."""
        now = memory.as_of(times)
        last = memory.events.last(keys, now)
        result: dict[str, np.ndarray] = {}
        for window in self.feature.window_days:
            count, label_sum = memory.totals(last)
            if window is not None:
                start = memory.events.last(keys, now - round(window * MICROSECONDS_PER_DAY))
                count_before, sum_before = memory.totals(start)
                count, label_sum = count - count_before, label_sum - sum_before
            for output in self.feature.outputs:
                if output != "recency":
                    result[f"{self.name}_{output}{_suffix(window)}"] = self._statistic(output, count, label_sum)
        if "recency" in self.feature.outputs:
            result[f"{self.name}_recency"] = _recency(memory, last, now)
        return dict(result)

    def _statistic(self, output: str, count: np.ndarray, label_sum: np.ndarray) -> np.ndarray:
        match output:
            case "positives":
                return np.log1p(np.maximum(label_sum, 0.0))
            case "rows":
                return np.log1p(count)
        return (label_sum + self.feature.smoothing * self.prior) / (count + self.feature.smoothing)

    @property
    def answer_counts(self) -> dict[str, NumberHistogram]:
        """Histograms of the statistics in the training rows."""
        return {name: number.histogram for name, number in self.numbers.items()}

    def learn_answers(self, answers: Answers) -> None:
        """Counts the training rows' statistics, so that they can be standardised."""
        for name, values in answers.items():
            assert isinstance(values, np.ndarray)
            self.numbers[name].histogram.add(values)

    def finish_answers(self) -> None:
        """Makes means and deviations."""
        for number in self.numbers.values():
            number.finish()

    def outline(self) -> Outline:
        """Dense inputs only."""
        return Outline(dense=tuple(each for number in self.numbers.values() for each in number.inputs()))

    def encode(self, rows: LogRows) -> Inputs:
        """The standardised statistics. A column with the name of one wins."""
        dense: dict[str, np.ndarray] = {}
        given = {name for name in self.numbers if rows.has(name)}
        answers = {} if len(given) == len(self.numbers) else self.look_up(rows)
        for name, number in self.numbers.items():
            values = rows.numbers(name) if name in given else answers[name]
            assert isinstance(values, np.ndarray)
            dense |= number.encode(values)
        return Inputs(dense=dense)

    def state(self) -> State:
        """The overall mean, and the statistics' means and deviations."""
        numbers = {name: asdict(number.standardiser) for name, number in self.numbers.items()}
        return State({"prior": self.prior, "numbers": numbers})

    def restore(self, state: State) -> None:
        """Takes saved statistics."""
        self.prior = state.values["prior"]
        for name, values in state.values["numbers"].items():
            self.numbers[name].standardiser = Standardiser(**values)


def _suffix(window: float | None) -> str:
    """End of an output's name: nothing for all of the past, `_7d`, `_0p5d`."""
    return "" if window is None else f"_{window:g}d".replace(".", "p")


def _recency(memory: CounterMemory, index: np.ndarray, now: np.ndarray) -> np.ndarray:
    """(N,) log(1 + days) since the last positive event, NaN without."""
    if not len(memory.events):
        return np.full(len(index), np.nan)
    assert memory.last_positive is not None
    last = np.where(index >= 0, memory.last_positive[index], NEVER)
    days = (now - last.astype(np.float64)) / MICROSECONDS_PER_DAY
    return np.where(last == NEVER, np.nan, np.log1p(np.maximum(days, 0.0)))
