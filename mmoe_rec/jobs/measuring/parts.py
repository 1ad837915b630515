"""The tasks of measuring predictions: parts of files are read and checked, and partitions of users are measured.

    row groups  -> rows, checked, to partitions of users through files; which users and values there are
    partitions  -> sums of metrics, which have no user in common

A partition is held in memory; all rows of a user lie in one, wherever they stand in the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.metrics.auc import bin_edges, counts_by_value
from mmoe_rec.evaluation.slices import Counts, SliceBy, Slices
from mmoe_rec.evaluation.sums import ClosedSums, close_sums, measure
from mmoe_rec.jobs.measuring.asked import JOINED, Asked
from mmoe_rec.jobs.measuring.reading import rows_of
from mmoe_rec.log.hashing import combine, hash_column
from mmoe_rec.log.parts import LogPart
from mmoe_rec.preprocessing.exchange import Exchange, partition_of

ROWS = "rows"  # the channel
ROWS_AT_A_TIME = 131_072


@dataclass(frozen=True)
class MeasureJob:
    """What the tasks share.

    precision: task -> machine precision of its least precise predictions; edges: of the bins of each binary task's
    predictions; grouped: whether users are measured in groups; slices: of the rows; all known once all was read.
    """

    asked: Asked
    rows: Exchange
    precision: dict[str, float]
    edges: dict[str, np.ndarray] | None = None
    grouped: bool = False
    slices: tuple[Slices, ...] = ()


@dataclass(frozen=True)
class Read:
    """What was read. users: hashes of them, (U,) uint64; values: binary task -> some of the predicted values, rising,
    with the numbers of positive and of negative rows that they stand for; sliced: of what rows are sliced by."""

    rows: int
    users: np.ndarray
    values: dict[str, Values]
    sliced: tuple[Counts, ...] = ()

    @staticmethod
    def all(parts: Sequence[Read], by: Sequence[SliceBy] = ()) -> Read:
        """That of all parts. Raises UserError where a column has too many values to slice by."""
        users = np.unique(np.concatenate([part.users for part in parts]))
        values = {
            name: tuple(np.concatenate(each) for each in zip(*(part.values[name] for part in parts), strict=True))
            for name in parts[0].values
        }
        sliced = tuple(each.add([part.sliced[number] for part in parts]) for number, each in enumerate(by))
        counted = {name: counts_by_value(*each) for name, each in values.items()}
        return Read(sum(part.rows for part in parts), users, counted, sliced)

    def edges(self) -> dict[str, np.ndarray]:
        """Of bins for all."""
        return {name: bin_edges(*values) for name, values in self.values.items()}


Values = tuple[np.ndarray, np.ndarray, np.ndarray]


def _fewer(values: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> Values:
    """At most `MOST_BINS` of the values, each of which stands for those up to the next one."""
    place = np.searchsorted(bin_edges(values, positives, negatives), values, side="right")
    _, first = np.unique(place, return_index=True)
    return values[first], np.bincount(place, positives), np.bincount(place, negatives)


def send_part(job: MeasureJob, number_and_part: tuple[int, LogPart]) -> Read:
    """Reads a part, checks its rows and sends them. Raises BadFile for a wrong value."""
    number, part = number_and_part
    binary = [task.name for task in job.asked.tasks if task.kind == "binary"]
    users: list[np.ndarray] = []
    seen: dict[str, list[Values]] = {name: [] for name in binary}
    sliced: list[list[pa.Array]] = [[] for _ in job.asked.slices]

    def tables() -> Iterator[tuple[pa.Table, np.ndarray]]:
        for piece in part.pieces:
            for table in rows_of(job.asked, piece, ROWS_AT_A_TIME):
                hashes = table["hash"].to_numpy()
                users.append(np.unique(hashes))
                for name in binary:
                    value, label = table[f"p.{name}"].to_numpy(), table[f"l.{name}"].to_numpy()
                    seen[name].append((value, label == 1, label == 0))
                for number, each in enumerate(sliced):
                    each.extend(table[f"s.{number}"].chunks)
                yield table.drop_columns(["hash"]), partition_of(hashes, job.rows.receivers)

    sent = job.rows.send_in_turns(ROWS, (number, 0), tables())
    found = {name: tuple(np.concatenate(each) for each in zip(*given, strict=True)) for name, given in seen.items()}
    values = {}
    for name, (value, positive, negative) in found.items():
        known = positive | negative
        values[name] = _fewer(*counts_by_value(value[known], positive[known], negative[known]))
    counts = tuple(by.count(each) for by, each in zip(job.asked.slices, sliced, strict=True))
    return Read(int(sent.sum()), np.unique(np.concatenate(users)), values, counts)


Sliced = dict[tuple[str, str], ClosedSums]


def measure_partition(job: MeasureJob, number: int) -> tuple[ClosedSums, Sliced, np.ndarray] | None:
    """The sums of a partition's rows and of their slices, and the hashes of its requests, (Q,) uint64; None if there
    are no rows."""
    table = job.rows.receive_all(ROWS, number)
    if table is None:
        return None
    asked = job.asked
    _check_users(asked, table)
    if asked.candidate is not None and asked.duplicates == "error":
        _check_candidates(asked, table)
    slices = {
        (each.by.name, name): _closed(job, table.take(pa.array(rows)))
        for place, each in enumerate(job.slices)
        for name, rows in each.rows(table[f"s.{place}"].combine_chunks()).items()
    }
    requests = np.unique(hash_column(table["request"].combine_chunks()))
    return _closed(job, table), slices, requests


def _closed(job: MeasureJob, table: pa.Table) -> ClosedSums:
    """The sums of rows."""
    asked = job.asked
    predictions = {task.name: table[f"p.{task.name}"] for task in asked.tasks}
    sums = measure(
        asked.tasks,
        table["user"],
        table["request"],
        predictions,
        {task.name: table[f"l.{task.name}"] for task in asked.tasks},
        score=table["score"] if asked.score is not None else next(iter(predictions.values())),
        weight=table["weight"] if asked.weight is not None else None,
        candidates=table["candidate"] if asked.candidate is not None else None,
        precision=job.precision,
    )
    return close_sums(sums, job.edges, job.grouped)


def check_requests(job: MeasureJob, requests: Sequence[np.ndarray]) -> None:
    """Raises UserError where a request has rows in several partitions, which hold other users. requests: hashes of each
    partition that has rows."""
    hashes, counts = np.unique(np.concatenate(requests), return_counts=True)
    if (counts == 1).all():
        return
    tables = []
    for number in range(job.rows.receivers):
        for table in job.rows.receive(ROWS, number):
            mine = np.isin(hash_column(table["request"].combine_chunks()), hashes[counts > 1][:1])
            tables.append(table.select(["user", "request"]).filter(pa.array(mine)))
    _check_users(job.asked, pa.concat_tables(tables))


def _request(asked: Asked, value: pa.Scalar) -> str:
    which = f"request {value.as_py()!r}" if len(asked.request) == 1 else "a request"
    return f"{which} by '{JOINED.join(asked.request)}'"


def _check_candidates(asked: Asked, table: pa.Table) -> None:
    """Raises UserError where a request has a candidate twice."""
    request, candidate = (table[name].combine_chunks() for name in ("request", "candidate"))
    pairs = combine([hash_column(request), hash_column(candidate)])
    _, first, counts = np.unique(pairs, return_index=True, return_counts=True)
    if len(twice := first[counts > 1]):
        row = int(twice[0])
        raise UserError(
            f"{_request(asked, request[row])} has candidate {candidate[row].as_py()!r} more than once, as where files "
            "of two models, or a file and its copy, lie together; --keep-duplicates counts all rows"
        )


def _check_users(asked: Asked, table: pa.Table) -> None:
    """Raises UserError where a request has rows of several users."""
    user, request = (table[name].combine_chunks().dictionary_encode() for name in ("user", "request"))
    users, requests = user.indices.to_numpy(), request.indices.to_numpy()
    of_request = np.zeros(len(request.dictionary), np.int64)
    of_request[requests] = users
    strange = np.flatnonzero(of_request[requests] != users)
    if len(strange):
        row = strange[0]
        first, other = (user.dictionary[int(each)].as_py() for each in (users[row], of_request[requests[row]]))
        raise UserError(
            f"{_request(asked, request.dictionary[int(requests[row])])} has rows of more than one user, {first!r} and "
            f"{other!r}: a request is one list shown to one user; name columns that tell lists apart with --columns "
            f"request={JOINED.join((asked.user, *asked.request))}"
        )
