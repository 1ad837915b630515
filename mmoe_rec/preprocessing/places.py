"""Where the log is and how its features are built, by the settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.files import is_remote
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.extend import Extension, extend
from mmoe_rec.preprocessing.logs import BuildOptions, Logs
from mmoe_rec.preprocessing.prepare import FeatureFolder, prepare
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import Settings


def log_and_place(settings: Settings) -> tuple[str, Schema, dict[str, Window], Path, BuildOptions]:
    """The arguments of `prepare`, `extend`, `existing` and `features_in_use`."""
    data = settings.data
    return data.log, settings.schema_, settings.split.windows(), Path(data.work), build_options(settings)


def build_options(settings: Settings) -> BuildOptions:
    """How the settings want features to be built."""
    names = [each.name for each in fields(BuildOptions)]
    return BuildOptions(**{name: getattr(settings.data, name) for name in names})


def adapt_schema(settings: Settings, schema: Schema) -> Schema:
    """The schema of a model, as it reads the settings' logs."""
    events = {name: settings.data.events.get(name, event) for name, event in schema.events.items()}
    of_rows = {"sampling_rate": settings.columns.sampling_rate, "weight": settings.columns.weight}
    columns = schema.columns.model_copy(update=of_rows)
    return schema.model_copy(update={"events": events, "columns": columns, "split": settings.split.by_column})


def logs_for(settings: Settings, pipeline: FeaturePipeline, types: Sequence[Mapping[str, str]] | None = None) -> Logs:
    """The settings' logs, to be read by the features of a model that may have been trained on logs elsewhere, with
    other rates, weights and splits of rows.

    types: of the columns of each log, None for those of the model's keys.
    """
    schema = pipeline.schema
    if schema.columns.has_time != settings.columns.has_time:
        ways = ("has no times (a plain table)", f"has times (in column '{schema.columns.time}')")
        raise UserError(
            f"the model was trained on a log that {ways[schema.columns.has_time]}, but the log of the settings has "
            f"{'times' if settings.columns.has_time else 'none'} (columns.time): the model's features can't read it"
        )
    schema = adapt_schema(settings, schema)
    types = key_types(pipeline, schema) if types is None else types
    return Logs(settings.data.log, schema, build_options(settings), types)


def key_types(pipeline: FeaturePipeline, schema: Schema) -> list[dict[str, str]]:
    """Types of the columns of a log and of each log of events, those of the model's keys."""
    kinds = pipeline.key_types
    # The time column of events may be named like a key of the log.
    return [kinds, *({n: kind for n, kind in kinds.items() if n != each.time} for each in schema.events.values())]


def build_features(settings: Settings) -> FeatureFolder:
    """Fitted features and encoded rows; existing ones are taken if they are still right."""
    return prepare(*log_and_place(settings))


def extend_features(settings: Settings) -> Extension | None:
    """Adds new files of the log to existing features; None where there are no new files."""
    return extend(*log_and_place(settings))


def short_names(addresses: Sequence[str]) -> dict[str, str]:
    """Addresses with names for files and folders, by the ends of their paths that tell them apart; other addresses are
    names. Raises UserError where one comes twice."""
    if twice := next((each for each in addresses if addresses.count(each) > 1), None):
        raise UserError(f"'{twice}' is given twice, and would be compared with itself; give --against another one")
    parts = [[each] if ":" in each else each.rstrip("/").split("/") for each in addresses]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return dict(zip(addresses, names, strict=True))
    return {each: each for each in addresses}


def check_out(out: Path, settings: Settings | None = None) -> None:
    """Raises UserError for a folder of results that is a file, or lies where the log or what is made of it lies."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out '{out}' is a file; name a folder")
    if settings is None:
        return
    real, work = Path(os.path.realpath(out)), Path(settings.data.work)
    sources = [settings.data.log, *(each.path for each in settings.data.events.values())]
    taken = [Path(each) for each in sources if not is_remote(each) and Path(each).is_dir()]
    ours = ("features", "checkpoints", "model", "comparison", "tuning", "unsent")
    taken += [work / name for name in ours]
    inside = next((each for each in taken if real.is_relative_to(os.path.realpath(each))), None)
    if inside is not None or real == Path(os.path.realpath(work)):
        raise UserError(f"--out '{out}' lies in '{inside or work}', which holds other things; name another folder")
