"""What the columns of a log mean: who, what, when, in which list; what describes what; what happened then."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mmoe_rec.profiling.profile import Column, Profile
from mmoe_rec.settings.columns import Role

Purpose = Literal["user", "candidate", "request", "time"]
PURPOSES = ("user", "candidate", "request", "time")
Corrections = Mapping[str, Sequence[str]]
"""Columns that the user names instead of a guess, by option: one of `PURPOSES`, task, placement, or leave-out"""

STEADY = 0.05
"""A column that changes so seldom (see `Profile.changes`) belongs to the keys; a price may change now and then."""


@dataclass
class TaskGuess:
    """A task, with what a person should know of it."""

    column: str
    kind: Literal["binary", "regression"] = "binary"
    objective: Literal["engagement", "satisfaction"] = "engagement"
    observed_when: tuple[str, Any] | None = None
    matures_after_days: float = 0.0
    score_weight: float = 1.0
    notes: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the task in settings."""
        name = re.sub(r"\W+", "_", self.column)
        return f"{name}_label" if name in ("score", "ranking") else name


@dataclass
class Meaning:
    """What a log means. keys: purpose -> column; checks: column -> why a person should check it; key_checks: the same
    of a purpose, or of `duplicates`; left_out: column -> why it is no input; warnings: sentences for the terminal."""

    keys: dict[str, str] = field(default_factory=dict)
    request_scope: Literal["log", "user"] = "log"
    time_unit: str | None = None
    sampling_rate: str | None = None
    weight: str | None = None
    split: tuple[str, dict[str, list[Any]]] | None = None
    roles: dict[Role, list[str]] = field(
        default_factory=lambda: {"user": [], "candidate": [], "context": [], "placement": []}
    )
    tasks: list[TaskGuess] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    key_checks: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    repeats: bool = False
    rows_per_request: float = 1.0

    def leave_out(self, column: str, why: str) -> None:
        """Makes a column no input, which a person should check."""
        self.left_out[column] = self.checks[column] = why


@dataclass
class Reading:
    """A log that is being understood. list_keys: columns whose values say which rows were one list, none where each
    row is its own."""

    profile: Profile
    corrections: Corrections
    meaning: Meaning = field(default_factory=Meaning)
    list_keys: list[str] = field(default_factory=list)

    @property
    def columns(self) -> Mapping[str, Column]:
        """Of the log."""
        return self.profile.columns

    @property
    def is_plain(self) -> bool:
        """Whether each row is its own: there are neither users nor requests."""
        return "user" not in self.meaning.keys and "request" not in self.meaning.keys

    @property
    def time(self) -> str:
        """SQL of the request's time, by which rows are put in order."""
        time = self.meaning.keys.get("time")
        return self.columns[time].microseconds if time else "0"

    def distinct(self, purpose: Purpose) -> int:
        """About how many users, or candidates, there are."""
        name = self.meaning.keys.get(purpose)
        return self.columns[name].distinct if name else 0

    def free(self) -> list[Column]:
        """Columns without a meaning so far."""
        meaning = self.meaning
        taken = {*meaning.keys.values(), *meaning.left_out, meaning.sampling_rate, meaning.weight}
        taken |= {each.column for each in meaning.tasks} | {name for its in meaning.roles.values() for name in its}
        taken |= {meaning.split[0]} if meaning.split else set()
        return [each for each in self.columns.values() if each.name not in taken]
