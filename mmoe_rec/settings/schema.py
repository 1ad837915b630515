"""Features, and checks that they match the columns, roles and tasks of a log."""

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
"""Maximum number of rows in a table, since IDs in encoded rows have 32 bits."""
_PURPOSES = ("user", "candidate", "time", "request", "sampling_rate", "weight")
_RESERVED = frozenset({"score", "ranking"})
Days = Annotated[float, Field(gt=0, le=36_500)]


@dataclass(frozen=True)
class InputSemantics:
    """Meaning of a feature's inputs, for the health report. A row is a row of the feature's embedding table.

    Attributes:
        columns: Columns of the log that the inputs are computed from.
        row_name: Function of a table's name and a row's number that returns the meaning of the row. None if the rows
            stand for IDs of a vocabulary.
        missing: Whether row 0 stands for a missing value.
        unknown: Number of rows after row 0 for IDs outside the vocabulary.
        zeros_missing: Whether dense inputs that are all 0 stand for a missing value.
        parts: Meaning of the inputs with other tables (attributes of a history), by the name of the table.
    """

    columns: tuple[str, ...]
    row_name: Callable[[str, int], str] | None = None
    missing: bool = True
    unknown: int = 0
    zeros_missing: bool = False
    parts: Mapping[str, InputSemantics] = field(default_factory=dict)

    @property
    def first_seen_row(self) -> int:
        """First row after the rows for a missing value and for IDs outside the vocabulary."""
        return self.missing + self.unknown


class Feature(Section, ABC):
    """Settings of a feature. In a `Schema`, choices of the model, such as `dim`, have their defaults."""

    if TYPE_CHECKING:
        kind: str

    fixed_role: ClassVar[Role | None] = None
    """Role of all features of this kind, None if the columns decide."""

    @abstractmethod
    def reads(self) -> Mapping[str, ColumnUse]:
        """Return the columns that the feature reads in a row to encode, and the use of each column."""

    @abstractmethod
    def semantics(self, schema: Schema) -> InputSemantics:
        """Return the meaning of the feature's inputs, for the health report."""

    @property
    def list_lengths(self) -> Mapping[str, int]:
        """Column -> required length of its lists, for columns whose lists need equal lengths."""
        return {}

    @property
    def table_owner(self) -> str | None:
        """Name of another feature whose vocabulary and table this feature uses, None if it shares no table."""
        return None

    @property
    def has_own_table(self) -> bool:
        """Whether the feature has its own embedding table, and therefore uses `dim`."""
        return self.table_owner is None and "dim" in type(self).model_fields

    def check(self, name: str, schema: Schema) -> None:
        """Raise ValueError if the feature contradicts other parts of the schema.

        Args:
            name: Name of the feature.
            schema: Schema that contains the feature.
        """

    def require_column(
        self, name: str, schema: Schema, purpose: Literal["user", "candidate", "time"], reason: str
    ) -> None:
        """Raise ValueError if the log lacks the column of users, candidates or times.

        Args:
            name: Name of the feature.
            schema: Schema that contains the feature.
            purpose: Whether the column of users, of candidates or of request times is required.
            reason: Reason in the error message, a clause after "because".
        """
        if not getattr(schema.columns, f"has_{purpose}"):
            raise ValueError(f"feature '{name}' needs columns.{purpose}, because {reason}. Set columns.{purpose}.")


class EmbeddingChoices(Section):
    """Settings of the embeddings of a feature, which only the model uses."""

    dim: int = Field(16, ge=1, le=1024, description="width of the embedding")


class EventFeature(Feature):
    """Feature of earlier events: labels of a task in the interaction log, or rows of an event log."""

    task: str | None = Field(None, description="task whose labels in the interaction log to read")
    events: str | None = Field(None, description="event log under `data.events` to read instead of a task")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.task is None) == (self.events is None):
            raise ValueError("needs either `task`, for labels of the interaction log, or `events`, for an event log")
        return self

    @abstractmethod
    def event_reads(self, schema: Schema) -> Mapping[str, ColumnUse]:
        """Return the columns that the feature reads in the event log, besides the time, and the use of each column."""

    def check(self, name: str, schema: Schema) -> None:
        """Raise ValueError if the task or the event log doesn't exist."""
        if self.task is not None and self.task not in schema.tasks:
            raise ValueError(f"feature '{name}' names task '{self.task}'; tasks are {', '.join(schema.tasks)}")
        if self.events is not None and self.events not in schema.events:
            names = ", ".join(schema.events) or "none, add it"
            raise ValueError(f"feature '{name}' names events '{self.events}'; logs under data.events are: {names}")
        self.require_column(name, schema, "time", "it reads events before a row's request")


class Schema(Section):
    """Columns, roles, tasks and features of a log: all settings that encoded rows depend on, checked for consistency.

    `mmoe_rec.features.kinds.parse_schema` builds a schema without settings that only concern the model, such as loss
    weights (see `log_columns.MODEL_CHOICES`). So a change of these settings needs no new features.
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
                raise ValueError(f"name '{name}' may contain only letters, digits and underscores")
        for names in (self.tasks, self.features):  # Names are in file names, where some systems ignore case.
            if len({name.casefold() for name in names}) < len(names):
                raise ValueError(f"some names differ only in upper and lower case: rename one of {', '.join(names)}")
        for name in _RESERVED.intersection(self.tasks):
            raise ValueError(f"a task can't have the name '{name}', which metrics use; rename it")
        self._check_conditional_tasks()
        for name, feature in self.features.items():
            self._check_leaks(name, feature.reads())
        for name, feature in self.features.items():
            feature.check(name, self)
            self.role_of(name)
        return self

    def _check_conditional_tasks(self) -> None:
        taken = dict.fromkeys(self.tasks, "a task")
        for name, task in self.tasks.items():
            if task.conditional_on is None:
                continue
            if not task.kind.is_binary:
                raise ValueError(f"task '{name}' has `conditional_on`, which only a binary task can have")
            others = {key: parent for key, parent in self.tasks.items() if key != name}
            plain = [key for key, parent in others.items() if parent.kind.is_binary and parent.conditional_on is None]
            if task.conditional_on not in plain:
                raise ValueError(
                    f"task '{name}' is conditional on '{task.conditional_on}', which is not another binary task "
                    f"without `conditional_on`. Name one of: {', '.join(plain) or 'none'}"
                )
            outcome = joint_task_name(task.conditional_on, name)
            if outcome in taken:
                raise ValueError(
                    f"the joint outcome of tasks '{task.conditional_on}' and '{name}' has the same name '{outcome}' as "
                    f"{taken[outcome]}. Rename a task."
                )
            taken[outcome] = "the outcome of two other tasks"

    def _check_columns(self) -> None:
        """Raise ValueError if a column has two purposes, or if a setting needs users or times that the log lacks."""
        columns = {f"columns.{name}": getattr(self.columns, name) for name in _PURPOSES}
        columns["split.column"] = None if self.split is None else self.split.column
        purposes: dict[str, str] = {}
        for purpose, column in columns.items():
            if column is not None and (first := purposes.setdefault(column, purpose)) != purpose:
                raise ValueError(f"{first} and {purpose} both name column '{column}'")
        if self.columns.request_scope == "user" and self.columns.request and not self.columns.has_user:
            raise ValueError("columns.request_scope user needs columns.user. Set columns.user, or the scope to log.")
        for name, task in self.tasks.items():
            if task.label in purposes:
                raise ValueError(f"{purposes[task.label]} and tasks.{name}.label both name column '{task.label}'")
            if task.label_delay_days and not self.columns.has_time:
                raise ValueError(
                    f"task '{name}' has label_delay_days, which needs columns.time. Set columns.time, or remove "
                    "label_delay_days."
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
                raise ValueError(f"feature '{name}' reads column '{column}', the sampling rate, which reveals labels")
            if self.split is not None and column == self.split.column:
                raise ValueError(f"feature '{name}' reads column '{column}', which is split.column")

    def _check_roles(self) -> None:
        seen: dict[str, str] = dict(self._own_roles)
        for role, names in self.roles:
            for column in names:
                if seen.setdefault(column, role) != role:
                    raise ValueError(f"column '{column}' has two roles, {seen[column]} and {role}; leave it in one")

    @property
    def _own_roles(self) -> dict[str, Role]:
        """Roles of the columns of user, candidate and time, without columns that the log lacks."""
        columns = self.columns
        roles: dict[str, Role] = {columns.user: "user", columns.candidate: "candidate", columns.time: "context"}
        return {name: role for name, role in roles.items() if name in columns.names}

    @property
    def column_roles(self) -> dict[str, Role]:
        """Role of each column that features may read."""
        roles = self._own_roles
        for role, names in self.roles:
            roles.update(dict.fromkeys(names, role))
        return roles

    def can_rank_without(self, names: Collection[str]) -> bool:
        """Return whether a feature with another role than placement remains if the features `names` are removed."""
        return any(name not in names and self.role_of(name) != "placement" for name in self.features)

    def role_of(self, name: str) -> Role:
        """Return the role of a feature: `fixed_role`, or else placement if the feature's columns have this role.

        Otherwise, return the first of candidate, context and user that a column has, or context without columns.

        Raises:
            ValueError: A column has no role, or placement is mixed with other roles.
        """
        feature = self.features[name]
        if feature.fixed_role is not None:
            return feature.fixed_role
        roles = set()
        for column in feature.reads():
            if column not in self.column_roles:
                near = get_close_matches(column, self.column_roles, 1)
                meant = f" (did you mean '{near[0]}'?)" if near else ""
                raise ValueError(
                    f"feature '{name}' reads column '{column}', which has no role{meant}. Add the column to "
                    "roles.user, roles.candidate, roles.context or roles.placement."
                )
            roles.add(self.column_roles[column])
        if "placement" in roles and (len(roles) > 1 or isinstance(feature, EventFeature)):
            raise ValueError(
                f"feature '{name}' reads a placement column together with other columns or past labels, but placement "
                "is absent in serving. Use only placement columns in this feature."
            )
        for role in ("placement", "candidate", "context"):
            if role in roles:
                return role
        return "user" if roles else "context"

    def table_of(self, name: str) -> str:
        """Return the name of the feature that owns the embedding table of the feature `name`."""
        return self.features[name].table_owner or name

    def identity(self) -> dict[str, Any]:
        """Return all settings as JSON values, except the paths of event logs.

        `mmoe_rec.preprocessing.prepare` combines these values with the log files to a fingerprint of the encoded rows.
        """
        return self.model_dump(mode="json", exclude={"events": {"__all__": {"path"}}})

    def input_columns(self) -> dict[str, Role]:
        """Return the roles of the columns that features read, and of the columns of user, candidate and time."""
        read = {column for feature in self.features.values() for column in feature.reads()}
        read |= self._own_roles.keys()
        return {column: role for column, role in self.column_roles.items() if column in read}


def check_unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the values, or raise ValueError if a value is repeated."""
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise ValueError(f"lists {'null' if twice[0] is None else twice[0]} twice")
    return values


Unique = AfterValidator(check_unique)
