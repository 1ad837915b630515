"""The journal: the events that servers have accepted, in one order for all who read it, in an SQL database.

    journal_about     one row: the journal's id, and up to which position batches were removed
    journal_batches   position -> rows that were accepted together, as an Arrow IPC stream with a checksum
    journal_columns   log and column -> the column's type, from the first row on that has a value
    journal_keys, journal_requests    keys of rows and requests that came before, see `mmoe_rec.live.row_keys`
    journal_logs      log -> the latest time of its rows; up to where files hold it, and batches of it were removed
    journal_cuts      see `mmoe_rec.live.journal_files`

The position of a batch is its number: 1, 2, 3 and so on, without a gap. Whoever appends has the database to itself, so
that a position is never visible before an earlier one. An embedded SQLite database has a file beside it, `FILE-end`,
that says where the journal ends: SQLite drops transactions, without a word, after a flipped bit in its write-ahead log.
"""

from __future__ import annotations

import os
import struct
import threading
import uuid
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
import sqlalchemy as sql
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from mmoe_rec.atomic import flush
from mmoe_rec.errors import RequestError, UserError, first_line, quoted
from mmoe_rec.live.journal_tables import ABOUT, BATCHES, COLUMNS, METADATA
from mmoe_rec.live.row_keys import RowKeys, judge
from mmoe_rec.log.columns import UTC_MICROSECONDS

ROWS_AT_A_TIME = 65_536
MOST_BATCH_BYTES = 2**28
LOCK_SECONDS = 60
"""How long to wait for a process that appends."""
_ADVISORY_LOCK = 0x6D6D6F65
_sync = getattr(os, "fdatasync", os.fsync)

_COUNTED = {"duplicate": "duplicates", "conflict": "conflicts", "out_of_order": "out_of_order"}
Types = dict[tuple[str, str], str]
"""Log of events, "" for the interaction log, and column -> the column's type."""


@dataclass(frozen=True)
class Batch:
    """Rows that were accepted together.

    source: name of the log of events, None for the interaction log; accepted_at: microseconds since 1970 UTC, by the
    clock of the server; table: columns in canonical types (see `mmoe_rec.log.columns`); position: 0 before it has one;
    counts: rows by outcome, once the batch was appended; keys: tell the rows that count, None if all do.
    """

    source: str | None
    accepted_at: int
    table: pa.Table
    position: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    keys: RowKeys | None = None

    def __len__(self) -> int:
        return self.table.num_rows


class Appended(NamedTuple):
    """The position of the last batch of a call, and how many rows of the call are earlier than a row before."""

    position: int
    out_of_order: int = 0


def parse_position(text: object) -> int:
    """The position in a text. Raises RequestError for anything else."""
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    raise RequestError(f"{quoted(text)} is no position of a journal, such as '12'")


class Journal:
    """A journal. Threads may share it; a process that is forked goes on with connections of its own.

    address: sqlite:///FILE, FILE, or postgresql://USER@HOST/DATABASE; create: make the journal if it is not there.

    Raises UserError where there is none, the address is something else, or, with `create`, nothing can be appended.
    """

    def __init__(self, address: str | Path, create: bool = True) -> None:
        self._url = _parse_address(str(address))
        self.name = self._url.render_as_string(hide_password=True)
        self._file = Path(self._url.database or "") if self._url.get_backend_name() == "sqlite" else None
        self._start()
        if self._file is not None:
            _check_file(self._file, create)
        with self.appending() if create else self.reading() as connection:  # appending fails where nothing can be
            if create:
                METADATA.create_all(connection)
                if connection.execute(sql.select(ABOUT.c.id)).first() is None:
                    connection.execute(sql.insert(ABOUT).values(id=uuid.uuid4().hex, removed=0))
            elif not sql.inspect(connection).has_table(ABOUT.name):
                raise UserError(f"'{self.name}' holds no journal")
            self.id: str = connection.execute(sql.select(ABOUT.c.id)).scalar_one()
            self._mark = None if self._file is None else _EndMark(self._file, self.id)
            if create:
                self._note_end(self._find_end(connection))

    def __reduce__(self) -> tuple[Any, ...]:
        return Journal, (self._url.render_as_string(hide_password=False), False)

    def append(self, *batches: Batch, position: Future[Appended] | None = None) -> Appended:
        """Append batches, all or none, and return the position of the last one once they are durable.

        Threads that append meanwhile share a transaction. Batches without rows are left out. Duplicate rows are left
        out of batches with keys, though a batch of duplicates alone has a position.

        Args:
            batches: Rows to append.
            position: A new future that gets the result. Cancel it to give up. If `cancel` returns True, nothing is
                appended. It returns False once the batches are being written.

        Raises:
            RequestError: A column is of another type than in earlier rows, or a batch is too large.
            UserError: Nothing was appended, or it is not known: the disk is full, fails, or a server is away.
            CancelledError: The position was cancelled.
        """
        position = Future() if position is None else position
        encoded = [(batch, _encode(batch.table)) for batch in batches if len(batch)]
        for _, payload in encoded:
            if len(payload) > MOST_BATCH_BYTES:
                raise RequestError(f"the rows take {len(payload):,} bytes; a batch has at most {MOST_BATCH_BYTES:,}")
        self._waiting[position] = encoded
        try:
            with self._writer:
                if not position.done():
                    self._append_together()
        finally:
            self._waiting.pop(position, None)
        return position.result(0)  # whoever had the lock before has set it

    def end(self) -> int:
        """The position of the last batch, 0 for none. It costs little where SQLite's mark says so."""
        if self._mark is not None and (marked := self._mark.read()) is not None:
            return marked[0]
        with self.reading() as connection:
            return self._find_end(connection)[0]

    def removed(self) -> int:
        """The position up to which batches were removed once the logs' files held them, 0 for none."""
        with self.reading() as connection:
            return _removed(connection)

    def check(self, position: int) -> None:
        """Raises RequestError for a position beyond the end."""
        if position > (end := self.end()):
            raise RequestError(f"position {position} lies beyond the journal's end, {end}; is it of another journal?")

    def read(self, after: int, most_rows: int = ROWS_AT_A_TIME, through: int | None = None) -> list[Batch]:
        """The next batches after a position, until there are so many rows; none where nothing is new.

        through: the last position to read. Raises UserError where batches are damaged, lost or were removed; what lies
        before these is given first.
        """
        end = self.end() if through is None else through
        if end < after and through is None:
            raise self._lost(end, after)
        if end <= after:
            return []
        batches, rows = list[Batch](), 0
        with self.reading() as connection:
            removed = _removed(connection)
            if after < removed:
                raise UserError(
                    f"batches {after + 1} to {removed} of the journal '{self.name}' were removed: go on with a model "
                    "whose tables hold them"
                )
            place, expected = BATCHES.c.position, after + 1
            query = sql.select(BATCHES).where(place > after, place <= end).order_by(place)
            for row in connection.execution_options(yield_per=16).execute(query):
                if row.position > expected or (batch := self._decode(row)) is None:
                    if batches:
                        break  # the next read says so
                    raise self._damaged(min(row.position, expected))
                batches.append(batch)
                rows, expected = rows + row.rows, row.position + 1
                if rows >= most_rows:
                    break
        if not batches and expected <= end:
            raise self._lost(after, end)
        return batches

    def read_log(self, source: str | None, after: int, through: int) -> list[Batch]:
        """Read the batches of one log after a position up to another one, without those that were removed.

        Raises:
            UserError: Batches are damaged or lost.
        """
        place, batches = BATCHES.c.position, list[Batch]()
        with self.reading() as connection:
            first = max(after, _removed(connection))
            there = sql.select(sql.func.count()).where(place > first, place <= through)
            if connection.execute(there).scalar_one() < through - first:
                raise self._lost(first, through)
            query = sql.select(BATCHES).where(place > after, place <= through, BATCHES.c.log == (source or ""))
            for row in connection.execution_options(yield_per=16).execute(query.order_by(place)):
                if (batch := self._decode(row)) is None:
                    raise self._damaged(row.position)
                batches.append(batch)
        return batches

    def column_types(self) -> Types:
        """The types of the columns that rows have so far."""
        with self.reading() as connection:
            return _read_types(connection)

    def close(self) -> None:
        """Closes the connections; the journal opens them again when it is used."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state. Raises UserError where the database can't be read."""
        with self._failing("can't be read"), self._engine.connect() as connection:
            if self._file is None:
                connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def appending(self) -> Iterator[Connection]:
        """A transaction in which nobody else appends. Raises UserError where the database can't be written."""
        failing = self._failing("can't be written, so nothing was appended")
        with failing, self._engine.connect() as connection:
            connection.execution_options(begin="BEGIN IMMEDIATE")
            with connection.begin():
                if self._file is None:
                    connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
                yield connection

    def _start(self) -> None:
        """Begins without connections and threads: those that a forked child finds are its parent's."""
        self._engine = _create_engine(self._url)
        self._waiting, self._writer = dict[Future[Appended], list[tuple[Batch, bytes]]](), threading.Lock()
        _journals.add(self)

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            reason = first_line(getattr(error, "orig", None) or error)
            raise UserError(f"the journal '{self.name}' {what}: {reason}") from None

    def _find_end(self, connection: Connection) -> tuple[int, int]:
        """Position and checksum of the last batch. Raises UserError where it is not the one that was marked."""
        last = connection.execute(
            sql.select(BATCHES.c.position, BATCHES.c.checksum).order_by(BATCHES.c.position.desc()).limit(1)
        ).first()
        removed = _removed(connection)
        end = (last.position, last.checksum) if last is not None and last.position >= removed else (removed, 0)
        if self._mark is None or (marked := self._mark.read()) is None:
            return end
        if marked[0] > end[0] or (marked[0] == end[0] > removed and marked[1] != end[1]):
            raise self._lost(end[0], marked[0])
        return end

    def _decode(self, row: Any) -> Batch | None:
        """Return the batch of a row of the table, None if it is damaged."""
        if row.checksum != _checksum(self.id, row._mapping, row.payload):
            return None
        table = pa.ipc.open_stream(pa.py_buffer(row.payload)).read_all()
        counts = {key: getattr(row, name) for key, name in _COUNTED.items()}
        return Batch(row.log or None, row.accepted_at, table, row.position, {"accepted": row.rows, **counts})

    def _damaged(self, position: int) -> UserError:
        return UserError(f"the journal '{self.name}' is damaged at batch {position}: restore its files from a copy")

    def _lost(self, end: int, marked: int) -> UserError:
        files = "" if self._file is None else f", or remove '{self._file}-end' to go on without what is lost"
        return UserError(
            f"the journal '{self.name}' is damaged: it ends with batch {end}, and {marked} were acknowledged; restore "
            f"its files from a copy{files}"
        )

    def _append_together(self) -> None:
        """Append the batches of all calls that still wait when the journal is free."""
        ends, calls = list[tuple[Future[Appended], Appended]](), list[Future[Appended]]()
        try:
            with self.appending() as connection:
                end, types = self._find_end(connection), _read_types(connection)
                for position in list(self._waiting):
                    batches = self._waiting.pop(position)
                    if not position.set_running_or_notify_cancel():
                        continue  # The caller has given up, and from here on no caller can.
                    calls.append(position)
                    try:
                        end, out_of_order = self._insert(connection, batches, end, types)
                        ends.append((position, Appended(end[0], out_of_order)))
                    except RequestError as error:
                        position.set_exception(error)
            self._note_end(end)
            for position, appended in ends:
                position.set_result(appended)
        except BaseException as error:
            for position in calls:
                if not position.done():
                    position.set_exception(error)
            raise

    def _insert(
        self, connection: Connection, batches: list[tuple[Batch, bytes]], end: tuple[int, int], types: Types
    ) -> tuple[tuple[int, int], int]:
        """Insert batches. Returns position and checksum of the new last one, and the number of rows out of order."""
        out_of_order = 0
        if new := _find_new_types(types, batches):
            types |= new
            columns = [{"log": log, "name": name, "type": kind} for (log, name), kind in new.items()]
            connection.execute(sql.insert(COLUMNS), columns)
        for batch, payload in batches:
            log, table, counts = batch.source or "", batch.table, Counter[str]()
            if batch.keys is not None:
                judged = judge(connection, log, batch.keys, batch.accepted_at)
                table, counts = _keep(table, batch.keys.time, judged.accepted, judged.times), judged.counts
            if table is not batch.table:
                payload = _encode(table)  # noqa: PLW2901
            row = {"position": end[0] + 1, "log": log, "accepted_at": batch.accepted_at, "rows": len(table)}
            row |= {name: counts[key] for key, name in _COUNTED.items()}
            end = end[0] + 1, _checksum(self.id, row, payload)
            connection.execute(sql.insert(BATCHES).values(**row, checksum=end[1], payload=payload))
            out_of_order += counts["out_of_order"]
        return end, out_of_order

    def _note_end(self, end: tuple[int, int]) -> None:
        """Marks the end, before anybody is told of it. A mark may lag behind by what a killed process appended."""
        if self._mark is not None and ((marked := self._mark.read()) is None or marked[0] < end[0]):
            with self._failing("could not be marked, so it is not known whether rows were kept"):
                self._mark.write(*end)


class _EndMark:
    """Where a journal ends, in `FILE-end`: the position and checksum of each of the last batches.

    Each batch has its own of 64 places in turn, so that processes need no lock, and a torn write loses one place.
    """

    _BYTES, _COUNT = 32, 64

    def __init__(self, file: Path, journal_id: str) -> None:
        self._path, self._id = Path(f"{file}-end"), bytes.fromhex(journal_id)

    def read(self) -> tuple[int, int] | None:
        """Position and checksum of the last batch that was acknowledged; None where the file does not say."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        marks = []
        for begin in range(0, len(data) - self._BYTES + 1, self._BYTES):
            position, checksum = struct.unpack_from("<QI", data, begin + len(self._id))
            if data[begin : begin + self._BYTES] == self._place(position, checksum):
                marks.append((position, checksum))
        return max(marks, default=None)

    def write(self, position: int, checksum: int) -> None:
        """Marks a batch as the last one, on disk."""
        is_new = not self._path.exists()
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(file, self._place(position, checksum), position % self._COUNT * self._BYTES)
            _sync(file)
        finally:
            os.close(file)
        if is_new:
            flush(self._path.parent)

    def _place(self, position: int, checksum: int) -> bytes:
        content = struct.pack("<16sQI", self._id, position, checksum)
        return content + struct.pack("<I", zlib.crc32(content))


def _parse_address(text: str) -> URL:
    try:
        url = sql.make_url(text if "://" in text else f"sqlite:///{text}")
        backend = url.get_backend_name()
    except ArgumentError:
        backend = ""
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and url.database not in (None, "", ":memory:"):
        return url.set(database=os.path.realpath(url.database or ""))
    raise UserError("the address of a journal is sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE")


def _check_file(file: Path, create: bool) -> None:
    try:
        if file.is_dir():
            raise UserError(
                f"'{file}' is a folder, and a journal is a file. Give its address, such as sqlite:///journal.db."
            )
        if create:
            file.parent.mkdir(parents=True, exist_ok=True)
        elif not file.is_file():
            raise UserError(f"'{file}' holds no journal")
    except OSError as error:
        raise UserError(f"there can be no journal '{file}': {error.strerror}") from None


def _create_engine(url: URL) -> Engine:
    if url.get_backend_name() == "postgresql":
        try:
            options = f"{url.query.get('options', '')} -c lock_timeout={LOCK_SECONDS}s -c synchronous_commit=on"
            return sql.create_engine(url, connect_args={"options": options})
        except ModuleNotFoundError:
            raise UserError("a journal in PostgreSQL needs psycopg: install the extra `postgres`") from None
    engine = sql.create_engine(url, connect_args={"timeout": LOCK_SECONDS})

    @sql.event.listens_for(engine, "connect")
    def set_up(connection: Any, record: object) -> None:
        connection.isolation_level = None  # transactions begin as `begin` says
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    @sql.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def _begin_in_child() -> None:
    for journal in list(_journals):
        journal._start()


os.register_at_fork(after_in_child=_begin_in_child)


def _encode(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    payload: bytes = sink.getvalue().to_pybytes()
    return payload


def _keep(table: pa.Table, time: str, rows: list[int], times: np.ndarray) -> pa.Table:
    """Take the rows that count, with the times of their requests."""
    kept = table if len(rows) == len(table) else table.take(pa.array(rows, pa.int64()))
    settled = pa.array(times, pa.int64()).cast(UTC_MICROSECONDS)
    if kept[time].combine_chunks().equals(settled):
        return kept
    return kept.set_column(kept.column_names.index(time), time, settled)


def _checksum(journal_id: str, row: Mapping[str, Any], payload: bytes) -> int:
    """Checksum a batch, given the values of its row in the table."""
    about = " ".join(str(row[name]) for name in ("position", "accepted_at", "rows", *_COUNTED.values(), "log"))
    return zlib.crc32(payload, zlib.crc32(f"{journal_id} {about}".encode()))


def _removed(connection: Connection) -> int:
    return int(connection.execute(sql.select(ABOUT.c.removed)).scalar_one())


def _read_types(connection: Connection) -> Types:
    return {(log, name): kind for log, name, kind in connection.execute(sql.select(COLUMNS))}


def _find_new_types(types: Types, batches: list[tuple[Batch, bytes]]) -> Types:
    """The types of columns of batches that have none yet.

    Raises RequestError where a column is of another type than before: its hashes, too, would be others.
    """
    new: Types = {}
    for batch, _ in batches:
        for column in batch.table.schema:
            if not pt.is_null(column.type):
                key, kind = (batch.source or "", column.name), str(column.type)
                before = types.get(key) or new.setdefault(key, kind)
                if before != kind:
                    values = batch.table[column.name]
                    is_list = pt.is_list(column.type)  # an empty one holds nothing of another type
                    holds = pc.greater(pc.list_value_length(values), 0) if is_list else pc.is_valid(values)
                    row = max(pc.index(holds, True).as_py(), 0)
                    raise RequestError(
                        f"row {row}: column '{column.name}' holds {kind}, but {before} in earlier rows of this journal"
                    )
    return new
