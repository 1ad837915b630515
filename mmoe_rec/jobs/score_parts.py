"""The tasks of a scoring: rows are scored part by part, and written with the ranks that a database gives them.

    part of the log -> predictions and scores, with what was known before each request; (request, log score, row)
    all of these    -> rank within the request, in a database
    parts           -> the rows as they were scored, with their rank, as Parquet

A process loads the model once, for all its tasks and threads. Rows are scored a fixed number at a time, by one thread
each, so that no bit depends on the engine or the number of workers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import scored_table
from mmoe_rec.jobs.prediction_files import WEIGHT
from mmoe_rec.jobs.score_files import LearntRows, Output, finished_name, known_rows, label_column
from mmoe_rec.log.database import Database
from mmoe_rec.log.reader import LogPart, LogReader
from mmoe_rec.log.rows import LogRows, labels_of
from mmoe_rec.model.products import Products
from mmoe_rec.point_in_time.join import Window
from mmoe_rec.preprocessing.exchange import ResultExchange, ResultReader

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
    out: where the files go.
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
    out: Output


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
        for name in ("rows", "early", "inexact", "learnt"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)

    @staticmethod
    def read(out: Output, number: int) -> PartScored | None:
        """What is known of a part that was scored before, None where it was not."""
        record = out.part(number, "json")
        if not (record.exists() and out.part(number, "ranked.parquet").exists()):
            return None
        return PartScored(**json.loads(record.read_text(encoding="utf-8")))


def ranker_of(folder: Path, version: str) -> Ranker:
    """The model of a folder, loaded once by this process, which keeps it until `forget_ranker`.

    Raises UserError where another one lies there by now.
    """
    with _LOADING:
        return _load(folder, version)


@lru_cache(maxsize=1)
def _load(folder: Path, version: str) -> Ranker:
    ranker = Ranker.load(folder)
    if ranker.version != version:
        raise UserError(
            f"another model (version {ranker.version}) took the place of the one in '{folder}' (version {version}) "
            "while rows were scored: start the command again, which scores with the new one"
        )
    return ranker


def forget_ranker() -> None:
    """Frees the memory of the model."""
    _load.cache_clear()


def score_part(job: ScoreJob, task: tuple[int, LogPart]) -> PartScored:
    """Scores part number `task[0]` of a log into a file, and writes what its rows are ranked by into another.

    The part is done when `PartScored.read` finds it; what a killed task has left is written again.
    """
    number, part = task
    torch.set_num_threads(1)
    ranker = ranker_of(job.model, job.version)
    ranker.scorer.multiply_by(job.products)
    results = None if job.results is None else ResultReader(job.results, list(ranker.pipeline.key_groups))
    whole, ranked = PartScored(), [_RANKED.empty_table()]
    with atomic_file(job.out.part(number, "arrow")) as path, pa.OSFile(str(path), "wb") as file:
        writer = None
        for numbers, rows in known_rows(job.reader, results, job.window, part):
            table, log_scores = _score_rows(ranker, rows)
            if job.labels_known_by is not None:
                for name, values in labels_of(rows, job.labels_known_by).items():
                    table = table.append_column(label_column(name), pa.array(values, from_pandas=True))
                if (weight := rows.schema.columns.weight) is not None:
                    table = table.append_column(WEIGHT, pa.array(rows.numbers(weight)))
            writer = writer or pa.ipc.new_file(file, table.schema)
            writer.write_table(table)
            ranked.append(pa.table([rows.request_hashes(), log_scores, numbers], schema=_RANKED))
            times = rows.times()
            early = int((times <= job.known_until).sum())
            inexact = 0 if job.exact_from is None else int((times < job.exact_from).sum())
            learnt = 0 if job.learnt is None else job.learnt.count(rows)
            whole.merge(PartScored(len(rows), early, inexact, learnt, int(times.min()), int(times.max())))
        if writer is not None:
            writer.close()
    with atomic_file(job.out.part(number, "ranked.parquet")) as path:
        pq.write_table(pa.concat_tables(ranked), path)
    with atomic_file(job.out.part(number, "json")) as path:
        path.write_text(json.dumps(asdict(whole)), encoding="utf-8")
    return whole


_RANKED = pa.schema({"request": pa.uint64(), "score": pa.float64(), "number": pa.int64()})
"""The hash of a row's request, its log score, and its number in the log."""


def _score_rows(ranker: Ranker, rows: LogRows) -> tuple[pa.Table, np.ndarray]:
    """Keys, predictions and scores of rows, and their log scores, (N,) float64."""
    values, log_scores = ranker.score(ranker.reader.completed(rows))
    return scored_table(rows, values, log_scores, ranker.layout), log_scores


def rank_rows(database: Database, parts: Mapping[Path, Path]) -> None:
    """Ranks the rows of all requests, best first from 1; equal scores keep the order of the rows.

    parts: file of `_RANKED` of each part -> the file that gets the ranks of its rows, (N,) int32, as NumPy's.
    """
    database.register("rows", ds.dataset(list(map(str, parts))))
    database.run(
        "CREATE TABLE ranks AS SELECT number, "
        "row_number() OVER (PARTITION BY request ORDER BY score DESC, number)::INTEGER AS rank FROM rows"
    )
    for rows, target in parts.items():
        numbers = pq.read_table(rows, columns=["number"])["number"].to_numpy()
        query = f"SELECT rank FROM ranks WHERE number BETWEEN {numbers[0]} AND {numbers[-1]} ORDER BY number"
        ranks = pa.concat_tables(database.read(query, ROWS_PER_GROUP))["rank"].to_numpy()
        assert len(ranks) == len(numbers), "ranks of other rows"
        with target.open("wb") as file:
            np.save(file, ranks)


ROWS_PER_GROUP = 131_072


def finish_part(out: Output, constants: Mapping[str, str], number: int) -> None:
    """Writes the file of a part that has rows, unless it is there. constants: columns with one value in all rows."""
    target = out.finished / finished_name(number)
    if target.is_file():
        return
    rank, start, writer = np.load(out.part(number, "npy")), 0, None
    with atomic_file(target) as path:
        for rows in _groups(out.part(number, "arrow")):
            its = {"rank": pa.array(rank[start : start + len(rows)])}
            its |= {name: pa.repeat(value, len(rows)) for name, value in constants.items()}
            table = pa.table([*rows.columns, *its.values()], names=[*rows.column_names, *its])
            start += len(rows)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        assert writer is not None, "a part without rows"
        writer.close()


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
