"""The feature kind `time`: hour and weekday of a time, and its age at the request."""

import calendar
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo

import numpy as np
from pydantic import Field, field_validator, model_validator

from mmoe_rec.features.encoder import FeatureKind, Inputs, InputSpec, NumberEncoder
from mmoe_rec.features.layout import TableSpec
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import Feature, InputSemantics, Schema, Unique

_MISSING = np.iinfo(np.int64).min
# Up to this many times, Python's calendar (0.6 microseconds per time) is faster than pandas.
_MAX_PYTHON_TIMES = 256
_FIRST_DAY, _LAST_DAY = np.array(["0001-01-02", "9999-12-30"], "datetime64[us]").astype(np.int64)


class TimeFeature(Feature):
    """Hour and weekday as embeddings, age in days as a number."""

    kind: Literal["time"]
    dim: int = Field(4, ge=1, le=1024, description="width of the embeddings of hour and weekday")
    column: str | None = Field(None, description="timestamp column; null means the request time")
    parts: Annotated[tuple[Literal["hour", "weekday", "age"], ...], Unique] = Field(
        ("hour", "weekday"), description="inputs to compute; age is the number of days from `column` to the request"
    )
    timezone: str = Field("UTC", description="time zone of hour and weekday, such as Europe/Berlin")

    @field_validator("timezone")
    @classmethod
    def _check_zone(cls, timezone: str) -> str:
        try:
            ZoneInfo(timezone)
        except (KeyError, OSError, ValueError):
            raise ValueError("must be a time zone such as UTC or Europe/Berlin") from None
        return timezone

    @model_validator(mode="after")
    def _check_age(self) -> Self:
        if "age" in self.parts and self.column is None:
            raise ValueError("part 'age' needs a `column`, because the request time has no age")
        return self

    def reads(self) -> Mapping[str, ColumnUse]:
        """Return `column`, if it is set. The request time isn't listed, because every feature can read it."""
        return {} if self.column is None else {self.column: "time"}

    @property
    def has_own_table(self) -> bool:
        return super().has_own_table and self.parts != ("age",)

    def check(self, name: str, schema: Schema) -> None:
        """Raise ValueError if the feature doesn't fit other sections of the settings."""
        if self.column is None:
            self.require_column(name, schema, "time", "it has no `column` of its own")
        if "age" in self.parts:
            self.require_column(name, schema, "time", "its part `age` ends at the request")

    def semantics(self, schema: Schema) -> InputSemantics:
        """Describe table row 0 as a missing time and the next rows as hours or weekdays."""
        return InputSemantics((self.column or schema.columns.time,), _hour_or_weekday)


class TimeEncoder(NumberEncoder):
    """Encoder of a time as hour, weekday and age at the request."""

    feature: TimeFeature
    suffix = "_age"

    def values(self, rows: LogRows) -> np.ndarray:
        """Return sign(age) log(1 + |age|), (N,), with the age in days, or an empty array if `parts` lacks the age."""
        if "age" not in self.feature.parts:
            return np.empty(0)
        times = rows.times(self.feature.column)
        days = (rows.times() - times.astype(np.float64)) / MICROSECONDS_PER_DAY
        days = np.where(times == _MISSING, np.nan, days)
        return np.sign(days) * np.log1p(np.abs(days))

    def input_spec(self) -> InputSpec:
        """Return id inputs for hour and weekday and a dense input for the age, as listed in `parts`."""
        sizes = {"hour": 25, "weekday": 8}
        parts = [part for part in self.feature.parts if part in sizes]
        tables = tuple(TableSpec(f"{self.name}_{part}", sizes[part], feature=self.name) for part in parts)
        ids = tuple((table.name, table.name, False) for table in tables)
        return InputSpec(tables, ids, self.number.inputs() if "age" in self.feature.parts else ())

    def encode(self, rows: LogRows) -> Inputs:
        times, inverse = np.unique(rows.times(self.feature.column), return_inverse=True)
        table_rows = zip(("hour", "weekday"), self._table_rows(times), strict=True)
        ids = {f"{self.name}_{part}": row[inverse] for part, row in table_rows if part in self.feature.parts}
        ages = [(self.values(rows), self.number)] if "age" in self.feature.parts else []
        return Inputs(ids, numbers=ages)

    def _table_rows(self, times: np.ndarray) -> np.ndarray:
        """Return the (2, T) int64 table rows of the hour and the weekday of T times, 0 for a missing time."""
        # Use Python's time zones, because Arrow's local times are wrong from 2038 on.
        zone = ZoneInfo(self.feature.timezone)
        # Python's calendar covers only the years 1 to 9999, so move earlier and later times into them.
        clipped = np.clip(times, _FIRST_DAY, _LAST_DAY)
        if len(times) > _MAX_PYTHON_TIMES:
            import pandas as pd

            index = pd.DatetimeIndex(clipped.view("datetime64[us]")).tz_localize("UTC").tz_convert(zone)
            parts = np.array([index.hour, index.day_of_week], np.int64)
        else:
            local = (datetime.fromtimestamp(second, zone) for second in (clipped // 1_000_000).tolist())
            parts = np.array([(time.hour, time.weekday()) for time in local], np.int64).reshape(-1, 2).T
        return np.where(times == _MISSING, 0, 1 + parts)


def _hour_or_weekday(table: str, row: int) -> str:
    return calendar.day_abbr[row - 1] if table.endswith("_weekday") else f"{row - 1}:00"


KIND = FeatureKind(TimeFeature, TimeEncoder)
