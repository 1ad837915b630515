"""Columns, roles and tasks of a log: sections `columns`, `roles`, `tasks` and `data.events` of a settings file.

Settings of the data are separate from model choices, such as objectives and the weights of losses and scores. Encoded
rows don't depend on model choices. So a changed choice needs a new training run, but no new features.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from mmoe_rec.task_kinds import DEFAULT_KIND, TaskKindField

Scalar = bool | int | float | str
Role = Literal["user", "candidate", "context", "placement"]
ColumnUse = Literal["key", "keys", "number", "vector", "time", "any"]
"""Type that a column is read as, see `mmoe_rec.log.columns`."""

SPLITS = ("train", "validation", "test")


# Names for the missing columns of a plain table. No real column begins with a null character.
NO_USER, NO_CANDIDATE, NO_TIME = "\0user", "\0candidate", "\0time"


def _read(stand_in: str) -> BeforeValidator:
    return BeforeValidator(lambda name: stand_in if name is None else name)


def _write(stand_in: str) -> PlainSerializer:
    return PlainSerializer(lambda name: None if name == stand_in else name)


_User = Annotated[str, _read(NO_USER), _write(NO_USER)]
_Candidate = Annotated[str, _read(NO_CANDIDATE), _write(NO_CANDIDATE)]
_Time = Annotated[str, _read(NO_TIME), _write(NO_TIME)]


class Section(BaseModel):
    """Strict, immutable section of the settings. Unknown keys and values of the wrong type are errors.

    Text and booleans are never converted. A whole number is valid wherever a number is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _lists_as_tuples(cls, values: Any) -> Any:
        # YAML and JSON have lists but no tuples.
        if isinstance(values, dict):
            return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return values


class Columns(Section):
    """Columns that identify a row of the log.

    A plain table, such as one row per person, may lack users, candidates and times. Reading then adds columns with
    reserved names, which features can't use.
    """

    user: _User = Field(None, validate_default=True, description="column with user IDs; null: each request is a user")
    candidate: _Candidate = Field(
        None, validate_default=True, description="column with candidate IDs; null: each row is a candidate"
    )
    time: _Time = Field(None, validate_default=True, description="column with request times; null with `split.column`")
    request: str | None = Field(None, description="column with request IDs; null: rows of one user and time")
    request_scope: Literal["log", "user"] = Field("log", description="scope in which a request ID is unique")
    time_unit: Literal["s", "ms", "us", "ns"] | None = Field(None, description="unit of integer times since 1970 UTC")
    sampling_rate: str | None = Field(None, description="column with a row's sampling rate, above 0 and at most 1")
    weight: str | None = Field(None, description="column with a row's weight in losses and metrics")

    @property
    def has_user(self) -> bool:
        """Whether the log has a column of users."""
        return self.user != NO_USER

    @property
    def has_candidate(self) -> bool:
        """Whether the log has a column of candidates."""
        return self.candidate != NO_CANDIDATE

    @property
    def has_time(self) -> bool:
        """Whether the log has a column of times."""
        return self.time != NO_TIME

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns with request, user, candidate and time, without columns that the log lacks."""
        columns = (self.request, self.user, self.candidate, self.time)
        return tuple(name for name in columns if name not in (None, NO_USER, NO_CANDIDATE, NO_TIME))


class SplitColumn(Section):
    """Column that names the split of each row, and the values that stand for each split."""

    column: str
    train: tuple[Scalar, ...]
    validation: tuple[Scalar, ...]
    test: tuple[Scalar, ...]

    @property
    def values(self) -> dict[str, tuple[Scalar, ...]]:
        """Values of each split, in the order of `SPLITS`."""
        return {name: getattr(self, name) for name in SPLITS}


class Roles(Section):
    """Roles of columns. Each column that a feature reads needs one role."""

    user: tuple[str, ...] = Field((), description="columns that describe the user")
    candidate: tuple[str, ...] = Field((), description="columns that describe the candidate")
    context: tuple[str, ...] = Field((), description="columns that describe the request, such as the device")
    placement: tuple[str, ...] = Field(
        (), description="columns that say where a candidate was shown; absent in serving"
    )


class EventLog(Section):
    """Additional log of events, such as all purchases or page views, for counters and histories.

    Any system can write the events. The key columns have the same names and types as in the interaction log. Requests
    after the time of an event see the event.
    """

    path: str = Field(description="folder of Parquet files, one file, or a glob; a path or an s3:// URI")
    time: str = Field(description="column with the event's time (integers are in `columns.time_unit`)")


# Keys of tasks and features that only concern the model. Encoded rows don't depend on them.
MODEL_CHOICES = {
    "tasks": frozenset({"objective", "loss_weight", "score_weight"}),
    "features": frozenset({"dim", "pooling"}),
}


def drop_model_choices(section: str, tree: Any) -> Any:
    """Return a section of a settings file without `MODEL_CHOICES`, the keys that only concern the model.

    Args:
        section: "tasks" or "features".
        tree: Section as parsed from YAML, name -> keys. Returned unchanged if it isn't a dictionary.
    """
    if not isinstance(tree, dict):
        return tree
    choices = MODEL_CHOICES[section]
    return {
        name: {key: value for key, value in entry.items() if key not in choices} if isinstance(entry, dict) else entry
        for name, entry in tree.items()
    }


class ObservedWhen(Section):
    """Condition on another column. A label is observed only in rows that meet the condition."""

    column: str = Field(description="column to compare")
    equals: Scalar = Field(description="value that marks an observed label")


class Task(Section):
    """Predicted behavior, without the choices that only concern the model. A null label is unobserved."""

    label: str = Field(description="column with the label; null means unobserved")
    kind: TaskKindField = Field(DEFAULT_KIND, description="binary (labels 0 and 1) or regression")
    observed_when: ObservedWhen | None = Field(None, description="condition for an observed label")
    conditional_on: str | None = Field(None, description="binary task that must happen first (ESMM, 2018)")
    label_delay_days: float = Field(0.0, ge=0, le=36_500, description="days until a label is final and available")


# Task of an event log's rows, whose label is always 1 and available at once. No log has a column of this name.
EVENT_TASK = Task(label="\0event")


class TaskSettings(Task):
    """Predicted behavior. A null label is unobserved."""

    objective: Literal["engagement", "satisfaction"] = Field(
        description="user action (engagement) or opinion (satisfaction)"
    )
    loss_weight: float = Field(1.0, ge=0, description="weight of the task's loss in training")
    score_weight: float = Field(
        1.0, ge=0, description="weight of the log probability in the score; 0 excludes the task"
    )


def joint_task_name(condition: str, task: str) -> str:
    """Return the name of the joint outcome (both labels are 1) of a task and its `conditional_on` task.

    Args:
        condition: Name of the `conditional_on` task.
        task: Name of the task.
    """
    return f"{condition}_and_{task}"
