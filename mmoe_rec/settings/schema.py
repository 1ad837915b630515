"""Features, and how they fit together with the columns, roles and tasks of a log."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, SerializeAsAny, model_validator

from mmoe_rec.settings.log_columns import (
    Columns,
    ColumnUse,
    EventLog,
    Role,
    Roles,
    Section,
    SplitColumn,
    Task,
    joint_task_name,
)

MAX_TABLE_ROWS = 2**31
"""Rows of the largest table: its ids are 32-bit numbers in encoded rows."""
_PURPOSES = ("user", "candidate", "time", "request", "sampling_rate", "weight")
_RESERVED = frozenset({"score", "ranking"})
Days = Annotated[float, Field(gt=0, le=36_500)]


@dataclass(frozen=True)
class InputSemantics:
    """A feature as the health report reads it.

    Attributes:
        columns: Columns that its values come from.
        row_name: Function of a table and a row that names the row, None if rows are the ids of a vocabulary.
        missing: Whether row 0 stands for a missing value.
        unknown: Number of rows after it that unknown ids share.
        zeros_missing: Whether dense inputs that are all 0 stand for a missing value.
        parts: Meaning of the inputs of other tables, by table.
    """

    columns: tuple[str, ...]
    row_name: Callable[[str, int], str] | None = None
    missing: bool = True
    unknown: int = 0
    zeros_missing: bool = False
    parts: Mapping[str, InputSemantics] = field(default_factory=dict)

    @property
    def first_seen_row(self) -> int:
        """The first row that stands for one known id, or for a bucket."""
        return self.missing + self.unknown


class Feature(Section, ABC):
    """What a feature reads, and what its inputs mean: a section of the settings without what a model makes of it."""

    if TYPE_CHECKING:
        kind: str

    fixed_role: ClassVar[Role | None] = None
    """The role of a kind's features, where their columns do not decide it."""

    @abstractmethod
    def reads(self) -> Mapping[str, ColumnUse]:
        """Columns of a row that the feature reads directly, and as what."""

    @abstractmethod
    def semantics(self, schema: Schema) -> InputSemantics:
        """What the health report needs to know."""

    @property
    def list_lengths(self) -> Mapping[str, int]:
        """Length that every list of a column must have, for columns that need one."""
        return {}

    @property
    def table_owner(self) -> str | None:
        """Name of the feature whose vocabulary and table this one uses, None for its own or none."""
        return None

    @property
    def has_own_table(self) -> bool:
        """Whether a `dim` means anything: the feature has an embedding table of its own."""
        return self.table_owner is None and "dim" in type(self).model_fields

    def check(self, name: str, schema: Schema) -> None:
        """Raises ValueError where a feature of that name does not fit the other sections."""

    def require_column(self, name: str, schema: Schema, purpose: Literal["user", "time"], why: str) -> None:
        """Raises ValueError where the log has no column of users or times, which a feature of that name needs."""
        if not getattr(schema.columns, f"has_{purpose}"):
            raise ValueError(f"feature '{name}' needs columns.{purpose}, which is left out: {why}")


class EmbeddingChoices(Section):
    """What a model chooses for a kind with an embedding table."""

    dim: int = Field(16, ge=1, le=1024, description="width of the embedding")


class EventFeature(Feature):
    """A feature of earlier events: rows of the interaction log with a task's label, or of a further log."""

    task: str | None = Field(None, description="task whose labels in the interaction log are read")
    events: str | None = Field(None, description="name of a further log under `data.events` that is read instead")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.task is None) == (self.events is None):
            raise ValueError("give either `task`, to read the log's labels, or `events`, to read a further log")
        return self

    @abstractmethod
    def event_reads(self, schema: Schema) -> Mapping[str, ColumnUse]:
        """Columns of the log of events that the feature reads, besides the time, and as what."""

    def check(self, name: str, schema: Schema) -> None:
        """Raises ValueError for a task or a log of events that does not exist."""
        if self.task is not None and self.task not in schema.tasks:
            raise ValueError(f"feature '{name}' names task '{self.task}'; tasks are {', '.join(schema.tasks)}")
        if self.events is not None and self.events not in schema.events:
            known = ", ".join(schema.events) or "none, add it"
            raise ValueError(f"feature '{name}' names events '{self.events}'; logs under data.events are: {known}")
        self.require_column(name, schema, "time", "it knows what happened before a row's request")


class Schema(Section):
    """The meaning of a log: everything that features need to know of the settings, checked for consistency.

    `mmoe_rec.features.kinds.schema_of` makes it of the sections of a settings file; keys that say what a model makes of
    features and tasks (see `columns`) are not part of it, so that nothing built from rows can depend on them.
    """

    columns: Columns
    roles: Roles = Roles()
    tasks: dict[str, Task] = Field(min_length=1)
    features: dict[str, SerializeAsAny[Feature]] = Field(min_length=1)
    events: dict[str, EventLog] = Field(default_factory=dict)
    split: SplitColumn | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        self._check_columns()
        self._check_roles()
        for name in (*self.tasks, *self.features):
            if not name.replace("_", "").isalnum():
                raise ValueError(f"name '{name}' may hold letters, digits and underscores only")
        for names in (self.tasks, self.features):  # files are named after them
            if len({name.casefold() for name in names}) < len(names):
                raise ValueError(f"some names differ only in upper and lower case: rename one of {', '.join(names)}")
        for name in _RESERVED.intersection(self.tasks):
            raise ValueError(f"a task may not be called '{name}', which is a part of the metrics; rename it")
        self._check_given()
        for name, feature in self.features.items():
            self._check_leaks(name, feature.reads())
        for name, feature in self.features.items():
            feature.check(name, self)
            self.role_of(name)
        return self

    def _check_given(self) -> None:
        taken = dict.fromkeys(self.tasks, "a task")
        for name, task in self.tasks.items():
            if task.conditional_on is None:
                continue
            if not task.kind.is_binary:
                raise ValueError(f"task '{name}' has `conditional_on`, which only a binary task can have")
            others = {each: other for each, other in self.tasks.items() if each != name}
            plain = [each for each, other in others.items() if other.kind.is_binary and other.conditional_on is None]
            if task.conditional_on not in plain:
                raise ValueError(
                    f"task '{name}' is given '{task.conditional_on}', which is not another binary task without "
                    "`conditional_on`; such "
                    f"tasks are: {', '.join(plain) or 'none'}"
                )
            outcome = joint_task_name(task.conditional_on, name)
            if outcome in taken:
                raise ValueError(
                    f"the outcome of tasks '{task.conditional_on}' and '{name}' together is called '{outcome}', as is "
                    f"{taken[outcome]}; rename one"
                )
            taken[outcome] = "that of two other tasks"

    def _check_columns(self) -> None:
        """No column has two purposes, and what needs users or times is not asked of a table without."""
        named = {f"columns.{name}": getattr(self.columns, name) for name in _PURPOSES}
        named["split.column"] = None if self.split is None else self.split.column
        purposes: dict[str, str] = {}
        for purpose, column in named.items():
            if column is not None and (other := purposes.setdefault(column, purpose)) != purpose:
                raise ValueError(f"{other} and {purpose} both name column '{column}'")
        if self.columns.request_scope == "user" and self.columns.request and not self.columns.has_user:
            raise ValueError("columns.request_scope is user, which needs columns.user: set it, or the scope to log")
        for name, task in self.tasks.items():
            if task.label in purposes:
                raise ValueError(
                    f"the label of task '{name}' is column '{task.label}', which is {purposes[task.label]} too"
                )
            if task.label_delay_days and not self.columns.has_time:
                raise ValueError(
                    f"task '{name}' has label_delay_days, which needs columns.time: without times it can't be told "
                    "which labels had matured"
                )

    def _check_leaks(self, name: str, read: Iterable[str]) -> None:
        labels = {task.label: task_name for task_name, task in self.tasks.items()}
        for column in read:
            if column in labels:
                raise ValueError(
                    f"feature '{name}' reads column '{column}', which is the label of task '{labels[column]}'; "
                    "past labels are read through features of kind counter or history"
                )
            if column == self.columns.sampling_rate:
                raise ValueError(
                    f"feature '{name}' reads column '{column}', the sampling rate, which gives labels away"
                )
            if self.split is not None and column == self.split.column:
                raise ValueError(f"feature '{name}' reads column '{column}', which says what a row is split to")

    def _check_roles(self) -> None:
        seen: dict[str, str] = dict(self._own_roles)
        for role, names in self.roles:
            for column in names:
                if seen.setdefault(column, role) != role:
                    raise ValueError(f"column '{column}' has two roles, {seen[column]} and {role}; leave it in one")

    @property
    def _own_roles(self) -> dict[str, Role]:
        """Role of the columns that give a row its place, as far as there are any."""
        columns = self.columns
        roles: dict[str, Role] = {columns.user: "user", columns.candidate: "candidate", columns.time: "context"}
        return {name: role for name, role in roles.items() if name in columns.names}

    @property
    def column_roles(self) -> dict[str, Role]:
        """Role of every column that may be read as an input."""
        roles = self._own_roles
        for role, names in self.roles:
            roles.update(dict.fromkeys(names, role))
        return roles

    def can_rank_without(self, names: Collection[str]) -> bool:
        """Whether a feature of user, candidate or context is left without some features."""
        return any(name not in names and self.role_of(name) != "placement" for name in self.features)

    def role_of(self, name: str) -> Role:
        """Role of a feature: what its columns describe together. Raises ValueError for a column without a role."""
        feature = self.features[name]
        if feature.fixed_role is not None:
            return feature.fixed_role
        roles = set()
        for column in feature.reads():
            if column not in self.column_roles:
                near = get_close_matches(column, self.column_roles, 1)
                meant = f" (did you mean '{near[0]}'?)" if near else ""
                raise ValueError(
                    f"feature '{name}' reads column '{column}', which has no role{meant}; list it under roles.user, "
                    "roles.candidate, roles.context or roles.placement"
                )
            roles.add(self.column_roles[column])
        if "placement" in roles and (len(roles) > 1 or isinstance(feature, EventFeature)):
            raise ValueError(
                f"feature '{name}' reads placement together with other columns or past labels, but placement is "
                "absent in serving; a feature of placement may read placement columns only"
            )
        for role in ("placement", "candidate", "context"):
            if role in roles:
                return role
        return "user" if roles else "context"

    def table_of(self, name: str) -> str:
        """Name of the id feature that owns the vocabulary and the embedding table of an id-like feature."""
        return self.features[name].table_owner or name

    def identity(self) -> dict[str, Any]:
        """What the settings decide of features, as JSON values, without the paths of event logs: of these, as of the
        log itself, the files count (`mmoe_rec.preprocessing.prepare`)."""
        return self.model_dump(mode="json", exclude={"events": {"__all__": {"path"}}})

    def input_columns(self) -> dict[str, Role]:
        """Columns that the features read, with their role; what a request may give."""
        read = {column for feature in self.features.values() for column in feature.reads()}
        read |= self._own_roles.keys()
        return {column: role for column, role in self.column_roles.items() if column in read}


def check_unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values. Raises ValueError where one is listed twice."""
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise ValueError(f"lists {'null' if twice[0] is None else twice[0]} twice")
    return values


Unique = AfterValidator(check_unique)
