"""Whether a log's files are good, as far as their footers tell when the log is opened.

Every problem of one file is a `BadFile` that names the file, the column and the rows. Values are checked while the log
is read, in `mmoe_rec.log.values`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError, first_line
from mmoe_rec.log.columns import canonical_type, element_type
from mmoe_rec.log.files import OPEN_AT_ONCE, FoundFile, is_remote, open_file, path_values
from mmoe_rec.settings.log_columns import Use

PathColumns = tuple[tuple[str, int | str | None], ...]


class BadFile(UserError):  # noqa: N818 - named for what it is about
    """An error about one file of a log; `address` is the file."""

    def __init__(self, message: str, address: str) -> None:
        super().__init__(message)
        self.address = address

    def __reduce__(self) -> tuple[type[BadFile], tuple[Any, ...]]:
        return BadFile, (str(self), self.address)


@dataclass(frozen=True)
class LogFile(FoundFile):
    """One Parquet file of a log: rows of its row groups, columns in its path, and those that hold true and false."""

    group_rows: tuple[int, ...]
    in_path: PathColumns = ()
    booleans: frozenset[str] = frozenset()

    @property
    def rows(self) -> int:
        """Rows of all groups."""
        return sum(self.group_rows)


@dataclass(frozen=True)
class LeftOut(FoundFile):
    """A file of a log that is not read, as it was then, and why."""

    reason: str


def format_time(microseconds: int) -> str:
    """A time as ISO 8601 in UTC, for messages."""
    return f"{np.datetime64(microseconds // 1_000_000, 's')}+00:00"


@contextmanager
def open_parquet(address: str, coded: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """A Parquet file; strings of the columns in `coded` are read dictionary-coded. Raises BadFile where it is not one,
    UserError where its place can't be reached."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_file(address))
            parquet = pq.ParquetFile(
                file,
                read_dictionary=coded,
                pre_buffer=is_remote(address),
                # As nanoseconds, the year 9999 that many systems write for "never" would wrap around.
                coerce_int96_timestamp_unit="us",
                page_checksum_verification=True,
            )
        except (pa.ArrowException, OSError) as error:
            why = first_line(error).rstrip(".")
            reason = f"is not a readable Parquet file: {why}; write it again, or move it out of the log"
            raise BadFile(f"'{address}' {reason}", address) from None
        yield stack.enter_context(parquet)


def word_of(kind: pa.DataType) -> str | None:
    """A canonical type in a word; None for that of an all-null column."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_list(kind):  # whatever a file calls the elements
        return f"list<{kind.value_type}>"
    return None if pa.types.is_null(kind) else str(kind)


def words_of(types: Mapping[str, pa.DataType]) -> dict[str, str]:
    """The types of columns in words, as far as they are known."""
    return {column: word for column, kind in types.items() if (word := word_of(kind)) is not None}


def check_files(
    found: Sequence[FoundFile],
    uses: dict[str, Use],
    time_unit: str | None,
    skip_bad_files: bool,
    fitted: Mapping[str, str],
) -> tuple[list[LogFile], dict[str, pa.DataType], list[LeftOut]]:
    """Reads every file's footer once; gives the files, each column's canonical type (none for a column that is null
    everywhere), and what was left out.

    fitted: types of columns, in words, that features were fitted to; other columns have that of most files. Raises
    BadFile for the first bad file, unless those are skipped.
    """

    integers = _find_integers(found, fitted)

    def read(file: FoundFile) -> tuple[LogFile, dict[str, pa.DataType]] | BadFile:
        try:
            return _read_footer(file, uses, time_unit, integers)
        except BadFile as problem:
            return problem

    with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
        footers = list(pool.map(read, found))
    good = [each for each in footers if not isinstance(each, BadFile)]
    types, problems = _common_types(good, uses, fitted)
    problems |= {each.address: each for each in footers if isinstance(each, BadFile)}
    bad = [file for file in found if file.address in problems]
    if bad and not skip_bad_files:
        raise problems[bad[0].address]
    left_out = [LeftOut(file.address, file.bytes, file.version, str(problems[file.address])) for file in bad]
    return [file for file, _ in good if file.address not in problems], types, left_out


def _find_integers(found: Sequence[FoundFile], fitted: Mapping[str, str]) -> set[str]:
    """The columns in paths that hold integers: those of such a fitted type, or whose values are 64-bit integers in all
    files."""
    pairs = (pair for file in found for pair in path_values(file.address).items())
    values = [(column, value) for column, value in pairs if value is not None]
    integers = {column for column, _ in values} - {column for column, value in values if not _is_integer(value)}
    integers -= {column for column, word in fitted.items() if word == "string"}
    return integers | {column for column, word in fitted.items() if word == "int64"}


def _read_footer(
    found: FoundFile, uses: dict[str, Use], time_unit: str | None, integers: set[str]
) -> tuple[LogFile, dict[str, pa.DataType]]:
    """The file, and the kinds of the columns that are used, none where it has no rows, so that none could be wrong."""
    address = found.address
    with open_parquet(address) as parquet:
        arrow, metadata = parquet.schema_arrow, parquet.metadata
        group_rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    paths = path_values(address)
    kinds, in_path, booleans = dict[str, pa.DataType](), list[tuple[str, int | str | None]](), set[str]()
    for column, use in uses.items():
        if (wrong := _find_wrong_column(column, use, arrow.names, paths)) is not None:
            raise BadFile(f"'{address}' {wrong}", address)
        if column in arrow.names:
            kind, place = arrow.field(column).type, ""
            if pa.types.is_boolean(element_type(kind)):
                booleans.add(column)
        else:
            value, place = paths[column], ", in the file's path"
            kind = pa.null() if value is None else pa.string()
            if value is not None and column in integers and _is_integer(value):
                kind = pa.int64()
            in_path.append((column, int(value) if value is not None and kind == pa.int64() else value))
        if any(group_rows):
            try:
                kinds[column] = canonical_type(column, use, kind, time_unit)
            except UserError as error:
                raise BadFile(f"'{address}': {error}{place}", address) from None
    file = LogFile(address, found.bytes, found.version, group_rows, tuple(in_path), frozenset(booleans))
    return file, kinds


def _find_wrong_column(column: str, use: Use, names: Sequence[str], paths: Mapping[str, str | None]) -> str | None:
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
    footers: Sequence[tuple[LogFile, dict[str, pa.DataType]]], uses: dict[str, Use], fitted: Mapping[str, str]
) -> tuple[dict[str, pa.DataType], dict[str, BadFile]]:
    """The fitted type of each column, or that of most files (the first of equals), and the files with another."""
    types: dict[str, pa.DataType] = {}
    deviating: dict[str, BadFile] = {}
    for column in uses:
        kinds = [(kinds.get(column, pa.null()), file.address) for file, kinds in footers]
        having = [(kind, address) for kind, address in kinds if not pa.types.is_null(kind)]
        if not having:
            continue
        common, count = Counter(kind for kind, _ in having).most_common(1)[0]
        word, share = word_of(common), f" ({count} of {len(having)} files have {common})"
        there = f"'{next(address for kind, address in having if kind == common)}'"
        if column in fitted:
            word, there, share = fitted[column], "the fitted features", ""
        for kind, address in having:
            if word_of(kind) == word:
                types[column] = kind
                continue
            message = (
                f"column '{column}' changes its type: {word} in {there}, {kind} in '{address}'; "
                f"write all files with one type{share}"
            )
            deviating.setdefault(address, BadFile(message, address))
    return types, deviating
