"""Partitions that are larger than memory: divided by time once, read a few times, and answered as in one piece."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.preprocessing.logs import BuildInputs, BuildOptions
from mmoe_rec.preprocessing.look_up import Chunk, Exchange, ReceivedRows, events_of, look_ups_of
from mmoe_rec.preprocessing.prepare import prepare
from tests.log.small_logs import DAY, START, files_of, random_log, schema_of, times_of, windows_of, write_log

WINDOWS = windows_of(5, 7)
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


def times_spread(kind: str, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Request times of a log: even, of hours and of a day, or most of them in one instant."""
    match kind:
        case "even":
            return rng.integers(0, 10 * DAY, rows)
        case "uneven":
            return np.minimum(np.exp(rng.uniform(0, np.log(9.9 * DAY), rows)), 9.9 * DAY).astype(np.int64)
        case "in days":
            return rng.integers(0, 10, rows) * DAY
        case "one instant":
            return np.where(rng.random(rows) < 0.8, 6 * DAY, rng.integers(0, 10 * DAY, rows))
    raise AssertionError(kind)


SPREADS = ["even", "uneven", "in days", "one instant"]


def skewed_log(seed: int, rows: int, spread: str) -> pa.Table:
    """A random log of one user at other times, each row with a candidate of its own."""
    rng = np.random.default_rng(seed)
    table = random_log(seed, rows)
    columns = {
        "user": pa.array(np.where(rng.random(rows) < 0.95, 7, rng.integers(0, 99, rows))),
        "item": pa.array(rng.permutation(rows)),
        "time": pa.array(START + np.sort(times_spread(spread, rows, rng))).cast(table["time"].type),
    }
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table.take(pa.array(rng.permutation(rows)))


def rows_read(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> int:
    """Rows that are received from any exchange meanwhile."""
    read: list[int] = []
    receive = Exchange.receive

    def counted(self, channel, receiver):
        for table in receive(self, channel, receiver):
            read.append(table.num_rows)
            yield table

    with monkeypatch.context() as patch:
        patch.setattr(Exchange, "receive", counted)
        run()
    return sum(read)


@pytest.mark.parametrize("spread", SPREADS)
def test_what_is_read_of_one_key_grows_with_its_rows_and_gives_what_one_piece_gives(tmp_path, monkeypatch, spread):
    schema = schema_of({name: GROUP[name] for name in ("item", "click", "liked", "clicked")})

    def read(rows: int) -> int:
        source = str(write_log(tmp_path / f"{rows}", skewed_log(0, rows, spread)))
        place, options = (source, schema, WINDOWS), BuildOptions(rows_in_memory=50)
        count = rows_read(monkeypatch, lambda: prepare(BuildInputs(*place, tmp_path / f"work {rows}", options)))
        divided, whole = (prepare(BuildInputs(*place, tmp_path / f"{name} {rows}")) for name in ("work", "whole"))
        assert files_of(divided.folder / "encoded") == files_of(whole.folder / "encoded")
        return count

    few, many = read(300), read(2400)
    # Duplicates and answers are read once, look-ups a few times, but not once for each of some 50 chunks.
    assert few < 15 * 300
    assert many < 15 * 2400


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
    whole = received(tmp_path / "events", skewed_log(3, 9000, "even"), 3, np.random.default_rng(0))
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
