"""Columns, roles and tasks of a log: the sections `columns`, `roles`, `tasks` and `data.events` of a settings file.

What tasks mean stands apart from what a model makes of them, objectives and the weights of losses and of the score: no
encoded row depends on the latter, so to change one takes a new training, not new features.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from mmoe_rec.task_kinds import DEFAULT_KIND, TaskKindField

Scalar = bool | int | float | str
Role = Literal["user", "candidate", "context", "placement"]
ColumnUse = Literal["key", "keys", "number", "vector", "time", "any"]
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


class Section(BaseModel):
    """A strict, immutable part of the settings: an unknown key is an error, and so is a value of another type.

    Text, true and false are never converted; a whole number may stand where any number may.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _lists_as_tuples(cls, values: Any) -> Any:
        # YAML and JSON have lists only.
        if isinstance(values, dict):
            return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return values


class Columns(Section):
    """The columns that give a row its place in the log.

    A plain table, say one row a person, may lack users, candidates and times: then these names are those of columns
    that `mmoe_rec.log.rows` adds to its rows as they are read, and features can't read them.
    """

    user: _User = Field(None, validate_default=True, description="column of users' ids; null: each request is a user")
    candidate: _Candidate = Field(None, validate_default=True, description="candidates' ids; null: each row is its own")
    time: _Time = Field(None, validate_default=True, description="request times; null in a table split by a column")
    request: str | None = Field(None, description="column with the request's id; null: a user's rows of one instant")
    request_scope: Literal["log", "user"] = Field("log", description="request ids are unique in the log, or to a user")
    time_unit: Literal["s", "ms", "us", "ns"] | None = Field(None, description="unit of integer times since 1970 UTC")
    sampling_rate: str | None = Field(None, description="column with the rate at which the row was sampled (0 to 1]")
    weight: str | None = Field(None, description="column with what the row counts in losses and metrics, in any unit")

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
    placement: tuple[str, ...] = Field((), description="columns of where a candidate was shown; absent in serving")


class EventLog(Section):
    """A further log of what happened, shown by this system or not, such as all purchases or page views.

    Counters and histories may read it. Its key columns have the names and types that they have in the interaction log.
    A row is an event that is known from its time on.
    """

    path: str = Field(description="a folder of Parquet files, one file, or a glob; a path or an s3:// address")
    time: str = Field(description="column with the event's time (in `columns.time_unit`, if integers)")


# Keys of tasks and features that say what a model makes of them; no encoded row depends on these.
MODEL_CHOICES = {
    "tasks": frozenset({"objective", "loss_weight", "score_weight"}),
    "features": frozenset({"dim", "pooling"}),
}


def drop_model_choices(section: str, tree: Any) -> Any:
    """The section `tasks` or `features` of a settings file, name -> keys, without what a model makes of each."""
    if not isinstance(tree, dict):
        return tree
    choices = MODEL_CHOICES[section]
    return {
        name: {key: value for key, value in each.items() if key not in choices} if isinstance(each, dict) else each
        for name, each in tree.items()
    }


class ObservedWhen(Section):
    """A row's label counts only where another column has a given value."""

    column: str = Field(description="column to look at")
    equals: Scalar = Field(description="value at which the label is known")


class Task(Section):
    """One predicted behaviour. A null label is always unobserved."""

    label: str = Field(description="column with the label; null means unobserved")
    kind: TaskKindField = Field(DEFAULT_KIND, description="binary (labels 0 and 1) or regression")
    observed_when: ObservedWhen | None = Field(None, description="condition for the label to be known")
    conditional_on: str | None = Field(None, description="binary task without which this one cannot happen (ESMM 2018)")
    label_delay_days: float = Field(0.0, ge=0, le=36_500, description="days until its label is final; unknown before")


# A row of an event log, as a task: its label is always 1 and known at once. No log has a column of that name.
EVENT_TASK = Task(label="\0event")


class TaskSettings(Task):
    """One predicted behaviour. A null label is always unobserved."""

    objective: Literal["engagement", "satisfaction"] = Field(description="the objective that the task serves")
    loss_weight: float = Field(1.0, ge=0, description="weight of the task's loss in training")
    score_weight: float = Field(1.0, ge=0, description="weight of log probability in the score; 0 leaves the task out")


def joint_task_name(given: str, task: str) -> str:
    """Name of the outcome that a task and the one it is `conditional_on` both happened; it stands beside names of
    tasks."""
    return f"{given}_and_{task}"
