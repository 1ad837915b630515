"""Whether a log's files are good, as far as their footers tell when the log is opened.

Every problem of one file is a `BadFile` that names the file, the column and the rows. Values are checked while the log
is read, in `mmoe_rec.log.values`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError, first_line
from mmoe_rec.log.columns import canonical_type, element_type
from mmoe_rec.log.files import OPEN_AT_ONCE, FoundFile, is_remote, open_file, path_values
from mmoe_rec.settings.columns import Use

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


@dataclass(frozen=True)
class _Footer:
    """What is read of a file: kinds of the columns that are used, and the text of those that stand in its path."""

    file: LogFile
    kinds: dict[str, pa.DataType]
    in_path: dict[str, str | None]


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

    def read(file: FoundFile) -> _Footer | BadFile:
        try:
            return _read_footer(file, uses, time_unit)
        except BadFile as problem:
            return problem

    with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
        read_files = list(pool.map(read, found))
    footers = [each for each in read_files if isinstance(each, _Footer)]
    problems = {each.address: each for each in read_files if isinstance(each, BadFile)}
    integers = _find_integers(footers, fitted)
    for each in footers:
        if (problem := _add_path_kinds(each, uses, integers, time_unit)) is not None:
            problems[problem.address] = problem
    footers = [each for each in footers if each.file.address not in problems]
    types, deviating = _common_types(footers, uses, fitted)
    problems |= deviating
    bad = [file for file in found if file.address in problems]
    if bad and not skip_bad_files:
        raise problems[bad[0].address]
    left_out = [LeftOut(file.address, file.bytes, file.version, str(problems[file.address])) for file in bad]
    files = []
    for each in footers:
        if each.file.address not in problems:
            in_path = tuple((c, int(v) if v is not None and c in integers else v) for c, v in each.in_path.items())
            files.append(replace(each.file, in_path=in_path))
    return files, types, left_out


def _find_integers(footers: Sequence[_Footer], fitted: Mapping[str, str]) -> set[str]:
    """The columns in paths that hold integers: those of such a fitted type, or whose values are 64-bit integers in all
    files."""
    values = [(column, value) for each in footers for column, value in each.in_path.items() if value is not None]
    integers = {column for column, _ in values} - {column for column, value in values if not _is_integer(value)}
    integers -= {column for column, word in fitted.items() if word == "string"}
    return integers | {column for column, word in fitted.items() if word == "int64"}


def _add_path_kinds(footer: _Footer, uses: dict[str, Use], integers: set[str], time_unit: str | None) -> BadFile | None:
    """Adds the kinds of columns in a file's path, if it has rows. Returns what is wrong with one."""
    address = footer.file.address
    for column, value in footer.in_path.items() if footer.file.rows else ():
        kind = pa.null() if value is None else pa.string()
        if column in integers and value is not None and _is_integer(value):
            kind = pa.int64()
        try:
            footer.kinds[column] = canonical_type(column, uses[column], kind, time_unit)
        except UserError as error:
            return BadFile(f"'{address}': {error}, in the file's path", address)
    return None


def _read_footer(found: FoundFile, uses: dict[str, Use], time_unit: str | None) -> _Footer:
    address = found.address
    with open_parquet(address) as parquet:
        arrow, metadata = parquet.schema_arrow, parquet.metadata
        group_rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    paths = path_values(address)
    in_path = {column: paths[column] for column in uses if column not in arrow.names and column in paths}
    kinds = {}
    for column, use in uses.items():
        if (wrong := _find_wrong_column(column, use, arrow.names, paths)) is not None:
            raise BadFile(f"'{address}' {wrong}", address)
        if column not in in_path and any(group_rows):  # without rows, there are no values whose type could be wrong
            try:
                kinds[column] = canonical_type(column, use, arrow.field(column).type, time_unit)
            except UserError as error:
                raise BadFile(f"'{address}': {error}", address) from None
    elements = {column: element_type(arrow.field(column).type) for column in kinds}
    booleans = frozenset(column for column, kind in elements.items() if pa.types.is_boolean(kind))
    return _Footer(LogFile(address, found.bytes, found.version, group_rows, (), booleans), kinds, in_path)


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
    footers: Sequence[_Footer], uses: dict[str, Use], fitted: Mapping[str, str]
) -> tuple[dict[str, pa.DataType], dict[str, BadFile]]:
    """The fitted type of each column, or that of most files (the first of equals), and the files with another."""
    types: dict[str, pa.DataType] = {}
    deviating: dict[str, BadFile] = {}
    for column in uses:
        having = [(each.kinds[column], each.file.address) for each in footers if column in each.kinds]
        having = [(kind, address) for kind, address in having if not pa.types.is_null(kind)]
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
