"""A partition of keys in stretches of time: one, or as many as fit into memory one by one.

A key may have most of a log's rows, so more partitions would not do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.features.encoder import MemoryEncoder
from mmoe_rec.features.events import LookUps, known_at
from mmoe_rec.features.exchange import Exchange
from mmoe_rec.features.learn import Window, events_of, label_of, look_ups_of
from mmoe_rec.features.pipeline import in_any, in_window
from mmoe_rec.features.sorting import sorted_order

Group = Sequence[MemoryEncoder[Any]]


@dataclass(frozen=True)
class Received:
    """What was sent to a partition of the keys of a group of counters and histories."""

    exchange: Exchange
    group: Group
    partition: int

    def look_ups(self) -> Iterator[pa.Table]:
        """key, time, row, and labels by which rows are events; rows rise."""
        return self.exchange.receive(look_ups_of(self.group[0].name), self.partition)

    def events(self, encoder: MemoryEncoder[Any]) -> Iterator[pa.Table]:
        """Events of a counter or history that are not look-ups too."""
        return self.exchange.receive(events_of(encoder.name), self.partition)

    def edges(self, stretches: int) -> list[int]:
        """Moments that divide the partition into about equal stretches of time, from a sample of its times."""
        if stretches <= 1:
            return []
        samples = [table["time"].to_numpy()[:: 1 + stretches] for table in self.look_ups()]
        for encoder in self.group:
            samples += [table["known"].to_numpy()[:: 1 + stretches] for table in self.events(encoder)]
        times = np.sort(np.concatenate(samples))
        return np.unique(times[np.arange(1, stretches) * len(times) // stretches]).tolist()


class Stretch:
    """Look-ups that are made, and events that become known, in a window of time.

    asked, rows, times: the look-ups of N rows that lie in one of the splits' windows, the rows' numbers, rising, and
    their times, (N,) int64.
    """

    def __init__(self, received: Received, window: Window, splits: Sequence[Window]) -> None:
        self._received, self._window = received, window
        labelled = {encoder.label: encoder for encoder in received.group if encoder.label is not None}
        matures_after = {encoder.matures_after for encoder in labelled.values()}
        tables = []
        for table in received.look_ups():
            time = table["time"].to_numpy()
            needed = in_window(time, window)
            for each in matures_after:
                needed |= in_window(known_at(time, each), window)
            tables.append(_filtered(table, needed))
        found = _together(tables)
        columns = {} if found is None else {name: found[name].to_numpy() for name in found.column_names}
        none = np.empty(0, np.int64)
        key, time = columns.get("key", none.view(np.uint64)), columns.get("time", none)
        order = sorted_order(key, time)
        self._key, self._time = key[order], time[order]
        self._labels = {task: columns[label_of(task)][order] for task in labelled} if columns else {}
        wanted = in_any(time, splits) & in_window(time, window)
        self.asked = LookUps.in_order(self._key, self._time, order).where(wanted)
        self.rows, self.times = columns.get("row", none)[wanted], time[wanted]

    def extended(self, encoder: MemoryEncoder[Any], memory: Any) -> Any:
        """A memory of a counter or history of the group with the stretch's events."""
        if encoder.label is None:
            events = _together([self._inside(each) for each in self._received.events(encoder)])
            return memory if events is None else encoder.extended(memory, events)
        if not self._labels:
            return memory
        events = self._inside(encoder.labelled(self._key, self._time, self._labels[encoder.label]))
        return encoder.extended(memory, events, in_order=True)

    def _inside(self, events: pa.Table) -> pa.Table:
        return _filtered(events, in_window(events["known"].to_numpy(), self._window))


def stretches(received: Received, edges: Sequence[int], splits: Sequence[Window]) -> Iterator[Stretch]:
    """The partition from the beginning of time to its end, divided at the `edges`."""
    for window in pairwise([None, *edges, None]):
        yield Stretch(received, window, splits)


def _filtered(table: pa.Table, wanted: np.ndarray) -> pa.Table:
    return table if wanted.all() else table.filter(pa.array(wanted))


def _together(tables: Sequence[pa.Table]) -> pa.Table | None:
    tables = [table for table in tables if table.num_rows]
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks() if tables else None
