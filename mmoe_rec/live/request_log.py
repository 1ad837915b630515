"""The log of requests: a thread of its own makes files of what replies hand over, and no reply waits for it.

mmoe_rec/server/README.md says what is logged, and what is dropped. What
waits is bounded by its candidates, as it holds all rows of its passes. Files are called by the time at which they were
written, UTC, `requests-TIME-HOST-PROCESS-RANDOM.parquet`, so that names in order are times in order. Other programs may
move or remove them at any time.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic, time_ns
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError, one_line
from mmoe_rec.features.layout import IdInput, Layout
from mmoe_rec.inference.ranking import RankedRequest, Ranking
from mmoe_rec.log.columns import UTC_MICROSECONDS, splitmix64
from mmoe_rec.point_in_time.arrays import Ragged

REQUEST = "served_request"
AT = "served_at"
RANK = "served_rank"
CANDIDATE_COUNT = "served_candidates"
REPLIED_COUNT = "served_replied"
SCORE = "served_score"
PREDICTION_PREFIX = "served_predicted_"
WEIGHTS = "served_weights"
DIGEST_PREFIX = "served_digest_"
ARTIFACT = "served_artifact"
FRACTION = "served_fraction"

MAX_QUEUED_CANDIDATES = 100_000
"""Candidates of replies that wait to be made rows of."""
ROWS_PER_FILE = 262_144

_log = logging.getLogger(__name__)
CountReplies = Callable[[str, int], None]


@dataclass(frozen=True)
class RequestLogOptions:
    """How requests are logged. share: of requests, 0 to 1; seconds: between files."""

    folder: Path
    fraction: float = 0.1
    flush_seconds: float = 300.0


class RequestLog:
    """Logs a share of requests.

    count: is told what became of how many replies: written, unsampled, dropped or failed. Raises UserError for a folder
    in which no file can be written.
    """

    def __init__(self, options: RequestLogOptions, count: CountReplies) -> None:
        check_log_folder(options.folder)
        self.options, self._count = options, count
        self._queue: SimpleQueue[LoggedReply | None] = SimpleQueue()  # None ends it
        self._lock = threading.Lock()
        self._candidates, self._is_closing = 0, False
        self._has_failed = self._has_dropped = False
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    def offer(self, reply: Ranking, weights: Mapping[str, Any] | None, name: str | None, version: str | None) -> None:
        """Takes a reply, if it is one of those that are logged, and never waits.

        reply: with an id; the rest as in `LoggedReply`.
        """
        request: Any = reply.request_id
        if reply.ranked_request.rows.schema.columns.request_scope == "user":
            request = f"{reply.ranked_request.user} {request}"
        if not is_sampled(request, self.options.fraction):
            self._count("unsampled", 1)
            return
        record = LoggedReply(reply, weights, name, version, self.options.fraction, time_ns() // 1_000)
        with self._lock:
            has_room = not self._candidates or self._candidates + len(record) <= MAX_QUEUED_CANDIDATES
            if has_room and not self._is_closing:
                self._candidates += len(record)
                self._queue.put(record)
                return
        self._count("dropped", 1)
        if not self._has_dropped:
            _log.warning("requests come faster than they can be logged; some are not")
        self._has_dropped = True

    def close(self) -> None:
        """Writes all that was handed over, however long that takes."""
        with self._lock:
            self._is_closing = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        """Make files, each of one model's rows, once these are many or their time is over."""
        tables, rows, artifact, until = list[pa.Table](), 0, "", 0.0
        while True:
            try:
                record = self._queue.get(timeout=max(until - monotonic(), 0.0) if tables else None)
            except Empty:
                tables = self._write(tables)
                continue
            if record is None:
                self._write(tables)
                return
            with self._lock:
                self._candidates -= len(record)
            if tables and artifact != record.reply.model["version"]:
                tables = self._write(tables)
            try:
                table = record.table()
            except Exception as error:
                self._fail(1, error)
                continue
            if not tables:
                rows, artifact, until = 0, record.reply.model["version"], monotonic() + self.options.flush_seconds
            tables.append(table)
            rows += len(table)
            if rows >= ROWS_PER_FILE or monotonic() >= until:
                tables = self._write(tables)

    def _write(self, tables: list[pa.Table]) -> list[pa.Table]:
        """Write the rows of replies into a file. Returns the rows of the next file, none."""
        if tables:
            try:  # a column without a value has no type yet
                write_log_file(
                    self.options.folder, pa.concat_tables(tables, promote_options="default").combine_chunks()
                )
            except Exception as error:
                self._fail(len(tables), error)
            else:
                self._count("written", len(tables))
                self._has_failed = False
        return []

    def _fail(self, records: int, error: Exception) -> None:
        """Count replies that can't be logged, and say so once, as it may be so for every reply."""
        self._count("failed", records)
        if not self._has_failed:
            why = str(error) if isinstance(error, UserError) else getattr(error, "strerror", None) or one_line(error)
            _log.warning("replies can't be logged in '%s', and serving goes on: %s", self.options.folder, why)
        self._has_failed = True


def is_sampled(request: int | str, fraction: float) -> bool:
    """Whether a request is one of the share that is logged.

    It depends on the id alone, so all servers, and all calls with one id, agree.
    """
    if fraction >= 1:
        return True
    digest = hashlib.blake2b(str(request).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def check_log_folder(folder: Path) -> None:
    """Makes the folder, and raises UserError where no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"requests can't be logged in '{folder}': {error.strerror}") from None


def write_log_file(folder: Path, rows: pa.Table) -> Path:
    """Writes rows into a new file of the folder, which appears whole. Raises OSError."""
    if not folder.is_dir():  # it may be a disk that has gone, so it is not made again on the one below
        raise FileNotFoundError(2, "the folder is gone")
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    host = re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname())[:40] or "host"
    path = folder / f"requests-{moment}-{host}-{os.getpid()}-{secrets.token_hex(4)}.parquet"
    with atomic_file(path) as temporary:
        pq.write_table(rows, temporary, compression="zstd", row_group_size=131_072)
    return path


@dataclass(frozen=True, eq=False)
class LoggedReply:
    """A reply to be logged. weights: the caller's `task_weights`; name, version: of the registered model, None where it
    is not known; share: of requests that are logged; served_at: microseconds since 1970 UTC."""

    reply: Ranking
    weights: Mapping[str, Any] | None
    name: str | None
    version: str | None
    fraction: float
    served_at: int

    def __len__(self) -> int:
        """How many candidates it holds the rows of: also those that `top_k` leaves out."""
        return int(self.reply.ranked_request.end - self.reply.ranked_request.first)

    def table(self) -> pa.Table:
        """A row for each candidate of the reply, best first.

        Raises UserError where a column of the log has the name of one that is added.
        """
        reply, ranked_request, count = self.reply, self.reply.ranked_request, len(self.reply.scores)
        places = ranked_request.first + np.array(reply.order, np.int64)
        inputs = ranked_request.rows.schema.input_columns()
        columns = {name: ranked_request.rows.take(name, places) for name, role in inputs.items() if role != "placement"}
        weights = None if self.weights is None else json.dumps(self.weights, sort_keys=True)
        added = {
            REQUEST: pa.repeat(reply.request_id, count),
            AT: pa.repeat(pa.scalar(self.served_at, UTC_MICROSECONDS), count),
            RANK: pa.array(np.arange(1, count + 1, dtype=np.int32)),
            CANDIDATE_COUNT: pa.repeat(pa.scalar(ranked_request.end - ranked_request.first, pa.int32()), count),
            REPLIED_COUNT: pa.repeat(pa.scalar(count, pa.int32()), count),
            SCORE: pa.array(reply.scores, pa.float64()),
        }
        for name, values in reply.predictions.items():
            added[f"{PREDICTION_PREFIX}{name}"] = pa.array(np.array(values, np.float32))
        added[WEIGHTS] = pa.repeat(pa.scalar(weights, pa.string()), count)
        for name, hashes in _hash_seen(ranked_request, places).items():
            added[f"{DIGEST_PREFIX}{name}"] = pa.array(hashes)
        texts = {"served_model": self.name, "served_version": self.version, ARTIFACT: reply.model["version"]}
        texts["served_tables_as_of"] = reply.tables_as_of
        added |= {name: pa.repeat(pa.scalar(value, pa.string()), count) for name, value in texts.items()}
        added[FRACTION] = pa.repeat(float(self.fraction), count)
        check_reserved_columns(columns, added)
        return pa.table(columns | added)


def check_reserved_columns(columns: Iterable[str], added: Iterable[str]) -> None:
    """Raises UserError where a column of the log has the name of one that is added to its rows."""
    if both := {*columns} & {*added}:
        raise UserError(f"column '{min(both)}' has a name that logged requests use for their own; rename it")


def _hash_seen(ranked_request: RankedRequest, places: np.ndarray) -> dict[str, np.ndarray]:
    """Feature -> (M,) int32 hashes of what the model read of the candidates at these (M,) rows of the pass."""
    shared, own = ranked_request.inputs
    request = np.full(len(places), ranked_request.number)

    def take(mine: Mapping[str, Any], spread: Mapping[str, Any]) -> dict[str, Any]:
        values = [*((name, each, places) for name, each in mine.items())]
        values += [(name, each, request) for name, each in spread.items()]
        return {name: each.take(at) if isinstance(each, Ragged) else each[at] for name, each, at in values}

    return hash_features(take(own.ids, shared.ids), take(own.dense, shared.dense), ranked_request.layout)


def hash_features(
    ids: Mapping[str, np.ndarray | Ragged], dense: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, np.ndarray]:
    """Feature -> (N,) int32 hashes of what a model reads of N rows, so that served and offline rows can be compared.

    Placement is left out, which is absent in serving. The hashes are computed from encoded inputs, ids as integers and
    numbers by the bits of their float32, so they agree exactly if every input does. A hash is multilinear (Lemire and
    Kaser 2014): the sum over inputs of value times a fixed odd number, modulo 2^64, then mixed.

    ids: name of an input -> (N,) integers, or `Ragged`; dense: name -> (N,) float32.
    """
    of_ids = [each for each in layout.ids if not each.placement]
    inputs = [*of_ids, *(each for each in layout.dense if not each.placement)]
    inputs.sort(key=attrgetter("feature"))
    columns = [_numbers(ids[each.name] if isinstance(each, IdInput) else dense[each.name]) for each in inputs]
    names, starts = np.unique([each.feature for each in inputs], return_index=True)
    factors = splitmix64(np.arange(len(inputs), dtype=np.uint64)) | np.uint64(1)
    with np.errstate(over="ignore"):
        hashes = splitmix64(np.add.reduceat((np.column_stack(columns) + np.uint64(1)) * factors, starts, axis=1))
    return dict(zip(names.tolist(), (hashes >> np.uint64(32)).astype(np.uint32).view(np.int32).T, strict=True))


def _numbers(values: np.ndarray | Ragged) -> np.ndarray:
    """(N,) uint64, one for each row."""
    if not isinstance(values, Ragged):
        if values.dtype == np.float32:
            return np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        return values.astype(np.int64).view(np.uint64)
    ends = np.cumsum(values.lengths, dtype=np.int64)
    starts = ends - values.lengths
    within = np.arange(len(values.values)) - np.repeat(starts, values.lengths)
    with np.errstate(over="ignore"):
        each = splitmix64(values.values.astype(np.int64).view(np.uint64) + splitmix64(within.astype(np.uint64)))
        sums = np.append(np.uint64(0), np.cumsum(each, dtype=np.uint64))
        return splitmix64(sums[ends] - sums[starts] + values.lengths.astype(np.uint64))
