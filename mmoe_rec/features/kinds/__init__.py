"""The kinds of features. To add a kind, write a file in this folder and add its name to `NAMES`."""

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
    "match",
    "history",
    "counter",
    "cooccurrence",
    "relative",
)
"""Values of `kind` in a settings file. The file of the same name in this folder defines the kind as `KIND`."""

FEATURE_KINDS: dict[str, FeatureKind] = {name: import_module(f"{__name__}.{name}").KIND for name in NAMES}

if TYPE_CHECKING:
    FeatureSettings = Feature
else:
    FeatureSettings = Annotated[
        reduce(or_, [kind.feature for kind in FEATURE_KINDS.values()]), Field(discriminator="kind")
    ]
    """A feature in a settings file."""

_FEATURES = TypeAdapter(dict[str, FeatureSettings])


def parse_schema(sections: Mapping[str, Any]) -> Schema:
    """Build a schema from the sections of a settings file that have the names of its fields, such as `columns`.

    Raises:
        pydantic.ValidationError: A section is not valid.
    """
    features = _FEATURES.validate_python(drop_model_choices("features", sections["features"]))
    tasks = drop_model_choices("tasks", sections["tasks"])
    return Schema.model_validate({**sections, "tasks": tasks, "features": features})
