"""Encoders of numbers and times: `numeric`, `vector` and `time`."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import Encoder, Inputs, Outline, State
from mmoe_rec.features.layout import DenseInput, Table
from mmoe_rec.features.numbers import NumberHistogram, Standardiser
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows
from mmoe_rec.schema import NumericFeature, TimeFeature, VectorFeature

_CALENDAR_CYCLE = 146_097 * MICROSECONDS_PER_DAY  # 400 years
_LAST_DAY = int(np.datetime64("9999-12-31", "us").astype(np.int64))


class DenseNumber:
    """A standardised number, with an indicator input where training rows had missing values."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.histogram = NumberHistogram()
        self.standardiser = Standardiser(0.0, 1.0, False)

    def finish(self) -> None:
        """Turns the histogram into mean and deviation."""
        self.standardiser = self.histogram.standardiser()

    def inputs(self) -> tuple[DenseInput, ...]:
        """The dense inputs."""
        number = DenseInput(self.name, edges=tuple(self.standardiser.edges))
        return (number, DenseInput(f"{self.name}_missing")) if self.standardiser.has_missing else (number,)

    def encode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Dense inputs of (N,) float64 values."""
        inputs = {self.name: self.standardiser.apply(values)}
        if self.standardiser.has_missing:
            inputs[f"{self.name}_missing"] = (~np.isfinite(values)).astype(np.float32)
        return inputs


class NumericEncoder(Encoder):
    """A number, standardised or as an embedded quantile bucket."""

    def __init__(self, name: str, feature: NumericFeature) -> None:
        self.name, self.feature = name, feature
        self.number = DenseNumber(name)
        self.counts = self.number.histogram
        self.edges = np.empty(0)

    def _values(self, rows: LogRows) -> np.ndarray:
        values = rows.numbers(self.feature.column)
        return np.sign(values) * np.log1p(np.abs(values)) if self.feature.transform == "log" else values

    def learn(self, rows: LogRows, known_by: int) -> None:
        """Counts the training rows' values."""
        self.number.histogram.add(self._values(rows))

    def finish(self) -> None:
        """Makes mean and deviation, or the buckets' edges."""
        self.number.finish()
        if self.feature.transform == "buckets":
            self.edges = self.number.histogram.bucket_edges(self.feature.buckets)

    def outline(self) -> Outline:
        """One dense input (and its indicator), or one id input: row 0 is missing, the buckets follow."""
        if self.feature.transform != "buckets":
            return Outline(dense=self.number.inputs())
        table = Table(self.name, len(self.edges) + 2)
        return Outline((table,), ((self.name, self.name, False),))

    def encode(self, rows: LogRows) -> Inputs:
        """The standardised number or its bucket."""
        values = self._values(rows)
        if self.feature.transform != "buckets":
            return Inputs(dense=self.number.encode(values))
        bucket = 1 + np.searchsorted(self.edges, values, side="left")
        return Inputs({self.name: np.where(np.isfinite(values), bucket, 0)})

    def state(self) -> State:
        """Mean, deviation, whether values were missing, the buckets' edges."""
        return State({**asdict(self.number.standardiser), "bucket_edges": self.edges.tolist()})

    def restore(self, state: State) -> None:
        """Takes saved statistics."""
        values = dict(state.values)
        self.edges = np.array(values.pop("bucket_edges"), np.float64)
        self.number.standardiser = Standardiser(**values)


class VectorEncoder(Encoder):
    """A vector, standardised with one mean and deviation over all its elements."""

    def __init__(self, name: str, feature: VectorFeature) -> None:
        self.name, self.feature = name, feature
        self.number = DenseNumber(name)
        self.counts = self.number.histogram

    def _matrix(self, rows: LogRows) -> np.ndarray:
        column, size = rows.column(self.feature.column), self.feature.size
        matrix = np.full((len(rows), size), np.nan)
        if pt.is_null(column.type):
            return matrix
        lengths = column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
        wrong = lengths[(lengths >= 0) & (lengths != size)]
        if len(wrong):
            raise UserError(
                f"feature '{self.name}': column '{self.feature.column}' holds a list of {wrong[0]} numbers, "
                f"but `size` is {size}"
            )
        matrix[lengths == size] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
        return matrix

    def learn(self, rows: LogRows, known_by: int) -> None:
        """Counts the training rows' elements."""
        self.number.histogram.add(self._matrix(rows).ravel())

    def finish(self) -> None:
        """Makes mean and deviation."""
        self.number.finish()

    def outline(self) -> Outline:
        """`size` dense inputs."""
        return Outline(dense=tuple(DenseInput(f"{self.name}_{index}") for index in range(self.feature.size)))

    def encode(self, rows: LogRows) -> Inputs:
        """The standardised elements; all zeros for a missing vector."""
        scaled = self.number.standardiser.apply(self._matrix(rows))
        return Inputs(dense={f"{self.name}_{index}": scaled[:, index] for index in range(self.feature.size)})

    def state(self) -> State:
        """Mean and deviation."""
        return State(asdict(self.number.standardiser))

    def restore(self, state: State) -> None:
        """Takes saved statistics."""
        self.number.standardiser = Standardiser(**state.values)


class TimeEncoder(Encoder):
    """Hour and weekday of a time, and its age at the request."""

    def __init__(self, name: str, feature: TimeFeature) -> None:
        self.name, self.feature = name, feature
        self.age = DenseNumber(f"{name}_age")
        self.counts = self.age.histogram
        try:
            pd.Timestamp(0, tz=feature.timezone)
        except Exception:
            raise UserError(f"feature '{name}': unknown time zone '{feature.timezone}'") from None

    def _age(self, rows: LogRows) -> np.ndarray:
        times = rows.times(self.feature.column)
        days = (rows.times() - times.astype(np.float64)) / MICROSECONDS_PER_DAY
        days = np.where(times == np.iinfo(np.int64).min, np.nan, days)
        return np.sign(days) * np.log1p(np.abs(days))

    def learn(self, rows: LogRows, known_by: int) -> None:
        """Counts the training rows' ages."""
        if "age" in self.feature.parts:
            self.age.histogram.add(self._age(rows))

    def finish(self) -> None:
        """Makes mean and deviation of the age."""
        self.age.finish()

    def outline(self) -> Outline:
        """Id inputs for hour and weekday (row 0 is missing), a dense input for the age."""
        sizes = {"hour": 25, "weekday": 8}
        parts = [part for part in self.feature.parts if part in sizes]
        tables = tuple(Table(f"{self.name}_{part}", sizes[part], feature=self.name) for part in parts)
        ids = tuple((table.name, table.name, False) for table in tables)
        return Outline(tables, ids, self.age.inputs() if "age" in self.feature.parts else ())

    def encode(self, rows: LogRows) -> Inputs:
        """Hour and weekday in the time zone; log(1 + days) of age."""
        every = rows.times(self.feature.column)
        # The rows of a request share their time.
        first = np.append(len(every) > 0, every[1:] != every[:-1])
        times, number = every[first], np.cumsum(first) - 1
        missing = times == np.iinfo(np.int64).min
        # Time zones go by a calendar that ends with the year 9999; it repeats, days of the week included.
        late = np.flatnonzero(times > _LAST_DAY)
        times[late] -= -(-(times[late] - _LAST_DAY) // _CALENDAR_CYCLE) * _CALENDAR_CYCLE
        local = pd.DatetimeIndex(pa.array(np.where(missing, 0, times), pa.timestamp("us")).to_numpy())
        local = local.tz_localize("UTC").tz_convert(self.feature.timezone)
        parts = {"hour": lambda: local.hour, "weekday": lambda: local.day_of_week}
        ids = {
            f"{self.name}_{part}": np.where(missing, 0, 1 + read().to_numpy().astype(np.int64))[number]
            for part, read in parts.items()
            if part in self.feature.parts
        }
        return Inputs(dict(ids), self.age.encode(self._age(rows)) if "age" in self.feature.parts else {})

    def state(self) -> State:
        """Mean and deviation of the age."""
        return State(asdict(self.age.standardiser))

    def restore(self, state: State) -> None:
        """Takes saved statistics."""
        self.age.standardiser = Standardiser(**state.values)
