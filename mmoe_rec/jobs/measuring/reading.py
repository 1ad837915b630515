"""Files of predictions: what their footers say, and their rows, checked, in columns of known names and types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.jobs.measuring.asked import Asked
from mmoe_rec.log.checks import BadFile, LogFile, open_parquet
from mmoe_rec.log.columns import canonical_type
from mmoe_rec.log.files import FoundFile, path_values
from mmoe_rec.log.hashing import combine, hash_column
from mmoe_rec.log.parts import Piece
from mmoe_rec.log.values import file_column, first_row, next_batch, with_path_values
from mmoe_rec.settings.columns import Use


@dataclass(frozen=True)
class Footer:
    """What a file says of itself."""

    file: LogFile
    schema: pa.Schema

    @staticmethod
    def read(found: FoundFile) -> Footer:
        """That of a file. Raises BadFile where it is no Parquet file."""
        with open_parquet(found.address) as parquet:
            metadata = parquet.metadata
            rows = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
            file = LogFile(found.address, sum(rows), found.bytes, found.version, rows)
            schema = parquet.schema_arrow
        for name in path_values(found.address):
            if name not in schema.names:
                schema = schema.append(pa.field(name, pa.string()))
        return Footer(file, schema)


def rows_of(asked: Asked, piece: Piece, at_a_time: int) -> Iterator[pa.Table]:
    """The rows of a piece of a file, some at a time, see `_Reading`. Raises BadFile for a wrong value."""
    reading, columns = _Reading(asked, piece.address), [*uses_of(asked), *(each.column for each in asked.slices)]
    with open_parquet(piece.address) as parquet:
        start = sum(parquet.metadata.row_group(number).num_rows for number in range(piece.groups[0]))
        held = [name for name in dict.fromkeys(columns) if name in parquet.schema_arrow.names]
        batches = parquet.iter_batches(at_a_time, row_groups=list(piece.groups), columns=held)
        while (batch := next_batch(batches, piece.address, parquet.schema_arrow)) is not None:
            table = with_path_values(pa.Table.from_batches([batch]), piece.address, columns)
            yield reading.rows(table, start)
            start += len(batch)


def uses_of(asked: Asked) -> dict[str, Use]:
    """What each column is read as."""
    keys = dict.fromkeys([asked.user, *([asked.candidate] if asked.candidate else [])], "key")
    keys |= {name: "any" for name in asked.request if name not in keys}
    named = [asked.score, asked.weight, *_of_tasks(asked, asked.predicted), *_of_tasks(asked, asked.labels)]
    return keys | {name: "number" for name in named if name is not None}  # type: ignore[return-value]


def _of_tasks(asked: Asked, columns: dict[str, str]) -> list[str]:
    return [columns[task.name] for task in asked.tasks]


class _Reading:
    """Rows of a file as columns `user` and its `hash`, `request`, `candidate`, `score`, `weight`, of each task `p.TASK`
    and `l.TASK`, and `s.N` of what they are sliced by."""

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
            self._check(asked.weight, weight, ~((weight > 1e-50) & (weight < 1e50)), start, "a positive number")
            columns["weight"] = pa.array(weight)
        for number, by in enumerate(asked.slices):
            try:
                columns[f"s.{number}"] = by.read(table[by.column].combine_chunks())
            except (ValueError, pa.ArrowNotImplementedError) as error:
                what = f"column '{by.column}' {error} (--slices)"
                raise BadFile(f"'{self._address}': {what}", self._address) from None
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


def key_types(asked: Asked, footer: Footer) -> dict[str, pa.DataType]:
    """Canonical types of the columns of a file that are keys. Raises BadFile where a column is missing or of a wrong
    type."""
    found = {}
    address, schema = footer.file.address, footer.schema
    for name, use in uses_of(asked).items():
        if schema.names.count(name) > 1:
            raise BadFile(f"'{address}' has several columns '{name}'", address)
        if schema.get_field_index(name) < 0:
            raise BadFile(f"'{address}' has no column '{name}'{_hint(asked, name)}", address)
        kind = schema.field(name).type
        kind = kind.value_type if pt.is_dictionary(kind) else kind
        if not footer.file.rows:
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
    for by in asked.slices:
        if schema.get_field_index(by.column) < 0:
            raise BadFile(
                f"'{address}' has no column '{by.column}', by which rows are to be sliced (--slices)", address
            )
    return found


def precision_of(asked: Asked, footer: Footer) -> dict[str, float]:
    """Task -> machine precision of its predictions in a file."""
    kinds = {task.name: footer.schema.field(asked.predicted[task.name]).type for task in asked.tasks}
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
