"""Section `labels` of a settings file, which defines how logged requests and events become training rows."""

from typing import Literal

from pydantic import Field, model_validator

from mmoe_rec.settings.log_columns import Section
from mmoe_rec.settings.schema import Schema

_MICROSECONDS_PER_DAY = 86_400_000_000


class LabelEvents(Section):
    """A log of events after requests, in the folder NAME of `--events`, or else at `data.events.NAME.path`.

    The columns of user and candidate have the same names and types as in the interaction log. If the log has a column
    `event_id`, several rows of a user with the same ID count once.
    """

    time: str = Field(description="column with the event's time (integers are in `columns.time_unit`)")
    request: str | None = Field(
        None,
        description="column with the request's ID. If null, an event belongs to the user's last earlier request that "
        "showed the candidate, and all requests must be logged.",
    )


class Window(Section):
    """A log of events, and how long after a request an event counts for the request."""

    events: str = Field(description="name under labels.events")
    attribution_days: float = Field(gt=0, le=36_500, description="days after the request during which an event counts")

    @property
    def length_us(self) -> int:
        """Length of the window in microseconds."""
        return round(self.attribution_days * _MICROSECONDS_PER_DAY)


class LabelSource(Window):
    """Events that give the label of each row, or the value of a column of `observed_when`."""

    value: str | None = Field(None, description="event column with the label; null: 1 for any event")
    combine: Literal["last", "first", "sum", "max"] = Field(
        "last", description="rule that combines the values of several events"
    )
    default: float | None = Field(0.0, description="label of a row without events; null if unknown")


class LabelRules(Section):
    """Rules by which `join-labels` builds training rows from logged requests and events."""

    events: dict[str, LabelEvents] = Field(default_factory=dict, description="name -> log of events after requests")
    shown: Window | None = Field(
        None,
        description="events that say which candidates were shown, with the columns of roles.placement. Other "
        "candidates are dropped. If null, all candidates of a reply count as shown.",
    )
    top: int | None = Field(None, ge=1, description="number of best candidates that count as shown; null: all")
    rank: str | None = Field(
        None, description="placement column with the rank in the reply, from 1; it must be null if `shown` is set"
    )
    sources: dict[str, LabelSource] = Field({}, description="column of a label or observed_when -> its events")
    wait_days: float = Field(
        0.05, ge=0, le=365, description="days to wait for late events after a request's last window"
    )

    @model_validator(mode="after")
    def _check_names(self) -> "LabelRules":
        windows = {**{f"sources.{name}": window for name, window in self.sources.items()}, "shown": self.shown}
        for key, window in windows.items():
            if window is not None and window.events not in self.events:
                names = ", ".join(self.events) or "none, add it"
                raise ValueError(f"{key}.events names '{window.events}'; logs under labels.events are: {names}")
        for name in self.events:
            if not name.replace("_", "").isalnum():
                raise ValueError(f"name '{name}' of labels.events may contain only letters, digits and underscores")
        if self.shown is not None and (self.top is not None or self.rank is not None):
            raise ValueError("`shown` can't be combined with `top` or `rank`: remove them")
        return self

    @property
    def windows(self) -> list[Window]:
        """All `sources`, and `shown` if it is set."""
        return [*self.sources.values(), *([] if self.shown is None else [self.shown])]

    def check(self, schema: Schema) -> None:
        """Raise ValueError if the rules contradict the other sections of the settings, which are in `schema`."""
        labels = label_columns(schema)
        if self.events and schema.columns.weight is not None:
            raise ValueError(
                f"labels.events can't be combined with columns.weight ('{schema.columns.weight}'), because logged "
                "requests have no weights. Remove one of the two settings."
            )
        for column, source in self.sources.items():
            if column not in labels:
                raise ValueError(
                    f"labels.sources names '{column}', which is neither the label nor the observed_when of a task. "
                    f"Name one of {', '.join(labels)}"
                )
            for name in labels[column]:
                task = schema.tasks[name]
                parent_days = 0.0 if task.conditional_on is None else schema.tasks[task.conditional_on].label_delay_days
                days = max(task.label_delay_days, parent_days)
                if days < source.attribution_days:
                    raise ValueError(
                        f"labels.sources.{column}.attribution_days is {source.attribution_days:g}, but training uses "
                        f"labels of task '{name}' after {days:g} days, when they may still change. Set "
                        f"tasks.{name}.label_delay_days to {source.attribution_days:g} or more."
                    )
        if self.rank is not None and schema.column_roles.get(self.rank) != "placement":
            raise ValueError(f"labels.rank names '{self.rank}', which is not listed in roles.placement")


def label_columns(schema: Schema) -> dict[str, list[str]]:
    """Return each column that events must provide -> names of the tasks that read the column.

    These columns are labels, and columns of `observed_when` that aren't inputs (see `Schema.input_columns`).
    """
    inputs = schema.input_columns()
    readers: dict[str, list[str]] = {}
    for name, task in schema.tasks.items():
        readers.setdefault(task.label, []).append(name)
        if task.observed_when is not None and task.observed_when.column not in inputs:
            readers.setdefault(task.observed_when.column, []).append(name)
    return readers
