"""Partitions that are larger than memory: divided by time once, read a few times, and answered as in one piece."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.preprocessing.look_up import Chunk, Exchange, ReceivedRows, events_of, look_ups_of
from tests.log.small_logs import DAY, START, random_log, schema_of, times_of, with_column

COUNTER = {"kind": "counter", "outputs": ["positives", "rows", "rate", "recency"], "window_days": [None, 1, 5]}
# All ask by the same columns: labels known at once and late, a log of events, and histories, which send events.
GROUP = {
    "item": {"kind": "id", "column": "item", "min_count": 1},
    "click": {**COUNTER, "task": "click", "by": ["user"]},
    "liked": {**COUNTER, "task": "liked", "by": ["user"]},
    "bought": {"kind": "counter", "events": "purchases", "by": ["user"], "outputs": ["rows"], "window_days": [1]},
    "clicked": {"kind": "history", "task": "click", "of": "item", "length": 3},
}
SCHEMA = schema_of(GROUP, events={"purchases": {"path": "purchases", "time": "bought_at"}})


def skewed_log(seed: int, rows: int) -> pa.Table:
    """A random log of one user at other times, each row with a candidate of its own."""
    rng = np.random.default_rng(seed)
    table = random_log(seed, rows)
    columns = {
        "user": pa.array(np.where(rng.random(rows) < 0.95, 7, rng.integers(0, 99, rows))),
        "item": pa.array(rng.permutation(rows)),
        "time": pa.array(START + np.sort(rng.integers(0, 10 * DAY, rows))).cast(table["time"].type),
    }
    for name, column in columns.items():
        table = with_column(table, name, column)
    return table.take(pa.array(rng.permutation(rows)))


def received(folder: Path, table: pa.Table, senders: int, rng: np.random.Generator) -> ReceivedRows:
    """The rows as look-ups and events of one partition."""
    group = FeaturePipeline(SCHEMA).key_groups["click"]
    times = times_of(table)
    rows = len(times)
    key = rng.integers(0, 3, rows).astype(np.uint64)
    look_ups = pa.table({"key": key, "time": times, "row": np.arange(rows), "label.click": np.ones(rows, np.int8)})
    look_ups = look_ups.append_column("label.liked", pa.array(np.ones(rows, np.int8)))
    events = {"bought": pa.table({"key": key, "known": times + 1})}
    events["clicked"] = pa.table({"key": key, "known": times + 1, "id": np.arange(rows)}).slice(rows // 2)
    exchange = Exchange(folder, 1)
    channels = {look_ups_of("click"): look_ups} | {events_of(name): each for name, each in events.items()}
    for channel, sent in channels.items():
        edges = [0, *np.sort(rng.integers(0, len(sent) + 1, senders - 1)), len(sent)]
        for number, (start, end) in enumerate(pairwise(edges)):
            exchange.send(channel, (number, 0), sent.slice(start, end - start), np.zeros(end - start, np.int64))
    return ReceivedRows(exchange, 0, group)


def test_no_stretch_holds_more_rows_than_memory_has_room_for(tmp_path):
    whole = received(tmp_path / "events", skewed_log(3, 9000), 3, np.random.default_rng(0))
    asked = []
    held: list[int] = []
    for encoder in whole.group:
        extended = encoder.extended
        encoder.extended = lambda before, events, in_order=False, of=extended: (  # type: ignore[method-assign]
            held.append(len(events)) or of(before, events, in_order)
        )
    for encoder in whole.group:
        if encoder.name == "clicked":
            encoder.parts["clicked"].grow()  # type: ignore[attr-defined]
    memories = {encoder.name: encoder.memory for encoder in whole.group}
    for piece in whole.divide(18_000, 1000, tmp_path / "scratch"):
        chunk = Chunk(piece, [(None, None)])
        for encoder in whole.group:
            memories[encoder.name] = chunk.extended(encoder, memories[encoder.name])
        held.append(len(chunk.rows))
        asked.append(chunk.rows)
    assert max(held) <= 1000
    assert sorted(np.concatenate(asked)) == list(range(9000))
