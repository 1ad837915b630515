"""The kind `time`: hour and weekday of a time, and its age at the request."""

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
_FEW_TIMES = 256  # up to which Python's calendar, of .6 microseconds a time, is faster than pandas's
_FIRST_DAY, _LAST_DAY = np.array(["0001-01-02", "9999-12-30"], "datetime64[us]").astype(np.int64)


class TimeFeature(Feature):
    """Hour and weekday as embeddings, age in days as a number."""

    kind: Literal["time"]
    dim: int = Field(4, ge=1, le=1024, description="width of the embeddings of hour and weekday")
    column: str | None = Field(None, description="timestamp column; null is the request's time")
    parts: Annotated[tuple[Literal["hour", "weekday", "age"], ...], Unique] = Field(
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
    def _age_needs_column(self) -> Self:
        if "age" in self.parts and self.column is None:
            raise ValueError("part 'age' needs a `column`: the request's own time has no age")
        return self

    def reads(self) -> Mapping[str, ColumnUse]:
        """The column as times; the request's own time needs no reading."""
        return {} if self.column is None else {self.column: "time"}

    @property
    def has_own_table(self) -> bool:
        return super().has_own_table and self.parts != ("age",)

    def check(self, name: str, schema: Schema) -> None:
        if self.column is None:
            self.require_column(name, schema, "time", "it has no `column` of its own")
        if "age" in self.parts:
            self.require_column(name, schema, "time", "its part `age` ends at the request")

    def semantics(self, schema: Schema) -> InputSemantics:
        """Row 0 is a missing time, hours and weekdays follow."""
        return InputSemantics((self.column or schema.columns.time,), _hour_or_weekday)


class TimeEncoder(NumberEncoder):
    """Hour and weekday of a time, and its age at the request."""

    feature: TimeFeature
    suffix = "_age"

    def values(self, rows: LogRows) -> np.ndarray:
        """log(1 + days) of age; none where no part is the age."""
        if "age" not in self.feature.parts:
            return np.empty(0)
        times = rows.times(self.feature.column)
        days = (rows.times() - times.astype(np.float64)) / MICROSECONDS_PER_DAY
        days = np.where(times == _MISSING, np.nan, days)
        return np.sign(days) * np.log1p(np.abs(days))

    def input_spec(self) -> InputSpec:
        """Id inputs for hour and weekday (row 0 is missing), a dense input for the age."""
        sizes = {"hour": 25, "weekday": 8}
        parts = [part for part in self.feature.parts if part in sizes]
        tables = tuple(TableSpec(f"{self.name}_{part}", sizes[part], feature=self.name) for part in parts)
        ids = tuple((table.name, table.name, False) for table in tables)
        return InputSpec(tables, ids, self.number.inputs() if "age" in self.feature.parts else ())

    def encode(self, rows: LogRows) -> Inputs:
        """Hour and weekday in the time zone, and the age."""
        times, number = np.unique(rows.times(self.feature.column), return_inverse=True)
        read = zip(("hour", "weekday"), self._read(times), strict=True)
        ids = {f"{self.name}_{part}": each[number] for part, each in read if part in self.feature.parts}
        ages = [(self.values(rows), self.number)] if "age" in self.feature.parts else []
        return Inputs(ids, numbers=ages)

    def _read(self, times: np.ndarray) -> np.ndarray:
        """(2, T) int64 hour and weekday of (T,) times, as rows of their tables. (Arrow's are wrong from 2038 on.)"""
        zone = ZoneInfo(self.feature.timezone)
        known = np.clip(times, _FIRST_DAY, _LAST_DAY)  # Python's calendar ends with the years 1 and 9999.
        if len(times) > _FEW_TIMES:
            import pandas as pd

            index = pd.DatetimeIndex(known.view("datetime64[us]")).tz_localize("UTC").tz_convert(zone)
            read = np.array([index.hour, index.day_of_week], np.int64)
        else:
            local = (datetime.fromtimestamp(second, zone) for second in (known // 1_000_000).tolist())
            read = np.array([(each.hour, each.weekday()) for each in local], np.int64).reshape(-1, 2).T
        return np.where(times == _MISSING, 0, 1 + read)


def _hour_or_weekday(table: str, row: int) -> str:
    return calendar.day_abbr[row - 1] if table.endswith("_weekday") else f"{row - 1}:00"


KIND = FeatureKind(TimeFeature, TimeEncoder)
