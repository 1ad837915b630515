"""The log of requests: a thread of its own makes files of what replies hand over, and no reply waits for it.

What waits is bounded by its candidates, as it holds all rows of its passes; beyond, records are dropped and counted. A
file's rows are in memory until it is written, so a process that is killed loses them; SIGTERM writes them. A disk that
is full or gone is told once, what could not be written is counted, and serving goes on.

Files are called `requests-TIME-HOST-PROCESS-RANDOM.parquet` by the time at which they were written, UTC, so that names
in order are times in order, and any number of processes and machines write into one folder. Nothing else in the folder
is touched, and other programs may move or remove files at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic, time, time_ns
from typing import TYPE_CHECKING, Any

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError, one_line

if TYPE_CHECKING:
    import pyarrow as pa

    from mmoe_rec.inference.ranking import RankedRequest, Ranking
    from mmoe_rec.live.logged_requests import Record

MOST_WAITING = 100_000
"""Candidates of replies that wait to be made rows of."""
ROWS_PER_FILE = 262_144
_TABLES_AT_ONCE = 64  # of a few hundred rows each: rows of many small tables take long to write

_log = logging.getLogger(__name__)
Count = Callable[[str, int], None]
_OURS = re.compile(r"requests-\d{8}T\d{6}\.\d{6}Z-.+\.parquet")
_LEFT = re.compile(r"\.requests-.+\.parquet\.[0-9a-f]{12}\.tmp")
_SECONDS_LEFT = 86_400
_JAVASCRIPT_BITS = 53
"""Integers beyond lose digits in JavaScript, and events with such ids would belong to no request."""


@dataclass(frozen=True)
class LogOptions:
    """How requests are logged. share: of requests, 0 to 1; seconds: between files; most_bytes: of the folder's files,
    beyond which the oldest are removed, None keeps all."""

    folder: Path
    share: float = 0.1
    seconds: float = 300.0
    most_bytes: int | None = None


class RequestLog:
    """Logs a share of requests.

    count: is told what became of how many replies: written, unsampled, dropped or failed. Raises UserError for a folder
    in which no file can be written.
    """

    def __init__(self, options: LogOptions, count: Count) -> None:
        check_folder(options.folder)
        self.options, self._count = options, count
        self._queue: SimpleQueue[Record | None] = SimpleQueue()  # None ends it
        self._lock = threading.Lock()
        self._candidates, self._is_closing = 0, False
        self._told: set[str] = set()
        self._begin_file()
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    @staticmethod
    def id_of(seen: RankedRequest) -> int | str:
        """A request's id: the caller's own, or a new one of the type that the log has."""
        return new_id(seen.integer_ids) if seen.request is None else seen.request

    def offer(self, reply: Ranking, weights: Mapping[str, Any] | None, name: str | None, version: str | None) -> None:
        """Takes a reply, if it is one of those that are logged, and never waits.

        reply: with the id that `id_of` gave; the rest as in `Record`.
        """
        from mmoe_rec.live.logged_requests import Record

        request: Any = reply.request_id
        if reply.seen.rows.schema.columns.request_scope == "user":
            request = f"{reply.seen.user} {request}"
        if not is_logged(request, self.options.share):
            self._count("unsampled", 1)
            return
        record = Record(reply, weights, name, version, self.options.share, time_ns() // 1_000)
        with self._lock:
            has_room = not self._candidates or self._candidates + len(record) <= MOST_WAITING
            if has_room and not self._is_closing:
                self._candidates += len(record)
                self._queue.put(record)
                return
        self._count("dropped", 1)
        self._tell("dropped", "requests come faster than they can be logged; some are not")

    def close(self) -> None:
        """Writes all that was handed over, however long that takes."""
        with self._lock:
            self._is_closing = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            left = None if not self._records else max(self._since + self.options.seconds - monotonic(), 0.0)
            try:
                record = self._queue.get(timeout=left)
            except Empty:
                self._write()
                continue
            if record is None:
                self._write()
                return
            with self._lock:
                self._candidates -= len(record)
            self._add(record)
            if self._rows >= ROWS_PER_FILE or (self._records and monotonic() >= self._since + self.options.seconds):
                self._write()

    def _begin_file(self) -> None:
        """Rows of the next file, which are of one model. schema: of all of them; small: tables of a reply each."""
        self._rows = self._records = 0
        self._since = 0.0
        self._artifact: str | None = None
        self._schema: pa.Schema | None = None
        self._tables: list[pa.Table] = []
        self._small: list[pa.Table] = []

    def _add(self, record: Record) -> None:
        import pyarrow as pa

        try:
            table = record.table()
        except Exception as error:
            self._fail(1, "a reply", error)
            return
        if self._records and not self._fits(record, table):
            self._write()
        self._schema = pa.unify_schemas([self._schema or table.schema, table.schema])
        if not self._records:
            self._since, self._artifact = monotonic(), record.artifact
        self._rows, self._records = self._rows + len(table), self._records + 1
        self._small.append(table)
        if len(self._small) >= _TABLES_AT_ONCE:
            self._tables.append(_concat(self._small))
            self._small = []

    def _fits(self, record: Record, table: pa.Table) -> bool:
        """Whether the file may hold rows of a reply as well: of the same model, and of the same types, where a column
        without a value has none."""
        import pyarrow as pa

        try:
            pa.unify_schemas([self._schema, table.schema])
        except pa.ArrowException:
            return False
        return record.artifact == self._artifact

    def _write(self) -> None:
        tables, records = [*self._tables, *self._small], self._records
        self._begin_file()
        if not records:
            return
        folder, most = self.options.folder, self.options.most_bytes
        try:
            write_file(folder, _concat(tables))
        except Exception as error:
            self._fail(records, f"{records:,} replies", error)
            return
        self._count("written", records)
        self._told.discard("failed")
        if most is not None:
            try:
                removed = make_room(folder, most)
            except OSError as error:
                self._tell("size", f"the size of '{folder}' can't be limited: {error.strerror}")
            else:
                if removed:
                    first = removed[0].name
                    self._tell("removed", f"'{folder}' is full: its oldest files are removed, the first is '{first}'")

    def _fail(self, records: int, what: str, error: Exception) -> None:
        self._count("failed", records)
        why = str(error) if isinstance(error, UserError) else getattr(error, "strerror", None) or one_line(error)
        self._tell("failed", f"{what} can't be logged in '{self.options.folder}', and serving goes on: {why}")

    def _tell(self, what: str, sentence: str) -> None:
        """Once, as it may be so for every reply."""
        if what not in self._told:
            self._told.add(what)
            _log.warning("%s", sentence)


def _concat(tables: list[pa.Table]) -> pa.Table:
    import pyarrow as pa

    return pa.concat_tables(tables, promote_options="default").combine_chunks()


def new_id(integer: bool) -> int | str:
    """An id for a request that has none: a random integer from 1 to 2^53, or 32 hexadecimal digits."""
    return secrets.randbelow(2**_JAVASCRIPT_BITS) + 1 if integer else uuid.uuid4().hex


def is_logged(request: int | str, share: float) -> bool:
    """Whether a request is one of the share that is logged.

    It depends on the id alone, so all servers, and all calls with one id, agree.
    """
    if share >= 1:
        return True
    digest = hashlib.blake2b(str(request).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def check_folder(folder: Path) -> None:
    """Makes the folder, and raises UserError where no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"requests can't be logged in '{folder}': {error.strerror}") from None


def write_file(folder: Path, rows: pa.Table) -> Path:
    """Writes rows into a new file of the folder, which appears whole. Raises OSError."""
    import pyarrow.parquet as pq

    if not folder.is_dir():  # it may be a disk that has gone, so it is not made again on the one below
        raise FileNotFoundError(2, "the folder is gone")
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    host = re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname())[:40] or "host"
    path = folder / f"requests-{moment}-{host}-{os.getpid()}-{secrets.token_hex(4)}.parquet"
    with atomic_file(path) as temporary:
        pq.write_table(rows, temporary, compression="zstd", row_group_size=131_072)
    return path


def make_room(folder: Path, most_bytes: int) -> list[Path]:
    """Removes the oldest files of logged requests, so that all of them have at most so many bytes; gives those removed.

    The newest stays. What writers have left that were killed more than a day ago is removed as well.
    """
    sizes: dict[Path, int] = {}
    with os.scandir(folder) as entries:
        for each in entries:
            with suppress(FileNotFoundError):  # another server has just removed it
                if _OURS.fullmatch(each.name):
                    sizes[Path(each.path)] = each.stat().st_size
                elif _LEFT.fullmatch(each.name) and time() - each.stat().st_mtime > _SECONDS_LEFT:
                    os.unlink(each.path)
    total, removed = sum(sizes.values()), []
    for path in sorted(sizes)[:-1]:
        if total <= most_bytes:
            break
        total -= sizes[path]
        with suppress(FileNotFoundError):
            path.unlink()
            removed.append(path)
    return removed
