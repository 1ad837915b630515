"""How much counters and histories remember, and how it is bounded by `max_keys`.

The keys with the latest events stay; of those whose events are as late, the least keys, which are hashes. This is done
to what was written, once at the end of a build or an extension and nowhere else: which keys stay depends on all
partitions together, and not on how many there are. A key that was dropped is answered as unknown, and begins anew with
its next event.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.features.memories.files import memory_parts, write_part
from mmoe_rec.point_in_time.join import KnownEvents

_KEYS_AT_LEAST = 1_000_000  # are gathered before the latest of them are found


def drop_keys(folder: Path, feature: str, max_keys: int) -> int:
    """Drops the other keys from a feature's memory in a folder of state; gives their number."""
    parts = memory_parts(folder, feature)
    keys, least = _latest(parts, max_keys)
    if keys <= max_keys:
        return 0
    for part in parts:
        table = pq.read_table(part, use_threads=False)
        events = _events(table)
        key, known = _last_events(events)
        stays = _stays(key, known, *least)
        if not stays.all():
            write_part(table.filter(pa.array(stays[events.number])), part)
    return keys - max_keys


def remembered_bytes(folder: Path) -> dict[str, int]:
    """Bytes that the events of each counter and history in a folder of state take in memory, without indexes."""
    sizes = {}
    for memory in sorted(folder.glob("*.memory")):
        feature = memory.name.removesuffix(".memory")
        parts = [pq.ParquetFile(part) for part in memory_parts(folder, feature)]
        widths = [field.type.bit_width // 8 for field in parts[0].schema_arrow]
        sizes[feature] = sum(widths) * sum(part.metadata.num_rows for part in parts)
    return sizes


def _latest(parts: Sequence[Path], max_keys: int) -> tuple[int, tuple[int, int]]:
    """The number of all keys, and the last of those that stay: its last event's time, and the key."""
    keys, waiting = 0, 0
    found = [(np.empty(0, np.uint64), np.empty(0, np.int64))]
    for part in parts:
        each = _last_events(_events(pq.read_table(part, columns=["key", "known"], use_threads=False)))
        found.append(each)
        keys, waiting = keys + len(each[0]), waiting + len(each[0])
        if waiting > max(max_keys, _KEYS_AT_LEAST):
            found, waiting = [_first(found, max_keys)], 0
    key, known = _first(found, max_keys)
    least = int(known.min())
    return keys, (least, int(key[known == least].max()))


def _first(found: Sequence[tuple[np.ndarray, np.ndarray]], max_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Of all keys, with their last events, at most so many: those that stay."""
    key, known = np.concatenate([each for each, _ in found]), np.concatenate([each for _, each in found])
    if len(key) <= max_keys:
        return key, known
    least = int(np.partition(known, len(known) - max_keys)[len(known) - max_keys])
    room = max_keys - int((known > least).sum())
    last = int(np.partition(key[known == least], room - 1)[room - 1])
    stays = _stays(key, known, least, last)
    return key[stays], known[stays]


def _stays(key: np.ndarray, known: np.ndarray, least: int, last: int) -> np.ndarray:
    """(N,) bool: keys whose last event is later than `least`, or as late where they are not beyond key `last`."""
    return (known > least) | ((known == least) & (key <= np.uint64(last)))


def _events(table: pa.Table) -> KnownEvents:
    return KnownEvents(table["key"].to_numpy(), table["known"].to_numpy())


def _last_events(events: KnownEvents) -> tuple[np.ndarray, np.ndarray]:
    """(G,) the keys, and the times of their last events."""
    return events.distinct, events.known[events.starts[1:] - 1]
