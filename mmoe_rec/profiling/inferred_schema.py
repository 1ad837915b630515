"""The inferred schema of a log: its keys, roles, tasks and split, and the guesses that a person should check."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mmoe_rec.profiling.profile import Column, Profile
from mmoe_rec.settings.log_columns import Role

KeyName = Literal["user", "candidate", "request", "time"]
KEY_NAMES = ("user", "candidate", "request", "time")
Corrections = Mapping[str, Sequence[str]]
"""Option (one of `KEY_NAMES`, `task`, `placement` or `leave-out`) -> columns that replace the guess."""

MAX_CHANGE_RATE = 0.05
"""Highest change rate (see `Profile.change_rates`) of an attribute of a key. Not 0, since a price changes sometimes."""


@dataclass
class InferredTask:
    """Settings of a guessed task, notes for the settings file, and reasons to check the guess."""

    column: str
    kind: Literal["binary", "regression"] = "binary"
    objective: Literal["engagement", "satisfaction"] = "engagement"
    observed_when: tuple[str, Any] | None = None
    label_delay_days: float = 0.0
    score_weight: float = 1.0
    notes: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the task in the settings."""
        name = re.sub(r"\W+", "_", self.column)
        return f"{name}_label" if name in ("score", "ranking") else name


@dataclass
class InferredSchema:
    """Guesses about the columns of a log.

    Attributes:
        profile: Statistics of the log.
        corrections: Columns that the user named, by option.
        keys: Key name -> column.
        request_scope: Whether request IDs are unique in the whole log or only for each user.
        time_unit: Unit of integer times, None for other times.
        sampling_rate: Column with the rate at which rows were sampled for the log, None if there is none.
        weight: Column with the weight of the row, None if there is none.
        split: Column that assigns rows to splits, and split -> values of the column. None if times split the rows.
        roles: Role -> columns.
        tasks: Guessed tasks.
        left_out: Column -> why it is not an input.
        checks: Column -> why a person should check the guess.
        key_checks: Key name or `duplicates` -> why a person should check it.
        warnings: Sentences for the terminal.
        request_keys: Columns that identify a request, empty if each row is a request of its own.
        rows_per_request: Mean number of rows of a request.
    """

    profile: Profile
    corrections: Corrections
    keys: dict[str, str] = field(default_factory=dict)
    request_scope: Literal["log", "user"] = "log"
    time_unit: str | None = None
    sampling_rate: str | None = None
    weight: str | None = None
    split: tuple[str, dict[str, list[Any]]] | None = None
    roles: dict[Role, list[str]] = field(
        default_factory=lambda: {"user": [], "candidate": [], "context": [], "placement": []}
    )
    tasks: list[InferredTask] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    key_checks: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    request_keys: list[str] = field(default_factory=list)
    rows_per_request: float = 1.0

    def leave_out(self, column: str, why: str) -> None:
        """Exclude a column from the inputs and mark the decision for a person to check.

        Args:
            column: Name of the column.
            why: Reason, as a clause.
        """
        self.left_out[column] = self.checks[column] = why

    @property
    def columns(self) -> Mapping[str, Column]:
        """Columns of the log by name."""
        return self.profile.columns

    @property
    def is_plain_table(self) -> bool:
        """Whether each row is its own request, because there are neither users nor requests."""
        return "user" not in self.keys and "request" not in self.keys

    @property
    def time_sql(self) -> str:
        """SQL for the time of the request in microseconds since 1970, 0 if the log has no times."""
        time = self.keys.get("time")
        return self.columns[time].time_sql if time else "0"

    def count_distinct(self, key_name: KeyName) -> int:
        """Return the approximate number of distinct values of a key, 0 if the log lacks the key."""
        name = self.keys.get(key_name)
        return self.columns[name].distinct if name else 0

    def unassigned(self) -> list[Column]:
        """Return the columns that aren't a key, label, weight, sampling rate, split or input, and aren't left out."""
        taken = {*self.keys.values(), *self.left_out, self.sampling_rate, self.weight}
        taken |= {task.column for task in self.tasks} | {name for names in self.roles.values() for name in names}
        taken |= {self.split[0]} if self.split else set()
        return [column for column in self.columns.values() if column.name not in taken]
