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
import pyarrow.types as pt

from mmoe_rec.build.exchange import Exchange, partition_of
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.closed import ClosedSums, closed
from mmoe_rec.evaluation.metrics.bins import bin_edges
from mmoe_rec.evaluation.sums import measure
from mmoe_rec.jobs.measuring.asked import JOINED, Asked
from mmoe_rec.log.checks import BadFile, open_parquet
from mmoe_rec.log.columns import canonical_type
from mmoe_rec.log.hashing import combine, hash_column
from mmoe_rec.log.values import file_column, first_row, next_batch
from mmoe_rec.schema import Use

ROWS = "rows"  # the channel
ROWS_AT_A_TIME = 131_072


@dataclass(frozen=True)
class Part:
    """Consecutive row groups of a file; start: the number of their first row."""

    address: str
    groups: tuple[int, ...]
    start: int
    rows: int


@dataclass(frozen=True)
class MeasureJob:
    """What the tasks share.

    precision: task -> machine precision of its least precise predictions; edges: of the bins of each binary task's
    predictions; grouped: whether users are measured in groups; both are known once all was read.
    """

    asked: Asked
    rows: Exchange
    precision: dict[str, float]
    edges: dict[str, np.ndarray] | None = None
    grouped: bool = False


@dataclass(frozen=True)
class Read:
    """What was read. users: hashes of them, (U,) uint64; values: binary task -> some of the predicted values, rising,
    with the numbers of positive and of negative rows that they stand for."""

    rows: int
    users: np.ndarray
    values: dict[str, Values]

    @staticmethod
    def all(parts: Sequence[Read]) -> Read:
        """That of all parts."""
        users = np.unique(np.concatenate([part.users for part in parts]))
        values = {
            name: tuple(np.concatenate(each) for each in zip(*(part.values[name] for part in parts), strict=True))
            for name in parts[0].values
        }
        return Read(sum(part.rows for part in parts), users, {name: _distinct(*each) for name, each in values.items()})

    def edges(self) -> dict[str, np.ndarray]:
        """Of bins for all."""
        return {name: bin_edges(*values) for name, values in self.values.items()}


Values = tuple[np.ndarray, np.ndarray, np.ndarray]


def _distinct(values: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> Values:
    distinct, place = np.unique(values, return_inverse=True)
    return distinct, np.bincount(place, positives, len(distinct)), np.bincount(place, negatives, len(distinct))


def _fewer(values: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> Values:
    """At most `MOST_BINS` of the values, each of which stands for those up to the next one."""
    place = np.searchsorted(bin_edges(values, positives, negatives), values, side="right")
    _, first = np.unique(place, return_index=True)
    return values[first], np.bincount(place, positives), np.bincount(place, negatives)


def uses_of(asked: Asked) -> dict[str, Use]:
    """What each column is read as."""
    keys = dict.fromkeys([asked.user, *([asked.candidate] if asked.candidate else [])], "key")
    keys |= {name: "any" for name in asked.request if name not in keys}
    named = [asked.score, asked.weight, *_of_tasks(asked, asked.predicted), *_of_tasks(asked, asked.labels)]
    return keys | {name: "number" for name in named if name is not None}  # type: ignore[return-value]


def _of_tasks(asked: Asked, columns: dict[str, str]) -> list[str]:
    return [columns[task.name] for task in asked.tasks]


def send_part(job: MeasureJob, number_and_part: tuple[int, Part]) -> Read:
    """Reads a part, checks its rows and sends them. Raises BadFile for a wrong value."""
    number, part = number_and_part
    reading, uses = _Reading(job.asked, part.address), uses_of(job.asked)
    binary = [task.name for task in job.asked.tasks if task.kind == "binary"]
    users: list[np.ndarray] = []
    seen: dict[str, list[Values]] = {name: [] for name in binary}
    with open_parquet(part.address) as parquet:
        batches = parquet.iter_batches(ROWS_AT_A_TIME, row_groups=list(part.groups), columns=list(uses))

        def tables() -> Iterator[tuple[pa.Table, np.ndarray]]:
            start = part.start
            while (batch := next_batch(batches, part.address, parquet.schema_arrow)) is not None:
                table = reading.rows(pa.Table.from_batches([batch]), start)
                start += len(table)
                hashes = table["hash"].to_numpy()
                users.append(np.unique(hashes))
                for name in binary:
                    value, label = table[f"p.{name}"].to_numpy(), table[f"l.{name}"].to_numpy()
                    seen[name].append((value, label == 1, label == 0))
                yield table.drop_columns(["hash"]), partition_of(hashes, job.rows.receivers)

        sent = job.rows.send_in_turns(ROWS, (number, 0), tables())
    found = {name: tuple(np.concatenate(each) for each in zip(*given, strict=True)) for name, given in seen.items()}
    values = {}
    for name, (value, positive, negative) in found.items():
        known = positive | negative
        values[name] = _fewer(*_distinct(value[known].astype(np.float64), positive[known], negative[known]))
    return Read(int(sent.sum()), np.unique(np.concatenate(users)), values)


class _Reading:
    """Rows of a file as columns `user` and its `hash`, `request`, `candidate`, `score`, `weight`, and of each task
    `p.TASK` and `l.TASK`."""

    def __init__(self, asked: Asked, address: str) -> None:
        self._asked, self._address = asked, address

    def rows(self, table: pa.Table, start: int) -> pa.Table:
        """The rows, checked. start: the number of the first in the file."""
        asked = self._asked
        names = dict.fromkeys([asked.user, *asked.request, *([asked.candidate] if asked.candidate else [])])
        keys = {name: self._key(table, name, start) for name in names}
        user, request = keys[asked.user], keys[asked.request[0]]
        if len(asked.request) > 1:
            request = pa.array(combine([hash_column(keys[name]) for name in asked.request]).view(np.int64))
        columns = {"user": _plain(user), "hash": pa.array(hash_column(user)), "request": _plain(request)}
        if asked.candidate is not None:
            columns["candidate"] = _plain(keys[asked.candidate])
        for task in asked.tasks:
            name, label = asked.predicted[task.name], asked.labels[task.name]
            is_binary = task.kind == "binary"
            predicted = self._numbers(table, name, start)
            wrong = ~((predicted >= 0) & (predicted <= 1)) if is_binary else ~np.isfinite(predicted)
            self._check(name, predicted, wrong, start, "a probability" if is_binary else "a finite number")
            columns[f"p.{task.name}"] = pa.array(predicted)
            labels = self._numbers(table, label, start)
            wrong = ~(np.isnan(labels) | ((labels == 0) | (labels == 1) if is_binary else np.isfinite(labels)))
            expected = "0, 1" if is_binary else "a number"
            self._check(label, labels, wrong, start, f"{expected} or null where it is unobserved")
            columns[f"l.{task.name}"] = pa.array(labels)
        if asked.score is not None:
            score = self._numbers(table, asked.score, start)
            self._check(asked.score, score, np.isnan(score), start, "a number")
            columns["score"] = pa.array(score)
        if asked.weight is not None:
            weight = self._numbers(table, asked.weight, start)
            self._check(asked.weight, weight, ~((weight > 0) & np.isfinite(weight)), start, "a positive number")
            columns["weight"] = pa.array(weight)
        return pa.table(columns)

    def _key(self, table: pa.Table, name: str, start: int) -> pa.Array:
        values = table[name].combine_chunks()
        if pt.is_timestamp(values.type) or pt.is_date(values.type):
            try:
                values = values.cast(pa.timestamp("us", tz=getattr(values.type, "tz", None))).cast(pa.int64())
            except pa.ArrowInvalid:
                what = f"column '{name}' tells requests apart by less than a microsecond; write it as integers"
                raise BadFile(f"'{self._address}': {what}", self._address) from None
        values = file_column(self._address, name, "key", values, None, start)
        if values.null_count:
            row = start + int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            raise BadFile(f"'{self._address}': column '{name}' holds null{first_row(row)}", self._address)
        return values

    def _numbers(self, table: pa.Table, name: str, start: int) -> np.ndarray:
        """(N,) float64; NaN where null."""
        given = table[name].combine_chunks()
        values = file_column(self._address, name, "number", given, None, start)
        if pt.is_null(values.type):
            return np.full(len(values), np.nan)
        return np.asarray(values.to_numpy(zero_copy_only=False))

    def _check(self, name: str, values: np.ndarray, wrong: np.ndarray, start: int, expected: str) -> None:
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            found = "null or NaN" if np.isnan(values[row]) else str(float(values[row])).removesuffix(".0")
            what = f"column '{name}' must hold {expected}, found {found}{first_row(start + row)}"
            raise BadFile(f"'{self._address}': {what}", self._address)


def _plain(values: pa.Array) -> pa.Array:
    return values.cast(pa.string()) if pt.is_dictionary(values.type) else values


def check_columns(asked: Asked, address: str) -> dict[str, pa.DataType]:
    """Canonical types of the columns of a file that are keys, and those that predictions have there. Raises BadFile
    where a column is missing or of a wrong type."""
    found = {}
    with open_parquet(address) as parquet:
        schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    for name, use in uses_of(asked).items():
        if schema.names.count(name) > 1:
            raise BadFile(f"'{address}' has several columns '{name}'", address)
        if schema.get_field_index(name) < 0:
            raise BadFile(f"'{address}' has no column '{name}'{_hint(asked, name)}", address)
        kind = schema.field(name).type
        kind = kind.value_type if pt.is_dictionary(kind) else kind
        if not rows:
            continue
        if use == "any" and (pt.is_timestamp(kind) or pt.is_date(kind)):
            found[name] = pa.timestamp("us", tz=getattr(kind, "tz", None))
            continue
        try:
            canonical = canonical_type(name, "key" if use == "any" else use, kind)
        except UserError as error:
            raise BadFile(f"'{address}': {error}", address) from None
        if use != "number" and not pt.is_null(canonical):
            found[name] = canonical
    return found


def precision_of(asked: Asked, address: str) -> dict[str, float]:
    """Task -> machine precision of its predictions in a file."""
    with open_parquet(address) as parquet:
        kinds = {task.name: parquet.schema_arrow.field(asked.predicted[task.name]).type for task in asked.tasks}
    single = {name: pt.is_float32(kind) or pt.is_float16(kind) for name, kind in kinds.items()}
    return {name: float(np.finfo(np.float32 if each else np.float64).eps) for name, each in single.items()}


def _hint(asked: Asked, name: str) -> str:
    for task, column in asked.labels.items():
        if column == name:
            return (
                f", the labels of task '{task}': mmoe-rec score writes them with --labels; "
                f"name another one with --columns label_{task}=COLUMN"
            )
    for task, column in asked.predicted.items():
        if column == name:
            return f", the predictions of task '{task}'; name another one with --columns predicted_{task}=COLUMN"
    single = ("user", "candidate", "score", "weight")
    part = next((part for part in single if getattr(asked, part) == name), "request")
    return f"; name another one with --columns {part}=COLUMN"


def measure_partition(job: MeasureJob, number: int) -> tuple[ClosedSums, np.ndarray] | None:
    """The sums of a partition's rows, and the hashes of its requests, (Q,) uint64; None if there are no rows."""
    table = job.rows.receive_all(ROWS, number)
    if table is None:
        return None
    asked = job.asked
    _check_users(asked, table)
    if asked.candidate is not None and asked.duplicates == "error":
        _check_candidates(asked, table)
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
    requests = np.unique(hash_column(table["request"].combine_chunks()))
    return closed(sums, job.edges, job.grouped), requests


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
