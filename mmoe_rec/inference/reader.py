"""Requests, tables and data frames -> rows that the feature pipeline encodes; what a request may give."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.errors import RequestError, UserError, quoted, suggest
from mmoe_rec.features.latest import LatestValues
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.request import Request
from mmoe_rec.log.columns import UTC_MICROSECONDS, canonical, column_uses, event_uses
from mmoe_rec.log.given import to_arrow
from mmoe_rec.log.reader import event_rows
from mmoe_rec.log.rows import FewRows, LogRows, RequestRows, Stored
from mmoe_rec.point_in_time.arrays import filled
from mmoe_rec.settings.columns import Role, Use
from mmoe_rec.settings.schema import Schema

if TYPE_CHECKING:
    import pandas as pd

PARTS: dict[Role, str] = {"user": "user", "candidate": "candidates", "context": "context"}


@dataclass(frozen=True)
class RequestColumn:
    """A column of a request. expected: its type in the log, None where any that `use` allows will do."""

    name: str
    role: Role
    use: Use
    expected: pa.DataType | None


class RequestColumns:
    """Every column that a request may give.

    Besides the log's columns these are the request's id, where the log has one, and precomputed values, which win over
    what the model's tables say: counters under the names of their outputs (such as `user_product_positives`), histories
    under the feature's name, oldest first.
    """

    def __init__(self, pipeline: FeaturePipeline, users: LatestValues, candidates: LatestValues) -> None:
        self.schema = schema = pipeline.schema
        # Later ones win: the log's own columns tell more than a vocabulary.
        types = {name: pa.type_for_alias(kind) for name, kind in pipeline.key_types.items()}
        for encoder in pipeline.encoders.values():
            types |= encoder.column_types()
        for latest in (users, candidates):
            known = (each for each in latest.table.schema if not pt.is_null(each.type))
            types |= {each.name: each.type for each in known if each.type != UTC_MICROSECONDS}
        uses, inputs = column_uses(schema), schema.input_columns()
        self._columns = {
            name: RequestColumn(name, role, uses[name], types.get(name))
            for name, role in inputs.items()
            if role != "placement"
        }
        self.log_columns = list(self._columns)
        # A log's own column comes first: that is what a feature would read.
        for name, memory in pipeline.memory_encoders.items():
            for column, (use, kind) in memory.result_columns().items():
                self._columns.setdefault(column, RequestColumn(column, schema.role_of(name), use, kind))
        if (request := schema.columns.request) is not None:  # features may not read it, and the server logs it
            self._columns.setdefault(request, RequestColumn(request, "context", "key", types.get(request)))
        self._unread = {n: r for n, r in schema.column_roles.items() if n not in inputs and n not in self._columns}

    def of_part(self, role: Role, names: Collection[str]) -> list[RequestColumn]:
        """The columns of these names. Columns that the settings list under the role but no feature reads are left out.

        Raises RequestError for an unknown name, a placement, or a column that belongs to another part.
        """
        for name in names:
            actual = self._columns[name].role if name in self._columns else self.schema.column_roles.get(name)
            if actual == "placement":
                raise RequestError(
                    f"column '{name}' describes placement, which is absent in serving: leave it out of '{PARTS[role]}'"
                )
            if actual is None:
                hint = suggest(name, [each.name for each in self._columns.values() if each.role == role])
                raise RequestError(f"'{PARTS[role]}' has an unknown column {quoted(name)}; {hint}")
            if actual != role:
                raise RequestError(
                    f"column '{name}' describes the {actual}: give it in '{PARTS[actual]}', not in '{PARTS[role]}'"
                )
        return [self._columns[name] for name in names if name not in self._unread]


class RequestReader:
    """Checks requests and completes them: given values win, others come from the latest known users and candidates.

    A given null means missing. Values of unknown users and candidates, and of the context, that are not given are null;
    the request's time is now. A model of a plain table, which knows no ids of users or candidates, needs what describes
    them.
    """

    def __init__(self, pipeline: FeaturePipeline, features: Path, max_candidates: int) -> None:
        self.schema = pipeline.schema
        self.max_candidates = max_candidates
        columns = self.schema.columns
        self.users = LatestValues.load(features, "user", columns.user)
        self.candidates = LatestValues.load(features, "candidate", columns.candidate)
        self.columns = RequestColumns(pipeline, self.users, self.candidates)
        # Without ids nothing is known of what a request leaves out.
        known = {"user": columns.has_user, "candidate": columns.has_candidate}
        inputs = self.schema.input_columns()
        self._uncompleted: dict[str, Role] = {name: role for name, role in inputs.items() if not known.get(role, True)}

    def with_latest(self, users: LatestValues, candidates: LatestValues) -> RequestReader:
        """One that knows other latest values; this one stays as it is."""
        reader = copy(self)
        reader.users, reader.candidates = users, candidates
        return reader

    def rows(self, requests: Sequence[Request]) -> RequestRows:
        """A row for each of the candidates of requests (at least one) that give the same columns, in order.

        Raises RequestError naming the column; which of several requests is wrong, it does not say.
        """
        names = self.schema.columns
        counts = [self._count(request.candidates) for request in requests]
        one, given = dict[str, pa.Array](), dict[str, pa.Array]()
        for each in self.columns.of_part("user", requests[0].user):
            one[each.name] = self._array(each, [request.user[each.name] for request in requests])
        for each in self.columns.of_part("context", requests[0].context):
            one[each.name] = self._array(each, [request.context[each.name] for request in requests])
        for each in self.columns.of_part("candidate", requests[0].candidates):
            lists = (request.candidates[each.name] for request in requests)
            given[each.name] = self._array(each, list(chain.from_iterable(lists)))
        self._require(one, given)
        if names.time not in one:
            one[names.time] = pa.repeat(_now(), len(requests))
        of = np.repeat(np.arange(len(requests)), counts)
        if not names.has_user:
            one[names.user] = pa.array(np.arange(len(requests)))
        if not names.has_candidate:  # which is then told by its place
            given[names.candidate] = pa.array(np.concatenate([np.arange(count) for count in counts]))
        shared, own = self.users.completed(one), self.candidates.completed(given)
        for name in self.columns.log_columns:
            if name not in own and name not in shared:
                shared[name] = pa.nulls(len(requests))
        return RequestRows(FewRows(shared, len(requests), self.schema), own, of)

    def completed(self, rows: LogRows) -> LogRows:
        """Rows with those attributes that they have no column for, as they were last known; null of unknown ids."""
        table = rows.table
        for latest in (self.users, self.candidates):
            if lacking := [name for name in latest.columns if not rows.has(name)]:
                known = latest.completed({latest.key: rows.column(latest.key)})
                for name in lacking:
                    each = known[name]
                    table = table.append_column(name, each.array() if isinstance(each, Stored) else each)
        return rows if table is rows.table else LogRows(table, self.schema, rows.results)

    def _count(self, candidates: Mapping[str, Any]) -> int:
        has_ids = self.schema.columns.has_candidate
        name = self.schema.columns.candidate if has_ids else next(iter(candidates), "")
        if name not in candidates:
            if not has_ids:
                raise RequestError("'candidates' is empty: it needs the columns that describe the rows to score")
            raise RequestError(f"'candidates' needs a column '{name}' with the candidates' ids")
        for column, values in candidates.items():
            if not isinstance(values, Sequence) or isinstance(values, str | bytes):
                raise RequestError(
                    f"column {quoted(column)} in 'candidates' must be a list with one value per candidate"
                )
        count = len(candidates[name])
        if count == 0:
            what = "id" if has_ids else "value"
            raise RequestError(f"'candidates' is empty: column {quoted(name)} needs at least one {what}")
        if count > self.max_candidates:
            raise RequestError(
                f"the request has {count:,} candidates; this model takes at most {self.max_candidates:,} "
                "(setting `serving.max_candidates`)"
            )
        for column, values in candidates.items():
            if len(values) != count:
                raise RequestError(
                    f"columns of 'candidates' differ in length: {quoted(name)} has {count:,} values, "
                    f"{quoted(column)} has {len(values):,}"
                )
        return count

    def _array(self, column: RequestColumn, values: Sequence[Any]) -> pa.Array:
        names = self.schema.columns
        if column.name in (names.user, names.candidate) and bool in set(map(type, values)):
            raise RequestError(f"column '{column.name}' holds true or false, which is no id")
        array = to_arrow(column.name, values, column.use, column.expected, self.schema.columns.time_unit)
        return filled(array, _now()) if column.name == self.schema.columns.time else array

    def _require(self, one: dict[str, pa.Array], given: dict[str, pa.Array]) -> None:
        names = self.schema.columns
        for column, role in self._uncompleted.items():
            if column not in (given if role == "candidate" else one):
                raise RequestError(
                    f"'{PARTS[role]}' lacks column '{column}', which the model reads; give null where it is not known"
                )
        if names.has_user and (names.user not in one or one[names.user].null_count):
            raise RequestError(f"'user' needs a column '{names.user}' with the user's id")
        if names.has_candidate and given[names.candidate].null_count:
            raise RequestError(f"column '{names.candidate}' in 'candidates' holds null; every candidate needs an id")


def _now() -> pa.Scalar:
    return pa.scalar(time.time_ns() // 1_000, UTC_MICROSECONDS)


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
    uses, names = column_uses(schema), schema.columns
    columns = {name: rows[name] for name in rows.column_names}
    for name in read.keys() & columns.keys():
        values = columns[name] = canonical(name, uses[name], rows[name], names.time_unit)
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        logged = pipeline.key_types.get(name)
        if logged is not None and not pa.types.is_null(kind) and str(kind) != logged:
            raise UserError(
                f"column '{name}' of the rows holds {kind}, and the log that the model was trained on {logged}"
            )
        if name in (names.user, names.candidate, names.time) and values.null_count:
            raise UserError(f"column '{name}' of the rows is null in {values.null_count:,} of {len(values):,} rows")
    return LogRows(pa.table(columns), schema)


def as_logged(schema: Schema, reader: RequestReader, log: str | None, checked: pa.Table) -> LogRows:
    """Checked rows with all columns of a log, None for the interaction log: attributes of users and candidates that
    they lack as they were last known, others null."""
    uses = column_uses(schema) if log is None else event_uses(schema, log)
    table = reader.completed(LogRows(checked, schema)).table if log is None else checked
    for name in uses.keys() - set(table.column_names):
        table = table.append_column(name, pa.nulls(len(table)))
    return LogRows(table, schema) if log is None else event_rows(table, schema, log)
