"""What every feature declares; each kind is one file of `mmoe_rec.features.kinds`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mmoe_rec.schema.section import Section

if TYPE_CHECKING:
    from mmoe_rec.schema.log import Schema

Role = Literal["user", "candidate", "context", "placement"]
Use = Literal["key", "keys", "number", "vector", "time", "any"]
"""What a column is read as: see `mmoe_rec.log.columns`."""

MAX_TABLE_ROWS = 2**31
"""Rows of the largest table: its ids are 32-bit numbers in encoded rows."""


@dataclass(frozen=True)
class Meaning:
    """What the health report needs to know about a feature.

    columns: what its values come from; row_name: (table, row) -> what a reader calls a row of a table, None where rows
    are the ids of a vocabulary; missing: row 0 stands for a missing value; unknown: rows after it that unknown ids
    share; hashed: values share rows by their hashes; zeros_missing: dense inputs that are all 0 are a missing value.
    """

    columns: tuple[str, ...]
    row_name: Callable[[str, int], str] | None = None
    missing: bool = True
    unknown: int = 0
    hashed: bool = False
    zeros_missing: bool = False

    @property
    def first_known(self) -> int:
        """The first row that stands for one known id, or for a bucket."""
        return self.missing + self.unknown


class Feature(Section, ABC):
    """What a feature reads, and what its inputs mean: a section of the settings without what a model makes of it."""

    if TYPE_CHECKING:
        kind: str

    fixed_role: ClassVar[Role | None] = None
    """The role of a kind's features, where their columns do not decide it."""

    @abstractmethod
    def reads(self) -> Mapping[str, Use]:
        """Columns of a row that the feature reads directly, and as what."""

    @abstractmethod
    def meaning(self, schema: Schema) -> Meaning:
        """What the health report needs to know."""

    @property
    def list_lengths(self) -> Mapping[str, int]:
        """Length that every list of a column must have, for columns that need one."""
        return {}

    @property
    def time_zones(self) -> tuple[str, ...]:
        """Time zones that the encoding depends on; their rules belong to the machine."""
        return ()

    @property
    def shares(self) -> str | None:
        """Name of the feature whose vocabulary and table this one uses, None for its own or none."""
        return None

    def check(self, name: str, schema: Schema) -> None:
        """Raises ValueError where a feature of that name does not fit the other sections."""


class Embedded(Section):
    """What a model chooses for a kind with an embedding table."""

    dim: int = Field(16, ge=1, le=1024, description="width of the embedding")


class EventLog(Section):
    """A further log of what happened, shown by this system or not, such as all purchases or page views.

    Counters and histories may read it. Its key columns have the names and types that they have in the interaction log.
    A row is an event that is known from its time on.
    """

    path: str = Field(description="a folder of Parquet files, one file, or a glob; a path or an s3:// address")
    time: str = Field(description="column with the event's time (in `columns.time_unit`, if integers)")


class Remembering(Feature):
    """A feature of earlier events: rows of the interaction log with a task's label, or of a further log."""

    task: str | None = Field(None, description="task whose labels in the interaction log are read")
    events: str | None = Field(
        None, description="name of a further log under `data.events` whose rows are read instead"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.task is None) == (self.events is None):
            raise ValueError("give either `task`, to read the log's labels, or `events`, to read a further log")
        return self

    @abstractmethod
    def event_reads(self, schema: Schema) -> Mapping[str, Use]:
        """Columns of the log of events that the feature reads, besides the time, and as what."""

    def check(self, name: str, schema: Schema) -> None:
        """Raises ValueError for a task or a log of events that does not exist."""
        if self.task is not None and self.task not in schema.tasks:
            raise ValueError(f"feature '{name}' names task '{self.task}'; tasks are {', '.join(schema.tasks)}")
        if self.events is not None and self.events not in schema.events:
            known = ", ".join(schema.events) or "none, add it"
            raise ValueError(f"feature '{name}' names events '{self.events}'; logs under data.events are: {known}")


def each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values. Raises ValueError where one is listed twice."""
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise ValueError(f"lists {'null' if twice[0] is None else twice[0]} twice")
    return values
