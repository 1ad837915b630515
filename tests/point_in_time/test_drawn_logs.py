"""Logs drawn at random: features that are built, extended by days or learnt live are those of the reference."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings

from mmoe_rec.features import kinds
from mmoe_rec.features.pipeline import FeaturePipeline, LiveUpdates, read_event_store, write_event_store
from mmoe_rec.log.columns import UTC_MICROSECONDS, canonicalize, column_uses
from mmoe_rec.log.rows import LogRows, RequestRows, ServingRows
from mmoe_rec.point_in_time import join as levels
from mmoe_rec.settings.log_columns import EVENT_TASK
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import assert_same, assert_same_inputs
from tests.point_in_time.compared_logs import compare
from tests.point_in_time.drawn_logs import DAY, DrawnLog, draw
from tests.reference.log import Log, Row


def log_rows(drawn: DrawnLog, rows: list[Row], schema: Schema) -> LogRows:
    uses = column_uses(schema)
    table = {name: pa.array([row[name] for row in rows], drawn.types[name]) for name in uses}
    return LogRows(pa.table({name: canonicalize(name, uses[name], item) for name, item in table.items()}), schema)


def event_rows(drawn: DrawnLog, rows: list[Row], schema: Schema) -> LogRows:
    keys = {name: pa.array([row[name] for row in rows], drawn.types[name]) for name in ("user", "item", "brand")}
    times = pa.array([row["bought_at"] for row in rows], pa.int64()).cast(UTC_MICROSECONDS)
    return LogRows(pa.table({**keys, "time": times, EVENT_TASK.label: pa.array(np.ones(len(rows)))}), schema)


def batches(random: np.random.Generator, rows: list[Row]) -> list[list[Row]]:
    """The rows in any order, in batches of one or a few."""
    mixed = [rows[place] for place in random.permutation(len(rows))]
    edges = np.unique(random.integers(0, len(mixed) + 1, max(1, len(mixed) // 2)))
    return [mixed[a:b] for a, b in zip([0, *edges], [*edges, len(mixed)], strict=True) if b > a]


def same(first: FeaturePipeline, second: FeaturePipeline, rows: LogRows) -> None:
    """Both say the same of rows, to the last bit, in all ways of asking: as rows of a log and as requests of a row."""
    assert_same(first.encode(rows), second.encode(rows))
    names = {name: name in ("item", "brand") for name in first.schema.input_columns()}

    def requests() -> RequestRows:
        own, shared = ({name: rows.column(name) for name, is_own in names.items() if is_own == of} for of in (1, 0))
        return RequestRows(ServingRows(shared, len(rows), first.schema), own, np.arange(len(rows)))

    for mine, theirs in zip(first.request_inputs(requests()), second.request_inputs(requests()), strict=True):
        assert_same_inputs(mine, theirs)
    for mine, theirs in zip(first.explain(requests()), second.explain(requests()), strict=True):
        assert mine.keys() == theirs.keys()
        for name, values in mine.items():
            np.testing.assert_array_equal(values, theirs[name], err_msg=name)


@pytest.mark.parametrize("seed", range(settings().max_examples // 2))
def test_live_rows_count_as_if_memories_had_been_extended(
    seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"MIN_LEVEL_SIZE": 6, "_GROWTH": 2, "_LARGE_LEVEL_SIZE": 12}.items():
        monkeypatch.setattr(levels, name, value)
    drawn, random = draw(seed), np.random.default_rng(seed)
    schema = kinds.parse_schema(drawn.settings)
    naive = Log(drawn.settings, drawn.log, {"bought": drawn.events})
    times = np.array([row["time"] for row in naive.rows])
    until = int(np.quantile(times, 0.6))
    of_logs: dict[str | None, tuple[list[Row], Any]] = {
        None: (naive.rows, log_rows),
        "bought": (naive.events["bought"], event_rows),
    }
    pipeline, extended = FeaturePipeline(schema), FeaturePipeline(schema)
    live, learnt = LiveUpdates(pipeline.point_in_time_encoders), 0
    for source, (rows, canonical_rows) in of_logs.items():
        encoders = {name: item for name, item in pipeline.point_in_time_encoders.items() if item.source == source}
        # Some early rows come late, after what they are counted for had been compacted.
        at = [row["time"] if source is None else row["bought_at"] for row in rows]
        early = [row for row, time in zip(rows, at, strict=True) if time <= until and random.random() < 0.8]
        later = [row for row in rows if not any(row is second for second in early)]
        for name, encoder in encoders.items() if early else ():
            events = encoder.events(canonical_rows(drawn, early, schema))
            write_event_store(encoder.compacted(encoder.extended(encoder.store, events), until + 1), tmp_path, name)
            encoder.store = extended.point_in_time_encoders[name].store = read_event_store(encoder, tmp_path)
            for column in encoder.store.to_columns().values():
                column.flags.writeable = False
        for some in batches(random, later):
            live = live.extended({source: canonical_rows(drawn, some, schema)})
            learnt += len(some)
            for name in encoders:
                encoder = extended.point_in_time_encoders[name]
                events = encoder.events(canonical_rows(drawn, some, schema))
                encoder.store = encoder.extended(encoder.store, events)
    assert live.rows == learnt
    moments = [until + 1, until + 2, int(times.max()), *(times.max() + np.array([1, DAY // 2, 2 * DAY, 9 * DAY]))]
    asking = naive.at_moments(6, [int(moment) for moment in [*moments, *random.choice(times[times > until], 3)]])
    same(pipeline.with_live(live), extended, log_rows(drawn, asking, schema))


PARTS = 5


@pytest.mark.parametrize("part", range(PARTS))
def test_counters_histories_and_labels_equal_the_reference(part: int, tmp_path: Path) -> None:
    compared = [compare(seed, tmp_path / str(seed)) for seed in range(part, settings().max_examples, PARTS)]
    # Nearly every log can be built.
    assert sum(item > 100 for item in compared) > 0.75 * len(compared)
