"""Whether a log's files are good: their footers when the log is opened, and their values while it is read.

Every problem of one file is a `BadFile` that names the file, the column and the first bad row. Values are checked for
what features and labels need in order to mean something.
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
from mmoe_rec.log.columns import canonical_type, canonicalize, element_type
from mmoe_rec.log.files import MAX_OPEN_FILES, FileInfo, is_remote, open_file, parse_path_columns
from mmoe_rec.log.rows import LogRows, split_indices
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import Schema
from mmoe_rec.task_kinds.task_kind import TaskKind

PathColumns = tuple[tuple[str, int | str | None], ...]


class BadFile(UserError):  # noqa: N818 - named for what it is about
    """An error about one file of a log; `uri` is the file."""

    def __init__(self, message: str, uri: str) -> None:
        super().__init__(message)
        self.uri = uri

    def __reduce__(self) -> "tuple[type[BadFile], tuple[Any, ...]]":
        return BadFile, (str(self), self.uri)


@dataclass(frozen=True)
class LogFile(FileInfo):
    """One Parquet file of a log: rows of its row groups, columns in its path, and those that hold true and false."""

    row_group_sizes: tuple[int, ...]
    path_columns: PathColumns = ()
    booleans: frozenset[str] = frozenset()

    @property
    def rows(self) -> int:
        """Rows of all groups."""
        return sum(self.row_group_sizes)


@dataclass(frozen=True)
class SkippedFile(FileInfo):
    """A file of a log that is not read, as it was then, and why."""

    reason: str


def format_time(microseconds: int) -> str:
    """A time as ISO 8601 in UTC, for messages."""
    return f"{np.datetime64(microseconds // 1_000_000, 's')}+00:00"


@contextmanager
def open_parquet(uri: str, dictionary_columns: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """A Parquet file; strings of the columns in `dictionary_columns` are read dictionary-coded. Raises BadFile where it
    is not one, UserError where its place can't be reached."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_file(uri))
            parquet = pq.ParquetFile(
                file,
                read_dictionary=dictionary_columns,
                pre_buffer=is_remote(uri),
                # As nanoseconds, the year 9999 that many systems write for "never" would wrap around.
                coerce_int96_timestamp_unit="us",
                page_checksum_verification=True,
            )
        except (pa.ArrowException, OSError) as error:
            why = first_line(error).rstrip(".")
            reason = f"is not a readable Parquet file: {why}; write it again, or move it out of the log"
            raise BadFile(f"'{uri}' {reason}", uri) from None
        yield stack.enter_context(parquet)


def type_name(kind: pa.DataType) -> str | None:
    """A canonical type in a word; None for that of an all-null column."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_list(kind):  # whatever a file calls the elements
        return f"list<{kind.value_type}>"
    return None if pa.types.is_null(kind) else str(kind)


def type_names(types: Mapping[str, pa.DataType]) -> dict[str, str]:
    """The types of columns in words, as far as they are known."""
    return {column: word for column, kind in types.items() if (word := type_name(kind)) is not None}


def check_files(
    found: Sequence[FileInfo],
    uses: dict[str, ColumnUse],
    time_unit: str | None,
    skip_bad_files: bool,
    fitted: Mapping[str, str],
) -> tuple[list[LogFile], dict[str, pa.DataType], list[SkippedFile]]:
    """Reads every file's footer once; gives the files, each column's canonical type (none for a column that is null
    everywhere), and what was left out.

    fitted: types of columns, in words, that features were fitted to; other columns have that of most files. Raises
    BadFile for the first bad file, unless those are skipped.
    """

    integers = _find_integers(found, fitted)

    def read(file: FileInfo) -> tuple[LogFile, dict[str, pa.DataType]] | BadFile:
        try:
            return _read_footer(file, uses, time_unit, integers)
        except BadFile as problem:
            return problem

    with ThreadPoolExecutor(MAX_OPEN_FILES) as pool:
        footers = list(pool.map(read, found))
    good = [each for each in footers if not isinstance(each, BadFile)]
    types, problems = _common_types(good, uses, fitted)
    problems |= {each.uri: each for each in footers if isinstance(each, BadFile)}
    bad = [file for file in found if file.uri in problems]
    if bad and not skip_bad_files:
        raise problems[bad[0].uri]
    skipped = [SkippedFile(file.uri, file.bytes, file.version, str(problems[file.uri])) for file in bad]
    return [file for file, _ in good if file.uri not in problems], types, skipped


def _find_integers(found: Sequence[FileInfo], fitted: Mapping[str, str]) -> set[str]:
    """The columns in paths that hold integers: those of such a fitted type, or whose values are 64-bit integers in all
    files."""
    pairs = (pair for file in found for pair in parse_path_columns(file.uri).items())
    values = [(column, value) for column, value in pairs if value is not None]
    integers = {column for column, _ in values} - {column for column, value in values if not _is_integer(value)}
    integers -= {column for column, word in fitted.items() if word == "string"}
    return integers | {column for column, word in fitted.items() if word == "int64"}


def _read_footer(
    found: FileInfo, uses: dict[str, ColumnUse], time_unit: str | None, integers: set[str]
) -> tuple[LogFile, dict[str, pa.DataType]]:
    """The file, and the kinds of the columns that are used, none where it has no rows, so that none could be wrong."""
    uri = found.uri
    with open_parquet(uri) as parquet:
        arrow, metadata = parquet.schema_arrow, parquet.metadata
        row_group_sizes = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    paths = parse_path_columns(uri)
    kinds, path_columns, booleans = dict[str, pa.DataType](), list[tuple[str, int | str | None]](), set[str]()
    for column, use in uses.items():
        if (wrong := _find_wrong_column(column, use, arrow.names, paths)) is not None:
            raise BadFile(f"'{uri}' {wrong}", uri)
        if column in arrow.names:
            kind, place = arrow.field(column).type, ""
            if pa.types.is_boolean(element_type(kind)):
                booleans.add(column)
        else:
            value, place = paths[column], ", in the file's path"
            kind = pa.null() if value is None else pa.string()
            if value is not None and column in integers and _is_integer(value):
                kind = pa.int64()
            path_columns.append((column, int(value) if value is not None and kind == pa.int64() else value))
        if any(row_group_sizes):
            try:
                kinds[column] = canonical_type(column, use, kind, time_unit)
            except UserError as error:
                raise BadFile(f"'{uri}': {error}{place}", uri) from None
    file = LogFile(uri, found.bytes, found.version, row_group_sizes, tuple(path_columns), frozenset(booleans))
    return file, kinds


def _find_wrong_column(
    column: str, use: ColumnUse, names: Sequence[str], paths: Mapping[str, str | None]
) -> str | None:
    """What is wrong with where a file has a column, None for nothing. names, paths: its columns, and those in its
    path."""
    if (times := names.count(column)) > 1:
        return f"has {times} columns called '{column}'; rename all but one"
    if times or (column in paths and use != "time"):
        return None
    if column in paths:
        return (
            f"has column '{column}' in its path only; a time is not read from a path, write it as a column of the file"
        )
    every = sorted({*names, *paths})
    near = get_close_matches(column, every, 1)
    meant = f" (did you mean '{near[0]}'?)" if near else ""
    has = f"it has {', '.join(every)}{meant}" if every else "it has no columns at all"
    return f"has no column '{column}'; {has}"


def _is_integer(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and -(2**63) <= int(text) < 2**63


def _common_types(
    footers: Sequence[tuple[LogFile, dict[str, pa.DataType]]], uses: dict[str, ColumnUse], fitted: Mapping[str, str]
) -> tuple[dict[str, pa.DataType], dict[str, BadFile]]:
    """The fitted type of each column, or that of most files (the first of equals), and the files with another."""
    types: dict[str, pa.DataType] = {}
    deviating: dict[str, BadFile] = {}
    for column in uses:
        kinds = [(kinds.get(column, pa.null()), file.uri) for file, kinds in footers]
        having = [(kind, uri) for kind, uri in kinds if not pa.types.is_null(kind)]
        if not having:
            continue
        common, count = Counter(kind for kind, _ in having).most_common(1)[0]
        word, share = type_name(common), f" ({count} of {len(having)} files have {common})"
        there = f"'{next(uri for kind, uri in having if kind == common)}'"
        if column in fitted:
            word, there, share = fitted[column], "the fitted features", ""
        for kind, uri in having:
            if type_name(kind) == word:
                types[column] = kind
                continue
            message = (
                f"column '{column}' changes its type: {word} in {there}, {kind} in '{uri}'; "
                f"write all files with one type{share}"
            )
            deviating.setdefault(uri, BadFile(message, uri))
    return types, deviating


# Values


def read_column_names(uri: str) -> set[str]:
    """Those of a file, with those that stand in its path. Raises BadFile where it is no Parquet file."""
    with open_parquet(uri) as parquet:
        return {*parquet.schema_arrow.names, *parse_path_columns(uri)}


def add_path_columns(table: pa.Table, uri: str, names: Iterable[str]) -> pa.Table:
    """A file's columns, with those that stand in its path instead, of these names, as strings."""
    for name, value in parse_path_columns(uri).items():
        if name in set(names) - set(table.column_names):
            table = table.append_column(name, pa.array([value] * len(table), pa.string()))
    return table


def next_batch(batches: Iterator[pa.RecordBatch], uri: str) -> pa.RecordBatch | None:
    """The next batch of a file, None after the last. Raises BadFile where it can't be read."""
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise BadFile(f"'{uri}' is damaged: {first_line(error)}; write the file again", uri) from None


def canonicalize_file_column(
    uri: str, column: str, use: ColumnUse, values: pa.Array, time_unit: str | None
) -> pa.Array:
    """A column in its canonical type. Raises BadFile."""
    try:
        array = canonicalize(column, use, values, time_unit, encode_strings=True)
        words = array.dictionary if pt.is_dictionary(array.type) else array
        if pt.is_string(words.type) or words.type == pa.list_(pa.string()):
            words.validate(full=True)
        return array
    except pa.ArrowInvalid as error:
        raise BadFile(f"'{uri}': column '{column}' holds text that is not UTF-8: {error}", uri) from None
    except UserError as error:
        raise BadFile(f"'{uri}': {first_line(error)}", uri) from None


def find_first_invalid(read: Callable[[Sequence[Any]], object], values: Sequence[Any]) -> int:
    """The first row that `read` can't read, as it raises UserError. It can't read all of them."""

    def fails(row: int) -> bool:
        try:
            read(values[: row + 1])
        except UserError:
            return True
        return False

    return bisect_left(range(len(values) - 1), True, key=fails)


def describe_row(row: int) -> str:
    """The end of a sentence about rows of a file."""
    return f" (the first is row {row} of the file, counted from 0)"


MAX_FLOAT32 = float(np.finfo(np.float32).max)  # models compute in float32


@dataclass(frozen=True)
class ValueCheck:
    """A check of one column: which of N rows are `wrong`, (N,) bool, and what the error `says` of a wrong value."""

    column: str
    wrong: Callable[[LogRows], np.ndarray]
    says: Callable[[Any], str]

    def find(self, rows: LogRows) -> tuple[int, str] | None:
        """The first wrong row, and what is wrong with it; None where all are right."""
        wrong = self.wrong(rows)
        if not wrong.any():
            return None
        row = int(wrong.argmax())
        column = rows.column(self.column)[row]
        # A time may lie beyond the years that Python has.
        value = column.cast(pa.int64()).as_py() if pt.is_timestamp(column.type) else column.as_py()
        return row, f"column '{self.column}' {self.says(value)}"


def _show(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else repr(value)


def log_value_checks(schema: Schema, max_time: int) -> list[ValueCheck]:
    """What a log's values must hold so that features and labels mean something."""
    columns, split = schema.columns, schema.split
    keys = filter(None, (columns.user, columns.candidate, columns.time, columns.request))
    checks = [_no_null(column, "every row needs one") for column in keys]
    checks.append(_no_future(columns.time, max_time, "a request"))
    if columns.sampling_rate is not None:
        checks.append(_positive(columns.sampling_rate, 1e-30, 1.0, "columns.sampling_rate"))
    if columns.weight is not None:
        checks.append(_positive(columns.weight, 1e-20, 1e20, "columns.weight"))
    if split is not None:
        listed = ", ".join(repr(each) for values in split.values.values() for each in values)
        advice = "list it under split.train, split.validation or split.test, or leave such rows out"
        checks.append(
            ValueCheck(
                split.column,
                lambda rows: split_indices(rows.raw_column(split.column), split) < 0,
                lambda value: f"of split.column holds {_show(value)}, and not one of {listed}: {advice}",
            )
        )
    checks += [_label_check(name, task.label, task.kind) for name, task in schema.tasks.items()]
    for name, feature in schema.features.items():
        checks += [_vector_check(name, column, length) for column, length in feature.list_lengths.items()]
    return checks


def event_value_checks(time: str, max_time: int) -> list[ValueCheck]:
    """What the values of a log of events must hold."""
    return [_no_null(time, "every event needs a time"), _no_future(time, max_time, "an event")]


def _no_null(column: str, need: str) -> ValueCheck:
    return ValueCheck(
        column,
        lambda rows: rows.raw_column(column).is_null().to_numpy(zero_copy_only=False),
        lambda _: f"is null; {need}",
    )


def _no_future(column: str, max_time: int, what: str) -> ValueCheck:
    def says(value: int) -> str:
        return (
            f"holds {what} in the future, {format_time(value)}, later than {format_time(max_time)}; fix the "
            "data, or set "
            "`columns.time_unit` if the column holds integers in another unit"
        )

    return ValueCheck(column, lambda rows: rows.times(column) > max_time, says)


def _positive(column: str, least: float, most: float, setting: str) -> ValueCheck:
    def wrong(rows: LogRows) -> np.ndarray:
        values = rows.numbers(column)
        return ~((values >= least) & (values <= most))

    advice = f"which is not from {least:g} to {most:g}; fix the data or remove {setting}"
    return ValueCheck(column, wrong, lambda value: f"holds {_show(value)}, {advice}")


def _label_check(task: str, label: str, kind: TaskKind) -> ValueCheck:
    def wrong(rows: LogRows) -> np.ndarray:
        values = rows.numbers(label)
        return ~kind.valid_labels[1](values) | (np.abs(values) > MAX_FLOAT32)

    return ValueCheck(label, wrong, lambda value: f"of {kind.label_error.format(task, _show(value))}")


def _vector_check(feature: str, column: str, size: int) -> ValueCheck:
    def wrong(rows: LogRows) -> np.ndarray:
        lists = rows.column(column)
        if pt.is_null(lists.type):
            return np.zeros(len(lists), bool)
        lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        not_finite = ~np.isfinite(lists.flatten().to_numpy(zero_copy_only=False))  # null is NaN
        row = np.repeat(np.arange(len(lists)), lengths)[not_finite]
        other_length = (lengths != size) & lists.is_valid().to_numpy(zero_copy_only=False)
        return other_length | (np.bincount(row, minlength=len(lists)) > 0)

    advice = f"feature '{feature}' needs lists of {size} finite numbers (its `size`), or null instead of a whole list"
    return ValueCheck(column, wrong, lambda value: f"holds {value!r:.100}; {advice}")
