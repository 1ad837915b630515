"""The kind `counter`: trailing counts and smoothed rates of a task's label per key, point in time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from mmoe_rec.features.encoder import Inputs, Kind, MemoryEncoder, Outline, Results, Shared, State
from mmoe_rec.features.layout import Table
from mmoe_rec.features.numbers import DenseNumber, Moments, NumberHistogram, Standardiser
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows, maturity
from mmoe_rec.point_in_time.join import known_at
from mmoe_rec.point_in_time.layers import AnyCounter
from mmoe_rec.point_in_time.memory import NEVER, CounterFound, CounterMemory
from mmoe_rec.point_in_time.search import AnyLookUps, UnsortedLookUps
from mmoe_rec.point_in_time.together import CounterQuestion
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.schema import Days, Meaning, Remembering, Schema, each_once

_FOREVER = np.iinfo(np.int64).max
_ROUNDING = 1e-12


class CounterFeature(Remembering):
    """Trailing statistics of a task's label, or of events, over all earlier rows with the same key, point in time."""

    kind: Literal["counter"]
    by: tuple[str, ...] = Field(min_length=1, description="columns that form the key, such as [user_id, brand]")
    outputs: tuple[Literal["positives", "rows", "rate", "recency"], ...] = Field(
        ("positives", "rate", "recency"),
        description="positives: log(1 + sum of labels); rows: log(1 + rows); rate: smoothed mean label, not of events; "
        "recency: log(1 + days since the last row with a positive label became known), missing if never",
    )
    window_days: tuple[Days | None, ...] = Field(
        (None,), min_length=1, description="trailing windows; null is all of the past"
    )
    smoothing: float = Field(20.0, gt=0, description="rows of the overall mean that are mixed into a rate")

    @model_validator(mode="before")
    @classmethod
    def _outputs_of_events(cls, values: Any) -> Any:
        """Events have no labels, so their default has no rate."""
        if isinstance(values, dict) and values.get("events") is not None and "outputs" not in values:
            return {**values, "outputs": ("positives", "recency")}
        return values

    @model_validator(mode="after")
    def _rate_has_labels(self) -> Self:
        if self.events is not None and "rate" in self.outputs:
            raise ValueError("events have no rate; set outputs, say, to [positives, recency]")
        return self

    @field_validator("by", "outputs", "window_days")
    @classmethod
    def _each_once(cls, values: tuple[str | float | None, ...]) -> tuple[str | float | None, ...]:
        return each_once(values)

    @field_validator("window_days")
    @classmethod
    def _each_named(cls, windows: tuple[float | None, ...]) -> tuple[float | None, ...]:
        names: dict[str, float] = {}
        for window in filter(None, windows):
            if (other := names.setdefault(f"{window:g}", window)) != window:
                raise ValueError(f"lists {other!r} and {window!r}, but windows are named by their first six digits")
        return windows

    @model_validator(mode="after")
    def _windows_are_remembered(self) -> Self:
        """So windows count the same with and without `forget_after_days`."""
        longest = max(filter(None, self.window_days), default=0.0)
        if self.forget_after_days is not None and self.forget_after_days < longest:
            raise ValueError(
                f"forgets after {self.forget_after_days:g} days, before its window of {longest:g} days is over: set "
                f"forget_after_days to {longest:g} or more, or give the long window to a counter of its own"
            )
        return self

    def reads(self) -> Mapping[str, Use]:
        """The columns of the key."""
        return dict.fromkeys(self.by, "key")

    def event_reads(self, schema: Schema) -> Mapping[str, Use]:
        """The columns of the key."""
        return self.reads()

    def meaning(self, schema: Schema) -> Meaning:
        """Inputs without tables."""
        return Meaning(self.by)


class CounterEncoder(MemoryEncoder[CounterMemory]):
    """Statistics over all earlier rows with the same key whose label was known at the request."""

    feature: CounterFeature

    def __init__(self, name: str, feature: CounterFeature, shared: Shared) -> None:
        super().__init__(name, feature, shared)
        self.source, self.task = feature.events, shared.schema.source_task(feature)
        self.prior = 0.0
        self.counts = Moments()
        self.numbers = {each: DenseNumber(each) for each in self._output_names()}
        self.matures_after = maturity(self.task, shared.schema)
        self.memory = self.empty()

    def empty(self) -> CounterMemory:
        """A memory of nothing."""
        recency = "recency" in self.feature.outputs
        return CounterMemory.empty(self.source is None, recency, self.has_fractions, self.forget_after)

    def make_room(self, units: Collection[int]) -> None:
        """Makes all memories from now on hold exact sums of fractional labels in these units."""
        self.memory = self.memory.with_room(units)

    def _output_names(self) -> list[str]:
        names = []
        for window in self.feature.window_days:
            names += [
                f"{self.name}_{output}{_suffix(window)}" for output in self.feature.outputs if output != "recency"
            ]
        return names + ([f"{self.name}_recency"] if "recency" in self.feature.outputs else [])

    def learn(self, rows: LogRows, known_by: int) -> None:
        """Adds the training rows' labels to the overall mean."""
        if self.source is None:
            self.counts.add(rows.labels(self.task, known_by))

    def finish(self) -> None:
        """Makes the overall mean."""
        self.prior = self.counts.mean

    @property
    def by(self) -> tuple[str, ...]:
        """The columns in `by`."""
        return tuple(self.feature.by)

    @property
    def label(self) -> str | None:
        """The task, where rows of the interaction log are counted."""
        return None if self.source is not None else self.feature.task

    def events(self, rows: LogRows) -> pa.Table:
        """Of a log of events, each event; of the interaction log, rows come as look-ups with their labels."""
        if self.source is None:
            return self.labelled(self.keys(rows), rows.times(), self.labels(rows))
        return pa.table({"key": self.keys(rows), "known": known_at(rows.times(), self.matures_after)})

    def labels(self, rows: LogRows) -> np.ndarray:
        """(N,) labels: int8 of a binary task, -1 where unobserved, or float64, NaN where unobserved."""
        labels = rows.labels(self.task, _FOREVER)
        return labels if self.task.kind == "regression" else np.where(np.isnan(labels), -1, labels).astype(np.int8)

    def labelled(self, key: np.ndarray, times: np.ndarray, labels: np.ndarray) -> pa.Table:
        """The rows whose label is observed; each becomes visible only when its label is known."""
        observed = labels >= 0 if labels.dtype == np.int8 else ~np.isnan(labels)
        if not observed.all():
            kept = np.flatnonzero(observed)
            key, times, labels = key[kept], times[kept], labels[kept]
        return pa.table({"key": key, "known": known_at(times, self.matures_after), "label": labels})

    def extended(self, memory: CounterMemory, events: pa.Table, in_order: bool = False) -> CounterMemory:
        """Further labels."""
        key, known = events["key"].to_numpy(), events["known"].to_numpy()
        label = None if self.source is not None else events["label"].to_numpy()
        return memory.extended(key, known, label, in_order)

    def compacted(self, memory: CounterMemory, moment: int) -> CounterMemory:
        """The totals of each key as of `moment` and within the longest window before it, and what comes later."""
        windows = [window for window in self.feature.window_days if window is not None]
        return memory.compacted(moment, round(max(windows, default=0.0) * MICROSECONDS_PER_DAY))

    def memory_from(self, columns: Mapping[str, np.ndarray], floor: int | None) -> CounterMemory:
        """A saved memory."""
        memory = CounterMemory.from_columns(columns, floor, self.has_fractions, self.forget_after)
        return memory.with_room(self.memory.units)

    @property
    def result_names(self) -> tuple[str, ...]:
        """The statistics."""
        return tuple(self.numbers)

    def distinct_results(self, memory: AnyCounter, asked: AnyLookUps) -> Mapping[str, np.ndarray]:
        """Statistics before they are standardised."""
        return self._statistics(memory.found(asked))

    def question(self, asked: UnsortedLookUps) -> CounterQuestion:
        """What N look-ups ask of this process's memory, whose answer `answered` takes; not of fractional labels."""
        windows = list(dict.fromkeys(window for window, _ in self._windows))
        return CounterQuestion(self.memory, asked, windows, "recency" in self.feature.outputs)

    def answered(self, found: CounterFound) -> dict[str, np.ndarray]:
        """(N,) float32 results of what N look-ups found, as `results` gives them."""
        return {name: self.exchanged(name, each) for name, each in self._statistics(found).items()}

    @property
    def has_fractions(self) -> bool:
        """Whether labels may be other than whole numbers."""
        return self.source is None and self.task.kind == "regression"

    @cached_property
    def _windows(self) -> list[tuple[int | None, str]]:
        """Microseconds of each window of totals, and the end of its outputs' names."""
        days = self.feature.window_days if set(self.feature.outputs) != {"recency"} else ()
        return [(None if each is None else round(each * MICROSECONDS_PER_DAY), _suffix(each)) for each in days]

    def _statistics(self, found: CounterFound) -> dict[str, np.ndarray]:
        result: dict[str, np.ndarray] = {}
        for window, suffix in self._windows:
            count, label_sum = found.totals(window)
            for output in self.feature.outputs:
                if output != "recency":
                    result[f"{self.name}_{output}{suffix}"] = self._statistic(output, count, label_sum)
        if "recency" in self.feature.outputs:
            moment = found.last_positive()
            days = (found.time - moment.astype(np.float64)) / MICROSECONDS_PER_DAY
            result[f"{self.name}_recency"] = np.where(moment == NEVER, np.nan, np.log1p(np.maximum(days, 0.0)))
        return result

    def distances(self, name: str, values: np.ndarray) -> np.ndarray:
        """(N,) distances of a regression's rates from the overall mean, beside which they may differ by little."""
        if self.task.kind == "binary" or not name.startswith(f"{self.name}_rate"):
            return values
        distances = values - self.prior
        # Sums of equal labels differ in their last bits.
        distances[np.abs(distances) <= _ROUNDING * abs(self.prior)] = 0.0
        return distances

    def _statistic(self, output: str, count: np.ndarray, label_sum: np.ndarray) -> np.ndarray:
        match output:
            case "positives":
                return np.log1p(np.maximum(label_sum, 0.0))
            case "rows":
                return np.log1p(count)
        return (label_sum + self.feature.smoothing * self.prior) / (count + self.feature.smoothing)

    @property
    def result_counts(self) -> dict[str, NumberHistogram]:
        """Histograms of the statistics in the training rows."""
        return {name: number.histogram for name, number in self.numbers.items()}

    def learn_results(self, results: Results) -> None:
        """Counts the training rows' statistics, so that they can be standardised."""
        for name, values in results.items():
            assert isinstance(values, np.ndarray)
            self.numbers[name].histogram.add(values)

    def finish_results(self) -> None:
        """Makes means and deviations."""
        for number in self.numbers.values():
            number.finish()

    def outline(self) -> Outline:
        """Dense inputs only."""
        return Outline(dense=tuple(each for number in self.numbers.values() for each in number.inputs()))

    def encode(self, rows: LogRows) -> Inputs:
        """The standardised statistics. A column with the name of one wins."""
        numbers: dict[str, tuple[np.ndarray, DenseNumber]] = {}
        given = {name for name in self.numbers if rows.has(name)}
        results = {} if len(given) == len(self.numbers) else self.look_up(rows)
        for name, number in self.numbers.items():
            values = self.distances(name, rows.numbers(name)) if name in given else results[name]
            assert isinstance(values, np.ndarray)
            numbers[name] = (values, number)
        return Inputs(numbers=numbers)

    def found(self, rows: LogRows, memory: AnyCounter) -> Mapping[str, np.ndarray]:
        """The statistics before they are standardised. A column with the name of one wins."""
        given = {name for name in self.numbers if rows.has(name)}
        asked = rows.look_ups(self.by)
        results = {} if len(given) == len(self.numbers) else self.distinct_results(memory, asked)
        return {
            name: rows.numbers(name) if name in given else results[name].astype(np.float64)[asked.number]
            for name in self.numbers
        }

    def state(self) -> State:
        """The overall mean, and the statistics' means and deviations."""
        numbers = {name: asdict(number.standardiser) for name, number in self.numbers.items()}
        return State({"prior": self.prior, "numbers": numbers})

    def restore(self, state: State) -> None:
        """Takes saved statistics."""
        self.prior = state.values["prior"]
        for name, values in state.values["numbers"].items():
            self.numbers[name].standardiser = Standardiser(**values)

    def largest_tables(self) -> tuple[Table, ...]:
        """None."""
        return ()

    def precomputed(self) -> Mapping[str, tuple[Use, pa.DataType | None]]:
        """The statistics under their names, such as `user_product_positives`."""
        return dict.fromkeys(self.numbers, ("number", pa.float64()))


def _suffix(window: float | None) -> str:
    """End of an output's name: nothing for all of the past, `_7d`, `_0p5d`."""
    return "" if window is None else f"_{window:g}d".replace(".", "p")


KIND = Kind(CounterFeature, CounterFeature, CounterEncoder)
