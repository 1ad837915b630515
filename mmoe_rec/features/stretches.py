"""What is held in memory of a partition of keys: all of it, or one stretch of time after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.features.division import Received, batches, together
from mmoe_rec.features.encoder import MemoryEncoder
from mmoe_rec.features.events import LookUps
from mmoe_rec.features.learn import Window, label_of
from mmoe_rec.features.pipeline import in_any, in_window
from mmoe_rec.features.sorting import sorted_order


class Stretch:
    """Look-ups that are made, and events that become known, in a window of time.

    asked, rows, times: the look-ups of N rows that lie in one of the splits' windows, the rows' numbers, rising, and
    their times, (N,) int64; until: no later stretch asks for an earlier moment, None for the last one.
    """

    def __init__(
        self,
        received: Received,
        splits: Sequence[Window],
        look_ups: Sequence[pa.Table],
        events: Mapping[str, Sequence[pa.Table]] | None,
        until: int | None,
    ) -> None:
        """events: of counters and histories, None for all that was received, which is then read one by one."""
        self._received, self._events, self.until = received, events, until
        labelled = {encoder.label for encoder in received.group if encoder.label is not None}
        found = together(look_ups) if look_ups else None
        columns = {} if found is None else {name: found[name].to_numpy() for name in found.column_names}
        none = np.empty(0, np.int64)
        key, time = columns.get("key", none.view(np.uint64)), columns.get("time", none)
        order = sorted_order(key, time)
        self._key, self._time = key[order], time[order]
        self._labels = {task: columns[label_of(task)][order] for task in labelled} if columns else {}
        wanted = in_any(time, splits) & in_window(time, received.window)
        self.asked = LookUps.in_order(self._key, self._time, order).where(wanted)
        self.rows, self.times = columns.get("row", none)[wanted], time[wanted]

    def extended(self, encoder: MemoryEncoder[Any], memory: Any) -> Any:
        """A memory of a counter or history of the group with the stretch's events."""
        if encoder.label is None:
            events = self._received.events(encoder) if self._events is None else self._events.get(encoder.name, ())
            tables = list(events)
            return encoder.extended(memory, together(tables)) if tables else memory
        if not self._labels:
            return memory
        events = encoder.labelled(self._key, self._time, self._labels[encoder.label])
        inside = in_window(events["known"].to_numpy(), self._received.window)
        return encoder.extended(memory, events if inside.all() else events.filter(pa.array(inside)), in_order=True)


def stretches(
    received: Received, splits: Sequence[Window], rows_in_memory: int, scratch: Path, held: Callable[[], int]
) -> Iterator[Stretch]:
    """All that was received, in the order of time, at most `rows_in_memory` rows at a time.

    held: events that a memory holds of those before. Where they are more, as within a long window of a counter, a
    stretch is as large: memories are gone through once a stretch, which then costs no more than its own rows.
    """
    waiting: _Pieces | None = None
    for piece in received.divided(rows_in_memory, scratch):
        if not piece.rows and piece.window[1] is not None:
            continue
        if waiting is not None and (piece.rows > rows_in_memory or waiting.rows + piece.rows > held()):
            yield waiting.together(splits)
            waiting = None
        if piece.rows > rows_in_memory:
            yield from _of_a_moment(piece, splits, max(rows_in_memory, held()))
        elif waiting is None and held() < 2 * piece.rows:
            yield Stretch(piece, splits, list(piece.look_ups()), None, piece.window[1])
        else:
            waiting = waiting or _Pieces(piece)
            waiting.add(piece)
    if waiting is not None:
        yield waiting.together(splits)


class _Pieces:
    """Pieces that follow each other, in memory."""

    def __init__(self, first: Received) -> None:
        self.rows = 0
        self._last, self._start = first, first.window[0]
        self._look_ups: list[pa.Table] = []
        self._events: dict[str, list[pa.Table]] = defaultdict(list)

    def add(self, piece: Received) -> None:
        """Takes the next one."""
        for table in piece.look_ups():
            # What asks in one piece and is known in a later one is in both.
            before = (self._start, piece.window[0])
            at_hand = np.logical_or.reduce([in_window(each, before) for each in piece.moments(table)])
            self._look_ups.append(table.filter(pa.array(~at_hand)) if self.rows and at_hand.any() else table)
        self._last = piece
        self.rows += piece.rows
        for encoder in piece.unlabelled:
            self._events[encoder.name] += piece.events(encoder)

    def together(self, splits: Sequence[Window]) -> Stretch:
        """One stretch of all of them."""
        end = self._last.window[1]
        return Stretch(replace(self._last, window=(self._start, end)), splits, self._look_ups, self._events, end)


def _of_a_moment(piece: Received, splits: Sequence[Window], rows: int) -> Iterator[Stretch]:
    """First its events, of which some are earlier look-ups, then its look-ups."""
    start, end = piece.window
    for encoder in piece.unlabelled:
        for table in batches(piece.events(encoder), rows):
            yield Stretch(piece, splits, [], {encoder.name: [table]}, start)
    for asks in (False, True):
        tables = (table.filter(pa.array((table["time"].to_numpy() == start) == asks)) for table in piece.look_ups())
        for table in batches(tables, rows):
            yield Stretch(piece, splits, [table], {}, start)
    yield Stretch(piece, splits, [], {}, end)
