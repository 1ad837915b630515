"""Requests (candidates for one user in one context), and their conversion to the rows that features read."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmoe_rec.errors import RequestError, UserError, quoted, suggest
from mmoe_rec.features.latest_values import LatestValues
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.columns import UTC_MICROSECONDS, canonicalize, column_uses, type_name
from mmoe_rec.log.request_values import find_duplicate, numpy_to_python, to_arrow, to_python_list
from mmoe_rec.log.rows import CachedValues, LogRows, RequestRows, ServingRows
from mmoe_rec.model.model_layout import ModelTask
from mmoe_rec.point_in_time.arrays import fill_nulls
from mmoe_rec.settings.log_columns import ColumnUse, Role

if TYPE_CHECKING:
    import pandas as pd

REQUEST_KEYS: dict[Role, str] = {"user": "user", "candidate": "candidates", "context": "context"}
REQUEST_OPTIONS = ("task_weights", "top_k", "gate_top_k", "mask_experts", "explain")
_EXPECTED = {"user": "an object", "context": "an object", "candidates": "an object of lists"}
_EXPECTED |= dict.fromkeys(("top_k", "gate_top_k"), "an integer of at least 1")
_EXPECTED |= {"mask_experts": "a list of integers", "explain": "true or false"}


class Request(BaseModel):
    """A user, a context and columns of candidates, with options. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user: dict[str, Any]
    context: dict[str, Any] = Field(default_factory=dict)
    candidates: dict[str, Any]  # `RequestReader` checks the columns.
    task_weights: dict[str, Any] | None = None
    top_k: int | None = Field(None, ge=1)
    gate_top_k: int | None = Field(None, ge=1)
    mask_experts: list[Any] | None = None  # The scorer checks the items. Pydantic would list every wrong one.
    explain: bool | None = None

    @staticmethod
    def of(element: Any, params: Mapping[str, Any] = {}) -> Request:
        """Parse one element of the `inputs` of a call. Arrays and data frames become lists.

        Args:
            element: Mapping with the fields of a request.
            params: Options for all elements of the call. Options in the element take precedence.

        Raises:
            RequestError: The element is not a valid request.
        """
        if not isinstance(element, Mapping):
            raise RequestError("a request must be an object with the keys user, context and candidates")
        for name in map(str, element):  # Checked here because pydantic would list every unknown key.
            if name not in Request.model_fields:
                raise RequestError(f"a request has no key {quoted(name)}; {suggest(name, Request.model_fields)}")
        # MLflow's server converts the parts of a request to arrays.
        fields = {
            name: numpy_to_python(value) if name in REQUEST_OPTIONS else to_python_list(value)
            for name, value in element.items()
        }
        for name in REQUEST_OPTIONS:
            if name in params and fields.get(name) is None:
                fields[name] = numpy_to_python(params[name])
        columns: Any = fields.get("candidates")
        if hasattr(columns, "items"):  # a dict, or a data frame
            pairs = [(name, to_python_list(values)) for name, values in columns.items()]
            fields["candidates"] = dict(pairs)
            if len(fields["candidates"]) < len(pairs):
                raise RequestError(f"'candidates' has column {quoted(find_duplicate(name for name, _ in pairs))} twice")
        try:
            return Request.model_validate(fields)
        except ValidationError as error:
            problem = error.errors()[0]
            name = str(problem["loc"][0])
            if problem["type"] == "missing":
                raise RequestError(f"a request needs the key '{name}'") from None
            raise RequestError(f"'{name}' must be {_EXPECTED.get(name, 'an object of numbers')}") from None

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        """Column names of user, context and candidates. Requests with equal names can be read together."""
        return tuple(self.user), tuple(self.context), tuple(self.candidates)

    @property
    def candidate_count(self) -> int:
        """Length of the longest candidate column."""
        lists = (v for v in self.candidates.values() if isinstance(v, Sequence) and not isinstance(v, str))
        return max(map(len, lists), default=0)


def read_requests(elements: Sequence[Any], params: Mapping[str, Any]) -> list[Request | RequestError]:
    """Parse the elements of a call.

    Args:
        elements: Elements of the call. Errors among them are returned as they are.
        params: Options for all elements, see `Request.of`.

    Returns:
        A request or an error for each element.
    """
    requests: list[Request | RequestError] = []
    for element in elements:
        try:
            requests.append(element if isinstance(element, RequestError) else Request.of(element, params))
        except RequestError as error:
            requests.append(error)
    return requests


def group_rows_by_request(
    reader: RequestReader, names: Sequence[Any], columns: Iterable[Any], params: Mapping[str, Any]
) -> tuple[list[Any], list[list[int]]]:
    """Group the rows of a table with one row per candidate into requests.

    Rows with the same ID in `columns.request` form a request. Without this column all rows form one request. Values of
    user and context are repeated in the rows of a request.

    Args:
        reader: Reader that will read the requests.
        names: Column names.
        columns: N values of each column. They are read only after all names are checked.
        params: Options of the call.

    Returns:
        The fields of a request, or the error of an inconsistent one, for each ID; and the row numbers of each request.

    Raises:
        RequestError: A column is unknown or occurs twice, an ID is null, or `params` has `top_k` or `explain`.
    """
    if option := next((name for name in ("top_k", "explain") if params.get(name)), None):
        raise RequestError(f"{option} is not for data frames, which get one prediction per row. Send 'inputs'.")
    names = [str(name) for name in names]
    roles = {name: reader.role_of(name, "the data frame") for name in names}
    if (duplicate := find_duplicate(names)) is not None:
        raise RequestError(f"the data frame has column {quoted(duplicate)} twice")
    values = {name: reader._read_frame_column(name, column) for name, column in zip(names, columns, strict=True)}
    request, groups = reader.schema.columns.request, dict[str, list[int]]()
    for row, request_id in enumerate(values.get(request or "", [None] * max(map(len, values.values()), default=0))):
        groups.setdefault(repr(request_id), []).append(row)
    if len(groups) > 1 and (rows := groups.get(repr(None))):  # Rows without ID may belong to several requests.
        raise RequestError(f"column '{request}' is null in row {rows[0]}: give each row the id of its request")
    elements: list[Any] = []
    for rows in groups.values():
        elements.append({part: {} for part in REQUEST_KEYS.values()})
        for name, role in roles.items():
            cells = [values[name][row] for row in rows]
            texts = [] if role == "candidate" else [repr(to_python_list(cell)) for cell in cells]
            if other_row := next((row for row, text in zip(rows, texts, strict=False) if text != texts[0]), None):
                hint = "" if request in (None, *names) else f"; give each request a unique id in '{request}'"
                problem = f"describes the {role} of a request, but differs between rows {rows[0]} and {other_row}"
                elements[-1] = RequestError(f"column '{name}' {problem}{hint}")
                break
            elements[-1][REQUEST_KEYS[role]][name] = cells if role == "candidate" else cells[0]
    return elements, list(groups.values())


def format_request_error(error: RequestError, index: int, count: int, rows: Sequence[Sequence[int]] = ()) -> str:
    """Return the message of an error, with the position of its request if the call has several.

    Args:
        error: Error of the request.
        index: Index of the request in the call.
        count: Number of requests in the call.
        rows: Row numbers of each request, if the call is a table.
    """
    where = f"the request of row {rows[index][0]}" if rows else f"inputs[{index}]"
    return f"{where}: {error}" if count > 1 else str(error)


def flatten_rankings(replies: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Turn the rankings or errors of a table's requests into one JSON object for each row, in the table's order.

    Args:
        replies: Rankings or errors as JSON values, one for each request.
        rows: Row numbers of each request's candidates.
    """
    results: dict[int, dict[str, Any]] = {}
    for reply, numbers in zip(replies, rows, strict=True):
        if "error" in reply:
            results |= {row: dict(reply) for row in numbers}
            continue
        predictions = {f"predicted_{name}": values for name, values in reply["predictions"].items()}
        columns = {**predictions, "score": reply["scores"], "log_score": reply["log_scores"]}
        for rank, position in enumerate(reply["order"]):
            extras = {name: reply[name] for name in ("request_id", "warnings") if name in reply}
            row = {name: values[rank] for name, values in columns.items()}
            results[numbers[position]] = {**row, "rank": rank + 1, **extras}
    return [results[row] for row in sorted(results)]


def resolve_task_weights(tasks: Sequence[ModelTask], overrides: Mapping[str, Any] | None) -> np.ndarray:
    """Return the weights of the tasks in the score, (T,) float64.

    A task's weight is its override or its `score_weight`, multiplied by the override of its objective if there is one.
    A name of both a task and an objective means the task.

    Args:
        tasks: Tasks of the model.
        overrides: Weights by task or objective.

    Raises:
        RequestError: A name is unknown, a weight is negative or not finite, or all weights are 0.
    """
    if overrides is None:
        return np.array([task.score_weight for task in tasks])
    names = {task.name for task in tasks}
    objectives = {task.objective for task in tasks} - names
    for name, weight in overrides.items():
        if name not in names | objectives:
            hint = suggest(str(name), [*sorted(names), *sorted(objectives)])
            raise RequestError(f"task_weights names {quoted(name)}, which is no task or objective; {hint}")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise RequestError(f"task_weights: the weight of '{name}' must be a number, found {quoted(weight)}")
        if not 0 <= weight <= 1e6:  # This refuses NaN too.
            problem = f"must lie between 0 and 1,000,000, found {quoted(weight)}"
            raise RequestError(f"task_weights: the weight of '{name}' {problem}")
    weights = np.array([float(overrides.get(task.name, task.score_weight)) for task in tasks])
    weights *= [float(overrides.get(task.objective, 1)) if task.objective in objectives else 1.0 for task in tasks]
    if overrides and not weights.any():
        raise RequestError("task_weights leave every task out of the score: at least one weight must be above 0")
    return weights


@dataclass(frozen=True)
class _RequestColumn:
    """A column that requests may contain. `expected` is its Arrow type, None if unknown."""

    name: str
    role: Role
    use: ColumnUse
    expected: pa.DataType | None
    is_boolean: bool = False


class RequestReader:
    """Checks requests and fills in absent columns from the latest values of users and candidates.

    A given null stays null. Absent columns of the context, and of unknown users and candidates, are null. The request's
    time defaults to now. If the log has no user (or candidate) IDs, requests must contain all columns of this role.

    A request may also contain its ID and precomputed values, which replace values of the model's tables: counters under
    the names of their outputs (such as `user_product_log_sum`), and histories under the feature's name, oldest first.
    """

    def __init__(self, pipeline: FeaturePipeline, features: Path, max_candidates: int) -> None:
        """Prepare the columns that requests may contain.

        Args:
            pipeline: Features of the model.
            features: Folder of the features, with the latest values.
            max_candidates: Maximum number of candidates per request.
        """
        self.schema = schema = pipeline.schema
        self.max_candidates = max_candidates
        names, inputs, uses = schema.columns, schema.input_columns(), column_uses(schema)
        self.users = LatestValues.load(features, "user", names.user)
        self.candidates = LatestValues.load(features, "candidate", names.candidate)
        # Without IDs there are no latest values to fill in absent columns.
        has_ids = {"user": names.has_user, "candidate": names.has_candidate}
        self._required: dict[str, Role] = {name: role for name, role in inputs.items() if not has_ids.get(role, True)}
        types = pipeline.column_types()
        for values in (self.users, self.candidates):
            typed = (column for column in values.table.schema if not pt.is_null(column.type))
            types |= {column.name: column.type for column in typed if column.type != UTC_MICROSECONDS}
        self._columns = {
            name: _RequestColumn(name, role, uses[name], types.get(name), name in pipeline.booleans)
            for name, role in inputs.items()
            if role != "placement"
        }
        self._log_columns = list(self._columns)
        # A column of the log takes precedence over a precomputed value of the same name.
        for name, memory in pipeline.point_in_time_encoders.items():
            for column, (use, dtype) in memory.result_columns().items():
                self._columns.setdefault(column, _RequestColumn(column, schema.role_of(name), use, dtype))
        if (request := names.request) is not None:  # No feature reads the ID, but the server logs it.
            self._columns.setdefault(request, _RequestColumn(request, "context", "key", types.get(request)))
        self._ignored = {n: r for n, r in schema.column_roles.items() if n not in inputs and n not in self._columns}

    def describe_parts(self) -> dict[str, dict[str, str]]:
        """Return part of a request (such as `user`) -> column -> type, or how it is read if the type is unknown."""
        return {
            part: {c.name: str(c.expected or c.use) for c in self._columns.values() if c.role == role}
            for role, part in REQUEST_KEYS.items()
        }

    def rows(self, requests: Sequence[Request]) -> RequestRows:
        """Convert one or more requests to rows, one for each candidate. The requests must have equal `columns`.

        Raises:
            RequestError: A column is invalid. The error names the column but not the request.
        """
        names = self.schema.columns
        counts = [self._count_candidates(request.candidates) for request in requests]
        request_columns, candidate_columns = dict[str, pa.Array](), dict[str, pa.Array]()
        for column in self._find_columns("user", requests[0].user):
            request_columns[column.name] = self._array(column, [request.user[column.name] for request in requests])
        for column in self._find_columns("context", requests[0].context):
            request_columns[column.name] = self._array(column, [request.context[column.name] for request in requests])
        for column in self._find_columns("candidate", requests[0].candidates):
            lists = (request.candidates[column.name] for request in requests)
            candidate_columns[column.name] = self._array(column, list(chain.from_iterable(lists)))
        self._check_required(request_columns, candidate_columns)
        if names.time not in request_columns:
            request_columns[names.time] = pa.repeat(_now(), len(requests))
        request_index = np.repeat(np.arange(len(requests)), counts)
        if not names.has_user:
            request_columns[names.user] = pa.array(np.arange(len(requests)))
        if not names.has_candidate:  # Number the candidates of each request instead.
            candidate_columns[names.candidate] = pa.array(np.concatenate([np.arange(count) for count in counts]))
        request_values = self.users.fill_missing_columns(request_columns)
        candidate_values = self.candidates.fill_missing_columns(candidate_columns)
        for name in self._log_columns:
            if name not in candidate_values and name not in request_values:
                request_values[name] = pa.nulls(len(requests))
        return RequestRows(ServingRows(request_values, len(requests), self.schema), candidate_values, request_index)

    def fill_attributes(self, rows: LogRows) -> LogRows:
        """Add absent attributes of users and candidates from their latest values, null for unknown IDs."""
        table = rows.table
        for latest_values in (self.users, self.candidates):
            if missing := [name for name in latest_values.columns if not rows.has_column(name)]:
                filled = latest_values.fill_missing_columns({latest_values.key: rows.column(latest_values.key)})
                for name in missing:
                    values = filled[name]
                    table = table.append_column(name, values.array() if isinstance(values, CachedValues) else values)
        return rows if table is rows.table else LogRows(table, self.schema, rows.results)

    def _find_columns(self, role: Role, names: Collection[str]) -> list[_RequestColumn]:
        """Check that columns have this role, and return the columns except those that no feature reads."""
        for name in names:
            if (actual := self.role_of(name, f"'{REQUEST_KEYS[role]}'", role)) != role:
                fix = f"give it in '{REQUEST_KEYS[actual]}', not in '{REQUEST_KEYS[role]}'"
                raise RequestError(f"column '{name}' describes the {actual}: {fix}")
        return [self._columns[name] for name in names if name not in self._ignored]

    def role_of(self, name: str, where: str, role: Role | None = None) -> Role:
        """Return the role of a column.

        Args:
            name: Name of the column.
            where: Part of the request that has the column, for error messages.
            role: Role of the columns to suggest if the name is unknown. None suggests columns of all roles.

        Raises:
            RequestError: The column is unknown or describes placement.
        """
        actual = self._columns[name].role if name in self._columns else self.schema.column_roles.get(name)
        if actual == "placement":
            problem = f"column '{name}' describes placement, which is absent in serving"
            raise RequestError(f"{problem}: leave it out of {where}")
        if actual is None:
            hint = suggest(name, [column.name for column in self._columns.values() if role in (None, column.role)])
            raise RequestError(f"{where} has an unknown column {quoted(name)}; {hint}")
        return actual

    def _read_frame_column(self, name: str, values: Any) -> Sequence[Any]:
        """Convert a data frame column to a Python sequence. IDs that pandas made floats (for null) become integers."""
        read: Sequence[Any] = to_python_list(values)
        is_float = getattr(getattr(values, "dtype", None), "kind", "") == "f"
        if is_float and None in read and name in self._columns and self._columns[name].use == "key":
            whole = [value is None or (value.is_integer() and abs(value) < 2**53) for value in read]
            return [value if value is None else int(value) for value in read] if all(whole) else read
        return read

    def _count_candidates(self, candidates: Mapping[str, Any]) -> int:
        has_ids = self.schema.columns.has_candidate
        name = self.schema.columns.candidate if has_ids else next(iter(candidates), "")
        if name not in candidates:
            if not has_ids:
                raise RequestError("'candidates' is empty: it needs the columns that describe the rows to score")
            raise RequestError(f"'candidates' needs a column '{name}' with the candidates' ids")
        for column, values in candidates.items():
            if not isinstance(values, Sequence) or isinstance(values, str | bytes):
                problem = "must be a list with one value per candidate"
                raise RequestError(f"column {quoted(column)} in 'candidates' {problem}")
        count = len(candidates[name])
        if count == 0:
            noun = "id" if has_ids else "value"
            raise RequestError(f"'candidates' is empty: column {quoted(name)} needs at least one {noun}")
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

    def _array(self, column: _RequestColumn, values: Sequence[Any]) -> pa.Array:
        unit = self.schema.columns.time_unit
        array = to_arrow(column.name, values, column.use, column.expected, unit, column.is_boolean)
        return fill_nulls(array, _now()) if column.name == self.schema.columns.time else array

    def _check_required(self, request_columns: dict[str, pa.Array], candidate_columns: dict[str, pa.Array]) -> None:
        names = self.schema.columns
        for column, role in self._required.items():
            if column not in (candidate_columns if role == "candidate" else request_columns):
                raise RequestError(
                    f"'{REQUEST_KEYS[role]}' lacks column '{column}', which the model reads; give null if it is unknown"
                )
        if names.has_user and (names.user not in request_columns or request_columns[names.user].null_count):
            raise RequestError(f"'user' needs a column '{names.user}' with the user's id")
        if names.has_candidate and candidate_columns[names.candidate].null_count:
            raise RequestError(f"column '{names.candidate}' in 'candidates' holds null; every candidate needs an id")


def _now() -> pa.Scalar:
    return pa.scalar(time.time_ns() // 1_000, UTC_MICROSECONDS)


def _as_table(rows: pa.Table | pd.DataFrame) -> pa.Table:
    if (names := getattr(rows, "column_names" if isinstance(rows, pa.Table) else "columns", None)) is None:
        raise UserError(f"rows must be a pyarrow Table or a pandas DataFrame, not a {type(rows).__name__}")
    if (duplicate := find_duplicate(names)) is not None:
        raise UserError(f"column {quoted(duplicate)} is given twice")
    try:
        return rows if isinstance(rows, pa.Table) else pa.Table.from_pandas(rows, preserve_index=False)
    except pa.ArrowException as error:
        raise UserError(f"the data frame can't be read: {'; '.join(map(str, error.args))}") from None


def read_rows(pipeline: FeaturePipeline, rows: LogRows | pa.Table | pd.DataFrame) -> LogRows:
    """Convert rows to the types of the log. They need no labels.

    Args:
        pipeline: Features that will read the rows.
        rows: Rows with the log's columns. `LogRows` are returned unchanged.

    Raises:
        UserError: A column is missing or has the wrong type.
    """
    if isinstance(rows, LogRows):
        return rows
    schema, table = pipeline.schema, _as_table(rows)
    roles = schema.input_columns()
    required = [name for name, role in roles.items() if role != "placement"]
    request = schema.columns.request if pipeline.relative_encoders else None
    required += [request] if request else []
    if missing := [name for name in required if name not in table.column_names]:
        raise UserError(f"the rows have no column {', '.join(map(repr, missing))}, which the model's features read")
    uses, names = column_uses(schema), schema.columns
    columns = {name: table[name] for name in table.column_names}
    for name in {*roles, *required} & columns.keys():
        values = columns[name] = canonicalize(name, uses[name], table[name], names.time_unit)
        dtype, expected = type_name(values.type), pipeline.key_types.get(name)
        if expected is not None and dtype is not None and dtype != expected:
            problem = f"column '{name}' of the rows holds {dtype}"
            raise UserError(f"{problem}, but the model was trained on a log with {expected}")
        if name in (names.user, names.candidate, names.time, request) and values.null_count:
            raise UserError(f"column '{name}' of the rows is null in {values.null_count:,} of {len(values):,} rows")
    return LogRows(pa.table(columns), schema)
