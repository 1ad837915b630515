"""What stands in for users, candidates and times where a log is a plain table without them.

| without | each row gets |
|---|---|
| a user | its request, where there is a column of requests; else its number in the log |
| a candidate | its number in the log |
| a time | the place of its split among `SPLITS`, microseconds; 0 where a log is not split |

So a row of a plain table is a user and a request of its own, splits lie in different moments, and nothing that reads
rows has to know about it. Features can't read these columns (see `Schema`), and no output holds them.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.hashing import hash_column
from mmoe_rec.point_in_time.arrays import filled, one_array
from mmoe_rec.settings.columns import SplitColumn
from mmoe_rec.settings.schema import Schema


def with_times(table: pa.Table, schema: Schema) -> pa.Table:
    """Canonical columns of rows, with times where the log has none."""
    if schema.columns.has_time:
        return table
    split = schema.split
    places = np.zeros(len(table), np.int64) if split is None else places_of(table.column(split.column), split)
    return table.append_column(schema.columns.time, pa.array(places).cast(UTC_MICROSECONDS))


def with_ids(table: pa.Table, schema: Schema, first_row: int) -> pa.Table:
    """Canonical columns of rows, with users and candidates where the log has none; first_row: number of the first."""
    columns, numbers = schema.columns, pa.array(np.arange(first_row, first_row + len(table)))
    if not columns.has_user:
        users = numbers
        if columns.request is not None:
            users = pa.array(hash_column(one_array(table.column(columns.request))).view(np.int64))
        table = table.append_column(columns.user, users)
    return table if columns.has_candidate else table.append_column(columns.candidate, numbers)


def describe_stand_ins(schema: Schema) -> str | None:
    """What stands in for users, requests and candidates, as a sentence; None where the log has all."""
    columns, told = schema.columns, []
    if not columns.has_user:
        told.append(f"columns.user: each {'row' if columns.request is None else 'request'} is a user of its own")
    elif columns.request is None and not columns.has_time:
        told.append("columns.request or columns.time: all rows of a user in a split are one request")
    if not columns.has_candidate:
        told.append("columns.candidate: each row is another one")
    return f"the settings name no {'; and no '.join(told)}" if told else None


def require_all(schema: Schema, what: str) -> None:
    """Raises UserError where a log is a plain table, which can't have what needs users, candidates and times."""
    columns = schema.columns
    there = {"user": columns.has_user, "candidate": columns.has_candidate, "time": columns.has_time}
    if lacking := [f"columns.{name}" for name, has in there.items() if not has]:
        raise UserError(
            f"{what} needs {' and '.join(lacking)}, which the settings leave out, as those of a plain table"
        )


def places_of(column: pa.ChunkedArray | pa.Array, split: SplitColumn) -> np.ndarray:
    """(N,) int64 the place of each row's split among `SPLITS`, -1 for a value that none lists.

    Raises UserError where the settings list values of another type than the column's.
    """
    values = one_array(column) if isinstance(column, pa.ChunkedArray) else column
    values = values.dictionary_decode() if pt.is_dictionary(values.type) else values
    places = np.full(len(values), -1)
    for place, (name, listed) in enumerate(split.values.items()):
        for each in listed:
            _check_type(split.column, name, each, values.type)
        if not pt.is_null(values.type):
            wanted = pa.array([each if isinstance(each, str) else int(each) for each in listed], values.type)
            places[filled(pc.is_in(values, value_set=wanted), False).to_numpy(zero_copy_only=False)] = place
    return places


def _check_type(column: str, split: str, value: object, kind: pa.DataType) -> None:
    if pt.is_null(kind) or isinstance(value, str) == pt.is_string(kind):
        return
    holds, write = ("text", "in quotes") if pt.is_string(kind) else ("whole numbers", "without quotes")
    raise UserError(f"column '{column}' holds {holds}, but split.{split} lists {value!r}: write its values {write}")
