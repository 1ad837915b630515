"""All settings as text, for `--help`."""

from __future__ import annotations

import builtins
import json
import typing
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmoe_rec.features.kinds import KINDS
from mmoe_rec.settings.columns import TaskSettings
from mmoe_rec.settings.load import without_none
from mmoe_rec.settings.sections import Settings


def describe(section: str | None = None) -> str:
    """Every setting, or those of one section, with type, default and meaning: the body of `--help`."""
    if section is None:
        return "\n".join(_describe(Settings, ""))
    inner = Settings.model_fields[section].annotation
    assert isinstance(inner, type), f"'{section}' is no section"
    return "\n".join(_describe(inner, f"{section}."))


def _describe(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = without_none(field.annotation)
        sections: dict[str, Any] = {}
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            sections = {f"{prefix}{name}": inner}
        elif name == "features":
            sections = {f"features.NAME (kind: {kind})": encoder.settings for kind, encoder in KINDS.items()}
        elif typing.get_origin(inner) is dict:
            sections = {f"{prefix}{name}.NAME": typing.get_args(inner)[1]}
        for heading, section in sections.items():
            yield f"\n{heading}: {(section.__doc__ or '').strip()}"
            yield from _describe(section, f"{heading.partition(' ')[0]}.")
        if not sections and (name != "kind" or model is TaskSettings):
            yield f"  --{prefix}{name}  {_default(field)}\n        {field.description}"


def _default(field: FieldInfo) -> str:
    kind = _words(field.annotation)
    if field.is_required():
        return f"<{kind}> (required)"
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"<{kind}> (default {json.dumps(default)})"


def _words(annotation: Any) -> str:
    """A type as a user would say it."""
    simple = {int: "whole number", float: "number", str: "text", bool: "true or false", datetime: "time"}
    simple |= {type(None): "null", Any: "value"}
    if annotation in simple:
        return simple[annotation]
    parts = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case typing.Literal:
            return " | ".join(map(str, parts))
        case typing.Annotated:
            return _words(parts[0])
        case builtins.tuple:
            return f"list of {_words(parts[0])}"
    return " | ".join(map(_words, parts))
