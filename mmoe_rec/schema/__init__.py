"""What the columns of an interaction log mean: roles, tasks, observed-rules and features.

These models are the `columns`, `roles`, `tasks` and `features` sections of a settings file. They only declare;
`mmoe_rec.features` turns them into model inputs. A `Schema` identifies features; what a model makes of them, such as
the weights of losses, is kept apart (`choices.py`).
"""

from mmoe_rec.schema.choices import FeatureSettings, TaskSettings
from mmoe_rec.schema.features import (
    MAX_TABLE_ROWS,
    CounterFeature,
    CrossFeature,
    EventLog,
    Feature,
    HistoryFeature,
    IdFeature,
    IdsFeature,
    NumericFeature,
    TimeFeature,
    VectorFeature,
    read_columns,
)
from mmoe_rec.schema.log import CHOICES, EVENT, Columns, ObservedWhen, Role, Roles, Scalar, Schema, Task, outcome_name
from mmoe_rec.schema.section import Section

__all__ = [
    "CHOICES",
    "EVENT",
    "MAX_TABLE_ROWS",
    "Columns",
    "CounterFeature",
    "CrossFeature",
    "EventLog",
    "Feature",
    "FeatureSettings",
    "HistoryFeature",
    "IdFeature",
    "IdsFeature",
    "NumericFeature",
    "ObservedWhen",
    "Role",
    "Roles",
    "Scalar",
    "Schema",
    "Section",
    "Task",
    "TaskSettings",
    "TimeFeature",
    "VectorFeature",
    "outcome_name",
    "read_columns",
]
