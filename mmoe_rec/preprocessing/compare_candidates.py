"""The step `compare` of a feature build: compute the features of kind `relative`.

Such a feature needs all rows of a request, which may be in different files. So tasks first read parts of the log, and
send the numbers of each row to the partition of the request. Then a task for each partition compares the numbers, and
sends the results to blocks of rows, as the step `look up` does.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mmoe_rec.features.numeric_statistics import NumberHistogram
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.reader import LogPart, LogReader
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import concat_tables
from mmoe_rec.point_in_time.join import Window, in_any_window, in_window
from mmoe_rec.preprocessing.look_up import COMPARED_GROUP, Exchange, ResultExchange, ResultReader, assign_partitions
from mmoe_rec.settings.schema import Schema

NUMBERS_CHANNEL = "compared"
PrepareRows = Callable[[LogRows], LogRows]


@dataclass(frozen=True)
class CompareJob:
    """Arguments that all tasks of the step `compare` share.

    Attributes:
        schema: Schema of the features.
        reader: Reader of the interaction log.
        prepare: Function that adds missing columns and results of counters to rows. None if rows are complete.
        windows: Request times [start, end) of the splits, in microseconds.
        training: Request times [start, end) of the rows to count in histograms. None counts no rows.
        exchange: Exchange of the numbers to compare, which partitions of requests receive.
        results: Exchange with the results of counters, to which this step adds its results.
    """

    schema: Schema
    reader: LogReader
    prepare: PrepareRows | None
    windows: Mapping[str, Window]
    training: Window | None
    exchange: Exchange
    results: ResultExchange


def send_numbers(job: CompareJob, part: LogPart) -> None:
    """Send the numbers to compare in a part of the log to the partitions of their requests."""
    job.exchange.send_batches(NUMBERS_CHANNEL, (part.start, 0), _read_numbers(job, part))


def _read_numbers(job: CompareJob, part: LogPart) -> Iterator[tuple[pa.Table, np.ndarray]]:
    pipeline = FeaturePipeline(job.schema)
    results = ResultReader(job.results, list(pipeline.key_groups))
    for rows in job.reader.read(part):
        inside = rows.filter(in_any_window(rows.times(), job.windows.values()))
        if len(inside):
            requests = inside.request_hashes()
            columns = {"request": requests, "row": inside.row_numbers, "time": inside.times()}
            complete = LogRows(inside.table, rows.schema, results.of(inside.row_numbers))
            complete = complete if job.prepare is None else job.prepare(complete)
            # Name the numbers by index, because a column of the log may be named `row`, for example.
            columns |= {
                str(index): values for index, values in enumerate(pipeline.numbers_to_compare(complete).values())
            }
            yield pa.table(columns), assign_partitions(requests, job.exchange.receivers)


def compare_partition(job: CompareJob, partition: int) -> dict[str, dict[str, NumberHistogram]]:
    """Compare the candidates of each request of a partition, and send the results to blocks of rows.

    Args:
        job: Arguments of all tasks.
        partition: Number of the partition.

    Returns:
        Histograms of the values of rows in `job.training`, by feature and name of the result.
    """
    encoders = FeaturePipeline(job.schema).relative_encoders
    if tables := list(job.exchange.receive(NUMBERS_CHANNEL, partition)):
        table = concat_tables(tables)
        columns = {name: table[name].to_numpy() for name in table.column_names}
        names = list(dict.fromkeys(name for encoder in encoders for name in encoder.compared))
        numbers = {name: columns[str(index)] for index, name in enumerate(names)}
        requests = np.unique(columns["request"], return_inverse=True)[1]
        inside = None if job.training is None else in_window(columns["time"], job.training)
        results: dict[str, np.ndarray] = {}
        for encoder in encoders:
            compared = encoder.compare(numbers, requests)
            if inside is not None:
                encoder.partial_fit_results({name: values[inside] for name, values in compared.items()})
            results |= compared
        job.results.send(COMPARED_GROUP, (partition, 0), columns["row"], results)
    return {encoder.name: {name: number.histogram for name, number in encoder.numbers.items()} for encoder in encoders}
