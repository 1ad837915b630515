"""Check a log's files: footers when the log is opened, and values while it is read.

Every problem of a file raises `BadFile`, which names the file, the column and the first bad row. The value checks make
sure that features and labels are meaningful.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from mmoe_rec.errors import UserError, first_line
from mmoe_rec.log.columns import canonical_type, canonicalize, element_type, type_name
from mmoe_rec.log.files import MAX_OPEN_FILES, FileInfo, is_remote, open_file, parse_path_columns
from mmoe_rec.log.rows import LogRows, split_indices
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import Schema
from mmoe_rec.task_kinds.task_kind import TaskKind

PathColumns = tuple[tuple[str, int | str | None], ...]


class BadFile(UserError):  # noqa: N818 - named for what it is about
    """Error about the log file at `uri`."""

    def __init__(self, message: str, uri: str) -> None:
        super().__init__(message)
        self.uri = uri

    def __reduce__(self) -> "tuple[type[BadFile], tuple[Any, ...]]":
        return BadFile, (str(self), self.uri)


@dataclass(frozen=True)
class LogFile(FileInfo):
    """A Parquet file of a log.

    Attributes:
        row_group_sizes: Number of rows of each row group.
        path_columns: Names and values of columns that are read from the file's path, such as `day=7/`.
        booleans: Names of the columns that the file stores as booleans.
    """

    row_group_sizes: tuple[int, ...]
    path_columns: PathColumns = ()
    booleans: frozenset[str] = frozenset()

    @property
    def rows(self) -> int:
        """Number of rows of all row groups."""
        return sum(self.row_group_sizes)


@dataclass(frozen=True)
class SkippedFile(FileInfo):
    """A file of a log that was skipped, and the reason."""

    reason: str


def format_time(microseconds: int) -> str:
    """Format `microseconds` since 1970 UTC as ISO 8601, for messages."""
    return f"{np.datetime64(microseconds // 1_000_000, 's')}+00:00"


@contextmanager
def open_parquet(uri: str, dictionary_columns: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file.

    Args:
        uri: URI of the file.
        dictionary_columns: Columns whose strings are read dictionary-coded.

    Raises:
        BadFile: The file is not a readable Parquet file.
        UserError: A remote file system can't be reached.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_file(uri))
            parquet = pq.ParquetFile(
                file,
                read_dictionary=dictionary_columns,
                pre_buffer=is_remote(uri),
                # Read times of the old type INT96 as microseconds. Many systems write the year 9999 for "never", and
                # this year doesn't fit into 64 bits as nanoseconds.
                coerce_int96_timestamp_unit="us",
                page_checksum_verification=True,
            )
        except (pa.ArrowException, OSError) as error:
            reason = first_line(error).rstrip(".")
            fix = "Write the file again, or move it out of the log."
            raise BadFile(f"'{uri}' is not a readable Parquet file ({reason}). {fix}", uri) from None
        yield stack.enter_context(parquet)


def type_names(types: Mapping[str, pa.DataType]) -> dict[str, str]:
    """Return the names of the column types in `types`, without columns of the null type."""
    return {column: word for column, kind in types.items() if (word := type_name(kind)) is not None}


def check_files(
    found_files: Sequence[FileInfo],
    uses: dict[str, ColumnUse],
    time_unit: str | None,
    skip_bad_files: bool,
    fitted: Mapping[str, str],
) -> tuple[list[LogFile], dict[str, pa.DataType], list[SkippedFile]]:
    """Read and check the footers of all files.

    Args:
        found_files: Files of the log.
        uses: Columns of the log and how to read them.
        time_unit: Unit of integer times, None if times are timestamps.
        skip_bad_files: Whether to return bad files as skipped instead of raising an error.
        fitted: Column -> name of the type with which existing features were built. Files must have this type. For other
            columns, files must have the type that most files have.

    Returns:
        The good files, the canonical type of each column (missing for a column of nulls), and the skipped files.

    Raises:
        BadFile: A file is bad, and `skip_bad_files` is false.
    """
    integers = _find_integers(found_files, fitted)

    def read(file: FileInfo) -> tuple[LogFile, dict[str, pa.DataType]] | BadFile:
        try:
            return _read_footer(file, uses, time_unit, integers)
        except BadFile as problem:
            return problem

    with ThreadPoolExecutor(MAX_OPEN_FILES) as pool:
        footers = list(pool.map(read, found_files))
    good = [footer for footer in footers if not isinstance(footer, BadFile)]
    types, problems = _common_types(good, uses, fitted)
    problems |= {error.uri: error for error in footers if isinstance(error, BadFile)}
    bad = [file for file in found_files if file.uri in problems]
    if bad and not skip_bad_files:
        raise problems[bad[0].uri]
    skipped = [SkippedFile(file.uri, file.bytes, file.version, str(problems[file.uri])) for file in bad]
    return [file for file, _ in good if file.uri not in problems], types, skipped


def _find_integers(files: Sequence[FileInfo], fitted: Mapping[str, str]) -> set[str]:
    """Return the path columns (`day=7/`) that hold integers, by their type in `fitted` or else by all their values."""
    pairs = (pair for file in files for pair in parse_path_columns(file.uri).items())
    values = [(column, value) for column, value in pairs if value is not None]
    integers = {column for column, _ in values} - {column for column, value in values if not _is_integer(value)}
    integers -= {column for column, word in fitted.items() if word == "string"}
    return integers | {column for column, word in fitted.items() if word == "int64"}


def _read_footer(
    info: FileInfo, uses: dict[str, ColumnUse], time_unit: str | None, integers: set[str]
) -> tuple[LogFile, dict[str, pa.DataType]]:
    """Return the file and the canonical type of each column in `uses`. A file without rows gets no types."""
    uri = info.uri
    with open_parquet(uri) as parquet:
        arrow, metadata = parquet.schema_arrow, parquet.metadata
        row_group_sizes = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    paths = parse_path_columns(uri)
    kinds, path_columns, booleans = dict[str, pa.DataType](), list[tuple[str, int | str | None]](), set[str]()
    for column, use in uses.items():
        if (problem := _find_wrong_column(column, use, arrow.names, paths)) is not None:
            raise BadFile(f"'{uri}' {problem}", uri)
        if column in arrow.names:
            kind, location = arrow.field(column).type, ""
            if pa.types.is_boolean(element_type(kind)):
                booleans.add(column)
        else:
            value, location = paths[column], ", in the file's path"
            kind = pa.null() if value is None else pa.string()
            if value is not None and column in integers and _is_integer(value):
                kind = pa.int64()
            path_columns.append((column, int(value) if value is not None and kind == pa.int64() else value))
        if any(row_group_sizes):
            try:
                kinds[column] = canonical_type(column, use, kind, time_unit)
            except UserError as error:
                raise BadFile(f"'{uri}': {error}{location}", uri) from None
    file = LogFile(uri, info.bytes, info.version, row_group_sizes, tuple(path_columns), frozenset(booleans))
    return file, kinds


def _find_wrong_column(
    column: str, use: ColumnUse, names: Sequence[str], paths: Mapping[str, str | None]
) -> str | None:
    """Return a problem with a file's `column`, if any. `names` are columns in the file, `paths` columns in its path."""
    if (times := names.count(column)) > 1:
        return f"has {times} columns called '{column}'. Rename all but one."
    if times or (column in paths and use != "time"):
        return None
    if column in paths:
        return f"has the time column '{column}' only in its path. Write the times as a column of the file."
    all_names = sorted({*names, *paths})
    near = get_close_matches(column, all_names, 1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return f"has no column '{column}'{hint}. Its columns are: {', '.join(all_names) or 'none'}."


def _is_integer(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and -(2**63) <= int(text) < 2**63


def _common_types(
    footers: Sequence[tuple[LogFile, dict[str, pa.DataType]]], uses: dict[str, ColumnUse], fitted: Mapping[str, str]
) -> tuple[dict[str, pa.DataType], dict[str, BadFile]]:
    """Return the type of each column, and an error for each file with another type, by URI.

    The type is the one in `fitted` (see `check_files`), or else the most frequent type.
    """
    types: dict[str, pa.DataType] = {}
    deviating: dict[str, BadFile] = {}
    for column in uses:
        kinds = [(kinds.get(column, pa.null()), file.uri) for file, kinds in footers]
        typed = [(kind, uri) for kind, uri in kinds if not pa.types.is_null(kind)]
        if not typed:
            continue
        common, count = Counter(kind for kind, _ in typed).most_common(1)[0]
        word, frequency = type_name(common), f" ({count} of {len(typed)} files have {common})"
        reference = f"in '{next(uri for kind, uri in typed if kind == common)}'"
        if column in fitted:
            word, reference, frequency = fitted[column], "when the features were built", ""
        for kind, uri in typed:
            if type_name(kind) == word:
                types[column] = kind
                continue
            message = (
                f"column '{column}' has the type {word} {reference}, but {kind} in '{uri}'{frequency}. "
                "Write all files with the same type."
            )
            deviating.setdefault(uri, BadFile(message, uri))
    return types, deviating


def read_column_names(uri: str) -> set[str]:
    """Return the names of the columns in the file at `uri` and in its path.

    Raises:
        BadFile: The file is not a readable Parquet file.
    """
    with open_parquet(uri) as parquet:
        return {*parquet.schema_arrow.names, *parse_path_columns(uri)}


def add_path_columns(table: pa.Table, uri: str, names: Iterable[str]) -> pa.Table:
    """Append columns from a file's path, as strings.

    Args:
        table: Rows of the file.
        uri: URI of the file.
        names: Columns to append if the table lacks them and the path has them.
    """
    for name, value in parse_path_columns(uri).items():
        if name in set(names) - set(table.column_names):
            table = table.append_column(name, pa.array([value] * len(table), pa.string()))
    return table


def next_batch(batches: Iterator[pa.RecordBatch], uri: str) -> pa.RecordBatch | None:
    """Return the next batch of a file, None after the last batch.

    Args:
        batches: Batches of the file.
        uri: URI of the file, for messages.

    Raises:
        BadFile: The batch can't be read.
    """
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise BadFile(f"'{uri}' is damaged ({first_line(error)}). Write the file again.", uri) from None


def canonicalize_file_column(
    uri: str, column: str, use: ColumnUse, values: pa.Array, time_unit: str | None
) -> pa.Array:
    """Convert a column of a file to its canonical type.

    Args:
        uri: URI of the file, for messages.
        column: Name of the column.
        use: Use of the column.
        values: Values of the column.
        time_unit: Unit of integer times, None if times are timestamps.

    Raises:
        BadFile: The values can't be converted.
    """
    try:
        array = canonicalize(column, use, values, time_unit, encode_strings=True)
        words = array.dictionary if pt.is_dictionary(array.type) else array
        if pt.is_string(words.type) or words.type == pa.list_(pa.string()):
            words.validate(full=True)
        return array
    except pa.ArrowInvalid as error:
        raise BadFile(f"'{uri}': column '{column}' contains text that is not UTF-8: {error}", uri) from None
    except UserError as error:
        raise BadFile(f"'{uri}': {first_line(error)}", uri) from None


def find_first_invalid(read: Callable[[Sequence[Any]], object], values: Sequence[Any]) -> int:
    """Return the index of the first value that `read` rejects.

    Args:
        read: Function that raises UserError for a sequence with an invalid value.
        values: Values, of which at least one is invalid.
    """

    def fails(row: int) -> bool:
        try:
            read(values[: row + 1])
        except UserError:
            return True
        return False

    return bisect_left(range(len(values) - 1), True, key=fails)


def describe_row(row: int) -> str:
    """Return the end of an error message, which names the first bad `row` of a file (counted from 0)."""
    return f" (the first is row {row} of the file, counted from 0)"


# Largest absolute value of a label. Models compute in float32, where larger labels become infinite.
MAX_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ValueCheck:
    """A check of one column.

    Attributes:
        column: Name of the column.
        wrong: Function that returns whether each of N rows is wrong, (N,) bool.
        says: Function that turns a wrong value into the text that follows the column's name in the error message.
    """

    column: str
    wrong: Callable[[LogRows], np.ndarray]
    says: Callable[[Any], str]

    def find(self, rows: LogRows) -> tuple[int, str] | None:
        """Return the index of the first wrong row and a message about it, None if all rows are right."""
        wrong = self.wrong(rows)
        if not wrong.any():
            return None
        row = int(wrong.argmax())
        column = rows.column(self.column)[row]
        # Read times as integers, because Python's datetime supports only the years 1 to 9999.
        value = column.cast(pa.int64()).as_py() if pt.is_timestamp(column.type) else column.as_py()
        return row, f"column '{self.column}' {self.says(value)}"


def _show(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else repr(value)


def log_value_checks(schema: Schema, max_time: int) -> list[ValueCheck]:
    """Return the value checks of an interaction log.

    Args:
        schema: Schema of the log.
        max_time: Latest valid time, in microseconds since 1970 UTC.
    """
    columns, split = schema.columns, schema.split
    keys = filter(None, (columns.user, columns.candidate, columns.time, columns.request))
    checks = [_no_null(column, "every row needs one") for column in keys]
    checks.append(_no_future(columns.time, max_time, "a request"))
    if columns.sampling_rate is not None:
        checks.append(_positive(columns.sampling_rate, 1e-30, 1.0, "columns.sampling_rate"))
    if columns.weight is not None:
        checks.append(_positive(columns.weight, 1e-20, 1e20, "columns.weight"))
    if split is not None:
        listed = ", ".join(repr(value) for values in split.values.values() for value in values)
        advice = "Add it to split.train, split.validation or split.test, or remove rows with this value"
        checks.append(
            ValueCheck(
                split.column,
                lambda rows: split_indices(rows.raw_column(split.column), split) < 0,
                lambda value: f"(split.column) has the unexpected value {_show(value)} (expected: {listed}). {advice}",
            )
        )
    checks += [_label_check(name, task.label, task.kind) for name, task in schema.tasks.items()]
    for name, feature in schema.features.items():
        checks += [_vector_check(name, column, length) for column, length in feature.list_lengths.items()]
    return checks


def event_value_checks(time: str, max_time: int) -> list[ValueCheck]:
    """Return the value checks of an event log.

    Args:
        time: Name of the time column.
        max_time: Latest valid time, in microseconds since 1970 UTC.
    """
    return [_no_null(time, "every event needs a time"), _no_future(time, max_time, "an event")]


def _no_null(column: str, need: str) -> ValueCheck:
    return ValueCheck(
        column,
        lambda rows: rows.raw_column(column).is_null().to_numpy(zero_copy_only=False),
        lambda _: f"is null, but {need}",
    )


def _no_future(column: str, max_time: int, row_kind: str) -> ValueCheck:
    def says(value: int) -> str:
        return (
            f"holds {row_kind} in the future, {format_time(value)}, later than {format_time(max_time)}. "
            "Fix the data, or set columns.time_unit if the integers have another unit"
        )

    return ValueCheck(column, lambda rows: rows.times(column) > max_time, says)


def _positive(column: str, least: float, most: float, setting: str) -> ValueCheck:
    def wrong(rows: LogRows) -> np.ndarray:
        values = rows.numbers(column)
        return ~((values >= least) & (values <= most))

    advice = f"which is not from {least:g} to {most:g}. Fix the data or remove {setting}"
    return ValueCheck(column, wrong, lambda value: f"holds {_show(value)}, {advice}")


def _label_check(task: str, label: str, kind: TaskKind) -> ValueCheck:
    def wrong(rows: LogRows) -> np.ndarray:
        values = rows.numbers(label)
        return ~kind.valid_labels[1](values) | (np.abs(values) > MAX_FLOAT32)

    return ValueCheck(label, wrong, lambda value: kind.label_error.format(task, _show(value)))


def _vector_check(feature: str, column: str, size: int) -> ValueCheck:
    def wrong(rows: LogRows) -> np.ndarray:
        lists = rows.column(column)
        if pt.is_null(lists.type):
            return np.zeros(len(lists), bool)
        lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        not_finite = ~np.isfinite(lists.flatten().to_numpy(zero_copy_only=False))  # null becomes NaN
        not_finite_rows = np.repeat(np.arange(len(lists)), lengths)[not_finite]
        wrong_length = (lengths != size) & lists.is_valid().to_numpy(zero_copy_only=False)
        return wrong_length | (np.bincount(not_finite_rows, minlength=len(lists)) > 0)

    advice = f"Feature '{feature}' needs lists of {size} finite numbers (its `size`), or null for a missing list"
    return ValueCheck(column, wrong, lambda value: f"holds {value!r:.100}. {advice}")
