"""From a request (a user, a context, columns of candidates) to rows that the feature pipeline encodes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.features.latest import LatestValues
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.rows import LogRows
from mmoe_rec.schema import Role
from mmoe_rec.serving.columns import PARTS, RequestColumn, RequestColumns
from mmoe_rec.serving.errors import RequestError
from mmoe_rec.serving.values import plain, to_arrow


@dataclass(frozen=True)
class Request:
    """One candidate list, for one user in one context, not yet checked; see `LoadedRanker.rank` for the parts.

    Columns of candidates that are given as arrays, or as a data frame, are lists here.
    """

    user: Mapping[str, Any]
    context: Mapping[str, Any]
    candidates: Mapping[str, Any]
    task_weights: Mapping[str, Any] | None = None
    top_k: int | None = None
    gate_top_k: int | None = None
    mask_experts: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if hasattr(self.candidates, "items"):
            object.__setattr__(self, "candidates", {name: plain(each) for name, each in self.candidates.items()})


class RequestReader:
    """Checks requests and completes them: given values win, others come from the latest known users and candidates.

    A given null means missing. Values of unknown users and candidates, and of the context, that are not given are null;
    the request's time is now.
    """

    def __init__(self, pipeline: FeaturePipeline, features: Path, max_candidates: int) -> None:
        self.schema = pipeline.schema
        self.max_candidates = max_candidates
        columns = self.schema.columns
        self.users = LatestValues(columns.user, pq.read_table(features / "latest.user.parquet"))
        self.candidates = LatestValues(columns.candidate, pq.read_table(features / "latest.candidate.parquet"))
        self.columns = RequestColumns(pipeline, self.users, self.candidates)

    def rows(self, user: Mapping[str, Any], context: Mapping[str, Any], candidates: Mapping[str, Any]) -> LogRows:
        """One row for each of the N candidates. Raises RequestError naming the column."""
        count = self._count(candidates)
        given = self._read_candidates(candidates)
        one = self._read_one("user", user) | self._read_one("context", context)
        self._require(one, given)
        names = self.schema.columns
        one.setdefault(names.time, pa.array([time.time_ns() // 1_000], UTC_MICROSECONDS))
        self._complete(one, self.users, "user")
        self._complete(given, self.candidates, "candidate")
        for name in self.columns.log_columns:
            if name not in given and name not in one:
                one[name] = pa.nulls(1)
        every_row = pa.array(np.zeros(count, np.int64))
        # Taking row 0 many times repeats a value of any type.
        given.update((name, values.take(every_row)) for name, values in one.items())
        return LogRows(pa.table(given), self.schema)

    def _count(self, candidates: Mapping[str, Any]) -> int:
        name = self.schema.columns.candidate
        if name not in candidates:
            raise RequestError(f"'candidates' needs a column '{name}' with the candidates' ids")
        for column, values in candidates.items():
            if not isinstance(values, Sequence) or isinstance(values, str | bytes):
                raise RequestError(f"column '{column}' in 'candidates' must be a list with one value per candidate")
        count = len(candidates[name])
        if count == 0:
            raise RequestError(f"'candidates' is empty: column '{name}' needs at least one id")
        if count > self.max_candidates:
            raise RequestError(
                f"the request has {count:,} candidates; this model takes at most {self.max_candidates:,} "
                "(setting `serving.max_candidates`)"
            )
        for column, values in candidates.items():
            if len(values) != count:
                raise RequestError(
                    f"columns of 'candidates' differ in length: '{name}' has {count:,} values, "
                    f"'{column}' has {len(values):,}"
                )
        return count

    def _read_candidates(self, candidates: Mapping[str, Any]) -> dict[str, pa.Array]:
        return {
            each.name: to_arrow(
                each.name, candidates[each.name], each.use, each.expected, self.schema.columns.time_unit
            )
            for each in self.columns.of_part("candidate", candidates)
        }

    def _read_one(self, role: Role, values: Mapping[str, Any]) -> dict[str, pa.Array]:
        if not isinstance(values, Mapping):
            raise RequestError(f"'{PARTS[role]}' must be an object of columns and values")
        return {each.name: self._one(each, values[each.name]) for each in self.columns.of_part(role, values)}

    def _one(self, column: RequestColumn, value: Any) -> pa.Array:
        if column.name == self.schema.columns.time and value is None:
            value = time.time_ns() // 1_000
            return pa.array([value], UTC_MICROSECONDS)
        return to_arrow(column.name, [value], column.use, column.expected, self.schema.columns.time_unit)

    def _require(self, one: dict[str, pa.Array], given: dict[str, pa.Array]) -> None:
        names = self.schema.columns
        if names.user not in one or one[names.user].null_count:
            raise RequestError(f"'user' needs a column '{names.user}' with the user's id")
        if given[names.candidate].null_count:
            raise RequestError(f"column '{names.candidate}' in 'candidates' holds null; every candidate needs an id")

    def _complete(self, values: dict[str, pa.Array], latest: LatestValues, role: Role) -> None:
        missing = [name for name in latest.table.column_names if name not in values]
        if missing:
            found = latest.find(values[latest.key])
            values.update((name, latest.values(name, found)) for name in missing)


def request_time(rows: LogRows) -> int:
    """The request time of a request's rows, microseconds since 1970 UTC."""
    return int(rows.times()[0])
