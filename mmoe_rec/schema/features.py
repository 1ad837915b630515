"""The kinds of features: what each means. What a model makes of them is in `mmoe_rec.schema.choices`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator, model_validator

from mmoe_rec.schema.section import Section

Days = Annotated[float, Field(gt=0, le=36_500)]
MAX_TABLE_ROWS = 2**31
"""Rows of the largest table: its ids are 32-bit numbers in encoded rows."""


class _Vocabulary(Section):
    column: str = Field(description="column that the feature reads")
    min_count: int = Field(2, ge=1, description="times an id occurs in the training rows to get a row of its own")
    max_size: int | None = Field(None, ge=1, lt=MAX_TABLE_ROWS, description="keep only this many most frequent ids")
    oov_buckets: int = Field(16, ge=1, lt=MAX_TABLE_ROWS, description="hashed buckets that unknown ids share")
    table: str | None = Field(
        None, description="name of another id feature whose vocabulary and embedding table this one shares"
    )

    @model_validator(mode="after")
    def _fits_a_table(self) -> Self:
        if (rows := 1 + self.oov_buckets + (self.max_size or 0)) > MAX_TABLE_ROWS:
            raise ValueError(
                f"max_size and oov_buckets together make a table of {rows:,} rows (one is for missing ids); a table "
                f"has at most {MAX_TABLE_ROWS:,}"
            )
        return self


class IdFeature(_Vocabulary):
    """One id a row."""

    kind: Literal["id"]


class IdsFeature(_Vocabulary):
    """A list of ids a row."""

    kind: Literal["ids"]
    max_length: int = Field(50, ge=1, description="keep at most this many first ids of a row")


class NumericFeature(Section):
    """A number, standardised or as its quantile bucket; missing values get an indicator."""

    kind: Literal["numeric"]
    column: str = Field(description="column that the feature reads")
    transform: Literal["standard", "log", "buckets"] = Field(
        "standard",
        description="standard: (x - mean) / deviation; log: the same after sign(x) log(1 + |x|); "
        "buckets: an embedding for each quantile bucket",
    )
    buckets: int = Field(32, ge=2, le=4096, description="number of quantile buckets (transform: buckets)")


class VectorFeature(Section):
    """A list of `size` numbers a row (say, a text embedding), standardised; a missing vector is all zeros."""

    kind: Literal["vector"]
    column: str = Field(description="column with lists of `size` numbers")
    size: int = Field(ge=1, description="length of every list")


class TimeFeature(Section):
    """Hour and weekday as ids, age in days as a number."""

    kind: Literal["time"]
    column: str | None = Field(None, description="timestamp column; null is the request's time")
    parts: tuple[Literal["hour", "weekday", "age"], ...] = Field(
        ("hour", "weekday"), description="hour, weekday; age = days from `column` to the request"
    )
    timezone: str = Field("UTC", description="time zone in which hour and weekday are read, such as Europe/Berlin")

    @field_validator("parts")
    @classmethod
    def _each_once(cls, parts: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(parts)

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


class CrossFeature(Section):
    """The hashed combination of two or more columns."""

    kind: Literal["cross"]
    columns: tuple[str, ...] = Field(min_length=2, description="columns to combine")
    buckets: int = Field(10_000, ge=2, le=MAX_TABLE_ROWS, description="hashed rows of the embedding table")

    @field_validator("columns")
    @classmethod
    def _each_once(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(columns)


class EventLog(Section):
    """A further log of what happened, shown by this system or not, such as all purchases or page views.

    Counters and histories may read it. Its key columns have the names and types that they have in the interaction log.
    A row is an event that is known from its time on.
    """

    path: str = Field(description="a folder of Parquet files, one file, or a glob; a path or an s3:// address")
    time: str = Field(description="column with the event's time (in `columns.time_unit`, if integers)")


class _Remembering(Section):
    task: str | None = Field(None, description="task whose labels in the interaction log are read")
    events: str | None = Field(
        None, description="name of a further log under `data.events` whose rows are read instead"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.task is None) == (self.events is None):
            raise ValueError("give either `task`, to read the log's labels, or `events`, to read a further log")
        return self


class HistoryFeature(_Remembering):
    """The user's last engaged candidates before the request, point in time, embedded and averaged."""

    kind: Literal["history"]
    of: str = Field(description="name of the candidate's id feature whose vocabulary and table are used")
    length: int = Field(20, ge=1, le=1000, description="number of last engaged candidates")
    at_least: float = Field(1.0, description="label from which on a row counts as engaged")


class CounterFeature(_Remembering):
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
    smoothing: float = Field(20.0, gt=0, description="rows of the overall mean that a rate is mixed with")

    @model_validator(mode="before")
    @classmethod
    def _outputs_of_events(cls, values: Any) -> Any:
        """The default of events, which have no labels, is without a rate."""
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
        return _distinct(values)

    @field_validator("window_days")
    @classmethod
    def _each_named(cls, windows: tuple[float | None, ...]) -> tuple[float | None, ...]:
        names: dict[str, float] = {}
        for window in filter(None, windows):
            if (other := names.setdefault(f"{window:g}", window)) != window:
                raise ValueError(f"lists {other!r} and {window!r}, but windows are named by their first six digits")
        return windows


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise ValueError(f"lists {'null' if twice[0] is None else twice[0]} twice")
    return values


Feature = Annotated[
    IdFeature
    | IdsFeature
    | NumericFeature
    | VectorFeature
    | TimeFeature
    | CrossFeature
    | HistoryFeature
    | CounterFeature,
    Field(discriminator="kind"),
]


def read_columns(feature: Feature) -> tuple[str, ...]:
    """Columns of a row that a feature reads directly. A history reads the user's id, which every row has."""
    if isinstance(feature, CrossFeature):
        return feature.columns
    if isinstance(feature, CounterFeature):
        return feature.by
    if isinstance(feature, HistoryFeature) or feature.column is None:
        return ()
    return (feature.column,)
