"""The kind `time`: hour and weekday of a time, and its age at the request."""

from __future__ import annotations

import calendar
from collections.abc import Mapping
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from mmoe_rec.features.encoder import Inputs, Kind, NumberEncoder, Outline, Shared
from mmoe_rec.features.layout import Table
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.schema import Feature, Meaning, Once, Schema

_CALENDAR_CYCLE = 146_097 * MICROSECONDS_PER_DAY  # 400 years
_MICROSECONDS = 1_000_000
_FEW_TIMES, _SECONDS_REMEMBERED = 16, 1_024
_LAST_DAY = int(np.datetime64("9999-12-31", "us").astype(np.int64))


class TimeFeature(Feature):
    """Hour and weekday as ids, age in days as a number."""

    kind: Literal["time"]
    column: str | None = Field(None, description="timestamp column; null is the request's time")
    parts: Annotated[tuple[Literal["hour", "weekday", "age"], ...], Once] = Field(
        ("hour", "weekday"), description="hour, weekday; age = days from `column` to the request"
    )
    timezone: str = Field("UTC", description="time zone in which hour and weekday are read, such as Europe/Berlin")

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, timezone: str) -> str:
        try:
            ZoneInfo(timezone)
        except (KeyError, OSError, ValueError):
            raise ValueError("must be a time zone such as UTC or Europe/Berlin") from None
        return timezone

    @model_validator(mode="after")
    def _age_needs_column(self) -> TimeFeature:
        if "age" in self.parts and self.column is None:
            raise ValueError("part 'age' needs a `column`: the request's own time has no age")
        return self

    def reads(self) -> Mapping[str, Use]:
        """The column as times; the request's own time needs no reading."""
        return {} if self.column is None else {self.column: "time"}

    def check(self, name: str, schema: Schema) -> None:
        if self.column is None:
            self.require(name, schema, "time", "it has no `column` of its own")
        if "age" in self.parts:
            self.require(name, schema, "time", "its part `age` ends at the request")

    @property
    def time_zones(self) -> tuple[str, ...]:
        return (self.timezone,)

    def meaning(self, schema: Schema) -> Meaning:
        """Row 0 is a missing time, hours and weekdays follow."""
        return Meaning((self.column or schema.columns.time,), _hour_or_weekday)


class EmbeddedTime(TimeFeature):
    """Hour and weekday as embeddings, age in days as a number."""

    dim: int = Field(4, ge=1, le=1024, description="width of the embeddings of hour and weekday")


class TimeEncoder(NumberEncoder):
    """Hour and weekday of a time, and its age at the request."""

    feature: TimeFeature
    suffix = "_age"

    def __init__(self, name: str, feature: TimeFeature, shared: Shared) -> None:
        super().__init__(name, feature, shared)
        # Second -> rows of hour and weekday.
        self._seconds: dict[int, list[int]] = {}

    def values(self, rows: LogRows) -> np.ndarray:
        """log(1 + days) of age; none where no part is the age."""
        if "age" not in self.feature.parts:
            return np.empty(0)
        times = rows.times(self.feature.column)
        days = (rows.times() - times.astype(np.float64)) / MICROSECONDS_PER_DAY
        days = np.where(times == np.iinfo(np.int64).min, np.nan, days)
        return np.sign(days) * np.log1p(np.abs(days))

    def outline(self) -> Outline:
        """Id inputs for hour and weekday (row 0 is missing), a dense input for the age."""
        sizes = {"hour": 25, "weekday": 8}
        parts = [part for part in self.feature.parts if part in sizes]
        tables = tuple(Table(f"{self.name}_{part}", sizes[part], feature=self.name) for part in parts)
        ids = tuple((table.name, table.name, False) for table in tables)
        return Outline(tables, ids, self.number.inputs() if "age" in self.feature.parts else ())

    def encode(self, rows: LogRows) -> Inputs:
        """Hour and weekday in the time zone, and the age."""
        every = rows.times(self.feature.column)
        # The rows of a request share their time.
        first = np.append(len(every) > 0, every[1:] != every[:-1])
        times, number = every[first], np.cumsum(first) - 1
        read = self._read(times) if len(times) > _FEW_TIMES else self._read_cached(times)
        ids = {
            f"{self.name}_{part}": each[number]
            for part, each in zip(("hour", "weekday"), read, strict=True)
            if part in self.feature.parts
        }
        ages = [(self.values(rows), self.number)] if "age" in self.feature.parts else []
        return Inputs(dict(ids), numbers=ages)

    def _read_cached(self, times: np.ndarray) -> np.ndarray:
        """What `_read` gives for a few times; what was read lately for the same seconds is taken again, as pandas needs
        .2 ms for a single one."""
        seconds = (times // _MICROSECONDS).tolist()  # zones differ by whole seconds
        known = self._seconds
        if all(second in known for second in seconds):
            return np.array([known[second] for second in seconds], np.int64).reshape(-1, 2).T
        read = self._read(times)
        if len(known) > _SECONDS_REMEMBERED:
            known = {}
        # Another dict, as other threads may be reading this one.
        self._seconds = known | dict(zip(seconds, read.T.tolist(), strict=True))
        return read

    def _read(self, times: np.ndarray) -> np.ndarray:
        """(2, T) int64 hour and weekday of (T,) times, as rows of their tables."""
        import pandas as pd

        missing = times == np.iinfo(np.int64).min
        times = np.where(missing, 0, times)
        # Time zones go by a calendar that ends with the year 9999; it repeats, days of the week included.
        late = np.maximum(times - _LAST_DAY, 0)
        times -= -(-late // _CALENDAR_CYCLE) * _CALENDAR_CYCLE
        local = pd.DatetimeIndex(pa.array(times, pa.timestamp("us")).to_numpy())
        local = local.tz_localize("UTC").tz_convert(self.feature.timezone)
        read = np.array([local.hour, local.day_of_week], np.int64)
        return np.where(missing, 0, 1 + read)


def _hour_or_weekday(table: str, row: int) -> str:
    return calendar.day_abbr[row - 1] if table.endswith("_weekday") else f"{row - 1}:00"


KIND = Kind(TimeFeature, EmbeddedTime, TimeEncoder)
