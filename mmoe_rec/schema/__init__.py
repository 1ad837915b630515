"""What the columns of an interaction log mean: roles, tasks, observed-rules and features.

These models are the `columns`, `roles`, `tasks` and `features` sections of a settings file. They only declare;
`mmoe_rec.features` turns them into model inputs. A `Schema` identifies features; what a model makes of them, such as
the weights of losses, is kept apart (`choices.py`).
"""

from mmoe_rec.schema.choices import TaskSettings
from mmoe_rec.schema.features import (
    MAX_TABLE_ROWS,
    Embedded,
    EventLog,
    Feature,
    Meaning,
    Remembering,
    Role,
    Use,
    each_once,
)
from mmoe_rec.schema.log import (
    CHOICES,
    EVENT,
    Columns,
    ObservedWhen,
    Roles,
    Scalar,
    Schema,
    Task,
    outcome_name,
    without_choices,
)
from mmoe_rec.schema.section import Section

__all__ = [
    "CHOICES",
    "EVENT",
    "MAX_TABLE_ROWS",
    "Columns",
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
    "Task",
    "TaskSettings",
    "Use",
    "each_once",
    "outcome_name",
    "without_choices",
]
