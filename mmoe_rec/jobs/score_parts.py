"""The tasks of a scoring: rows are scored part by part, ranked request by request, and written.

    part of the log -> predictions and scores, with what was known before each request
    scored rows     -> (request, log score, row), to partitions of requests through files
    partitions      -> (row, rank), back to the parts of the log through files
    parts           -> the rows as they were scored, with their rank, as Parquet

A process loads the model once, for all its tasks and threads. Rows are scored a fixed number at a time, by one thread
each, so that no bit depends on the engine or the number of workers. A partition of requests is held in memory, with 24
bytes for each of its rows: a single request is not divided.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import scored_table
from mmoe_rec.jobs.prediction_files import WEIGHT
from mmoe_rec.jobs.score_files import RANKS, SCORES, LearntRows, finished_name, known_rows, label_column, scored_file
from mmoe_rec.log.reader import ROWS_PER_PART, LogPart, LogReader
from mmoe_rec.log.rows import LogRows, labels_of
from mmoe_rec.model.products import Products
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.exchange import Exchange, ResultExchange, ResultReader, partition_of

_LOADING = threading.Lock()
_GREATEST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class ScoreJob:
    """What the tasks of this step share.

    model: artifact folder, and version, its checksum; products: what multiplies; reader: of the log; results: what
    counters and histories knew of the rows, None where the model's own tables are asked; window: request times to
    score; known_until: time of the last request that the tables know, microseconds; exact_from: from when on the tables
    know what was known then, None for any time; labels_known_by: the moment as of which labels are written,
    microseconds, None for no labels; learnt: how rows are told that the model has learnt from, None where nobody asks;
    scores: exchange by request; scored: folder that gets a file a part.
    """

    model: Path
    version: str
    products: Products
    reader: LogReader
    results: ResultExchange | None
    window: Window
    known_until: int
    exact_from: int | None
    labels_known_by: int | None
    learnt: LearntRows | None
    scores: Exchange
    scored: Path


@dataclass
class PartScored:
    """Rows of parts that were scored; early: of these, requested no later than what the tables know; inexact: requested
    before what the tables still know as it was then; learnt: that the model has learnt from; first, last: request
    times, microseconds. Parts are merged in any order."""

    rows: int = 0
    early: int = 0
    inexact: int = 0
    learnt: int = 0
    first: int = _GREATEST
    last: int = -_GREATEST

    def merge(self, other: PartScored) -> None:
        """Adds other parts."""
        self.rows, self.early = self.rows + other.rows, self.early + other.early
        self.inexact, self.learnt = self.inexact + other.inexact, self.learnt + other.learnt
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)

    @staticmethod
    def read(scored: Path, number: int) -> PartScored | None:
        """What is known of a part that was scored before, None where it was not."""
        try:
            return PartScored(**json.loads(_about(scored, number).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None


def _about(scored: Path, number: int) -> Path:
    return scored / f"part-{number:05d}.json"


def ranker_of(folder: Path, version: str) -> Ranker:
    """The model of a folder, loaded once by this process, which keeps it until `forget_ranker`.

    Raises UserError where another one lies there by now.
    """
    with _LOADING:
        return _loaded(folder, version)


@lru_cache(maxsize=1)
def _loaded(folder: Path, version: str) -> Ranker:
    ranker = Ranker.load(folder)
    if ranker.version != version:
        raise UserError(
            f"another model (version {ranker.version}) took the place of the one in '{folder}' (version {version}) "
            "while rows were scored: start the command again, which scores with the new one"
        )
    return ranker


def forget_ranker() -> None:
    """Frees the memory of the model."""
    _loaded.cache_clear()


def score_part(job: ScoreJob, task: tuple[int, LogPart]) -> PartScored:
    """Scores part number `task[0]` of a log into a file, and sends each row's score to where its request is ranked.

    The part is done when `PartScored.read` finds it; what a killed task has left is written again.
    """
    number, part = task
    torch.set_num_threads(1)
    ranker = ranker_of(job.model, job.version)
    ranker.scorer.multiply_by(job.products)
    found = PartScored()
    sender = _Sender(job.scores, part.start)
    with atomic_file(scored_file(job.scored, number)) as path, pa.OSFile(str(path), "wb") as file:
        writer = None
        for numbers, rows in _known_rows(job, ranker, part):
            table, log_scores = _scored(ranker, rows)
            if job.labels_known_by is not None:
                for name, values in labels_of(rows, job.labels_known_by).items():
                    table = table.append_column(label_column(name), pa.array(values, from_pandas=True))
                if (weight := rows.schema.columns.weight) is not None:
                    table = table.append_column(WEIGHT, pa.array(rows.numbers(weight)))
            writer = writer or pa.ipc.new_file(file, table.schema)
            writer.write_table(table)
            sender.add(rows.request_hashes(), log_scores, numbers)
            times = rows.times()
            early = int((times <= job.known_until).sum())
            inexact = 0 if job.exact_from is None else int((times < job.exact_from).sum())
            learnt = 0 if job.learnt is None else job.learnt.count(rows)
            found.merge(PartScored(len(rows), early, inexact, learnt, int(times.min()), int(times.max())))
        if writer is not None:
            writer.close()
    sender.flush()
    with atomic_file(_about(job.scored, number)) as path:
        path.write_text(json.dumps(asdict(found)), encoding="utf-8")
    return found


def _known_rows(job: ScoreJob, ranker: Ranker, part: LogPart) -> Iterator[tuple[np.ndarray, LogRows]]:
    results = None if job.results is None else ResultReader(job.results, list(ranker.pipeline.key_groups))
    return known_rows(job.reader, results, job.window, part)


def _scored(ranker: Ranker, rows: LogRows) -> tuple[pa.Table, np.ndarray]:
    """Keys, predictions and scores of rows, and their log scores, (N,) float64."""
    values, log_scores = ranker.score(ranker.reader.completed(rows))
    return scored_table(rows, values, log_scores, ranker.layout), log_scores


class _Sender:
    """Sends the log scores of a part's rows to partitions of requests, many rows at a time."""

    def __init__(self, exchange: Exchange, start: int) -> None:
        self.exchange, self.start, self.turn = exchange, start, 0
        self._waiting: list[pa.Table] = []

    def add(self, request: np.ndarray, score: np.ndarray, row: np.ndarray) -> None:
        """Takes N rows: the hash of their request, their log score, and their number in the log."""
        self._waiting.append(pa.table({"request": request, "score": score, "row": row}))
        if sum(map(len, self._waiting)) >= ROWS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting."""
        if self._waiting:
            table = pa.concat_tables(self._waiting)
            receiver = partition_of(table["request"].to_numpy(), self.exchange.receivers)
            self.exchange.send(SCORES, (self.start, self.turn), table, receiver)
            self._waiting, self.turn = [], self.turn + 1


ROWS_PER_GROUP = 131_072


@dataclass(frozen=True)
class RankJob:
    """What the tasks of ranking share.

    starts: number of the first row of each part, rising; scores: exchange by request; ranks: exchange by part; scored:
    folder of the scored parts; finished: folder that gets Parquet files; constants: columns with one value in all rows.
    """

    starts: np.ndarray
    scores: Exchange
    ranks: Exchange
    scored: Path
    finished: Path
    constants: dict[str, str]


def rank_partition(job: RankJob, partition: int) -> None:
    """Ranks the rows of a partition's requests, best first from 1; equal scores keep the order of the rows."""
    table = job.scores.receive_all(SCORES, partition)
    if table is None:
        return
    request, score, row = (table[name].to_numpy() for name in ("request", "score", "row"))
    order = np.lexsort((row, -score, request))
    request, row = request[order], row[order]
    begins = np.flatnonzero(np.append(True, request[1:] != request[:-1]))
    lengths = np.diff(np.append(begins, len(row)))
    rank = np.arange(1, len(row) + 1) - np.repeat(begins, lengths)
    part = np.searchsorted(job.starts, row, side="right") - 1
    ranked = pa.table({"row": row, "rank": rank.astype(np.int32)})
    job.ranks.send(RANKS, (partition, 0), ranked, part)


def finish_part(job: RankJob, number: int) -> None:
    """Writes the file of a part that has rows, unless it is there."""
    target = job.finished / finished_name(number)
    if target.is_file():
        return
    ranked = job.ranks.receive_all(RANKS, number)
    assert ranked is not None, "a part without ranks"
    rank = ranked["rank"].to_numpy()[np.argsort(ranked["row"].to_numpy())]
    start, writer = 0, None
    with atomic_file(target) as path:
        for rows in _groups(scored_file(job.scored, number)):
            its = {"rank": pa.array(rank[start : start + len(rows)])}
            its |= {name: pa.repeat(value, len(rows)) for name, value in job.constants.items()}
            table = pa.table([*rows.columns, *its.values()], names=[*rows.column_names, *its])
            start += len(rows)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        assert writer is not None, "a part without rows"
        writer.close()
    assert start == len(rank), "ranks of other rows"


def _groups(scored: Path) -> Iterator[pa.Table]:
    """The rows of a scored part, as many at a time as a row group holds, or a few more."""
    waiting: list[pa.RecordBatch] = []
    with pa.OSFile(str(scored)) as file, pa.ipc.open_file(file) as reader:
        for number in range(reader.num_record_batches):
            waiting.append(reader.get_batch(number))
            if sum(map(len, waiting)) >= ROWS_PER_GROUP:
                yield pa.Table.from_batches(waiting)
                waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)
