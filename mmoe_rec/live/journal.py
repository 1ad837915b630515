"""The journal: the events that servers have accepted, in one order for all who read it, in an SQL database.

    journal_about     one row: the journal's id, and up to which position batches were removed
    journal_batches   position -> rows that were accepted together, as an Arrow IPC stream with a checksum
    journal_columns   log and column -> the column's type, from the first row on that has a value
    journal_keys, journal_requests    keys of rows and requests that came before, see `mmoe_rec.live.row_keys`

The position of a batch is its number: 1, 2, 3 and so on, without a gap. Whoever appends has the database to itself, so
that a position is never visible before an earlier one. The tables are the same in SQLite and in PostgreSQL.
"""

import os
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
import sqlalchemy as sql
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from mmoe_rec.errors import RequestError, UserError, first_line, quoted
from mmoe_rec.live.row_keys import BIG, METADATA, RowKeys, define_table, forget_keys, judge
from mmoe_rec.log.columns import UTC_MICROSECONDS

ROWS_AT_A_TIME = 65_536
MOST_BATCH_BYTES = 2**28
LOCK_SECONDS = 60
"""How long to wait for a process that appends."""
_ADVISORY_LOCK = 0x6D6D6F65
_COUNTS = ("accepted", "duplicate", "conflict")
_ABOUT = define_table("about", "id", id=sql.String(32), removed=BIG)
_BATCHES = define_table(
    "batches",
    "position",
    position=BIG,
    log=sql.Text,
    accepted_at=BIG,
    **dict.fromkeys(_COUNTS, sql.Integer),
    checksum=BIG,
    payload=sql.LargeBinary,
)
_COLUMNS = define_table("columns", "log name", log=sql.Text, name=sql.Text, type=sql.Text)
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


def parse_position(text: object) -> int:
    """The position in a text. Raises RequestError for anything else."""
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    raise RequestError(f"{quoted(text)} is no position of a journal, such as '12'")


class Journal:
    """A journal. Threads may share it, and processes to which it is sent open it again.

    address: sqlite:///FILE, FILE, or postgresql://USER@HOST/DATABASE; create: make the journal if it is not there.

    Raises UserError where there is none, the address is something else, or, with `create`, nothing can be appended.
    """

    def __init__(self, address: str | Path, create: bool = True) -> None:
        self._url = _parse_address(str(address))
        self.name = self._url.render_as_string(hide_password=True)
        self._file = Path(self._url.database or "") if self._url.get_backend_name() == "sqlite" else None
        self._last = 0  # position of the last batch that this process has appended
        self._engine = _create_engine(self._url)
        self._waiting, self._writer = dict[Future[int], list[tuple[Batch, bytes]]](), threading.Lock()
        if self._file is not None:
            _check_file(self._file, create)
        with self.appending() if create else self.reading() as connection:  # appending fails where nothing can be
            if create:
                METADATA.create_all(connection)
                if connection.execute(sql.select(_ABOUT.c.id)).first() is None:
                    connection.execute(sql.insert(_ABOUT).values(id=uuid.uuid4().hex, removed=0))
            elif not sql.inspect(connection).has_table(_ABOUT.name):
                raise UserError(f"'{self.name}' holds no journal")
            self.id: str = connection.execute(sql.select(_ABOUT.c.id)).scalar_one()

    def __reduce__(self) -> tuple[Any, ...]:
        return Journal, (self._url.render_as_string(hide_password=False), False)

    def append(self, *batches: Batch, position: Future[int] | None = None) -> int:
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
        """The position of the last batch, 0 for none."""
        with self.reading() as connection:
            return _find_ends(connection)[1]

    def removed(self) -> int:
        """The position up to which batches were removed once the logs' files held them, 0 for none."""
        with self.reading() as connection:
            return _find_ends(connection)[0]

    def check(self, position: int) -> None:
        """Raises RequestError for a position beyond the end."""
        if position > (end := self.end()):
            raise RequestError(f"position {position} lies beyond the journal's end, {end}; is it of another journal?")

    def read(self, after: int, most_rows: int = ROWS_AT_A_TIME, through: int | None = None) -> list[Batch]:
        """Read the next batches after a position, until there are so many rows.

        Args:
            after: The position.
            most_rows: Batches are read until they have so many rows.
            through: The last position to read. By default the journal's end.

        Returns:
            The batches, none if nothing is new.

        Raises:
            UserError: The next batch is damaged, lost or was removed.
        """
        batches, rows, place = list[Batch](), 0, _BATCHES.c.position
        with self.reading() as connection:
            removed, end = _find_ends(connection)
            if end < after:
                raise self._lost(end, after)
            if after < removed:
                raise UserError(
                    f"batches {after + 1} to {removed} of the journal '{self.name}' were removed: go on with a model "
                    "whose tables hold them"
                )
            query = sql.select(_BATCHES).where(place > after, place <= (end if through is None else through))
            for row in connection.execution_options(yield_per=16).execute(query.order_by(place)):
                expected = after + len(batches) + 1
                if row.position != expected or row.checksum != _checksum(self.id, dict(row._mapping), row.payload):
                    if batches:
                        break  # the next read says so
                    raise UserError(
                        f"the journal '{self.name}' is damaged at batch {expected}: restore its files from a copy"
                    )
                table = pa.ipc.open_stream(pa.py_buffer(row.payload)).read_all()
                counts = {name: row._mapping[name] for name in _COUNTS}
                batches.append(Batch(row.log or None, row.accepted_at, table, row.position, counts))
                rows += row.accepted
                if rows >= most_rows:
                    break
        return batches

    def remove(self, position: int) -> None:
        """Remove the batches up to a position, once the logs' files hold their rows."""
        with self.appending() as connection:
            connection.execute(sql.delete(_BATCHES).where(_BATCHES.c.position <= position))
            connection.execute(sql.update(_ABOUT).where(_ABOUT.c.removed < position).values(removed=position))

    def forget(self) -> None:
        """Forget the keys of rows that were accepted long ago."""
        with self.appending() as connection:
            forget_keys(connection, time.time_ns() // 1_000)

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

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            reason = first_line(getattr(error, "orig", None) or error)
            raise UserError(f"the journal '{self.name}' {what}: {reason}") from None

    def _lost(self, end: int, acknowledged: int) -> UserError:
        return UserError(
            f"the journal '{self.name}' is damaged: it ends with batch {end}, and {acknowledged} were acknowledged; "
            "restore its files from a copy"
        )

    def _append_together(self) -> None:
        """Append the batches of all calls that still wait when the journal is free."""
        ends = dict[Future[int], int]()
        calls = list[Future[int]]()
        try:
            with self.appending() as connection:
                end, types = _find_ends(connection)[1], _read_types(connection)
                if end < self._last:
                    raise self._lost(end, self._last)
                for position in list(self._waiting):
                    batches = self._waiting.pop(position)
                    if not position.set_running_or_notify_cancel():
                        continue  # The caller has given up, and from here on no caller can.
                    calls.append(position)
                    try:
                        ends[position] = end = self._insert(connection, batches, end, types)
                    except RequestError as error:
                        position.set_exception(error)
            self._last = end
            for position, last in ends.items():
                position.set_result(last)
        except BaseException as error:
            for position in calls:
                if not position.done():
                    position.set_exception(error)
            raise

    def _insert(self, connection: Connection, batches: list[tuple[Batch, bytes]], end: int, types: Types) -> int:
        """Insert batches, and return the position of the last one."""
        if new := _find_new_types(types, batches):
            types |= new
            columns = [{"log": log, "name": name, "type": kind} for (log, name), kind in new.items()]
            connection.execute(sql.insert(_COLUMNS), columns)
        for batch, payload in batches:
            log, table, counts = batch.source or "", batch.table, Counter(accepted=len(batch))
            if batch.keys is not None:
                judged = judge(connection, batch.keys, batch.accepted_at)
                table, counts = _keep(table, batch.keys.time, judged.accepted, judged.times), judged.counts
            if table is not batch.table:
                payload = _encode(table)  # noqa: PLW2901
            end += 1
            row = {"position": end, "log": log, "accepted_at": batch.accepted_at}
            row |= {name: counts[name] for name in _COUNTS}
            checksum = _checksum(self.id, row, payload)
            connection.execute(sql.insert(_BATCHES).values(**row, checksum=checksum, payload=payload))
        return end


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
    about = " ".join(str(row[name]) for name in ("position", "accepted_at", *_COUNTS, "log"))
    return zlib.crc32(payload, zlib.crc32(f"{journal_id} {about}".encode()))


def _find_ends(connection: Connection) -> tuple[int, int]:
    """Find the position up to which batches were removed, and the one of the last batch."""
    removed = int(connection.execute(sql.select(_ABOUT.c.removed)).scalar_one())
    last = connection.execute(sql.select(sql.func.max(_BATCHES.c.position))).scalar()
    return removed, max(removed, last or 0)


def _read_types(connection: Connection) -> Types:
    return {(log, name): kind for log, name, kind in connection.execute(sql.select(_COLUMNS))}


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
