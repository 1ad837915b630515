"""The journal: an SQL database with the events that servers have accepted, in one order for all readers.

    journal_about     one row: the journal's ID and the position up to which batches were removed
    journal_batches   position -> rows that were accepted together, as an Arrow IPC stream with a checksum
    journal_columns   log and column -> the column's type, from the first row with a value
    journal_keys      keys of earlier rows, to recognize duplicates
    journal_requests  request -> its user and time

Batches have the positions 1, 2, 3 and so on, without a gap. Only one process appends at a time, so readers see
positions in rising order.
"""

import os
import threading
import time
import uuid
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
import sqlalchemy as sql
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from mmoe_rec.errors import RequestError, UserError, first_line, quoted
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY

READ_CHUNK_ROWS = 65_536
MAX_BATCH_BYTES = 2**28
LOCK_TIMEOUT_SECONDS = 60
"""Seconds to wait for another process that appends."""
KEY_RETENTION_DAYS = 30
"""Days for which a row's keys are kept. Later, a duplicate of the row is no longer recognized."""
_ADVISORY_LOCK = 0x6D6D6F65
_KEYS_PER_QUERY = 1_000  # SQLite allows at most 32,766 parameters in a query.
_METADATA = sql.MetaData()
_BIG = sql.BigInteger().with_variant(sql.Integer, "sqlite")
ColumnTypes = dict[tuple[str, str], str]
"""(event log, column) -> the column's type. The event log is "" for the interaction log."""


def _define_table(name: str, keys: str, /, **columns: Any) -> sql.Table:
    """Define a table of the journal. `keys` lists the columns of the primary key, separated by spaces."""
    sql_columns = [
        sql.Column(column, kind, primary_key=column in keys.split(), autoincrement=False, nullable=False)
        for column, kind in columns.items()
    ]
    return sql.Table(f"journal_{name}", _METADATA, *sql_columns)


_ABOUT = _define_table("about", "id", id=sql.String(32), removed=_BIG)
_BATCHES = _define_table(
    "batches",
    "position",
    position=_BIG,
    log=sql.Text,
    accepted_at=_BIG,
    duplicates=sql.Integer,
    checksum=_BIG,
    payload=sql.LargeBinary,
)
_COLUMNS = _define_table("columns", "log name", log=sql.Text, name=sql.Text, type=sql.Text)
_KEYS = _define_table("keys", "key", key=_BIG, day=sql.Integer)
_REQUESTS = _define_table("requests", "request", request=_BIG, user=_BIG, time=_BIG, day=sql.Integer)


@dataclass(frozen=True)
class RowKeys:
    """Keys of the N rows of a batch.

    Attributes:
        time_column: Name of the column of request or event times.
        times: Request or event times, (N,) microseconds.
        keys: The keys of each row, N tuples of hashes. A row is a duplicate if the journal contains one of its keys.
        requests: Hashes of each row's request ID and user, N pairs. None if requests have no IDs.
    """

    time_column: str
    times: np.ndarray
    keys: list[tuple[int, ...]]
    requests: list[tuple[int, int]] | None


@dataclass(frozen=True)
class Batch:
    """Rows that were accepted together.

    Attributes:
        log_name: Name of the event log, None for the interaction log.
        accepted_at: Time of acceptance by the server's clock, microseconds since 1970 UTC.
        table: The rows. Columns have the canonical types of `mmoe_rec.log.columns`.
        position: Position in the journal, 0 before the batch is appended.
        duplicates: Number of duplicate rows of this batch that the journal skipped.
        keys: Keys by which the journal recognizes duplicate rows. None keeps all rows.
    """

    log_name: str | None
    accepted_at: int
    table: pa.Table
    position: int = 0
    duplicates: int = 0
    keys: RowKeys | None = None

    def __len__(self) -> int:
        return self.table.num_rows


def parse_position(text: object) -> int:
    """Parse the text of a journal position, or raise RequestError."""
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    raise RequestError(f"{quoted(text)} is not a position of a journal, such as '12'")


class Journal:
    """An open journal.

    Threads may share a journal. If a journal is pickled, the process that unpickles it opens its own connection.
    """

    def __init__(self, url: str | Path, create: bool = True) -> None:
        """Open a journal.

        Args:
            url: `sqlite:///FILE`, `FILE` or `postgresql://USER@HOST/DATABASE`.
            create: Whether to create the journal if it doesn't exist.

        Raises:
            UserError: The URL is invalid, or there is no journal. With `create`, the journal isn't writable.
        """
        self._url = _parse_url(str(url))
        self.name = self._url.render_as_string(hide_password=True)
        self._file = Path(self._url.database or "") if self._url.get_backend_name() == "sqlite" else None
        self._last = 0  # Position of the last batch that this process has appended.
        self._engine, self._writer = _create_engine(self._url), threading.Lock()
        if self._file is not None:
            _check_file(self._file, create)
        # With `create`, begin a write transaction, so that a read-only journal fails here and not at the first append.
        with self.write_transaction() if create else self.read_transaction() as connection:
            if create:
                _METADATA.create_all(connection)
                if connection.execute(sql.select(_ABOUT.c.id)).first() is None:
                    connection.execute(sql.insert(_ABOUT).values(id=uuid.uuid4().hex, removed=0))
            elif not sql.inspect(connection).has_table(_ABOUT.name):
                raise UserError(f"'{self.name}' is not a journal")
            self.id: str = connection.execute(sql.select(_ABOUT.c.id)).scalar_one()

    def __reduce__(self) -> tuple[Any, ...]:
        return Journal, (self._url.render_as_string(hide_password=False), False)

    def append(self, *batches: Batch) -> int:
        """Append batches atomically, and return the position of the last batch once all are durable.

        Empty batches are skipped, and so are duplicate rows of batches with keys. A batch of only duplicates still gets
        a position.

        Raises:
            RequestError: A column's type differs from earlier rows, or a batch is too large.
            UserError: The disk is full or failing, or the database is unreachable. Either nothing was appended, or it
                is unknown whether the batches were appended.
        """
        with self._writer, self.write_transaction() as connection:
            end = _find_ends(connection)[1]
            types = {(log, name): kind for log, name, kind in connection.execute(sql.select(_COLUMNS))}
            if end < self._last:
                raise self._lost(end, self._last)
            for batch in batches:
                if len(batch):
                    end += 1
                    self._insert(connection, batch, end, types)
        self._last = end
        return end

    def last_position(self) -> int:
        """Return the position of the last batch, 0 if there is none."""
        with self.read_transaction() as connection:
            return _find_ends(connection)[1]

    def removed_until(self) -> int:
        """Return the position up to which batches were removed, 0 if none were. The removed rows are in log files."""
        with self.read_transaction() as connection:
            return _find_ends(connection)[0]

    def read(self, after: int, max_rows: int = READ_CHUNK_ROWS, through: int | None = None) -> list[Batch]:
        """Read the next batches after a position.

        Args:
            after: Position of the last batch to skip.
            max_rows: Stop after the batch that reaches this number of rows.
            through: Position of the last batch to read. None reads to the journal's end.

        Returns:
            The batches. The list is empty if there are no new batches.

        Raises:
            UserError: The first batch to read is damaged, lost or was removed.
        """
        batches, rows, position = list[Batch](), 0, _BATCHES.c.position
        with self.read_transaction() as connection:
            removed, end = _find_ends(connection)
            if end < after:
                raise self._lost(end, after)
            if after < removed:
                raise UserError(
                    f"batches {after + 1} to {removed} of the journal '{self.name}' were removed. Use a model whose "
                    "tables include them."
                )
            query = sql.select(_BATCHES).where(position > after, position <= (end if through is None else through))
            for row in connection.execution_options(yield_per=16).execute(query.order_by(position)):
                expected = after + len(batches) + 1
                if row.position != expected or row.checksum != _checksum(self.id, dict(row._mapping), row.payload):
                    if batches:
                        break  # Return the intact batches. The next read reports the damage.
                    problem = f"the journal '{self.name}' is damaged at batch {expected}"
                    raise UserError(f"{problem}: restore its files from a copy")
                table = pa.ipc.open_stream(pa.py_buffer(row.payload)).read_all()
                batches.append(Batch(row.log or None, row.accepted_at, table, row.position, row.duplicates))
                rows += len(table)
                if rows >= max_rows:
                    break
        return batches

    def remove_until(self, position: int) -> None:
        """Remove the batches up to a position. The logs' files must already contain the rows of these batches."""
        with self.write_transaction() as connection:
            connection.execute(sql.delete(_BATCHES).where(_BATCHES.c.position <= position))
            connection.execute(sql.update(_ABOUT).where(_ABOUT.c.removed < position).values(removed=position))

    def forget_old_keys(self) -> None:
        """Stop recognizing duplicates of rows that were accepted more than `KEY_RETENTION_DAYS` ago.

        This deletes the keys of these rows, and the users and times of requests that began before then.
        """
        first_day = time.time_ns() // 1_000 // MICROSECONDS_PER_DAY - KEY_RETENTION_DAYS
        with self.write_transaction() as connection:
            for table in (_KEYS, _REQUESTS):
                connection.execute(sql.delete(table).where(table.c.day < first_day))

    def close(self) -> None:
        """Close the connections to the database. Later calls open new connections."""
        self._engine.dispose()

    @contextmanager
    def read_transaction(self) -> Iterator[Connection]:
        """Open a transaction that reads one snapshot of the database. Raise UserError if it can't be read."""
        with self._translate_errors("can't be read"), self._engine.connect() as connection:
            if self._file is None:
                connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def write_transaction(self) -> Iterator[Connection]:
        """Open a transaction that blocks other writers. Raise UserError if the database can't be written."""
        problem = "can't be written, so nothing was appended"
        with self._translate_errors(problem), self._engine.connect() as connection:
            connection.execution_options(begin="BEGIN IMMEDIATE")
            with connection.begin():
                if self._file is None:
                    connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
                yield connection

    @contextmanager
    def _translate_errors(self, problem: str) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            reason = first_line(getattr(error, "orig", None) or error)
            raise UserError(f"the journal '{self.name}' {problem}: {reason}") from None

    def _lost(self, end: int, acknowledged: int) -> UserError:
        return UserError(
            f"the journal '{self.name}' is damaged: it ends with batch {end}, and {acknowledged} were acknowledged; "
            "restore its files from a copy"
        )

    def _insert(self, connection: Connection, batch: Batch, position: int, types: ColumnTypes) -> None:
        """Insert the rows of a batch that aren't duplicates."""
        if new := _find_new_types(types, batch):
            types |= new
            columns = [{"log": log, "name": name, "type": kind} for (log, name), kind in new.items()]
            connection.execute(sql.insert(_COLUMNS), columns)
        table = batch.table
        if batch.keys is not None:
            table = _drop_duplicates(connection, table, batch.keys, batch.accepted_at)
        payload = _encode(table)
        if len(payload) > MAX_BATCH_BYTES:
            raise RequestError(f"the rows take {len(payload):,} bytes; a batch has at most {MAX_BATCH_BYTES:,}")
        row = {"position": position, "log": batch.log_name or "", "accepted_at": batch.accepted_at}
        row |= {"duplicates": len(batch) - len(table)}
        row |= {"checksum": _checksum(self.id, row, payload), "payload": payload}
        connection.execute(sql.insert(_BATCHES).values(row))


def _parse_url(text: str) -> URL:
    try:
        url = sql.make_url(text if "://" in text else f"sqlite:///{text}")
        backend = url.get_backend_name()
    except ArgumentError:
        backend = ""
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and url.database not in (None, "", ":memory:"):
        return url.set(database=os.path.realpath(url.database or ""))
    raise UserError("the URL of a journal is sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE")


def _check_file(file: Path, create: bool) -> None:
    try:
        if file.is_dir():
            hint = "Give its URL, such as sqlite:///journal.db."
            raise UserError(f"'{file}' is a folder, but a journal is a file. {hint}")
        if create:
            file.parent.mkdir(parents=True, exist_ok=True)
        elif not file.is_file():
            raise UserError(f"'{file}' is not a journal")
    except OSError as error:
        raise UserError(f"the journal '{file}' can't be created: {error.strerror}") from None


def _create_engine(url: URL) -> Engine:
    if url.get_backend_name() == "postgresql":
        try:
            options = f"{url.query.get('options', '')} -c lock_timeout={LOCK_TIMEOUT_SECONDS}s -c synchronous_commit=on"
            return sql.create_engine(url, connect_args={"options": options})
        except ModuleNotFoundError:
            raise UserError("a journal in PostgreSQL needs psycopg: install the extra `postgres`") from None
    engine = sql.create_engine(url, connect_args={"timeout": LOCK_TIMEOUT_SECONDS})

    @sql.event.listens_for(engine, "connect")
    def set_up(connection: Any, record: object) -> None:
        connection.isolation_level = None  # Keep sqlite3 from starting transactions. `begin` below starts them.
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
    return bytes(sink.getvalue())


def _drop_duplicates(connection: Connection, table: pa.Table, keys: RowKeys, accepted_at: int) -> pa.Table:
    """Return the rows of a batch that aren't duplicates, and store the keys and requests of these rows.

    A row is also dropped if an earlier row has the same request and a different user. Each row gets the time of its
    request: the earliest time in the first batch that contains the request.
    """
    seen = set(_select(connection, _KEYS.c.key, {key for row_keys in keys.keys for key in row_keys}))
    stored = _select(connection, _REQUESTS.c.request, {request for request, _ in keys.requests or ()})
    requests, begun = {request: (user, first) for request, (user, first, _) in stored.items()}, dict[int, Any]()
    day, accepted, new_keys = accepted_at // MICROSECONDS_PER_DAY, list[int](), list[int]()
    for row, (row_keys, time_us) in enumerate(zip(keys.keys, keys.times.tolist(), strict=True)):
        if not seen.isdisjoint(row_keys):
            continue
        if keys.requests is not None:
            request, user = keys.requests[row]
            owner, first = requests.get(request) or begun.get(request, (user, time_us))
            if owner != user:
                continue
            if request not in requests:
                begun[request] = user, min(first, time_us)
        accepted.append(row)
        seen.update(row_keys)
        new_keys += row_keys
    _insert_rows(connection, _KEYS, [{"key": key, "day": day} for key in new_keys])
    rows = [{"request": request, "user": user, "time": first, "day": day} for request, (user, first) in begun.items()]
    _insert_rows(connection, _REQUESTS, rows)
    kept = table.take(pa.array(accepted, pa.int64()))
    if keys.requests is None:
        return kept
    all_requests = requests | begun
    times = pa.array([all_requests[keys.requests[row][0]][1] for row in accepted], pa.int64())
    return kept.set_column(kept.column_names.index(keys.time_column), keys.time_column, times.cast(UTC_MICROSECONDS))


def _select(connection: Connection, key: sql.Column[int], wanted: Collection[int]) -> dict[int, Any]:
    """Return the rows whose `key`, a table's first column, is `wanted`: key -> values of the other columns."""
    keys, selected = sorted(wanted), dict[int, Any]()
    for first in range(0, len(keys), _KEYS_PER_QUERY):
        query = sql.select(key.table).where(key.in_(keys[first : first + _KEYS_PER_QUERY]))
        selected |= {row[0]: tuple(row[1:]) for row in connection.execute(query)}
    return selected


def _insert_rows(connection: Connection, table: sql.Table, rows: list[dict[str, int]]) -> None:
    if rows:
        connection.execute(sql.insert(table), rows)


def _checksum(journal_id: str, row: Mapping[str, Any], payload: bytes) -> int:
    """Compute the checksum of a batch from its other columns in `journal_batches` and its Arrow stream (`payload`)."""
    header = " ".join(str(row[name]) for name in ("position", "accepted_at", "duplicates", "log"))
    return zlib.crc32(payload, zlib.crc32(f"{journal_id} {header}".encode()))


def _find_ends(connection: Connection) -> tuple[int, int]:
    """Return the position up to which batches were removed, and the position of the last batch."""
    removed = int(connection.execute(sql.select(_ABOUT.c.removed)).scalar_one())
    last = connection.execute(sql.select(sql.func.max(_BATCHES.c.position))).scalar()
    return removed, max(removed, last or 0)


def _find_new_types(types: ColumnTypes, batch: Batch) -> ColumnTypes:
    """Return the types of a batch's new columns. Raise RequestError if a column's type differs from earlier rows."""
    new: ColumnTypes = {}
    for column in batch.table.schema:
        if not pt.is_null(column.type):
            before, kind = types.get((batch.log_name or "", column.name)), str(column.type)
            if before is None:
                new[batch.log_name or "", column.name] = kind
            elif before != kind:
                problem = f"contains {kind}, but {before} in earlier rows of this journal"
                raise RequestError(f"column '{column.name}' {problem}")
    return new
