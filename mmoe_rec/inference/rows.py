"""Rows that are given as a table or a data frame, in the types that features read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.requests.request import RequestReader
from mmoe_rec.log.columns import canonical, column_uses, event_uses
from mmoe_rec.log.reader import event_rows
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.schema import Schema

if TYPE_CHECKING:
    import pandas as pd


def read_rows(pipeline: FeaturePipeline, given: pa.Table | pd.DataFrame) -> LogRows:
    """Rows with the log's columns; labels need not be there.

    Raises UserError for a column that is missing, or that cannot be read as the features do.
    """
    schema = pipeline.schema
    rows = given if isinstance(given, pa.Table) else pa.Table.from_pandas(given, preserve_index=False)
    read = schema.input_columns()
    missing = [name for name, role in read.items() if role != "placement" and name not in rows.column_names]
    if missing:
        raise UserError(f"the rows have no column {', '.join(map(repr, missing))}, which the model's features read")
    uses, unit = column_uses(schema), schema.columns.time_unit
    columns = {name: rows[name] for name in rows.column_names}
    for name in read.keys() & columns.keys():
        columns[name] = canonical(name, uses[name], rows[name], unit)
        _check(pipeline, name, columns[name])
    return LogRows(pa.table(columns), schema)


def as_logged(schema: Schema, reader: RequestReader, log: str | None, checked: pa.Table) -> LogRows:
    """Checked rows with all columns of a log, None for the interaction log: attributes of users and candidates that
    they lack as they were last known, others null."""
    uses = column_uses(schema) if log is None else event_uses(schema, log)
    table = reader.completed(LogRows(checked, schema)).table if log is None else checked
    for name in uses.keys() - set(table.column_names):
        table = table.append_column(name, pa.nulls(len(table)))
    return LogRows(table, schema) if log is None else event_rows(table, schema, log)


def _check(pipeline: FeaturePipeline, name: str, values: pa.ChunkedArray) -> None:
    """Raises UserError where a column of rows has not the type that the log had, or an id or a time is missing."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    known, names = pipeline.key_types.get(name), pipeline.schema.columns
    if known is not None and not pa.types.is_null(kind) and str(kind) != known:
        raise UserError(f"column '{name}' of the rows holds {kind}, and the log that the model was trained on {known}")
    if name in (names.user, names.candidate, names.time) and values.null_count:
        raise UserError(f"column '{name}' of the rows is null in {values.null_count:,} of {len(values):,} rows")
