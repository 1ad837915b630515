"""Columns, roles, tasks and observed-rules of an interaction log, and how they and the features fit together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from mmoe_rec.schema.features import EventLog, Feature, Remembering, Role
from mmoe_rec.schema.section import Section

Scalar = bool | int | float | str


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


class ObservedWhen(Section):
    """A row's label counts only where another column has a given value."""

    column: str = Field(description="column to look at")
    equals: Scalar = Field(description="value at which the label is known")


class Task(Section):
    """One predicted behaviour. A null label is always unobserved."""

    label: str = Field(description="column with the label; null means unobserved")
    kind: Literal["binary", "regression"] = Field("binary", description="binary (labels 0 and 1) or regression")
    observed_when: ObservedWhen | None = Field(None, description="condition for the label to be known")
    given: str | None = Field(
        None, description="binary task without which this one cannot happen; both are learnt from all rows (ESMM 2018)"
    )
    matures_after_days: float = Field(
        0.0, ge=0, le=36_500, description="days after the request until the label is final; until then it is unobserved"
    )


# A row of an event log, as a task: its label is always 1 and known at once. No log has a column of that name.
EVENT = Task(label="\0event", kind="binary")


_RESERVED = frozenset({"score", "ranking"})


def outcome_name(given: str, task: str) -> str:
    """Name of the outcome that a task and the one it is `given` both happened; it stands beside names of tasks."""
    return f"{given}_and_{task}"


# Keys of tasks and features that say what a model makes of them; no encoded row depends on these.
CHOICES = {"tasks": frozenset({"objective", "loss_weight", "score_weight"}), "features": frozenset({"dim"})}


class Schema(Section):
    """The meaning of a log: everything that features need to know of the settings, checked for consistency.

    `mmoe_rec.features.kinds.schema_of` makes it of the sections of a settings file; keys that say what a model makes of
    features and tasks (see `mmoe_rec.schema.choices`) are not part of it, so that nothing built from rows can depend on
    them.
    """

    columns: Columns
    roles: Roles = Roles()
    tasks: dict[str, Task] = Field(min_length=1)
    features: dict[str, SerializeAsAny[Feature]] = Field(min_length=1)
    events: dict[str, EventLog] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        self._check_columns()
        self._check_roles()
        for name in (*self.tasks, *self.features):
            if not name.replace("_", "").isalnum():
                raise ValueError(f"name '{name}' may hold letters, digits and underscores only")
        self._check_case(self.tasks, "task")
        self._check_case(self.features, "feature")
        for name in _RESERVED.intersection(self.tasks):
            raise ValueError(f"a task may not be called '{name}', which is a part of the metrics; rename it")
        self._check_given()
        for name, feature in self.features.items():
            self._check_leaks(name, feature.reads())
        for name, feature in self.features.items():
            feature.check(name, self)
            self.role_of(name)
        return self

    def _check_case(self, names: Iterable[str], what: str) -> None:
        """Files are named after tasks and features, and not all machines tell upper from lower case."""
        seen: dict[str, str] = {}
        for name in names:
            if (other := seen.setdefault(name.casefold(), name)) != name:
                raise ValueError(
                    f"{what}s '{other}' and '{name}' differ only in upper and lower case, which file names on some "
                    "machines do not tell apart; rename one"
                )

    def _check_given(self) -> None:
        taken = dict.fromkeys(self.tasks, "a task")
        for name, task in self.tasks.items():
            if task.given is None:
                continue
            if task.kind != "binary":
                raise ValueError(f"task '{name}' has `given`, which only a binary task can have")
            others = {each: other for each, other in self.tasks.items() if each != name}
            plain = [each for each, other in others.items() if other.kind == "binary" and other.given is None]
            if task.given not in plain:
                raise ValueError(
                    f"task '{name}' is given '{task.given}', which is not another binary task without `given`; such "
                    f"tasks are: {', '.join(plain) or 'none'}"
                )
            outcome = outcome_name(task.given, name)
            if outcome in taken:
                raise ValueError(
                    f"the outcome of tasks '{task.given}' and '{name}' together is called '{outcome}', as is "
                    f"{taken[outcome]}; rename one"
                )
            taken[outcome] = "that of two other tasks"

    def source_task(self, feature: Remembering) -> Task:
        """The task whose labels a feature remembers; every row of an event log counts as one of `EVENT`."""
        return EVENT if feature.task is None else self.tasks[feature.task]

    def _check_columns(self) -> None:
        purposes: dict[str, str] = {}
        for purpose in ("user", "candidate", "time", "request", "sampling_rate"):
            column = getattr(self.columns, purpose)
            if column is not None and (other := purposes.setdefault(column, purpose)) != purpose:
                raise ValueError(f"columns.{other} and columns.{purpose} both name column '{column}'")
        for name, task in self.tasks.items():
            if task.label in purposes:
                raise ValueError(
                    f"the label of task '{name}' is column '{task.label}', which is columns.{purposes[task.label]} too"
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

    def _check_roles(self) -> None:
        seen = {self.columns.user: "user", self.columns.candidate: "candidate", self.columns.time: "context"}
        for role, names in self.roles:
            for column in names:
                if seen.setdefault(column, role) != role:
                    raise ValueError(f"column '{column}' has two roles, {seen[column]} and {role}; leave it in one")

    @property
    def column_roles(self) -> dict[str, Role]:
        """Role of every column that may be read as an input."""
        roles: dict[str, Role] = {
            self.columns.user: "user",
            self.columns.candidate: "candidate",
            self.columns.time: "context",
        }
        for role, names in self.roles:
            roles.update(dict.fromkeys(names, role))
        return roles

    def role_of(self, name: str) -> Role:
        """Role of a feature: what its columns describe together. Raises ValueError for a column without a role."""
        feature = self.features[name]
        if feature.fixed_role is not None:
            return feature.fixed_role
        roles = set()
        for column in feature.reads():
            if column not in self.column_roles:
                raise ValueError(
                    f"feature '{name}' reads column '{column}', which has no role; list it under roles.user, "
                    "roles.candidate, roles.context or roles.placement"
                )
            roles.add(self.column_roles[column])
        if "placement" in roles and (len(roles) > 1 or isinstance(feature, Remembering)):
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
        return self.features[name].shares or name

    def identity(self) -> dict[str, Any]:
        """What features depend on, as JSON values. Where a log of events lies is not among it, but its files are."""
        return self.model_dump(mode="json", exclude={"events": {"__all__": {"path"}}})

    def input_columns(self) -> dict[str, Role]:
        """Columns that the features read, with their role; what a request may give."""
        read = {column for feature in self.features.values() for column in feature.reads()}
        read |= {self.columns.user, self.columns.candidate, self.columns.time}
        return {column: role for column, role in self.column_roles.items() if column in read}


def without_choices(section: str, tree: Any) -> Any:
    """The section `tasks` or `features` of a settings file, name -> keys, without what a model makes of each."""
    if not isinstance(tree, dict):
        return tree
    choices = CHOICES[section]
    return {
        name: {key: value for key, value in each.items() if key not in choices} if isinstance(each, dict) else each
        for name, each in tree.items()
    }
