"""The ranks of scored rows within their requests, whose rows may lie in any parts of a log, and the files with them.

    scored rows     -> (request, log score, row), to partitions of requests through files
    partitions      -> (row, rank), back to the parts of the log through files
    parts           -> the rows as they were scored, with their rank, as Parquet

A partition of requests is held in memory, with 24 bytes for each of its rows: a single request is not divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_file
from mmoe_rec.jobs.scoring.folder import RANKS, SCORES, finished_name, scored_file
from mmoe_rec.preprocessing.exchange import Exchange

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
