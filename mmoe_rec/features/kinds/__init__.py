"""The kinds of features, one file each: a new kind is its file, and its line in `NAMES`."""

from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter

from mmoe_rec.features.encoder import FeatureKind
from mmoe_rec.settings.log_columns import drop_model_choices
from mmoe_rec.settings.schema import Feature, Schema

NAMES = (
    "id",
    "ids",
    "numeric",
    "vector",
    "time",
    "cross",
    "history",
    "counter",
)
"""Each is a `kind` in a settings file, and the file of this folder whose `KIND` holds all of it."""

FEATURE_KINDS: dict[str, FeatureKind] = {name: import_module(f"{__name__}.{name}").KIND for name in NAMES}

if TYPE_CHECKING:
    FeatureSettings = Feature
else:
    FeatureSettings = Annotated[
        reduce(or_, [each.feature for each in FEATURE_KINDS.values()]), Field(discriminator="kind")
    ]
    """What may stand under `features` in a settings file."""

_FEATURES = TypeAdapter(dict[str, FeatureSettings])


def parse_schema(sections: Mapping[str, Any]) -> Schema:
    """The schema of sections of a settings file, `columns` to `events`. Raises pydantic's ValidationError."""
    features = _FEATURES.validate_python(drop_model_choices("features", sections["features"]))
    tasks = drop_model_choices("tasks", sections["tasks"])
    return Schema.model_validate({**sections, "tasks": tasks, "features": features})
