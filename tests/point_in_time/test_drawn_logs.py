"""Logs drawn at random: features that are built, extended by days or learnt live are those of the reference."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings

from mmoe_rec.features import kinds
from mmoe_rec.features.kinds.history import HistoryEncoder
from mmoe_rec.features.memories import Live
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.columns import UTC_MICROSECONDS, canonical, column_uses
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time import levels
from mmoe_rec.point_in_time.arrays import Ragged, SharedRagged
from mmoe_rec.settings.columns import EVENT
from mmoe_rec.settings.schema import Schema
from tests.point_in_time.compared_logs import compare
from tests.point_in_time.drawn_logs import DAY, DrawnLog, draw
from tests.reference import features
from tests.reference.log import Log, Row

_TOLERANCE = 1e-5


def log_rows(drawn: DrawnLog, rows: list[Row], schema: Schema) -> LogRows:
    uses = column_uses(schema)
    table = {name: pa.array([row[name] for row in rows], drawn.types[name]) for name in uses}
    return LogRows(pa.table({name: canonical(name, uses[name], each) for name, each in table.items()}), schema)


def event_rows(drawn: DrawnLog, rows: list[Row], schema: Schema) -> LogRows:
    keys = {name: pa.array([row[name] for row in rows], drawn.types[name]) for name in ("user", "item", "brand")}
    times = pa.array([row["bought_at"] for row in rows], pa.int64()).cast(UTC_MICROSECONDS)
    return LogRows(pa.table({**keys, "time": times, EVENT.label: pa.array(np.ones(len(rows)))}), schema)


def batches(random: np.random.Generator, rows: list[Row]) -> list[list[Row]]:
    """The rows in any order, in batches of one or a few."""
    mixed = [rows[place] for place in random.permutation(len(rows))]
    edges = np.unique(random.integers(0, len(mixed) + 1, max(1, len(mixed) // 2)))
    return [mixed[a:b] for a, b in zip([0, *edges], [*edges, len(mixed)], strict=True) if b > a]


def known_in_time(drawn: DrawnLog, random: np.random.Generator, until: int, time: int) -> bool:
    """Whether a row was known before `until`; where features forget, none comes later than these can bear."""
    days = [each.get("forget_after_days") for each in drawn.settings["features"].values()]
    shortest = min((round(each * DAY) for each in days if each is not None), default=None)
    return random.random() < 0.8 or (shortest is not None and time + 1 <= until - shortest)


def equal(one: Any, other: Any) -> bool:
    """To the last bit, NaN being NaN."""
    if isinstance(one, SharedRagged):
        one, other = one.expand(), other.expand()
        return bool((one.lengths == other.lengths).all() and (one.values == other.values).all())
    assert one.dtype == other.dtype == np.float32
    return bool((one.view(np.uint32) == other.view(np.uint32)).all())


@pytest.mark.parametrize("seed", range(settings().max_examples // 2))
def test_live_rows_count_as_if_memories_had_been_extended(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "SMALLEST", 6)
    monkeypatch.setattr(levels, "_GROWTH", 2)
    monkeypatch.setattr(levels, "_MANY", 12)
    drawn, random = draw(seed), np.random.default_rng(seed)
    schema = kinds.schema_of(drawn.settings)
    naive = Log(drawn.settings, drawn.log, {"bought": drawn.events})
    times = np.array([row["time"] for row in naive.rows])
    until = int(np.quantile(times, 0.6))
    of_logs: dict[str | None, tuple[list[Row], Any]] = {
        None: (naive.rows, log_rows),
        "bought": (naive.events["bought"], event_rows),
    }
    pipeline, extended = FeaturePipeline(schema), FeaturePipeline(schema)
    live = Live.none(pipeline.memory_encoders)
    learnt = 0
    for source, (rows, canonical_rows) in of_logs.items():
        # Some early rows come late, after what they are counted for had been compacted.
        at = [row["time"] if source is None else row["bought_at"] for row in rows]
        early = [
            row
            for row, time in zip(rows, at, strict=True)
            if time <= until and known_in_time(drawn, random, until, time)
        ]
        later = [row for row in rows if not any(row is other for other in early)]
        before = pipeline.live_events(source, canonical_rows(drawn, early, schema)) if early else {}
        for name, events in before.items():
            encoder = pipeline.memory_encoders[name]
            memory = encoder.compacted(encoder.extended(encoder.memory, events), until + 1)
            for column in memory.to_columns().values():
                column.flags.writeable = False
            encoder.memory = extended.memory_encoders[name].memory = memory
        for some in batches(random, later):
            events_of_some = pipeline.live_events(source, canonical_rows(drawn, some, schema))
            live = live.extended(events_of_some, len(some))
            learnt += len(some)
            for name, events in events_of_some.items():
                encoder = extended.memory_encoders[name]
                encoder.memory = encoder.extended(encoder.memory, events)
    assert live.rows == learnt
    pipeline = pipeline.with_live(live)
    moments = [until + 1, until + 2, int(times.max()), *(times.max() + np.array([1, DAY // 2, 2 * DAY, 9 * DAY]))]
    asking = naive.at_moments(6, [int(each) for each in [*moments, *random.choice(times[times > until], 3)]])
    asked = log_rows(drawn, asking, schema)
    for name, encoder in pipeline.memory_encoders.items():
        other = extended.memory_encoders[name]
        found = encoder.results(pipeline.live.memory(name), asked.look_ups(encoder.by))
        expected = other.results(other.memory, asked.look_ups(other.by))
        for each, values in found.items():
            assert equal(values, expected[each]), f"{each} of log {seed}"
        raw = encoder.distinct_results(pipeline.live.memory(name), look_ups := asked.look_ups(encoder.by))
        if isinstance(encoder, HistoryEncoder):
            ids = list({row["item"] for rows in (naive.rows, *naive.events.values()) for row in rows})
            rows_of = dict(zip(ids, encoder.owner.encode(pa.array(ids, drawn.types["item"])).tolist(), strict=True))
            lists = raw[name]
            assert isinstance(lists, Ragged)
            offsets = lists.offsets
            found_lists = [lists.values[offsets[each] : offsets[each + 1]].tolist() for each in look_ups.number]
            assert found_lists == features.history(naive, name, rows_of, asking), f"{name} of log {seed}"
            continue
        for place, values in enumerate(features.counter(naive, name, encoder.prior, asking)):
            for each in raw:
                output, days = next(
                    (output, days)
                    for output, days in values
                    if each == f"{name}_{output}" + ("" if days is None else f"_{days:g}d".replace(".", "p"))
                )
                value = np.nan if values[output, days] is None else values[output, days]
                got = raw[each][look_ups.number[place]]
                np.testing.assert_allclose(got, value, _TOLERANCE, _TOLERANCE, err_msg=f"{each} of log {seed}")


PARTS = 5


@pytest.mark.parametrize("part", range(PARTS))
def test_counters_histories_and_labels_equal_the_reference(part: int, tmp_path: Path) -> None:
    compared = [compare(seed, tmp_path / str(seed)) for seed in range(part, settings().max_examples, PARTS)]
    # Nearly every log can be built.
    assert sum(each > 100 for each in compared) > 0.75 * len(compared)
