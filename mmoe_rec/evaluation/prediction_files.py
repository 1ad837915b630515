"""Evaluate predictions in Parquet files. The settings or the command line name the columns.

Rows are checked when they are read, and all rows are kept in memory.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.slices import SliceSpec
from mmoe_rec.evaluation.summary import MeasuredModel, RowsBySlice, find_objective_metric, measure_model
from mmoe_rec.evaluation.sums import SCORE_RULE, WEIGHT_RULE, MeasuredTask, PredictedRows
from mmoe_rec.inference.ranking import ROW_NUMBER_COLUMN
from mmoe_rec.inference.scored_files import read_overlap_warnings
from mmoe_rec.locks import write_lock
from mmoe_rec.log.checks import (
    BadFile,
    add_path_columns,
    canonicalize_file_column,
    describe_row,
    next_batch,
    open_parquet,
)
from mmoe_rec.log.columns import combine_hashes, hash_column
from mmoe_rec.log.files import FileInfo, find_files, is_remote, parse_path_columns
from mmoe_rec.log.rows import FEATURE_BATCH_ROWS
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.preprocessing.build_inputs import check_output_folder, short_names
from mmoe_rec.settings.log_columns import joint_task_name
from mmoe_rec.settings.sections import ErrorOrKeep, Evaluation, Settings
from mmoe_rec.task_kinds import DEFAULT_KIND, find_kind
from mmoe_rec.task_kinds.task_kind import ValueRule

COLUMN_SEPARATOR, WEIGHT = "+", "weight"
_OWN = ("user", "request", "candidate", WEIGHT)
"""Column names in the files of `score --labels` and `evaluate --model`, which don't depend on the log."""


@dataclass(frozen=True)
class PredictionColumns:
    """Tasks, and the names of the columns of prediction files.

    A part is the role of a column: user, request, candidate, score, weight, predicted_TASK or label_TASK.

    Attributes:
        tasks: Tasks and joint outcomes to measure.
        names: Part -> name of the column. If several columns together identify a request, their names are joined by
            `COLUMN_SEPARATOR`.
        optional: Parts that files may lack.
        outcomes: Names of joint outcomes (a task and its `conditional_on` task are both 1). Files may lack them.
        log_named: Parts whose columns have the log's names. If files lack such a column, they may have a column with
            the part's name, as files of this package do.
        duplicates: `keep` if a request may have a candidate twice, else `error`.
        slices: Slices of the rows.
    """

    tasks: tuple[MeasuredTask, ...]
    names: Mapping[str, str]
    optional: frozenset[str] = frozenset(("score", "candidate", WEIGHT))
    outcomes: frozenset[str] = frozenset()
    log_named: frozenset[str] = frozenset()
    duplicates: ErrorOrKeep = "error"
    slices: tuple[SliceSpec, ...] = ()

    @property
    def request(self) -> list[str]:
        """Columns that identify requests."""
        return self.names["request"].split(COLUMN_SEPARATOR)

    def by_part(self) -> dict[str, str | None]:
        """Return the column of each part, None if files have no such column."""
        return {part: self.names.get(part) for part in _list_parts(self.tasks)}

    def with_columns(self, words: Sequence[str], option: str = "--columns") -> "PredictionColumns":
        """Return a copy in which some parts have other columns, which files must then have.

        Args:
            words: Parts with their columns, such as `user=customer_id`.
            option: Option to name in errors.

        Raises:
            UserError: A word is not PART=COLUMN.
        """
        named, parts = dict[str, str](), _list_parts(self.tasks)
        for word in words:
            part, _, column = word.partition("=")
            if part not in parts or not column:
                raise UserError(f"{option} {word}: expected PART=COLUMN, where PART is one of {', '.join(parts)}")
            named[part] = column
        log_named = self.log_named - named.keys()
        if named.keys() & {"user", "request", "candidate"}:
            log_named &= {WEIGHT}
        return replace(self, names={**self.names, **named}, optional=self.optional - named.keys(), log_named=log_named)

    def match(self, available: Collection[str]) -> "PredictionColumns":
        """Return a copy without optional parts and joint outcomes that are not among `available`, the files' columns.

        If one file has an optional column, all files need it. Otherwise a task would be measured on some rows only.
        """
        available, names = set(available), dict(self.names)
        for part in self.log_named & available:
            if not {*names[part].split(COLUMN_SEPARATOR)} <= available:
                names[part] = part
        for part in ("score", "candidate", WEIGHT):
            if part in self.optional and names[part] not in available:
                del names[part]
        tasks = tuple(
            task
            for task in self.tasks
            if task.name not in self.outcomes
            or available & {names[f"predicted_{task.name}"], names[f"label_{task.name}"]}
        )
        return replace(self, tasks=tasks, names=names)

    def list_columns(self) -> list[str]:
        """List the columns to read."""
        named = [column for part, column in self.by_part().items() if column is not None and part != "request"]
        return list(dict.fromkeys([*named, *self.request, *(by.column for by in self.slices)]))


def _list_parts(tasks: Sequence[MeasuredTask]) -> list[str]:
    task_parts = [f"{kind}_{task.name}" for task in tasks for kind in ("predicted", "label")]
    return ["user", "candidate", "score", WEIGHT, "request", *task_parts]


def columns_from_settings(settings: Settings) -> PredictionColumns:
    """Return the tasks and joint outcomes of settings, and the log's columns of users, requests and candidates."""
    tasks = [MeasuredTask(name, task.kind, task.score_weight) for name, task in settings.tasks.items()]
    outcomes = [
        joint_task_name(task.conditional_on, name)
        for name, task in settings.tasks.items()
        if task.conditional_on is not None
    ]
    tasks += [MeasuredTask(name, weight=0.0) for name in outcomes]
    log = settings.schema_.columns
    user = log.user if log.has_user else log.request or ROW_NUMBER_COLUMN
    if log.request is None:
        # Without a column of users, each row is a user. Without a column of times, each user makes one request.
        request = [user, log.time] if log.has_time and log.has_user else [user]
    else:
        request = [log.user, log.request] if log.request_scope == "user" else [log.request]
    names = {part: part for part in _list_parts(tasks)}
    names |= {"user": user, "request": COLUMN_SEPARATOR.join(request), "candidate": log.candidate}
    optional = {"score", "candidate", WEIGHT}
    if log.weight is not None:
        names[WEIGHT], optional = log.weight, {"score", "candidate"}
    return PredictionColumns(
        tuple(tasks),
        names,
        optional=frozenset(optional),
        outcomes=frozenset(outcomes),
        log_named=frozenset(_OWN),
        duplicates=settings.data.on_duplicates,
    )


def parse_tasks(words: Sequence[str]) -> PredictionColumns:
    """Parse tasks NAME, NAME:KIND, NAME=WEIGHT or NAME:KIND=WEIGHT, with default column names. May raise UserError."""
    tasks = []
    for word in words:
        name_and_kind, equals, weight = word.partition("=")
        name, colon, named_kind = name_and_kind.partition(":")
        try:
            kind = find_kind(named_kind) if colon else DEFAULT_KIND
            tasks.append(MeasuredTask(name, kind, float(weight) if equals else 1.0))
        except ValueError as error:
            raise UserError(
                f"--tasks takes NAME, NAME:regression and NAME=WEIGHT, such as bought or stars:regression=0.2; "
                f"found '{word}' ({error})"
            ) from None
    names = [task.name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--tasks names '{twice}' twice")
    return PredictionColumns(tuple(tasks), {part: part for part in _list_parts(tasks)})


def _match_columns(columns: PredictionColumns, files: Sequence[FileInfo]) -> PredictionColumns:
    """Match `columns` with the columns of `files`. Raise BadFile if a file lacks a column or has one twice."""
    names = dict[str, list[str]]()
    for file in files:
        with open_parquet(file.uri) as parquet:
            stored_names = parquet.schema_arrow.names
        names[file.uri] = [*stored_names, *(name for name in parse_path_columns(file.uri) if name not in stored_names)]
    columns = columns.match({name for file_names in names.values() for name in file_names})
    for uri, file_columns in names.items():
        for name in columns.list_columns():
            if file_columns.count(name) > 1:
                raise BadFile(f"'{uri}' has several columns '{name}'", uri)
            if name not in file_columns:
                raise BadFile(f"'{uri}' has no column '{name}'{_hint(columns, name)}", uri)
    return columns


def _read_predictions(columns: PredictionColumns, files: Sequence[FileInfo]) -> tuple[PredictedRows, RowsBySlice]:
    """Read and check the rows of files.

    Returns the rows, and their slices: name of the `SliceSpec` -> name of the slice -> row numbers (n,). Raises
    UserError if a value is wrong, a request has several users or a candidate twice, or there is no row.
    """
    tables = [table for file in files if (table := _read_file(columns, file.uri)) is not None]
    if not tables:
        raise UserError(f"'{files[0].uri}'{' and the other files' * (len(files) > 1)} contain no row to evaluate")
    try:
        table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except pa.ArrowTypeError as error:
        where = f"the {len(files):,} files such as '{files[0].uri}'"
        raise UserError(f"{where} hold columns of several types, which can't be compared: {error}") from None
    _check_requests(columns, table)
    slices = {by.name: by.find_slices(one_array(table[f"slice {by.name}"])) for by in columns.slices}
    predictions = {task.name: table[f"predicted_{task.name}"].to_numpy() for task in columns.tasks}
    labels = {task.name: table[f"label_{task.name}"].to_numpy() for task in columns.tasks}
    rows = PredictedRows(
        columns.tasks,
        one_array(table["user"]),
        one_array(table["request"]),
        one_array(table["candidate"]) if "candidate" in columns.names else None,
        predictions,
        labels,
        table["score"].to_numpy() if "score" in columns.names else _fuse(columns.tasks, list(predictions.values())),
        table[WEIGHT].to_numpy() if WEIGHT in columns.names else None,
    )
    return rows, slices


def load_predictions(columns: PredictionColumns, source: str, option: str) -> PredictedRows:
    """Read the rows of prediction files as `_read_predictions` does.

    Args:
        columns: Tasks and columns.
        source: A folder of Parquet files, one file or a glob.
        option: Option to name in errors.
    """
    files = find_files(source, option)
    return _read_predictions(_match_columns(columns, files), files)[0]


def _fuse(tasks: Sequence[MeasuredTask], predictions: Sequence[np.ndarray]) -> np.ndarray:
    """Return scores (N,) for files without scores: a single task's prediction, or sums of weight x log(prediction)."""
    if len(tasks) == 1:
        return predictions[0]
    least = [max(1e-12, task.kind.min_prediction) for task in tasks]
    return np.log(np.maximum(np.stack(predictions, axis=1), least)) @ np.array([task.weight for task in tasks])


def _check_requests(columns: PredictionColumns, table: pa.Table) -> None:
    """Raise UserError if a request has rows of several users, or a candidate twice."""
    users = table.group_by(["request", "user"], use_threads=False).aggregate([])
    lists = users.group_by("request", use_threads=False).aggregate([([], "count_all")])
    if (request := pc.min(lists.filter(pc.field("count_all") > 1)["request"]).as_py()) is not None:
        first, second_user, *_ = sorted(users.filter(pc.field("request") == request)["user"].to_pylist())
        raise UserError(
            f"request {request!r} by '{columns.names['request']}' has rows of more than one user, {first!r} and "
            f"{second_user!r}: a request is one list shown to one user; name columns that identify lists with "
            f"--columns request={COLUMN_SEPARATOR.join((columns.names['user'], *columns.request))}"
        )
    if "candidate" in columns.names and columns.duplicates == "error":
        shown = table.group_by(["request", "candidate"], use_threads=False).aggregate([([], "count_all")])
        if len(duplicates := shown.filter(pc.field("count_all") > 1)):
            request, candidate = (duplicates[name][0].as_py() for name in ("request", "candidate"))
            raise UserError(
                f"request {request!r} has candidate {candidate!r} more than once, perhaps because files of two "
                "models, or copies of a file, are in one folder. To count all rows, add --keep-duplicates."
            )


def _read_file(columns: PredictionColumns, uri: str) -> pa.Table | None:
    """Read a file's columns, renamed to parts, and columns `slice NAME` to slice by. None if the file has no rows."""
    columns_to_read, names = columns.list_columns(), columns.names
    with open_parquet(uri) as parquet:
        if not parquet.metadata.num_rows:
            return None
        schema = parquet.schema_arrow
        stored_columns = [name for name in columns_to_read if name in schema.names]
        batches = parquet.iter_batches(FEATURE_BATCH_ROWS, columns=stored_columns)
        read = list(iter(partial(next_batch, batches, uri), None))
    file = _FileRows(uri, add_path_columns(pa.Table.from_batches(read), uri, columns_to_read))
    request = [file.read_ids(name) for name in columns.request]
    joined = request[0] if len(request) == 1 else combine_hashes([*map(hash_column, request)]).view(np.int64)
    parts = {"user": file.read_ids(names["user"]), "request": joined}
    if "candidate" in names:
        parts["candidate"] = file.read_ids(names["candidate"])
    for task in columns.tasks:
        for part, check in (("predicted", task.kind.valid_predictions), ("label", task.kind.valid_labels)):
            name = f"{part}_{task.name}"
            parts[name] = file.read_numbers(names[name], check)
    for part, check in (("score", SCORE_RULE), (WEIGHT, WEIGHT_RULE)):
        if part in names:
            parts[part] = file.read_numbers(names[part], check)
    for by in columns.slices:
        try:
            parts[f"slice {by.name}"] = by.read(one_array(file.table[by.column]))
        except (ValueError, pa.ArrowNotImplementedError) as error:
            raise BadFile(f"'{uri}': column '{by.column}' {error} (--slices)", uri) from None
    return pa.table(parts)


@dataclass(frozen=True)
class _FileRows:
    """Rows of a file. The methods check a column and raise BadFile for a wrong value."""

    uri: str
    table: pa.Table

    def read_ids(self, name: str) -> pa.Array:
        """Read a column of IDs. Null is an error. Times become int64 microseconds."""
        values = one_array(self.table[name])
        if pt.is_timestamp(values.type) or pt.is_date(values.type):
            try:
                values = values.cast(pa.timestamp("us", tz=getattr(values.type, "tz", None))).cast(pa.int64())
            except pa.ArrowInvalid:
                problem = f"column '{name}' distinguishes requests by less than a microsecond; write it as integers"
                raise BadFile(f"'{self.uri}': {problem}", self.uri) from None
        values = canonicalize_file_column(self.uri, name, "key", values, None)
        self._refuse(values.is_null().to_numpy(zero_copy_only=False), f"column '{name}' holds null")
        return values.cast(pa.string()) if pt.is_dictionary(values.type) else values

    def read_numbers(self, name: str, check: ValueRule) -> np.ndarray:
        """Read a column of numbers as (N,) float64. Null becomes NaN, before `check` accepts or refuses the values."""
        values = canonicalize_file_column(self.uri, name, "number", one_array(self.table[name]), None)
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
            raise BadFile(f"'{self.uri}': {what}{describe_row(row)}", self.uri)


def _hint(columns: PredictionColumns, name: str) -> str:
    if name in {by.column for by in columns.slices}:
        return ", by which --slices groups rows (or evaluation.slices)"
    part = next((part for part, column in columns.by_part().items() if column == name), "request")
    kind, _, task = part.partition("_")
    descriptions = {"label": f", the labels of task '{task}': mmoe-rec score writes them with --labels"}
    descriptions["predicted"] = f", the predictions of task '{task}'"
    return f"{descriptions.get(kind, '')}; name another one with --columns {part}=COLUMN"


# Evaluation of files


def evaluate_predictions(
    columns: PredictionColumns,
    source: str,
    out: str | Path,
    rules: Evaluation,
    against: Sequence[str] = (),
    compare_to_columns: Sequence[str] = (),
) -> Results:
    """Evaluate the rows of Parquet files, and write `metrics.json` and other files to a folder.

    Args:
        columns: Tasks and the names of columns.
        source: A folder of Parquet files, one file or a glob.
        out: Folder for the results.
        rules: Settings of intervals and comparisons.
        against: Sources of other predictions of the same rows to compare with.
        compare_to_columns: PART=COLUMN for columns that have other names in `against` than in `source`.

    Raises:
        UserError: A file, a column or a value is wrong.
    """
    from mmoe_rec.evaluation.results_report import write_results

    if is_remote(str(out)):
        raise UserError(f"--out '{out}' must be a local or mounted folder.")
    out = Path(os.path.abspath(out))
    check_output_folder(out)
    names = short_names([source, *against])
    find_objective_metric(rules.primary_metric)
    files_by_source = {source: find_files(source, "--predictions")}
    files_by_source |= {path: find_files(path, "--compare-to") for path in against}
    real_out = Path(os.path.realpath(out))
    for path, files in files_by_source.items():
        is_inside = os.path.isdir(path) and real_out.is_relative_to(os.path.realpath(path))
        local_files = [Path(os.path.realpath(file.uri)) for file in files if not is_remote(file.uri)]
        if is_inside or any(file.is_relative_to(real_out) for file in local_files):
            raise UserError(f"--out '{out}' overlaps with the predictions in '{path}'. Give another folder.")
    columns_by_source = {source: _match_columns(columns, files_by_source[source])}
    for path in against:
        try:
            renamed = columns.with_columns(compare_to_columns, "--compare-to-columns")
            columns_by_source[path] = _match_columns(renamed, files_by_source[path])
        except BadFile as error:
            raise BadFile(str(error).replace("--columns", "--compare-to-columns"), error.uri) from None
    with write_lock(out, "an evaluation", "give another folder with --out", wait=True):
        measured = {
            names[path]: _measure_files(columns_by_source[path], files, path, rules.resamples)
            for path, files in files_by_source.items()
        }
        tasks = tuple(task.name for task in columns_by_source[source].tasks if task.name not in columns.outcomes)
        named = [f"{part}={name}" for part, name in columns_by_source[source].by_part().items() if name]
        facts = {"predictions": source, "files": f"{len(files_by_source[source]):,}", "columns": ", ".join(named)}
        results = Results(measured, tasks, rules, f"Evaluation of {names[source]}", facts)
        write_results(results, out)
    return results


def _measure_files(columns: PredictionColumns, files: Sequence[FileInfo], source: str, resamples: int) -> MeasuredModel:
    rows, slices = _read_predictions(columns, files)
    weights = {task.name: task.weight for task in columns.tasks}
    facts = {"predictions": source, "files": len(files), "columns": columns.by_part(), "relevance_weights": weights}
    training_overlap = read_overlap_warnings(file.uri for file in files)
    return measure_model(rows, resamples, slices, facts, address=source, training_overlap=training_overlap)
