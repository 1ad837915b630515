"""Whether a log's files are good: footers when a log is opened, values while it is read.

Every problem of one file is a `BadFile` that names the file, the column and the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.features.columns import Use, canonical_type
from mmoe_rec.features.rows import LogRows
from mmoe_rec.files import FoundFile, first_line, is_remote, open_file, path_values
from mmoe_rec.schema import Schema

_OPEN_AT_ONCE = 16
_LARGEST_LABEL = float(np.finfo(np.float32).max)  # models compute in float32
Partition = tuple[tuple[str, int | str | None], ...]


class BadFile(UserError):  # noqa: N818 - named for what it is about
    """An error about one file of a log; `address` is the file."""

    def __init__(self, message: str, address: str) -> None:
        super().__init__(message)
        self.address = address

    def __reduce__(self) -> tuple[type[BadFile], tuple[str, str]]:
        return BadFile, (str(self), self.address)


@dataclass(frozen=True)
class LogFile:
    """One Parquet file of a log.

    version: changes when the file is written again. partition: columns that stand in its path.
    """

    address: str
    rows: int
    bytes: int
    version: str
    group_rows: tuple[int, ...]
    partition: Partition = ()


@dataclass(frozen=True)
class LeftOut:
    """A file of a log that is not read, and why."""

    address: str
    reason: str


@dataclass(frozen=True)
class _Footer:
    found: FoundFile
    group_rows: tuple[int, ...]
    kinds: dict[str, pa.DataType]
    in_path: dict[str, str | None]

    @property
    def rows(self) -> int:
        return sum(self.group_rows)


def format_time(microseconds: int) -> str:
    """A time as ISO 8601 in UTC, for messages."""
    return f"{np.datetime64(microseconds // 1_000_000, 's')}+00:00"


@contextmanager
def open_parquet(address: str, coded: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """A Parquet file; strings of the columns in `coded` are read dictionary-coded.

    Raises BadFile where it is none, UserError where its place can't be reached.
    """
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
            reason = f"is not a readable Parquet file: {first_line(error)}; write it again, or move it out of the log"
            raise BadFile(f"'{address}' {reason}", address) from None
        yield stack.enter_context(parquet)


def check_files(
    found: Sequence[FoundFile], uses: dict[str, Use], time_unit: str | None, skip_bad_files: bool
) -> tuple[list[LogFile], dict[str, pa.DataType], list[LeftOut]]:
    """Reads every file's footer once.

    Returns:
        the files, each column's canonical type (none for a column that is null everywhere), and what was left out.

    Raises:
        BadFile: the first bad file, unless those are skipped.
    """
    footers = _footers(found, uses, time_unit)
    problems = {each.address: each for each in footers if isinstance(each, BadFile)}
    good = [each for each in footers if isinstance(each, _Footer)]
    integers = _integers_in_paths(good)
    for footer in good:
        try:
            _add_kinds_in_path(footer, uses, time_unit, integers)
        except BadFile as problem:
            problems[footer.found.address] = problem
    good = [each for each in good if each.found.address not in problems]
    types, deviating = _majority(good, uses)
    problems |= deviating
    bad = [problems[file.address] for file in found if file.address in problems]
    if bad and not skip_bad_files:
        raise bad[0]
    files = []
    for each in good:
        if (file := each.found).address not in problems:
            partition = tuple((c, _in_path(v, c in integers)) for c, v in each.in_path.items())
            files.append(LogFile(file.address, each.rows, file.bytes, file.version, each.group_rows, partition))
    return files, types, [LeftOut(problem.address, str(problem)) for problem in bad]


def _footers(found: Sequence[FoundFile], uses: dict[str, Use], time_unit: str | None) -> list[_Footer | BadFile]:
    with ThreadPoolExecutor(_OPEN_AT_ONCE) as pool:
        try:
            return list(pool.map(lambda file: _footer(file, uses, time_unit), found))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _footer(found: FoundFile, uses: dict[str, Use], time_unit: str | None) -> _Footer | BadFile:
    address = found.address
    try:
        with open_parquet(address) as parquet:
            arrow, metadata = parquet.schema_arrow, parquet.metadata
            group_rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    except BadFile as problem:
        return problem
    paths = path_values(address)
    in_path = {column: paths[column] for column in uses if column not in arrow.names and column in paths}
    kinds = {}
    for column, use in uses.items():
        if column in in_path:
            if use == "time":
                return BadFile(
                    f"'{address}' has column '{column}' in its path only; a time is not read from a path, "
                    "write it as a column of the file",
                    address,
                )
            continue
        if column not in arrow.names:
            has = f"it has {', '.join(sorted(arrow.names))}" if arrow.names else "it has no columns at all"
            return BadFile(f"'{address}' has no column '{column}'; {has}", address)
        if (times := arrow.names.count(column)) > 1:
            return BadFile(f"'{address}' has {times} columns called '{column}'; rename all but one", address)
        if any(group_rows):  # A file without rows has no values whose type could be wrong.
            try:
                kinds[column] = canonical_type(column, use, arrow.field(column).type, time_unit)
            except UserError as error:
                return BadFile(f"'{address}': {error}", address)
    return _Footer(found, group_rows, kinds, in_path)


def _integers_in_paths(footers: Iterable[_Footer]) -> set[str]:
    """Columns in paths whose values are 64-bit integers in all files."""
    values: dict[str, set[str]] = {}
    for footer in footers:
        for column, value in footer.in_path.items():
            if value is not None:
                values.setdefault(column, set()).add(value)
    return {column for column, found in values.items() if all(map(_is_integer, found))}


def _is_integer(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and -(2**63) <= int(text) < 2**63


def _in_path(value: str | None, integer: bool) -> int | str | None:
    return int(value) if integer and value is not None else value


def _add_kinds_in_path(footer: _Footer, uses: dict[str, Use], time_unit: str | None, integers: set[str]) -> None:
    if not footer.rows:
        return
    address = footer.found.address
    for column, value in footer.in_path.items():
        found = pa.null() if value is None else pa.int64() if column in integers else pa.string()
        try:
            footer.kinds[column] = canonical_type(column, uses[column], found, time_unit)
        except UserError as error:
            raise BadFile(f"'{address}': {error}, in the file's path", address) from None


def _majority(footers: Sequence[_Footer], uses: dict[str, Use]) -> tuple[dict[str, pa.DataType], dict[str, BadFile]]:
    """The type of each column that most files have (the first of equals), and the files that have another."""
    types: dict[str, pa.DataType] = {}
    deviating: dict[str, BadFile] = {}
    for column in uses:
        having = [(each.kinds[column], each.found.address) for each in footers if column in each.kinds]
        having = [(kind, address) for kind, address in having if not pa.types.is_null(kind)]
        if not having:
            continue
        counts = Counter(kind for kind, _ in having)
        types[column], count = counts.most_common(1)[0]
        example = next(address for kind, address in having if kind == types[column])
        for kind, address in having:
            if kind != types[column]:
                message = (
                    f"column '{column}' changes its type: {types[column]} in '{example}', {kind} in '{address}'; "
                    f"write all files with one type ({count} of {len(having)} files have {types[column]})"
                )
                deviating.setdefault(address, BadFile(message, address))
    return types, deviating


@dataclass
class Wrong:
    """The wrong values of a column in one file: how many rows, the first one's number and value, and the range."""

    count: int = 0
    row: int = 0
    first: float = 0
    least: float = 0
    largest: float = 0

    def add(self, values: np.ndarray, mask: np.ndarray, start: int) -> None:
        """Counts the rows of `values` (N,) where `mask` (N,) is true; the first of them is the file's row `start`."""
        if not mask.any():
            return
        wrong = values[mask]
        if not self.count:
            self.row, self.first = start + int(mask.argmax()), wrong[0]
            self.least, self.largest = wrong[0], wrong[0]
        self.count += len(wrong)
        self.least, self.largest = min(self.least, wrong.min()), max(self.largest, wrong.max())


@dataclass(frozen=True)
class ValueCheck:
    """A check of one column: `values` (N,) of rows, which of them are `wrong`, and what one `says` of those."""

    column: str
    values: Callable[[LogRows], np.ndarray]
    wrong: Callable[[np.ndarray], np.ndarray]
    says: Callable[[Wrong], str]


def log_value_checks(schema: Schema, now: int) -> list[ValueCheck]:
    """What a log's values must hold so that features and labels mean something."""
    columns = schema.columns
    keys = filter(None, (columns.user, columns.candidate, columns.time, columns.request))
    checks = [_no_null(column, "every row needs one") for column in keys]
    checks.append(_no_future(columns.time, now, "requests"))
    if (rate := columns.sampling_rate) is not None:
        checks.append(
            ValueCheck(
                rate,
                lambda rows: rows.numbers(rate),
                lambda values: ~((values > 0) & (values <= 1)),
                lambda found: (
                    f"column '{rate}' holds {'null' if np.isnan(found.first) else f'{found.first:g}'} "
                    f"({found.count} rows are not above 0 and at most 1); fix the data or remove columns.sampling_rate"
                ),
            )
        )
    return checks + [_label_check(name, task.label, task.kind) for name, task in schema.tasks.items()]


def event_value_checks(time: str, now: int) -> list[ValueCheck]:
    """What the values of a log of events must hold."""
    return [_no_null(time, "every event needs a time"), _no_future(time, now, "events")]


def _no_null(column: str, need: str) -> ValueCheck:
    return ValueCheck(
        column,
        lambda rows: rows.coded(column).is_null().to_numpy(zero_copy_only=False),
        lambda nulls: nulls,
        lambda found: f"column '{column}' is null in {found.count} rows; {need}",
    )


def _no_future(column: str, now: int, what: str) -> ValueCheck:
    return ValueCheck(
        column,
        lambda rows: rows.times(column),
        lambda times: times > now,
        lambda found: (
            f"column '{column}' holds {found.count} {what} of the future: {what} from "
            f"{format_time(int(found.least))} to {format_time(int(found.largest))}, later than {format_time(now)}; "
            "fix the data, or set `columns.time_unit` if the column holds integers of another unit"
        ),
    )


def _label_check(task: str, label: str, kind: str) -> ValueCheck:
    if kind == "regression":
        return ValueCheck(
            label,
            lambda rows: rows.numbers(label),
            lambda values: np.abs(values) > _LARGEST_LABEL,
            lambda found: (
                f"label column '{label}' of task '{task}' holds "
                f"{'an infinite value' if np.isinf(found.first) else f'{found.first:g}, too large for 32 bits'}; "
                f"make it null ({found.count} rows)"
            ),
        )
    return ValueCheck(
        label,
        lambda rows: rows.numbers(label),
        lambda values: ~np.isnan(values) & (values != 0) & (values != 1),
        lambda found: (
            f"label column '{label}' of binary task '{task}' holds {found.first:g} "
            f"({found.count} rows are neither 0 nor 1); fix the data or set the task's kind to regression"
        ),
    )
