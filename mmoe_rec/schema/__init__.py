"""What the columns of an interaction log mean: roles, tasks, observed-rules and features.

These models are the `columns`, `roles`, `tasks` and `features` sections of a settings file. They only declare;
`mmoe_rec.features` turns them into model inputs. A `Schema` identifies features; what a model makes of them, such as
the weights of losses, is kept apart.
"""

from mmoe_rec.schema.log import NO_CANDIDATE, NO_USER, SPLITS, Columns, EventLog, Role, Roles, SplitColumn, Use
from mmoe_rec.schema.schema import MAX_TABLE_ROWS, Days, Embedded, Feature, Meaning, Remembering, Schema, each_once
from mmoe_rec.schema.section import Section
from mmoe_rec.schema.tasks import (
    CHOICES,
    EVENT,
    ObservedWhen,
    Scalar,
    Task,
    TaskSettings,
    outcome_name,
    without_choices,
)

__all__ = [
    "CHOICES",
    "EVENT",
    "MAX_TABLE_ROWS",
    "NO_CANDIDATE",
    "NO_USER",
    "SPLITS",
    "Columns",
    "Days",
    "Embedded",
    "EventLog",
    "Feature",
    "Meaning",
    "ObservedWhen",
    "Remembering",
    "Role",
    "Roles",
    "Scalar",
    "Schema",
    "Section",
    "SplitColumn",
    "Task",
    "TaskSettings",
    "Use",
    "each_once",
    "outcome_name",
    "without_choices",
]
