"""What counters and histories say of rows, as it is exchanged: by block of rows, a table of each group of them.

A list that many rows in a row share, as the candidates of a request share their user's history, is sent once: null
stands for the list of the row before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.features.encoded import Ragged, SharedRagged
from mmoe_rec.features.encoder import Answers
from mmoe_rec.features.exchange import Exchange, Sender

ROWS_PER_BLOCK = 131_072


def answers_in(scratch: Path, blocks: int) -> Exchange:
    """Where answers lie in a build's folder: by block of rows."""
    return Exchange(scratch / "answers", blocks)


def send_answers(exchange: Exchange, group: str, sender: Sender, rows: np.ndarray, answers: Answers) -> None:
    """Sends a group's answers for (N,) rising row numbers."""
    block = rows // ROWS_PER_BLOCK
    columns = {"row": pa.array(rows)}
    for name, each in answers.items():
        columns[name] = _lists(each, block) if isinstance(each, SharedRagged) else pa.array(each)
    exchange.send(group, sender, pa.table(columns), block)


def _lists(answers: SharedRagged, block: np.ndarray) -> pa.Array:
    number = answers.number
    first = np.append(len(number) > 0, (number[1:] != number[:-1]) | (block[1:] != block[:-1]))
    lists = answers.lists.take(number[first])
    offsets = np.zeros(len(number) + 1, np.int32)
    offsets[1:][first] = lists.lengths
    return pa.ListArray.from_arrays(
        pa.array(np.cumsum(offsets, dtype=np.int32)), pa.array(lists.values.astype(np.int32)), mask=pa.array(~first)
    )


class AnswerReader:
    """Gives rows, read in order, the answers of counters and histories, block by block."""

    def __init__(self, answers: Exchange, groups: Sequence[str]) -> None:
        self._exchange, self._groups = answers, groups
        self._block = -1
        self._at_hand: Answers = {}

    def of(self, first: int, wanted: np.ndarray) -> Answers:
        """Answers for the rows from number `first` of the log on that are `wanted`, (N,) bool with any true."""
        rows = first + np.flatnonzero(wanted)
        parts = []
        for block in range(rows[0] // ROWS_PER_BLOCK, rows[-1] // ROWS_PER_BLOCK + 1):
            start = block * ROWS_PER_BLOCK
            inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + ROWS_PER_BLOCK)] - start
            if len(inside):
                parts.append(take(self._load(block), inside))
        return parts[0] if len(parts) == 1 else {name: _joined([part[name] for part in parts]) for name in parts[0]}

    def _load(self, block: int) -> Answers:
        if block != self._block:
            answers: dict[str, np.ndarray | SharedRagged] = {}
            for group in self._groups:
                answers |= _by_row(list(self._exchange.receive(group, block)), block * ROWS_PER_BLOCK)
            self._block, self._at_hand = block, answers
        return self._at_hand


def _by_row(tables: Sequence[pa.Table], start: int) -> Answers:
    """Answers of a block whose first row is number `start`, at the place of each row; rows without one may be left."""
    answers: dict[str, np.ndarray | SharedRagged] = {}
    places = [table["row"].to_numpy() - start for table in tables]
    for field in list(tables[0].schema)[1:] if tables else ():
        columns = [table[field.name].combine_chunks() for table in tables]
        if pt.is_list(field.type):
            parts = SharedRagged.join([_shared(column) for column in columns])
            number = np.zeros(ROWS_PER_BLOCK, np.int64)
            number[np.concatenate(places)] = parts.number
            answers[field.name] = SharedRagged(parts.lists, number)
        else:
            values = np.empty(ROWS_PER_BLOCK, np.float32)
            for place, column in zip(places, columns, strict=True):
                values[place] = column.to_numpy()
            answers[field.name] = values
    return answers


def _shared(column: pa.ListArray) -> SharedRagged:
    first = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = column.value_lengths().fill_null(0).to_numpy()[first]
    return SharedRagged(Ragged(column.flatten().to_numpy(), lengths), np.cumsum(first) - 1)


def take(answers: Answers, rows: np.ndarray) -> Answers:
    """The answers of the given rows."""
    if len(rows) and len(rows) == rows[-1] - rows[0] + 1:  # rows that follow each other need no copy
        inside = slice(int(rows[0]), int(rows[-1]) + 1)
        return {
            name: each.take(inside) if isinstance(each, SharedRagged) else each[inside]
            for name, each in answers.items()
        }
    return {name: each.take(rows) if isinstance(each, SharedRagged) else each[rows] for name, each in answers.items()}


def _joined(parts: Sequence[np.ndarray | SharedRagged]) -> np.ndarray | SharedRagged:
    lists = [part for part in parts if isinstance(part, SharedRagged)]
    return SharedRagged.join(lists) if lists else np.concatenate([np.asarray(part) for part in parts])
