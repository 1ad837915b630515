"""Files of predictions: which columns hold what, by a settings file or the words of a command line, and their rows.

Rows are checked as they are read, and come in columns of known names and types.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.slices import SliceBy
from mmoe_rec.evaluation.sums import LABELS, PREDICTIONS, SCORES, WEIGHTS, Check, MeasuredTask
from mmoe_rec.inference.ranking import ROW
from mmoe_rec.log.checks import BadFile, LogFile, open_parquet
from mmoe_rec.log.columns import canonical_type, combine, hash_column
from mmoe_rec.log.files import FoundFile, path_values
from mmoe_rec.log.reader import Piece
from mmoe_rec.log.values import file_column, first_row, next_batch, with_path_values
from mmoe_rec.settings.columns import Use, outcome_name
from mmoe_rec.settings.sections import ErrorOrKeep, Settings

JOINED, WEIGHT = "+", "weight"
_OWN = ("user", "request", "candidate", WEIGHT)
"""What the files of `score --labels` and `evaluate --predictions` call them, whatever the log calls them."""


@dataclass(frozen=True)
class PredictionColumns:
    """Tasks, and the columns that rows have.

    names: part (user, request, candidate, score, weight, predicted_TASK, label_TASK) -> column; of a request several,
    joined by `JOINED`, whose values together tell requests apart; optional: parts that files need not have; outcomes:
    names of tasks that they need not have; by_log: parts that are called as in the log, so that the names of `_OWN` are
    meant where the files lack these; duplicates: whether a request may hold a candidate twice; slices: of rows.
    """

    tasks: tuple[MeasuredTask, ...]
    names: Mapping[str, str]
    optional: frozenset[str] = frozenset(("score", "candidate", WEIGHT))
    outcomes: frozenset[str] = frozenset()
    by_log: frozenset[str] = frozenset()
    duplicates: ErrorOrKeep = "error"
    slices: tuple[SliceBy, ...] = ()

    @staticmethod
    def of(tasks: Sequence[MeasuredTask]) -> PredictionColumns:
        """Columns with their usual names."""
        return PredictionColumns(tuple(tasks), {part: part for part in _list_parts(tasks)})

    @property
    def request(self) -> list[str]:
        """The columns that tell requests apart."""
        return self.names["request"].split(JOINED)

    def by_part(self) -> dict[str, str | None]:
        """Part -> column, None where rows have none."""
        return {part: self.names.get(part) for part in _list_parts(self.tasks)}

    def with_columns(self, words: Sequence[str], option: str = "--columns") -> PredictionColumns:
        """The same with other columns, see `name_columns`."""
        given = name_columns(words, _list_parts(self.tasks), option)
        by_log = self.by_log - given.keys()
        if given.keys() & {"user", "request", "candidate"}:
            by_log &= {WEIGHT}
        return replace(self, names={**self.names, **given}, optional=self.optional - given.keys(), by_log=by_log)

    def match(self, there: Collection[str]) -> PredictionColumns:
        """Those that files with the columns `there` have. All need what one has, or a task would be of some rows."""
        there, names = set(there), dict(self.names)
        lacking = not {names["user"], *self.request} <= there
        if "user" in self.by_log and lacking and {"user", "request"} <= there:
            names |= {part: part for part in _OWN[:3]}
        if WEIGHT in self.by_log and names[WEIGHT] not in there and WEIGHT in there:
            names[WEIGHT] = WEIGHT
        for part in ("score", "candidate", WEIGHT):
            if part in self.optional and names[part] not in there:
                del names[part]
        tasks = tuple(
            task
            for task in self.tasks
            if task.name not in self.outcomes or there & {names[f"predicted_{task.name}"], names[f"label_{task.name}"]}
        )
        return replace(self, tasks=tasks, names=names)

    def find_uses(self) -> dict[str, Use]:
        """What each column is read as."""
        uses: dict[str, Use] = {self.names[part]: "key" for part in ("user", "candidate") if part in self.names}
        uses |= {name: "any" for name in self.request if name not in uses}
        numbers = [part for part in self.by_part() if part not in ("user", "candidate", "request")]
        return uses | {self.names[part]: "number" for part in numbers if part in self.names}


def _list_parts(tasks: Sequence[MeasuredTask]) -> list[str]:
    its = [f"{kind}_{task.name}" for task in tasks for kind in ("predicted", "label")]
    return ["user", "candidate", "score", WEIGHT, "request", *its]


def name_columns(words: Sequence[str], parts: Collection[str], option: str = "--columns") -> dict[str, str]:
    """Part -> column, by words such as `user=customer_id`. Raises UserError for any other word."""
    names = {}
    for word in words:
        part, equals, column = word.partition("=")
        if not equals or part not in parts or not column:
            raise UserError(f"{option} {word}: expected PART=COLUMN, where PART is one of {', '.join(parts)}")
        names[part] = column
    return names


def columns_of_settings(settings: Settings) -> PredictionColumns:
    """The tasks of settings, their outcomes, and the log's names of users, requests and candidates."""
    tasks = [MeasuredTask(name, task.kind, task.score_weight) for name, task in settings.tasks.items()]
    outcomes = [outcome_name(task.given, name) for name, task in settings.tasks.items() if task.given is not None]
    columns = PredictionColumns.of([*tasks, *(MeasuredTask(name, "binary", 0.0) for name in outcomes)])
    log = settings.schema_.columns
    user = log.user if log.has_user else log.request or ROW
    if log.request is None:
        # A row of a plain table is a user of its own, and a user of a log without times makes one request.
        request = [user, log.time] if log.has_time and log.has_user else [user]
    else:
        request = [log.user, log.request] if log.request_scope == "user" else [log.request]
    names = {**columns.names, "user": user, "request": JOINED.join(request), "candidate": log.candidate}
    optional = columns.optional
    if log.weight is not None:
        names[WEIGHT], optional = log.weight, optional - {WEIGHT}
    return replace(
        columns,
        names=names,
        optional=optional,
        outcomes=frozenset(outcomes),
        by_log=frozenset(_OWN),
        duplicates=settings.data.duplicates,
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
    return PredictionColumns.of(tasks)


@dataclass(frozen=True)
class Footer:
    """What a file says of itself."""

    file: LogFile
    schema: pa.Schema

    @staticmethod
    def read(found: FoundFile) -> Footer:
        """The footer of a file. Raises BadFile where it is no Parquet file."""
        with open_parquet(found.address) as parquet:
            metadata = parquet.metadata
            rows = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
            file = LogFile(found.address, found.bytes, found.version, rows)
            schema = parquet.schema_arrow
        for name in path_values(found.address):
            if name not in schema.names:
                schema = schema.append(pa.field(name, pa.string()))
        return Footer(file, schema)


@dataclass(frozen=True)
class FileRows:
    """Some rows of a file, in columns of any names. start: number of the first. Its methods raise BadFile for a wrong
    value."""

    address: str
    table: pa.Table
    start: int = 0

    def read_ids(self, name: str) -> pa.Array:
        """Ids, none of them null; times are microseconds."""
        values = self.table[name].combine_chunks()
        if pt.is_timestamp(values.type) or pt.is_date(values.type):
            try:
                values = values.cast(pa.timestamp("us", tz=getattr(values.type, "tz", None))).cast(pa.int64())
            except pa.ArrowInvalid:
                what = f"column '{name}' tells requests apart by less than a microsecond; write it as integers"
                raise BadFile(f"'{self.address}': {what}", self.address) from None
        values = file_column(self.address, name, "key", values, None, self.start)
        self._refuse(values.is_null().to_numpy(zero_copy_only=False), f"column '{name}' holds null")
        return values.cast(pa.string()) if pt.is_dictionary(values.type) else values

    def read_numbers(self, name: str, check: Check) -> np.ndarray:
        """(N,) float64; NaN where null."""
        values = file_column(self.address, name, "number", self.table[name].combine_chunks(), None, self.start)
        numbers = np.full(len(values), np.nan)
        if not pt.is_null(values.type):
            numbers = np.asarray(values.to_numpy(zero_copy_only=False))
        expected, is_right = check
        self._refuse(~is_right(numbers), f"column '{name}' must hold {expected}", numbers)
        return numbers

    def _refuse(self, wrong: np.ndarray, what: str, values: np.ndarray | None = None) -> None:
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            if values is not None:
                value = float(values[row])
                what += f", found {'null or NaN' if np.isnan(value) else str(value).removesuffix('.0')}"
            raise BadFile(f"'{self.address}': {what}{first_row(self.start + row)}", self.address)


def read_rows(columns: PredictionColumns, piece: Piece, at_a_time: int) -> Iterator[pa.Table]:
    """The rows of a piece of a file, some at a time, as columns `user` and its `hash`, `request`, `candidate`, `score`,
    `weight`, of task number N `pN` and `lN`, and `sN` of what they are sliced by. Raises BadFile for a wrong value."""
    wanted = [*columns.find_uses(), *(each.column for each in columns.slices)]
    with open_parquet(piece.address) as parquet:
        start = sum(parquet.metadata.row_group(number).num_rows for number in range(piece.groups[0]))
        held = [name for name in dict.fromkeys(wanted) if name in parquet.schema_arrow.names]
        batches = parquet.iter_batches(at_a_time, row_groups=list(piece.groups), columns=held)
        while (batch := next_batch(batches, piece.address, parquet.schema_arrow)) is not None:
            table = with_path_values(pa.Table.from_batches([batch]), piece.address, wanted)
            yield _name_parts(columns, FileRows(piece.address, table, start))
            start += len(batch)


def _name_parts(columns: PredictionColumns, rows: FileRows) -> pa.Table:
    names = columns.names
    user, request = rows.read_ids(names["user"]), [rows.read_ids(name) for name in columns.request]
    joined = combine([hash_column(each) for each in request]).view(np.int64) if len(request) > 1 else request[0]
    parts = {"user": user, "hash": hash_column(user), "request": joined}
    if "candidate" in names:
        parts["candidate"] = rows.read_ids(names["candidate"])
    for number, task in enumerate(columns.tasks):
        parts[f"p{number}"] = rows.read_numbers(names[f"predicted_{task.name}"], PREDICTIONS[task.kind])
        parts[f"l{number}"] = rows.read_numbers(names[f"label_{task.name}"], LABELS[task.kind])
    if "score" in names:
        parts["score"] = rows.read_numbers(names["score"], SCORES)
    if WEIGHT in names:
        parts[WEIGHT] = rows.read_numbers(names[WEIGHT], WEIGHTS)
    for number, by in enumerate(columns.slices):
        try:
            parts[f"s{number}"] = by.read(rows.table[by.column].combine_chunks())
        except (ValueError, pa.ArrowNotImplementedError) as error:
            raise BadFile(f"'{rows.address}': column '{by.column}' {error} (--slices)", rows.address) from None
    return pa.table(parts)


def find_key_types(columns: PredictionColumns, footer: Footer) -> dict[str, pa.DataType]:
    """Canonical types of a file's columns that are keys. Raises BadFile where one is missing or of a wrong type."""
    types = {}
    address, schema = footer.file.address, footer.schema
    for name, use in columns.find_uses().items():
        if schema.names.count(name) > 1:
            raise BadFile(f"'{address}' has several columns '{name}'", address)
        if schema.get_field_index(name) < 0:
            raise BadFile(f"'{address}' has no column '{name}'{_hint(columns, name)}", address)
        kind = schema.field(name).type
        kind = kind.value_type if pt.is_dictionary(kind) else kind
        if not footer.file.rows:
            continue
        if use == "any" and (pt.is_timestamp(kind) or pt.is_date(kind)):
            types[name] = pa.timestamp("us", tz=getattr(kind, "tz", None))
            continue
        try:
            canonical = canonical_type(name, "key" if use == "any" else use, kind)
        except UserError as error:
            raise BadFile(f"'{address}': {error}", address) from None
        if use != "number" and not pt.is_null(canonical):
            types[name] = canonical
    for by in columns.slices:
        if schema.get_field_index(by.column) < 0:
            what = f"has no column '{by.column}', by which rows are to be sliced (--slices)"
            raise BadFile(f"'{address}' {what}", address)
    return types


def _hint(columns: PredictionColumns, name: str) -> str:
    part = next((part for part, column in columns.by_part().items() if column == name), "request")
    kind, _, task = part.partition("_")
    what = {"label": f", the labels of task '{task}': mmoe-rec score writes them with --labels"}
    what["predicted"] = f", the predictions of task '{task}'"
    return f"{what.get(kind, '')}; name another one with --columns {part}=COLUMN"
