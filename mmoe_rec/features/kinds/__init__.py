"""The kinds of features, one file each. `KINDS` lists them all: a new kind is its file and its line here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter

from mmoe_rec.features.kind import Kind
from mmoe_rec.features.kinds.counter import COUNTER
from mmoe_rec.features.kinds.cross import CROSS
from mmoe_rec.features.kinds.history import HISTORY
from mmoe_rec.features.kinds.id import ID
from mmoe_rec.features.kinds.ids import IDS
from mmoe_rec.features.kinds.numeric import NUMERIC
from mmoe_rec.features.kinds.time import TIME
from mmoe_rec.features.kinds.vector import VECTOR
from mmoe_rec.schema import Feature, Schema, without_choices

KINDS: tuple[Kind, ...] = (ID, IDS, NUMERIC, VECTOR, TIME, CROSS, HISTORY, COUNTER)

if TYPE_CHECKING:
    FeatureSettings = Feature
    _Meanings = Feature
else:
    _kind = Field(discriminator="kind")
    FeatureSettings = Annotated[reduce(or_, [each.settings for each in KINDS]), _kind]
    """What may stand under `features` in a settings file."""
    _Meanings = Annotated[reduce(or_, [each.feature for each in KINDS]), _kind]

_FEATURES = TypeAdapter(dict[str, _Meanings])


def schema_of(sections: Mapping[str, Any]) -> Schema:
    """The schema of sections of a settings file, `columns` to `events`. Raises pydantic's ValidationError."""
    features = _FEATURES.validate_python(without_choices("features", sections["features"]))
    tasks = without_choices("tasks", sections["tasks"])
    return Schema.model_validate({**sections, "tasks": tasks, "features": features})
