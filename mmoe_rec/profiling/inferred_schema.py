"""What the columns of a log mean: who, what, when, in which list; what describes what; what happened then."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mmoe_rec.profiling.profile import Column, Profile
from mmoe_rec.settings.log_columns import Role

KeyName = Literal["user", "candidate", "request", "time"]
KEY_NAMES = ("user", "candidate", "request", "time")
Corrections = Mapping[str, Sequence[str]]
"""Columns that the user names instead of a guess, by option: one of `KEY_NAMES`, task, placement, or leave-out"""

MAX_CHANGE_RATE = 0.05
"""A column that changes so seldom (see `Profile.change_rates`) belongs to the keys; a price may change now and then."""


@dataclass
class InferredTask:
    """A task, with what a person should know of it."""

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
        """Of the task in settings."""
        name = re.sub(r"\W+", "_", self.column)
        return f"{name}_label" if name in ("score", "ranking") else name


@dataclass
class InferredSchema:
    """What a log means, as far as it is understood. keys: purpose -> column; list_keys: columns whose values say which
    rows were one list, none where each row is its own; checks: column -> why a person should check it; key_checks: the
    same of a purpose, or of `duplicates`; left_out: column -> why it is no input; warnings: sentences for the terminal.
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
        """Makes a column no input, which a person should check."""
        self.left_out[column] = self.checks[column] = why

    @property
    def columns(self) -> Mapping[str, Column]:
        """Of the log."""
        return self.profile.columns

    @property
    def is_plain_table(self) -> bool:
        """Whether each row is its own: there are neither users nor requests."""
        return "user" not in self.keys and "request" not in self.keys

    @property
    def time_sql(self) -> str:
        """SQL of the request's time, by which rows are put in order."""
        time = self.keys.get("time")
        return self.columns[time].time_sql if time else "0"

    def distinct(self, key_name: KeyName) -> int:
        """About how many users, or candidates, there are."""
        name = self.keys.get(key_name)
        return self.columns[name].distinct if name else 0

    def unassigned(self) -> list[Column]:
        """Columns without a meaning so far."""
        taken = {*self.keys.values(), *self.left_out, self.sampling_rate, self.weight}
        taken |= {each.column for each in self.tasks} | {name for its in self.roles.values() for name in its}
        taken |= {self.split[0]} if self.split else set()
        return [each for each in self.columns.values() if each.name not in taken]
