"""`Request`: one candidate list, for one user in one context, with what to make of it; from the wire to rows that the
feature pipeline encodes, as tables and data frames are.
"""

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
from mmoe_rec.log.columns import UTC_MICROSECONDS, canonicalize, column_uses
from mmoe_rec.log.request_values import find_duplicate, numpy_to_python, to_arrow, to_python_list
from mmoe_rec.log.rows import CachedValues, LogRows, RequestRows, ServingRows
from mmoe_rec.model.model_layout import ModelTask
from mmoe_rec.point_in_time.arrays import fill_nulls
from mmoe_rec.settings.log_columns import ColumnUse, Role

if TYPE_CHECKING:
    import pandas as pd

REQUEST_KEYS: dict[Role, str] = {"user": "user", "candidate": "candidates", "context": "context"}
REQUEST_OPTIONS = ("task_weights", "top_k", "gate_top_k", "mask_experts", "explain")
_WANTED = {"user": "an object", "context": "an object", "candidates": "an object of lists"}
_WANTED |= dict.fromkeys(("top_k", "gate_top_k"), "an integer of at least 1")
_WANTED |= {"mask_experts": "a list of integers", "explain": "true or false"}


class Request(BaseModel):
    """A user, a context and columns of candidates, with options; an unknown key is an error.

    Columns of candidates that are given as arrays, or as a data frame, are lists here; numpy's numbers are Python's.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    user: dict[str, Any]
    context: dict[str, Any] = Field(default_factory=dict)
    candidates: dict[str, Any]  # `RequestReader` says what is wrong with a column
    task_weights: dict[str, Any] | None = None
    top_k: int | None = Field(None, ge=1)
    gate_top_k: int | None = Field(None, ge=1)
    mask_experts: list[Any] | None = None  # checked by the model: pydantic would write down each that is no number
    explain: bool | None = None

    @staticmethod
    def of(element: Any, params: Mapping[str, Any] = {}) -> Request:
        """The request in an element of a call. params: options for all elements; an element's own win.

        Raises RequestError for one of another shape.
        """
        if not isinstance(element, Mapping):
            raise RequestError("a request must be an object with the keys user, context and candidates")
        for name in element:  # pydantic would write down every one of them
            if name not in Request.model_fields:
                raise RequestError(
                    f"a request has no key {quoted(str(name))}; {suggest(str(name), Request.model_fields)}"
                )
        # MLflow's server makes arrays of the parts of a request.
        given = {
            name: numpy_to_python(each) if name in REQUEST_OPTIONS else to_python_list(each)
            for name, each in element.items()
        }
        given |= {
            name: numpy_to_python(each)
            for name, each in params.items()
            if name in REQUEST_OPTIONS and given.get(name) is None
        }
        columns: Any = given.get("candidates")
        if hasattr(columns, "items"):  # a dict, or a data frame
            pairs = [(name, to_python_list(each)) for name, each in columns.items()]
            given["candidates"] = dict(pairs)
            if len(given["candidates"]) < len(pairs):
                raise RequestError(f"'candidates' has column {quoted(find_duplicate(name for name, _ in pairs))} twice")
        try:
            return Request.model_validate(given)
        except ValidationError as error:
            problem = error.errors()[0]
            name = str(problem["loc"][0])
            if problem["type"] == "missing":
                raise RequestError(f"a request needs the key '{name}'") from None
            raise RequestError(f"'{name}' must be {_WANTED.get(name, 'an object of numbers')}") from None

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        """What requests that can be read together have in common: the columns that they give."""
        return tuple(self.user), tuple(self.context), tuple(self.candidates)

    @property
    def candidate_count(self) -> int:
        """How many candidates there are, by the longest column."""
        lists = (each for each in self.candidates.values() if isinstance(each, Sequence) and not isinstance(each, str))
        return max(map(len, lists), default=0)


def read_requests(elements: Sequence[Any], params: Mapping[str, Any]) -> list[Request | RequestError]:
    """The request in each element of a call, or the sentence about what is wrong with it; params: see `Request.of`."""
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
    """The elements of a call, and the rows of each, in a table with a row for each candidate, in which values of user
    and context are repeated; in the place of a wrong element, the error.

    columns: N values of each name, which are made only once all names are known; rows with the same id in
    `columns.request` are an element, and all rows where there is no such column. Raises RequestError for a column that
    is unknown or given twice, and for an option whose reply has not a row for each candidate.
    """
    if wrong := next((name for name in ("top_k", "explain") if params.get(name)), None):
        raise RequestError(f"{wrong} is not for data frames, each of whose rows gets one prediction: send 'inputs'")
    names = [str(name) for name in names]
    roles = {name: reader.role_of(name, "the data frame") for name in names}
    if (twice := find_duplicate(names)) is not None:
        raise RequestError(f"the data frame has column {quoted(twice)} twice")
    values = {name: reader.read_frame_column(name, each) for name, each in zip(names, columns, strict=True)}
    request, groups = reader.schema.columns.request, dict[str, list[int]]()
    for row, each in enumerate(values.get(request or "", [None] * max(map(len, values.values()), default=0))):
        groups.setdefault(repr(each), []).append(row)
    if len(groups) > 1 and (rows := groups.get(repr(None))):  # which may be of several requests
        raise RequestError(f"column '{request}' is null in row {rows[0]}: give each row the id of its request")
    elements: list[Any] = []
    for rows in groups.values():
        elements.append({part: {} for part in REQUEST_KEYS.values()})
        for name, role in roles.items():
            its = [values[name][row] for row in rows]
            texts = [] if role == "candidate" else [repr(to_python_list(each)) for each in its]
            if other := next((row for row, text in zip(rows, texts, strict=False) if text != texts[0]), None):
                hint = "" if request in (None, *names) else f"; give each request an id of its own in '{request}'"
                differs = f"describes the {role} of a request, and differs in its rows {rows[0]} and {other}"
                elements[-1] = RequestError(f"column '{name}' {differs}{hint}")
                break
            elements[-1][REQUEST_KEYS[role]][name] = its if role == "candidate" else its[0]
    return elements, list(groups.values())


def format_request_error(error: RequestError, index: int, count: int, rows: Sequence[Sequence[int]] = ()) -> str:
    """The sentence about a wrong element, with its place in a call of several. rows: of a table, of each element."""
    where = f"the request of row {rows[index][0]}" if rows else f"inputs[{index}]"
    return f"{where}: {error}" if count > 1 else str(error)


def flatten_rankings(replies: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Rankings, or errors, of a table's requests as JSON values: one for each row of the table."""
    found: dict[int, dict[str, Any]] = {}
    for reply, places in zip(replies, rows, strict=True):
        if "error" in reply:
            found |= {row: dict(reply) for row in places}
            continue
        predictions = {f"predicted_{name}": each for name, each in reply["predictions"].items()}
        columns = {**predictions, "score": reply["scores"], "log_score": reply["log_scores"]}
        for rank, place in enumerate(reply["order"]):
            more = {name: reply[name] for name in ("request_id", "warnings") if name in reply}
            found[places[place]] = {**{name: each[rank] for name, each in columns.items()}, "rank": rank + 1, **more}
    return [found[row] for row in sorted(found)]


def resolve_task_weights(tasks: Sequence[ModelTask], given: Mapping[str, Any] | None) -> np.ndarray:
    """(T,) float64 weights of the tasks in the score: each one's own, which replaces its `score_weight`, times that of
    its objective, else 1. A name that is both a task's and an objective's means the task.

    Raises RequestError for an unknown name, a weight that is negative or not finite, or weights that leave every task
    out.
    """
    if given is None:
        return np.array([task.score_weight for task in tasks])
    names = {task.name for task in tasks}
    objectives = {task.objective for task in tasks} - names
    for name, weight in given.items():
        if name not in names | objectives:
            hint = suggest(str(name), [*sorted(names), *sorted(objectives)])
            raise RequestError(f"task_weights names {quoted(name)}, which is no task or objective; {hint}")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise RequestError(f"task_weights: the weight of '{name}' must be a number, found {quoted(weight)}")
        if not 0 <= weight <= 1e6:  # nor NaN
            raise RequestError(
                f"task_weights: the weight of '{name}' must lie between 0 and 1,000,000, found {quoted(weight)}"
            )
    weights = np.array([float(given.get(task.name, task.score_weight)) for task in tasks])
    weights *= [float(given.get(task.objective, 1)) if task.objective in objectives else 1.0 for task in tasks]
    if given and not weights.any():
        raise RequestError("task_weights leave every task out of the score: at least one weight must be above 0")
    return weights


@dataclass(frozen=True)
class RequestColumn:
    """A column of a request. expected: its type in the log, None where any that `use` allows will do; booleans: whether
    the log holds true and false."""

    name: str
    role: Role
    use: ColumnUse
    expected: pa.DataType | None
    is_boolean: bool = False


class RequestReader:
    """Checks requests and completes them: given values win, others come from the latest known users and candidates.

    Besides the log's columns a request may give its id, where the log has one, and precomputed values, which win over
    what the model's tables say: counters under the names of their outputs (such as `user_product_log_sum`), histories
    under the feature's name, oldest first. A given null means missing. Values of unknown users and candidates, and of
    the context, that are not given are null; the request's time is now. A model of a plain table, which knows no ids of
    users or candidates, needs what describes them.
    """

    def __init__(self, pipeline: FeaturePipeline, features: Path, max_candidates: int) -> None:
        self.schema = schema = pipeline.schema
        self.max_candidates = max_candidates
        names, inputs, uses = schema.columns, schema.input_columns(), column_uses(schema)
        self.users = LatestValues.load(features, "user", names.user)
        self.candidates = LatestValues.load(features, "candidate", names.candidate)
        # Without ids nothing is known of what a request leaves out.
        known = {"user": names.has_user, "candidate": names.has_candidate}
        self._uncompleted: dict[str, Role] = {name: role for name, role in inputs.items() if not known.get(role, True)}
        types = pipeline.column_types()
        for latest in (self.users, self.candidates):
            kinds = (each for each in latest.table.schema if not pt.is_null(each.type))
            types |= {each.name: each.type for each in kinds if each.type != UTC_MICROSECONDS}
        self._columns = {
            name: RequestColumn(name, role, uses[name], types.get(name), name in pipeline.booleans)
            for name, role in inputs.items()
            if role != "placement"
        }
        self._log_columns = list(self._columns)
        # A log's own column comes first: that is what a feature would read.
        for name, memory in pipeline.point_in_time_encoders.items():
            for column, (use, kind) in memory.result_columns().items():
                self._columns.setdefault(column, RequestColumn(column, schema.role_of(name), use, kind))
        if (request := names.request) is not None:  # features may not read it, and the server logs it
            self._columns.setdefault(request, RequestColumn(request, "context", "key", types.get(request)))
        self._unread = {n: r for n, r in schema.column_roles.items() if n not in inputs and n not in self._columns}

    def describe_parts(self) -> dict[str, dict[str, str]]:
        """Return the columns of each part of a request, with their types in the log or else their use."""
        return {
            part: {each.name: str(each.expected or each.use) for each in self._columns.values() if each.role == role}
            for role, part in REQUEST_KEYS.items()
        }

    def rows(self, requests: Sequence[Request]) -> RequestRows:
        """A row for each of the candidates of requests (at least one) that give the same columns, in order.

        Raises RequestError naming the column; which of several requests is wrong, it does not say.
        """
        names = self.schema.columns
        counts = [self._count(request.candidates) for request in requests]
        one, given = dict[str, pa.Array](), dict[str, pa.Array]()
        for each in self._columns_of("user", requests[0].user):
            one[each.name] = self._array(each, [request.user[each.name] for request in requests])
        for each in self._columns_of("context", requests[0].context):
            one[each.name] = self._array(each, [request.context[each.name] for request in requests])
        for each in self._columns_of("candidate", requests[0].candidates):
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
        shared, own = self.users.fill_missing_columns(one), self.candidates.fill_missing_columns(given)
        for name in self._log_columns:
            if name not in own and name not in shared:
                shared[name] = pa.nulls(len(requests))
        return RequestRows(ServingRows(shared, len(requests), self.schema), own, of)

    def fill_attributes(self, rows: LogRows) -> LogRows:
        """Rows with those attributes that they have no column for, as they were last known; null of unknown ids."""
        table = rows.table
        for latest in (self.users, self.candidates):
            if lacking := [name for name in latest.columns if not rows.has_column(name)]:
                known = latest.fill_missing_columns({latest.key: rows.column(latest.key)})
                for name in lacking:
                    each = known[name]
                    table = table.append_column(name, each.array() if isinstance(each, CachedValues) else each)
        return rows if table is rows.table else LogRows(table, self.schema, rows.results)

    def _columns_of(self, role: Role, names: Collection[str]) -> list[RequestColumn]:
        """The columns of these names, without those that the settings list and no feature reads."""
        for name in names:
            if (actual := self.role_of(name, f"'{REQUEST_KEYS[role]}'", role)) != role:
                raise RequestError(
                    f"column '{name}' describes the {actual}: give it in '{REQUEST_KEYS[actual]}', not in "
                    f"'{REQUEST_KEYS[role]}'"
                )
        return [self._columns[name] for name in names if name not in self._unread]

    def role_of(self, name: str, where: str, role: Role | None = None) -> Role:
        """What a column describes. where: it stands; role: of the columns that may stand there, None for any. Raises
        RequestError for one that is unknown, or of the placement."""
        actual = self._columns[name].role if name in self._columns else self.schema.column_roles.get(name)
        if actual == "placement":
            raise RequestError(
                f"column '{name}' describes placement, which is absent in serving: leave it out of {where}"
            )
        if actual is None:
            hint = suggest(name, [each.name for each in self._columns.values() if role in (None, each.role)])
            raise RequestError(f"{where} has an unknown column {quoted(name)}; {hint}")
        return actual

    def read_frame_column(self, name: str, values: Any) -> Sequence[Any]:
        """Values of a column; ids that pandas made floats, as some are missing, are integers again."""
        found: Sequence[Any] = to_python_list(values)
        is_float = getattr(getattr(values, "dtype", None), "kind", "") == "f"
        if is_float and None in found and name in self._columns and self._columns[name].use == "key":
            whole = [each is None or (each.is_integer() and abs(each) < 2**53) for each in found]
            return [each if each is None else int(each) for each in found] if all(whole) else found
        return found

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
        unit = self.schema.columns.time_unit
        array = to_arrow(column.name, values, column.use, column.expected, unit, column.is_boolean)
        return fill_nulls(array, _now()) if column.name == self.schema.columns.time else array

    def _require(self, one: dict[str, pa.Array], given: dict[str, pa.Array]) -> None:
        names = self.schema.columns
        for column, role in self._uncompleted.items():
            if column not in (given if role == "candidate" else one):
                raise RequestError(
                    f"'{REQUEST_KEYS[role]}' lacks column '{column}', which the model reads; give null where it "
                    "is not known"
                )
        if names.has_user and (names.user not in one or one[names.user].null_count):
            raise RequestError(f"'user' needs a column '{names.user}' with the user's id")
        if names.has_candidate and given[names.candidate].null_count:
            raise RequestError(f"column '{names.candidate}' in 'candidates' holds null; every candidate needs an id")


def _now() -> pa.Scalar:
    return pa.scalar(time.time_ns() // 1_000, UTC_MICROSECONDS)


def as_table(given: pa.Table | pd.DataFrame) -> pa.Table:
    """Rows as Arrow has them. Raises UserError for what is no table, a column that is there twice, and values of
    several types."""
    if (names := getattr(given, "column_names" if isinstance(given, pa.Table) else "columns", None)) is None:
        raise UserError(f"rows are given as a pyarrow Table or a pandas DataFrame, not as a {type(given).__name__}")
    if (twice := find_duplicate(names)) is not None:
        raise UserError(f"column {quoted(twice)} is given twice")
    try:
        return given if isinstance(given, pa.Table) else pa.Table.from_pandas(given, preserve_index=False)
    except pa.ArrowException as error:
        raise UserError(f"the data frame can't be read: {'; '.join(map(str, error.args))}") from None


def read_rows(pipeline: FeaturePipeline, given: LogRows | pa.Table | pd.DataFrame) -> LogRows:
    """Rows with the log's columns; labels need not be there.

    Raises UserError for a column that is missing, or that cannot be read as the features do.
    """
    if isinstance(given, LogRows):
        return given
    schema = pipeline.schema
    rows = as_table(given)
    read = schema.input_columns()
    missing = [name for name, role in read.items() if role != "placement" and name not in rows.column_names]
    if missing:
        raise UserError(f"the rows have no column {', '.join(map(repr, missing))}, which the model's features read")
    uses, names = column_uses(schema), schema.columns
    columns = {name: rows[name] for name in rows.column_names}
    for name in read.keys() & columns.keys():
        values = columns[name] = canonicalize(name, uses[name], rows[name], names.time_unit)
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        logged = pipeline.key_types.get(name)
        if logged is not None and not pa.types.is_null(kind) and str(kind) != logged:
            raise UserError(
                f"column '{name}' of the rows holds {kind}, and the log that the model was trained on {logged}"
            )
        if name in (names.user, names.candidate, names.time) and values.null_count:
            raise UserError(f"column '{name}' of the rows is null in {values.null_count:,} of {len(values):,} rows")
    return LogRows(pa.table(columns), schema)
