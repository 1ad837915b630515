"""The `labels` section of a settings file: how logged requests and events become rows of the interaction log."""

from typing import Literal

from pydantic import Field, model_validator

from mmoe_rec.settings.log_columns import Section
from mmoe_rec.settings.schema import Schema

_MICROSECONDS_PER_DAY = 86_400_000_000


class LabelEvents(Section):
    """A log of what happened after requests, in the folder of this name within --events, or at `data.events.NAME.path`.

    Its columns of user and candidate have the names and types that they have in the interaction log. Where it has a
    column `event_id`, a row that comes again with the same id counts once.
    """

    time: str = Field(description="column with the event's time (in `columns.time_unit`, if integers)")
    request: str | None = Field(
        None,
        description="column with the id of the request that it came from; null: an event belongs to the user's last "
        "request before it that showed the candidate, which needs all requests to be logged",
    )


class Window(Section):
    """Events that count for a request."""

    events: str = Field(description="a name under labels.events")
    attribution_days: float = Field(gt=0, le=36_500, description="days after the request in which an event counts")

    @property
    def length_us(self) -> int:
        """The window's length."""
        return round(self.attribution_days * _MICROSECONDS_PER_DAY)


class LabelSource(Window):
    """Where a label, or another column that tells whether one is known, comes from."""

    value: str | None = Field(None, description="column of the events with the label; null: 1 if there is an event")
    combine: Literal["last", "first", "sum", "max"] = Field("last", description="label of several events with a value")
    default: float | None = Field(0.0, description="the label of a row without one; null where that says nothing")


class LabelRules(Section):
    """What `join-labels` makes of requests that the server logged and of events: rows of the interaction log."""

    events: dict[str, LabelEvents] = Field(default_factory=dict, description="name -> a log of what happened")
    shown: Window | None = Field(
        None,
        description="the events that say which candidates were shown, with the columns of roles.placement; others are "
        "left out. null: all that were replied were shown",
    )
    top: int | None = Field(None, ge=1, description="so many best of a request were shown; null with `shown`")
    rank: str | None = Field(None, description="placement column with the rank in the reply, from 1; null with `shown`")
    sources: dict[str, LabelSource] = Field({}, description="column of a label or observed_when -> events it is from")
    wait_days: float = Field(0.05, ge=0, le=365, description="days for events to arrive after a request's last window")

    @model_validator(mode="after")
    def _check_names(self) -> "LabelRules":
        used = {**{f"sources.{name}": each for name, each in self.sources.items()}, "shown": self.shown}
        for place, each in used.items():
            if each is not None and each.events not in self.events:
                known = ", ".join(self.events) or "none, add it"
                raise ValueError(f"{place}.events names '{each.events}'; logs under labels.events are: {known}")
        for name in self.events:
            if not name.replace("_", "").isalnum():
                raise ValueError(f"name '{name}' of labels.events may hold letters, digits and underscores only")
        if self.shown is not None and (self.top is not None or self.rank is not None):
            raise ValueError("`shown` says what was shown and where: leave out `top` and `rank`")
        return self

    @property
    def windows(self) -> list[Window]:
        """The windows of all labels, and of what was shown."""
        return [*self.sources.values(), *([] if self.shown is None else [self.shown])]

    def check(self, schema: Schema) -> None:
        """Raises ValueError where the section does not fit the others."""
        labels = label_columns(schema)
        if self.events and schema.columns.weight is not None:
            raise ValueError(
                f"labels.events make rows of the log, but nothing says what goes into columns.weight "
                f"('{schema.columns.weight}'): leave out one of them"
            )
        for column, source in self.sources.items():
            if column not in labels:
                raise ValueError(
                    f"labels.sources names '{column}', which is neither the label nor the observed_when of a task; "
                    f"these are: {', '.join(labels)}"
                )
            for name in labels[column]:
                task = schema.tasks[name]
                given = 0.0 if task.conditional_on is None else schema.tasks[task.conditional_on].label_delay_days
                days = max(task.label_delay_days, given)
                if days < source.attribution_days:
                    raise ValueError(
                        f"labels.sources.{column}.attribution_days is {source.attribution_days:g}, but task "
                        f"'{name}' takes its "
                        f"label as final after {days:g} days: set tasks.{name}.label_delay_days to "
                        f"{source.attribution_days:g} or more, or training would see what was not known yet"
                    )
        if self.rank is not None and schema.column_roles.get(self.rank) != "placement":
            raise ValueError(f"labels.rank names '{self.rank}', which is no column of roles.placement")


def label_columns(schema: Schema) -> dict[str, list[str]]:
    """Columns that say what happened after a request -> the tasks that read them."""
    known = schema.input_columns()
    found: dict[str, list[str]] = {}
    for name, task in schema.tasks.items():
        found.setdefault(task.label, []).append(name)
        if task.observed_when is not None and task.observed_when.column not in known:
            found.setdefault(task.observed_when.column, []).append(name)
    return found
