"""What a feature build reads of a schema's logs: files and columns."""

from glob import glob
from pathlib import Path

from mmoe_rec.settings.schema import Remembering, Schema

LOG = "(log)"


def source_columns(schema: Schema) -> dict[str, list[str]]:
    """Source (the log, or the name of a log of events) -> the columns of it that the features and labels need."""
    names = schema.columns
    needed: dict[str, set[str | None]] = {LOG: {names.user, names.candidate, names.time, names.request}}
    needed[LOG] |= {names.sampling_rate}
    for task in schema.tasks.values():
        needed[LOG] |= {task.label, task.observed_when.column if task.observed_when else None}
    needed |= {name: {events.time} for name, events in schema.events.items()}
    for feature in schema.features.values():
        needed[LOG] |= set(feature.reads())
        if isinstance(feature, Remembering) and feature.events:
            needed[feature.events] |= set(feature.event_reads(schema))
    return {source: sorted(filter(None, columns)) for source, columns in needed.items()}


def source_files(log: str, schema: Schema) -> dict[str, list[Path]]:
    """Source -> its Parquet files."""
    paths = {LOG: log} | {name: events.path for name, events in schema.events.items()}
    return {source: _parquet_files(path) for source, path in paths.items()}


def source_times(schema: Schema) -> dict[str, str]:
    """Source -> its column of time."""
    return {LOG: schema.columns.time} | {name: events.time for name, events in schema.events.items()}


def _parquet_files(path: str) -> list[Path]:
    found = Path(path).rglob("*.parquet") if Path(path).is_dir() else map(Path, glob(path, recursive=True))
    return sorted(found)
