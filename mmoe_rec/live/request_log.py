"""Log ranked requests to Parquet files in a background thread, so that no reply waits for a file.

docs/how-to/train-on-served-requests.md says which requests are logged. The files have the names
`requests-TIME-HOST-PROCESS-RANDOM.parquet` with the time of writing (UTC). Other programs may move or remove files at
any time.
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
from enum import StrEnum
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
"""Limit on the candidates of all queued replies, which keep the rows of their batches in memory. More are dropped."""
ROWS_PER_FILE = 262_144

_log = logging.getLogger(__name__)


class LogOutcome(StrEnum):
    """What happened to a reply, as a label of the metric `request_log`."""

    UNSAMPLED = "unsampled"
    DROPPED = "dropped"
    WRITTEN = "written"
    FAILED = "failed"


CountReplies = Callable[[LogOutcome, int], None]


@dataclass(frozen=True)
class RequestLogOptions:
    """Options of the request log.

    Attributes:
        folder: Folder of the log's files.
        fraction: Fraction of requests to log, 0 to 1.
        flush_seconds: Seconds between files.
    """

    folder: Path
    fraction: float = 0.1
    flush_seconds: float = 300.0


class RequestLog:
    """Log of ranked requests, or of a fraction of them."""

    def __init__(self, options: RequestLogOptions, count: CountReplies) -> None:
        """Start the thread that writes files.

        Args:
            options: Folder, fraction and frequency of files.
            count: Receives an outcome and the number of replies with this outcome.

        Raises:
            UserError: No file can be written in the folder.
        """
        check_log_folder(options.folder)
        self.options, self._count = options, count
        self._queue: SimpleQueue[LoggedReply | None] = SimpleQueue()  # None ends the thread.
        self._lock = threading.Lock()
        self._candidates = 0  # Number of candidates of all replies in the queue.
        self._is_closing = self._has_failed = self._has_dropped = False
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    def offer(self, reply: Ranking, weights: Mapping[str, Any] | None, name: str | None, version: str | None) -> None:
        """Queue a reply if its request is sampled. If the queue is full, the reply is dropped, so this never waits.

        Args:
            reply: Ranking with a request ID.
            weights: Score weights of tasks in the request (`task_weights`). None if the model's weights were used.
            name: Name of the registered model, None if unknown.
            version: Version of the registered model, None if unknown.
        """
        request: Any = reply.request_id
        if reply.ranked_request.rows.schema.columns.request_scope == "user":
            request = f"{reply.ranked_request.user} {request}"
        if not is_sampled(request, self.options.fraction):
            self._count(LogOutcome.UNSAMPLED, 1)
            return
        record = LoggedReply(reply, weights, name, version, self.options.fraction, time_ns() // 1_000)
        with self._lock:
            has_room = not self._candidates or self._candidates + len(record) <= MAX_QUEUED_CANDIDATES
            if has_room and not self._is_closing:
                self._candidates += len(record)
                self._queue.put(record)
                return
        self._count(LogOutcome.DROPPED, 1)
        if not self._has_dropped:
            _log.warning("requests arrive faster than they can be logged; some are dropped")
        self._has_dropped = True

    def close(self) -> None:
        """Write all queued replies, however long that takes."""
        with self._lock:
            self._is_closing = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        """Write queued replies to files until the log is closed.

        A file is written once `ROWS_PER_FILE` rows have arrived, after `flush_seconds`, or before another model's first
        reply, because each file has the replies of one model.
        """
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
                table = record.to_table()
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
        """Write the tables of replies to a file. Return an empty list, which collects the next file's tables."""
        if tables:
            try:  # A column with only nulls has the null type in one table, but maybe not in others. Unify the types.
                rows = pa.concat_tables(tables, promote_options="default").combine_chunks()
                write_log_file(self.options.folder, rows)
            except Exception as error:
                self._fail(len(tables), error)
            else:
                self._count(LogOutcome.WRITTEN, len(tables))
                self._has_failed = False
        return []

    def _fail(self, records: int, error: Exception) -> None:
        """Count replies that can't be logged. Only the first failure is printed, because every reply may fail."""
        self._count(LogOutcome.FAILED, records)
        if not self._has_failed:
            reason = str(error) if isinstance(error, UserError) else getattr(error, "strerror", None) or one_line(error)
            _log.warning("replies can't be logged in '%s', and serving continues: %s", self.options.folder, reason)
        self._has_failed = True


def is_sampled(request: int | str, fraction: float) -> bool:
    """Return whether a request belongs to the logged fraction. The result depends only on the ID and the fraction.

    Args:
        request: ID of the request.
        fraction: Fraction of requests to log, 0 to 1.
    """
    if fraction >= 1:
        return True
    digest = hashlib.blake2b(str(request).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def check_log_folder(folder: Path) -> None:
    """Create the folder. Raise UserError if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"requests can't be logged in '{folder}': {error.strerror}") from None


def write_log_file(folder: Path, rows: pa.Table) -> Path:
    """Write rows atomically to a new file, and return its path.

    Args:
        folder: Folder of the request log.
        rows: Rows to write.

    Raises:
        OSError: The folder is gone or can't be written.
    """
    if not folder.is_dir():  # Don't recreate it. It may be a lost mount, and files would fill the local disk instead.
        raise FileNotFoundError(2, "the folder is gone")
    timestamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    host = re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname())[:40] or "host"
    path = folder / f"requests-{timestamp}-{host}-{os.getpid()}-{secrets.token_hex(4)}.parquet"
    with atomic_file(path) as temporary:
        pq.write_table(rows, temporary, compression="zstd", row_group_size=131_072)
    return path


@dataclass(frozen=True, eq=False)
class LoggedReply:
    """A reply in the queue.

    Attributes:
        reply: Ranking with a request ID.
        weights: Score weights of tasks in the request (`task_weights`). None if the model's weights were used.
        name: Name of the registered model, None if unknown.
        version: Version of the registered model, None if unknown.
        fraction: Fraction of requests that are logged.
        served_at: Time of the reply, microseconds since 1970 UTC.
    """

    reply: Ranking
    weights: Mapping[str, Any] | None
    name: str | None
    version: str | None
    fraction: float
    served_at: int

    def __len__(self) -> int:
        """Return the number of candidates of the request, including candidates that `top_k` omits from the reply."""
        return int(self.reply.ranked_request.end - self.reply.ranked_request.first)

    def to_table(self) -> pa.Table:
        """Return one row for each candidate of the reply, best first.

        Raises UserError if a column of the interaction log has the name of a column that the request log adds.
        """
        reply, ranked_request, count = self.reply, self.reply.ranked_request, len(self.reply.scores)
        rows, row_indices = ranked_request.rows, ranked_request.first + np.array(reply.order, np.int64)
        inputs = rows.schema.input_columns()
        columns = {name: rows.take(name, row_indices) for name, role in inputs.items() if role != "placement"}
        weights = None if self.weights is None else json.dumps(self.weights, sort_keys=True)
        added = {
            REQUEST: pa.repeat(reply.request_id, count),
            AT: pa.repeat(pa.scalar(self.served_at, UTC_MICROSECONDS), count),
            RANK: pa.array(np.arange(1, count + 1, dtype=np.int32)),
            CANDIDATE_COUNT: pa.repeat(pa.scalar(len(self), pa.int32()), count),
            REPLIED_COUNT: pa.repeat(pa.scalar(count, pa.int32()), count),
            SCORE: pa.array(reply.scores, pa.float64()),
        }
        for name, values in reply.predictions.items():
            added[f"{PREDICTION_PREFIX}{name}"] = pa.array(np.array(values, np.float32))
        added[WEIGHTS] = pa.repeat(pa.scalar(weights, pa.string()), count)
        for name, hashes in _hash_ranked_inputs(ranked_request, row_indices).items():
            added[f"{DIGEST_PREFIX}{name}"] = pa.array(hashes)
        texts = {"served_model": self.name, "served_version": self.version, ARTIFACT: reply.model["version"]}
        texts["served_tables_as_of"] = reply.tables_as_of
        added |= {name: pa.repeat(pa.scalar(value, pa.string()), count) for name, value in texts.items()}
        added[FRACTION] = pa.repeat(float(self.fraction), count)
        check_reserved_columns(columns, added)
        return pa.table(columns | added)


def check_reserved_columns(columns: Iterable[str], added: Iterable[str]) -> None:
    """Raise UserError if a column of the interaction log has the name of a column that the request log adds.

    Args:
        columns: Columns of the interaction log.
        added: Columns that the request log adds.
    """
    if both := {*columns} & {*added}:
        raise UserError(f"column '{min(both)}' has a name that the request log uses for its own columns; rename it")


def _hash_ranked_inputs(ranked_request: RankedRequest, row_indices: np.ndarray) -> dict[str, np.ndarray]:
    """Hash the model's inputs of M candidates, given their rows in the batch. Return feature -> (M,) int32 hashes."""
    by_request, by_row = ranked_request.inputs
    request_indices = np.full(len(row_indices), ranked_request.number)

    def take(row_inputs: Mapping[str, Any], request_inputs: Mapping[str, Any]) -> dict[str, Any]:
        selections = [(name, values, row_indices) for name, values in row_inputs.items()]
        selections += [(name, values, request_indices) for name, values in request_inputs.items()]
        return {
            name: values.take(indices) if isinstance(values, Ragged) else values[indices]
            for name, values, indices in selections
        }

    return hash_features(take(by_row.ids, by_request.ids), take(by_row.dense, by_request.dense), ranked_request.layout)


def hash_features(
    ids: Mapping[str, np.ndarray | Ragged], dense: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, np.ndarray]:
    """Hash the inputs of each feature for N rows, so that served and offline rows can be compared.

    Inputs that say where a candidate was shown are left out, because a server doesn't know them. Hashes are multilinear
    (Lemire and Kaser 2014): each input is multiplied by a fixed odd number, and the sum modulo 2^64 is mixed.

    Args:
        ids: Input name -> (N,) integers, or `Ragged` for lists of IDs.
        dense: Input name -> (N,) float32.
        layout: Inputs of the model.

    Returns:
        Feature -> (N,) int32.
    """
    id_inputs = [spec for spec in layout.ids if not spec.placement]
    inputs = [*id_inputs, *(spec for spec in layout.dense if not spec.placement)]
    inputs.sort(key=attrgetter("feature"))
    columns = [_to_uint64(ids[spec.name] if isinstance(spec, IdInput) else dense[spec.name]) for spec in inputs]
    names, starts = np.unique([spec.feature for spec in inputs], return_index=True)
    factors = splitmix64(np.arange(len(inputs), dtype=np.uint64)) | np.uint64(1)
    with np.errstate(over="ignore"):
        hashes = splitmix64(np.add.reduceat((np.column_stack(columns) + np.uint64(1)) * factors, starts, axis=1))
    return dict(zip(names.tolist(), (hashes >> np.uint64(32)).astype(np.uint32).view(np.int32).T, strict=True))


def _to_uint64(values: np.ndarray | Ragged) -> np.ndarray:
    """Reduce the value of each of N rows (a number or a list) to one uint64 for hashing. Return shape (N,)."""
    if not isinstance(values, Ragged):
        if values.dtype == np.float32:
            return np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        return values.astype(np.int64).view(np.uint64)
    ends = np.cumsum(values.lengths, dtype=np.int64)
    starts = ends - values.lengths
    within = np.arange(len(values.values)) - np.repeat(starts, values.lengths)
    with np.errstate(over="ignore"):
        mixed = splitmix64(values.values.astype(np.int64).view(np.uint64) + splitmix64(within.astype(np.uint64)))
        sums = np.append(np.uint64(0), np.cumsum(mixed, dtype=np.uint64))
        return splitmix64(sums[ends] - sums[starts] + values.lengths.astype(np.uint64))
