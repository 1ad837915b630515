"""Columns and roles of an interaction log, and further logs of events."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmoe_rec.schema.section import Section

Role = Literal["user", "candidate", "context", "placement"]
Use = Literal["key", "keys", "number", "vector", "time", "any"]
"""What a column is read as: see `mmoe_rec.log.columns`."""


class Columns(Section):
    """The columns that give a row its place in the log."""

    user: str = Field(description="column with the user's id (integer or string)")
    candidate: str = Field(description="column with the candidate's id (integer or string)")
    time: str = Field(description="column with the request's time (a timestamp, or integers with `time_unit`)")
    request: str | None = Field(
        None, description="column with the request's id; without one, a user's rows of one instant form a request"
    )
    request_scope: Literal["log", "user"] = Field(
        "log",
        description="log: a request id is unique in the whole log; user: only within a user, such as 1, 2, 3",
    )
    time_unit: Literal["s", "ms", "us", "ns"] | None = Field(
        None, description="unit of an integer `time` column, counted from 1970-01-01 UTC"
    )
    sampling_rate: str | None = Field(
        None, description="column with the probability at which the row was kept when the log was sampled (0 to 1]"
    )


class Roles(Section):
    """Which columns describe what. Every column that a feature reads belongs to one role."""

    user: tuple[str, ...] = Field((), description="columns that describe the user")
    candidate: tuple[str, ...] = Field((), description="columns that describe the candidate")
    context: tuple[str, ...] = Field((), description="columns that describe the request's circumstances")
    placement: tuple[str, ...] = Field(
        (), description="columns that describe where a candidate was shown; used in training, absent in serving"
    )


class EventLog(Section):
    """A further log of what happened, shown by this system or not, such as all purchases or page views.

    Counters and histories may read it. Its key columns have the names and types that they have in the interaction log.
    A row is an event that is known from its time on.
    """

    path: str = Field(description="a folder of Parquet files, one file, or a glob; a path or an s3:// address")
    time: str = Field(description="column with the event's time (in `columns.time_unit`, if integers)")
