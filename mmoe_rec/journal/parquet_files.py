"""Closed segments as files of the logs: what counts of their rows, for `build`, `--extend` and training to read.

Each segment gives at most one file a log, `journal-ID-SEGMENT.parquet`, with the rows that a follower of the journal
gives, in its order, and the columns and types of the log's other files. A file that is there is left as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.journal.checkpoints import duplicates_after, save_checkpoint
from mmoe_rec.journal.duplicates import FORGET_AFTER_DAYS, Counts, Taken
from mmoe_rec.journal.folder import open_folder
from mmoe_rec.journal.segments import segment_numbers
from mmoe_rec.log.columns import canonical, column_uses, event_uses
from mmoe_rec.log.files import MAGIC, find_local, is_remote, local_path, would_find
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.schema import Schema

_NAME = re.compile(r"journal-([0-9a-f]{32})-([0-9]+)\.parquet")
_COLUMNS = b"mmoe_rec.columns"
"""Metadata of a file: the columns that the model read for which it was written, as a JSON list; others are null."""


@dataclass(frozen=True)
class Written:
    """files: those of the segments, also those that were there; counts: log -> rows by what became of them; unknown:
    log of events that the schema does not have -> rows, which are in no file; early: rows left out by
    `later_than`."""

    files: list[Path]
    counts: Mapping[str | None, Counts]
    unknown: Mapping[str, int]
    early: int = 0


def write_files(
    journal: str | Path,
    schema: Schema,
    through: int,
    log: str,
    after: int = 0,
    forget_after_days: int = FORGET_AFTER_DAYS,
    later_than: int | None = None,
    rest: Callable[[pa.Table], pa.Table] | None = None,
) -> Written:
    """Writes the files of the segments later than `after` up to `through`, and keeps what duplicates are remembered.

    Args:
        through: number of a closed segment.
        after: the last one whose rows the logs hold, 0 for none; files of logs of events that only this model has are
            written of earlier ones, too.
        later_than: leave out rows of this time (microseconds) and before, as a server does whose tables know nothing
            of the journal.
        rest: gives those rows of the interaction log that are to be in a file; None for all. It is asked for each file
            that is not there yet.
        log: where the interaction log is (`data.log`); other logs are where the schema has them (`events.NAME.path`).

    Raises:
        UserError: a place can't take files, the journal is damaged, or a segment is missing or not closed.
    """
    writing = _Writing(open_folder(Path(journal), create=False).hex(), schema, log, later_than, rest)
    # Segments that the logs hold may have rows of a log that no model had which has been refreshed so far.
    duplicates, follower = duplicates_after(journal, schema, after, forget_after_days, unknown=writing.add)
    if (closed := segment_numbers(follower.folder)[-1] - 1) < through:
        raise UserError(f"segment {through} of the journal '{follower.folder}' is not closed; the last one is {closed}")
    unknown: dict[str, int] = {}
    for segment in range(after + 1, through + 1):
        while batches := follower.read(through=segment):
            writing.add(segment, duplicates.take(batches))
        unknown = dict.fromkeys(duplicates.unknown, segment) | unknown
    writing.flush()
    if through:
        save_checkpoint(follower.folder, through, duplicates, writing.segments, unknown)
    return Written(writing.files, writing.counts, duplicates.unknown, writing.early)


def check_columns(journal: str, schema: Schema, log: str, held: Mapping[str | None, int]) -> None:
    """Raises UserError where files of a journal, by its id, lack columns that a model reads, as the refresh of another
    model wrote them.

    held: log -> the last segment whose file the model's tables hold; only later ones are looked at.
    """
    for source, (_, place) in _places(schema, log).items():
        for path in [] if is_remote(place) else find_local(local_path(place))[0]:
            named = _NAME.fullmatch(path.name)
            if named is None or named[1] != journal or int(named[2]) <= held.get(source, 0):
                continue
            try:
                written = json.loads((pq.read_schema(path).metadata or {})[_COLUMNS])
            except (pa.ArrowException, OSError, KeyError):  # it is of an earlier version, or the build tells of it
                continue
            if missing := sorted(_uses(schema)[source].keys() - set(written)):
                raise UserError(
                    f"'{path}' was written by the refresh of a model that does not read the column '{missing[0]}', so "
                    "values of it that callers sent are not in this file: models that share a journal must read the "
                    "same columns; where no caller sent the column then, as it is new, run refresh without --journal "
                    "once, which takes the file as it is, with nulls"
                )


def _uses(schema: Schema) -> dict[str | None, dict[str, Use]]:
    """Log -> its columns."""
    uses: dict[str | None, dict[str, Use]] = {None: column_uses(schema)}
    return uses | {name: event_uses(schema, name) for name in schema.events}


def _places(schema: Schema, log: str) -> dict[str | None, tuple[str, str]]:
    """Log -> the setting that says where it is, and its value."""
    places: dict[str | None, tuple[str, str]] = {None: ("data.log", log)}
    return places | {name: (f"data.events.{name}.path", each.path) for name, each in schema.events.items()}


class _Writing:
    """Writes the rows that it is given, segment after segment, into one file for each segment and log.

    files: also those that were there; segments: log -> the last segment that has a file.
    """

    def __init__(
        self,
        journal: str,
        schema: Schema,
        log: str,
        later_than: int | None,
        rest: Callable[[pa.Table], pa.Table] | None,
    ) -> None:
        self._journal, self._schema, self._later_than, self._rest = journal, schema, later_than, rest
        self._uses, self._places = _uses(schema), _places(schema, log)
        self._segment, self._tables = 0, dict[str | None, list[pa.Table]]()
        self.files, self.counts, self.early = list[Path](), dict[str | None, Counts](), 0
        self.segments: dict[str | None, int] = {}

    def add(self, segment: int, found: Mapping[str | None, Taken]) -> None:
        """Takes rows of a segment that is not earlier than the one before."""
        if segment != self._segment:
            self.flush()
            self._segment = segment
        for source, taken in found.items():
            later = _later(taken, self._schema, self._later_than)
            self.early += len(taken.table) - len(later)
            self._tables.setdefault(source, []).append(later)
            self.counts.setdefault(source, Counts()).add(taken.counts)

    def flush(self) -> None:
        """Writes what it was given."""
        name = f"journal-{self._journal}-{self._segment:08d}.parquet"
        for source, tables in self._tables.items():
            table = pa.concat_tables(tables, promote_options="default").combine_chunks()
            if not table.num_rows:
                continue
            setting, place = self._places[source]
            path = _folder(place, setting, name) / name
            if not path.exists():
                if source is None and self._rest is not None and not (table := self._rest(table)).num_rows:
                    continue
                _write(path, table, self._uses[source], _pattern(place), self._schema.columns.time_unit)
            self.files.append(path)
            self.segments[source] = self._segment
        self._tables = {}


def _later(taken: Taken, schema: Schema, moment: int | None) -> pa.Table:
    if moment is None:
        return taken.table
    return taken.table.filter(pa.array(taken.rows(schema).times() > moment))


def _folder(source: str, setting: str, name: str) -> Path:
    """The folder whose file of that name belongs to a log."""
    if is_remote(source):
        raise UserError(
            f"`{setting}` '{source}' is remote, where no journal's files can be written; use a local folder"
        )
    path = Path(local_path(source))
    if path.is_dir():
        return path
    fixed = list(takewhile(lambda part: not MAGIC & set(part), path.parts))
    folder = Path(*fixed)
    if len(fixed) < len(path.parts) and folder.is_dir() and would_find(str(path), [folder / name]):
        return folder
    raise UserError(
        f"`{setting}` '{source}' is no folder, and no pattern that takes in '{name}' in a folder: the journal's files "
        "would not belong to the log; set it to a folder"
    )


def _pattern(source: str) -> pa.Schema | None:
    """The columns and types of a log's first file that is none of a journal, else of its first one; None: no file."""
    found, _ = find_local(local_path(source))
    for path in sorted(found, key=lambda path: (path.name.startswith("journal-"), str(path))):
        try:
            return pq.read_schema(path)
        except (pa.ArrowException, OSError):
            continue
    return None


def _write(path: Path, table: pa.Table, uses: Mapping[str, Use], pattern: pa.Schema | None, unit: str | None) -> None:
    columns = pa.table(dict(_columns(table, uses, pattern, unit)))
    columns = columns.replace_schema_metadata({_COLUMNS: json.dumps(sorted(uses))})
    try:
        with atomic_file(path) as temporary:
            pq.write_table(columns, temporary, compression="zstd")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"'{path}' can't be written: {str(error).splitlines()[0]}") from None


def _columns(
    table: pa.Table, uses: Mapping[str, Use], pattern: pa.Schema | None, unit: str | None
) -> Iterator[tuple[str, pa.Array]]:
    fields = {} if pattern is None else {field.name: field.type for field in pattern}
    for name, kind in fields.items():
        if name in uses:
            yield name, _as_type(name, uses[name], table.column(name).combine_chunks(), kind, unit)
        else:
            yield name, pa.nulls(table.num_rows, kind)
    for name in [each for each in uses if each not in fields]:  # such as those in the paths of a log's files
        yield name, table.column(name).combine_chunks()


def _as_type(name: str, use: Use, values: pa.Array, kind: pa.DataType, unit: str | None) -> pa.Array:
    """Canonical values in a file's type; as they are where that could not hold them, as both are read alike."""
    if pt.is_null(values.type):
        return pa.nulls(len(values), kind)
    try:
        given = values.cast(pa.timestamp(unit or "us", tz="UTC")) if use == "time" and pt.is_integer(kind) else values
        cast = given.cast(kind)
        if canonical(name, use, cast, unit).equals(values):
            return cast
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UserError):
        pass
    return values
