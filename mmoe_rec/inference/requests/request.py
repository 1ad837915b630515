"""From a request (a user, a context, columns of candidates) to rows that the feature pipeline encodes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from mmoe_rec.features.latest import RecentValues
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.errors import RequestError, quoted
from mmoe_rec.inference.requests.columns import PARTS, RequestColumn, RequestColumns
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.given import plain, plain_option, to_arrow
from mmoe_rec.log.request_rows import FewRows, RequestRows, Stored
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import filled
from mmoe_rec.settings.columns import Role

OPTIONS = ("task_weights", "top_k", "gate_top_k", "mask_experts", "explain")


@dataclass(frozen=True)
class Request:
    """One candidate list, for one user in one context, not yet checked; see `LoadedRanker.rank` for the parts.

    Columns of candidates that are given as arrays, or as a data frame, are lists here; numpy's numbers are Python's.
    """

    user: Mapping[str, Any]
    context: Mapping[str, Any]
    candidates: Mapping[str, Any]
    task_weights: Mapping[str, Any] | None = None
    top_k: int | None = None
    gate_top_k: int | None = None
    mask_experts: Sequence[int] | None = None
    explain: bool | None = None

    def __post_init__(self) -> None:
        if hasattr(self.candidates, "items"):
            object.__setattr__(self, "candidates", {name: plain(each) for name, each in self.candidates.items()})
        for name in OPTIONS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, plain_option(value))


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
        self.users = _latest(columns.user, features, "user")
        self.candidates = _latest(columns.candidate, features, "candidate")
        self.columns = RequestColumns(pipeline, self.users, self.candidates)
        # Without ids nothing is known of what a request leaves out.
        known = {"user": columns.has_user, "candidate": columns.has_candidate}
        inputs = self.schema.input_columns()
        self._uncompleted: dict[str, Role] = {name: role for name, role in inputs.items() if not known.get(role, True)}

    def with_latest(self, users: RecentValues, candidates: RecentValues) -> RequestReader:
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
        one = self._read("user", [request.user for request in requests])
        one |= self._read("context", [request.context for request in requests])
        given = self._read_candidates([request.candidates for request in requests])
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
        name = self.schema.columns.candidate if self.schema.columns.has_candidate else next(iter(candidates), "")
        if name not in candidates:
            if not self.schema.columns.has_candidate:
                raise RequestError("'candidates' is empty: it needs the columns that describe the rows to score")
            raise RequestError(f"'candidates' needs a column '{name}' with the candidates' ids")
        for column, values in candidates.items():
            if not isinstance(values, Sequence) or isinstance(values, str | bytes):
                raise RequestError(
                    f"column {quoted(column)} in 'candidates' must be a list with one value per candidate"
                )
        count = len(candidates[name])
        if count == 0:
            what = "id" if self.schema.columns.has_candidate else "value"
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

    def _read_candidates(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
        return {
            each.name: self._array(each, list(chain.from_iterable(part[each.name] for part in parts)))
            for each in self.columns.of_part("candidate", parts[0])
        }

    def _read(self, role: Role, parts: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
        if not all(isinstance(part, Mapping) for part in parts):
            raise RequestError(f"'{PARTS[role]}' must be an object of columns and values")
        return {
            each.name: self._array(each, [part[each.name] for part in parts])
            for each in self.columns.of_part(role, parts[0])
        }

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


def _latest(key: str, features: Path, role: Role) -> RecentValues:
    """Latest values, with lists in the type that canonical columns have; Parquet calls what they hold `element`."""
    table, times = pq.read_table(features / f"latest.{role}.parquet"), features / f"latest.{role}.times.parquet"
    for place, field in enumerate(table.schema):
        if pt.is_list(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(pa.list_(field.type.value_type)))
    return RecentValues(key, table, pq.read_table(times)["time"].to_numpy() if times.is_file() else None)


def same_columns(request: Request) -> tuple[Any, ...]:
    """What requests that can be read together have in common: the columns that they give."""
    parts = (request.user, request.context, request.candidates)
    return tuple(tuple(part) if isinstance(part, Mapping) else None for part in parts)


def _now() -> pa.Scalar:
    return pa.scalar(time.time_ns() // 1_000, UTC_MICROSECONDS)
