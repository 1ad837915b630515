"""Columns and roles of an interaction log, and further logs of events."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from mmoe_rec.schema.section import Section
from mmoe_rec.schema.tasks import Scalar

Role = Literal["user", "candidate", "context", "placement"]
Use = Literal["key", "keys", "number", "vector", "time", "any"]
"""What a column is read as: see `mmoe_rec.log.columns`."""

SPLITS = ("train", "validation", "test")


# What the columns of a plain table are called that it does not have; no log has columns of such names.
NO_USER, NO_CANDIDATE, NO_TIME = "\0user", "\0candidate", "\0time"


def _read(stand_in: str) -> BeforeValidator:
    return BeforeValidator(lambda name: stand_in if name is None else name)


def _write(stand_in: str) -> PlainSerializer:
    return PlainSerializer(lambda name: None if name == stand_in else name)


_User = Annotated[str, _read(NO_USER), _write(NO_USER)]
_Candidate = Annotated[str, _read(NO_CANDIDATE), _write(NO_CANDIDATE)]
_Time = Annotated[str, _read(NO_TIME), _write(NO_TIME)]


class Columns(Section):
    """The columns that give a row its place in the log.

    A plain table, say one row a person, may lack users, candidates and times: then these names are those of columns
    that `mmoe_rec.log.stand_ins` adds to its rows as they are read, and features can't read them.
    """

    user: _User = Field(
        None,
        validate_default=True,
        description="column with the user's id (integer or string); null in a plain table: each request is a user",
    )
    candidate: _Candidate = Field(
        None,
        validate_default=True,
        description="column with the candidate's id (integer or string); null in a plain table: each row is another",
    )
    time: _Time = Field(
        None,
        validate_default=True,
        description="column with the request's time (a timestamp, or integers with `time_unit`); null in a plain "
        "table, which `split.column` splits",
    )
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
    weight: str | None = Field(
        None, description="column with what the row counts in losses and metrics, such as a survey's weight (above 0)"
    )

    @property
    def has_user(self) -> bool:
        """Whether there is a column of users."""
        return self.user != NO_USER

    @property
    def has_candidate(self) -> bool:
        """Whether there is a column of candidates."""
        return self.candidate != NO_CANDIDATE

    @property
    def has_time(self) -> bool:
        """Whether there is a column of times."""
        return self.time != NO_TIME

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of request, user, candidate and time that there are."""
        found = (self.request, self.user, self.candidate, self.time)
        return tuple(name for name in found if name not in (None, NO_USER, NO_CANDIDATE, NO_TIME))

    @model_serializer(mode="wrap")
    def _without_unset(self, values_of: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Columns without weights are identified as before there were any."""
        return {name: each for name, each in values_of(self).items() if each is not None or name != "weight"}


class SplitColumn(Section):
    """A column that says to which split a row belongs, with its values for each of `SPLITS`."""

    column: str
    train: tuple[Scalar, ...]
    validation: tuple[Scalar, ...]
    test: tuple[Scalar, ...]

    @property
    def values(self) -> dict[str, tuple[Scalar, ...]]:
        """The values of each split, in the order of `SPLITS`."""
        return {name: getattr(self, name) for name in SPLITS}


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
