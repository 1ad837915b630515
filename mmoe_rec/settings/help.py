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

from mmoe_rec.settings.columns import EventLog, Section, TaskSettings
from mmoe_rec.settings.load import feature_kinds, without_none
from mmoe_rec.settings.outcomes import LabelSource, OutcomeEvents, Outcomes
from mmoe_rec.settings.sections import Data, Search, Settings, Tuning


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
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield f"\n{prefix}{name}: {(inner.__doc__ or '').strip()}"
            yield from _describe(inner, f"{prefix}{name}.")
        elif name == "tasks":
            yield f"\ntasks.NAME: {(TaskSettings.__doc__ or '').strip()}"
            yield from _describe(TaskSettings, "tasks.NAME.")
        elif name == "events" and model is Data:
            yield f"\ndata.events.NAME: {(EventLog.__doc__ or '').strip()}"
            yield from _describe(EventLog, "data.events.NAME.")
        elif name in ("events", "labels") and model is Outcomes:
            section: type[Section] = OutcomeEvents if name == "events" else LabelSource
            yield f"\noutcomes.{name}.NAME: {(section.__doc__ or '').strip()}"
            yield from _describe(section, f"outcomes.{name}.NAME.")
        elif name == "search" and model is Tuning:
            yield f"\ntuning.search.SETTING: {(Search.__doc__ or '').strip()}"
            yield from _describe(Search, "tuning.search.SETTING.")
        elif name == "features":
            for kind, section in feature_kinds().items():
                yield f"\nfeatures.NAME (kind: {kind}): {(section.__doc__ or '').strip()}"
                yield from _describe(section, "features.NAME.")
        elif name != "kind" or model is TaskSettings:
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
