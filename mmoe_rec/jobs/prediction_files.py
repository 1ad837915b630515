"""Files of predictions: which columns hold what, by a settings file or the words of a command line, and their rows.

Rows are checked as they are read, and come in columns of known names and types.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.slices import SliceBy
from mmoe_rec.evaluation.sums import MeasuredTask
from mmoe_rec.inference.ranking import ROW
from mmoe_rec.log.checks import BadFile, LogFile, open_parquet
from mmoe_rec.log.columns import canonical_type
from mmoe_rec.log.files import FoundFile, path_values
from mmoe_rec.log.hashing import combine, hash_column
from mmoe_rec.log.reader import Piece
from mmoe_rec.log.values import file_column, first_row, next_batch, with_path_values
from mmoe_rec.settings.columns import Use, outcome_name
from mmoe_rec.settings.sections import ErrorOrKeep, Settings

JOINED, WEIGHT = "+", "weight"


@dataclass(frozen=True)
class PredictionColumns:
    """Tasks, and the columns that rows have.

    request: one column, or several whose values together tell requests apart; score, candidate: None where nothing was
    said of them, so that the files need not have them; usual_candidate: the column that is taken then, if it is there;
    usual_weight: the log's name of weights, which files of this project call `WEIGHT`; by_log: whether users, requests
    and candidates are called as in the log, so that files which call them `user`, `request` and `candidate` are meant;
    predicted, labels: task -> column; optional: tasks that are measured where the files have their columns; duplicates:
    whether a request may hold a candidate twice; slices: by what rows are sliced.
    """

    tasks: tuple[MeasuredTask, ...]
    user: str = "user"
    request: tuple[str, ...] = ("request",)
    score: str | None = None
    candidate: str | None = None
    usual_candidate: str = "candidate"
    weight: str | None = None
    usual_weight: str | None = None
    by_log: bool = False
    predicted: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    duplicates: ErrorOrKeep = "error"
    slices: tuple[SliceBy, ...] = ()

    def by_part(self) -> dict[str, str | None]:
        """Part -> column, as `with_columns` takes them."""
        columns = {name: getattr(self, name) for name in ("user", "candidate", "score", "weight")}
        columns["request"] = JOINED.join(self.request)
        for task in self.tasks:
            columns[f"predicted_{task.name}"] = self.predicted[task.name]
            columns[f"label_{task.name}"] = self.labels[task.name]
        return columns

    def with_columns(self, words: Sequence[str]) -> PredictionColumns:
        """With other columns, each as PART=COLUMN. Raises UserError for words that say something else."""
        changed = self
        for word in words:
            part, equals, column = word.partition("=")
            if not equals or not part or not column:
                raise UserError(f"--columns takes PART=COLUMN, such as user=customer_id; found '{word}'")
            changed = changed._with(part, column)
        return changed

    def _with(self, part: str, column: str) -> PredictionColumns:
        if part in ("user", "score", "candidate", "weight"):
            return replace(self, **{part: column}, by_log=self.by_log and part in ("score", "weight"))  # type: ignore[arg-type]
        if part == "request":
            return replace(self, request=tuple(column.split(JOINED)), by_log=False)
        for kind in ("predicted", "label"):
            task = part.removeprefix(f"{kind}_")
            if task != part and task in self.predicted:
                if kind == "predicted":
                    return replace(self, predicted=self.predicted | {task: column})
                return replace(self, labels=self.labels | {task: column})
        parts = ["user", "request", "candidate", "score", "weight"]
        parts += [f"{kind}_{task}" for task in self.predicted for kind in ("predicted", "label")]
        near = get_close_matches(part, parts, 1)
        meant = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(parts)}"
        raise UserError(f"--columns {part}={column}: rows have no part '{part}'{meant}")

    def by_usual_names(self, there: Collection[str]) -> PredictionColumns:
        """For files with these columns: where they lack the log's, by the names that `evaluate --predictions` gives."""
        lacking = {self.user, *self.request} - set(there)
        if not (self.by_log and lacking and {"user", "request"} <= set(there)):
            return self
        return replace(self, user="user", request=("request",), usual_candidate="candidate")

    def without(self, tasks: Sequence[str]) -> PredictionColumns:
        """Without some of the tasks."""
        return replace(self, tasks=tuple(task for task in self.tasks if task.name not in tasks))


def _usual_columns(tasks: Sequence[MeasuredTask], optional: Sequence[str] = ()) -> PredictionColumns:
    names = [task.name for task in tasks]
    predicted, labels = ({name: f"{kind}_{name}" for name in names} for kind in ("predicted", "label"))
    return PredictionColumns(tuple(tasks), predicted=predicted, labels=labels, optional=frozenset(optional))


def columns_of_settings(settings: Settings) -> PredictionColumns:
    """The tasks of settings, their outcomes, and the log's names of users, requests and candidates."""
    tasks = [MeasuredTask(name, task.kind, task.score_weight) for name, task in settings.tasks.items()]
    outcomes = [outcome_name(task.given, name) for name, task in settings.tasks.items() if task.given is not None]
    columns = _usual_columns([*tasks, *(MeasuredTask(name, "binary", 0.0) for name in outcomes)], outcomes)
    names = settings.schema_.columns
    user = names.user if names.has_user else names.request or ROW
    if names.request is None:
        # A row of a plain table is a user of its own, and a user of a log without times makes one request.
        request: tuple[str, ...] = (user, names.time) if names.has_time and names.has_user else (user,)
    else:
        request = (names.user, names.request) if names.request_scope == "user" else (names.request,)
    return replace(
        columns,
        user=user,
        request=request,
        usual_candidate=names.candidate,
        weight=names.weight,
        usual_weight=names.weight,
        duplicates=settings.data.duplicates,
        by_log=True,
    )


def columns_of_tasks(words: Sequence[str]) -> PredictionColumns:
    """Tasks as NAME, NAME:regression, NAME=WEIGHT or NAME:regression=WEIGHT. Raises UserError for anything else."""
    tasks = []
    for word in words:
        named, equals, weight = word.partition("=")
        name, colon, kind = named.partition(":")
        try:
            tasks.append(MeasuredTask(name, kind if colon else "binary", float(weight) if equals else 1.0))  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(
                f"--tasks takes NAME, NAME:regression and NAME=WEIGHT, such as bought or stars:regression=0.2; "
                f"found '{word}' ({error})"
            ) from None
    names = [task.name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--tasks names '{twice}' twice")
    return _usual_columns(tasks)


@dataclass(frozen=True)
class Footer:
    """What a file says of itself."""

    file: LogFile
    schema: pa.Schema

    @staticmethod
    def read(found: FoundFile) -> Footer:
        """That of a file. Raises BadFile where it is no Parquet file."""
        with open_parquet(found.address) as parquet:
            metadata = parquet.metadata
            rows = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
            file = LogFile(found.address, sum(rows), found.bytes, found.version, rows)
            schema = parquet.schema_arrow
        for name in path_values(found.address):
            if name not in schema.names:
                schema = schema.append(pa.field(name, pa.string()))
        return Footer(file, schema)


def read_rows(columns: PredictionColumns, piece: Piece, at_a_time: int) -> Iterator[pa.Table]:
    """The rows of a piece of a file, some at a time, see `_Reading`. Raises BadFile for a wrong value."""
    reading, wanted = _Reading(columns, piece.address), [*find_uses(columns), *(each.column for each in columns.slices)]
    with open_parquet(piece.address) as parquet:
        start = sum(parquet.metadata.row_group(number).num_rows for number in range(piece.groups[0]))
        held = [name for name in dict.fromkeys(wanted) if name in parquet.schema_arrow.names]
        batches = parquet.iter_batches(at_a_time, row_groups=list(piece.groups), columns=held)
        while (batch := next_batch(batches, piece.address, parquet.schema_arrow)) is not None:
            table = with_path_values(pa.Table.from_batches([batch]), piece.address, wanted)
            yield reading.rows(table, start)
            start += len(batch)


def find_uses(columns: PredictionColumns) -> dict[str, Use]:
    """What each column is read as."""
    keys = dict.fromkeys([columns.user, *([columns.candidate] if columns.candidate else [])], "key")
    keys |= {name: "any" for name in columns.request if name not in keys}
    of_tasks = [each[task.name] for each in (columns.predicted, columns.labels) for task in columns.tasks]
    numbers = {name: "number" for name in (columns.score, columns.weight, *of_tasks) if name is not None}
    return keys | numbers  # type: ignore[return-value]


class _Reading:
    """Rows of a file as columns `user` and its `hash`, `request`, `candidate`, `score`, `weight`, of each task `p.TASK`
    and `l.TASK`, and `s.N` of what they are sliced by."""

    def __init__(self, columns: PredictionColumns, address: str) -> None:
        self._columns, self._address = columns, address

    def rows(self, table: pa.Table, start: int) -> pa.Table:
        """The rows, checked. start: the number of the first in the file."""
        columns = self._columns
        names = dict.fromkeys([columns.user, *columns.request, *([columns.candidate] if columns.candidate else [])])
        keys = {name: self._key(table, name, start) for name in names}
        user, request = keys[columns.user], keys[columns.request[0]]
        if len(columns.request) > 1:
            request = pa.array(combine([hash_column(keys[name]) for name in columns.request]).view(np.int64))
        made = {"user": _plain(user), "hash": pa.array(hash_column(user)), "request": _plain(request)}
        if columns.candidate is not None:
            made["candidate"] = _plain(keys[columns.candidate])
        for task in columns.tasks:
            name, label = columns.predicted[task.name], columns.labels[task.name]
            is_binary = task.kind == "binary"
            predicted = self._numbers(table, name, start)
            wrong = ~((predicted >= 0) & (predicted <= 1)) if is_binary else ~np.isfinite(predicted)
            self._check(name, predicted, wrong, start, "a probability" if is_binary else "a finite number")
            made[f"p.{task.name}"] = pa.array(predicted)
            labels = self._numbers(table, label, start)
            wrong = ~(np.isnan(labels) | ((labels == 0) | (labels == 1) if is_binary else np.isfinite(labels)))
            expected = "0, 1" if is_binary else "a number"
            self._check(label, labels, wrong, start, f"{expected} or null where it is unobserved")
            made[f"l.{task.name}"] = pa.array(labels)
        if columns.score is not None:
            score = self._numbers(table, columns.score, start)
            self._check(columns.score, score, np.isnan(score), start, "a number")
            made["score"] = pa.array(score)
        if columns.weight is not None:
            weight = self._numbers(table, columns.weight, start)
            is_wrong = ~((weight > np.float64(1e-50)) & (weight < np.float64(1e50)))
            self._check(columns.weight, weight, is_wrong, start, "a positive number")
            made["weight"] = pa.array(weight)
        for number, by in enumerate(columns.slices):
            try:
                made[f"s.{number}"] = by.read(table[by.column].combine_chunks())
            except (ValueError, pa.ArrowNotImplementedError) as error:
                what = f"column '{by.column}' {error} (--slices)"
                raise BadFile(f"'{self._address}': {what}", self._address) from None
        return pa.table(made)

    def _key(self, table: pa.Table, name: str, start: int) -> pa.Array:
        values = table[name].combine_chunks()
        if pt.is_timestamp(values.type) or pt.is_date(values.type):
            try:
                values = values.cast(pa.timestamp("us", tz=getattr(values.type, "tz", None))).cast(pa.int64())
            except pa.ArrowInvalid:
                what = f"column '{name}' tells requests apart by less than a microsecond; write it as integers"
                raise BadFile(f"'{self._address}': {what}", self._address) from None
        values = file_column(self._address, name, "key", values, None, start)
        if values.null_count:
            row = start + int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            raise BadFile(f"'{self._address}': column '{name}' holds null{first_row(row)}", self._address)
        return values

    def _numbers(self, table: pa.Table, name: str, start: int) -> np.ndarray:
        """(N,) float64; NaN where null."""
        given = table[name].combine_chunks()
        values = file_column(self._address, name, "number", given, None, start)
        if pt.is_null(values.type):
            return np.full(len(values), np.nan)
        return np.asarray(values.to_numpy(zero_copy_only=False))

    def _check(self, name: str, values: np.ndarray, wrong: np.ndarray, start: int, expected: str) -> None:
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            found = "null or NaN" if np.isnan(values[row]) else str(float(values[row])).removesuffix(".0")
            what = f"column '{name}' must hold {expected}, found {found}{first_row(start + row)}"
            raise BadFile(f"'{self._address}': {what}", self._address)


def _plain(values: pa.Array) -> pa.Array:
    return values.cast(pa.string()) if pt.is_dictionary(values.type) else values


def find_key_types(columns: PredictionColumns, footer: Footer) -> dict[str, pa.DataType]:
    """Canonical types of the columns of a file that are keys. Raises BadFile where a column is missing or of a wrong
    type."""
    found = {}
    address, schema = footer.file.address, footer.schema
    for name, use in find_uses(columns).items():
        if schema.names.count(name) > 1:
            raise BadFile(f"'{address}' has several columns '{name}'", address)
        if schema.get_field_index(name) < 0:
            raise BadFile(f"'{address}' has no column '{name}'{_hint(columns, name)}", address)
        kind = schema.field(name).type
        kind = kind.value_type if pt.is_dictionary(kind) else kind
        if not footer.file.rows:
            continue
        if use == "any" and (pt.is_timestamp(kind) or pt.is_date(kind)):
            found[name] = pa.timestamp("us", tz=getattr(kind, "tz", None))
            continue
        try:
            canonical = canonical_type(name, "key" if use == "any" else use, kind)
        except UserError as error:
            raise BadFile(f"'{address}': {error}", address) from None
        if use != "number" and not pt.is_null(canonical):
            found[name] = canonical
    for by in columns.slices:
        if schema.get_field_index(by.column) < 0:
            raise BadFile(
                f"'{address}' has no column '{by.column}', by which rows are to be sliced (--slices)", address
            )
    return found


def find_precision(columns: PredictionColumns, footer: Footer) -> dict[str, float]:
    """Task -> machine precision of its predictions in a file."""
    kinds = {task.name: footer.schema.field(columns.predicted[task.name]).type for task in columns.tasks}
    single = {name: pt.is_float32(kind) or pt.is_float16(kind) for name, kind in kinds.items()}
    return {name: float(np.finfo(np.float32 if each else np.float64).eps) for name, each in single.items()}


def _hint(columns: PredictionColumns, name: str) -> str:
    for task, column in columns.labels.items():
        if column == name:
            return (
                f", the labels of task '{task}': mmoe-rec score writes them with --labels; "
                f"name another one with --columns label_{task}=COLUMN"
            )
    for task, column in columns.predicted.items():
        if column == name:
            return f", the predictions of task '{task}'; name another one with --columns predicted_{task}=COLUMN"
    single = ("user", "candidate", "score", "weight")
    part = next((part for part in single if getattr(columns, part) == name), "request")
    return f"; name another one with --columns {part}=COLUMN"
