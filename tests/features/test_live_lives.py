"""Features that forget and learn live: against extended memories and loops."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.features.memories import Live, read_memory, write_memory
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.columns import column_uses
from mmoe_rec.log.reader import event_rows
from mmoe_rec.log.request_rows import FewRows, RequestRows
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time import levels
from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import (
    DAY,
    START,
    assert_same,
    assert_same_inputs,
    at_times,
    fit_in_memory,
    log_rows,
    random_log,
    times_of,
)
from tests.preprocessing.growing_log import FEATURES, schema_with_purchases

REMEMBERING = [name for name, each in FEATURES.items() if each["kind"] in ("counter", "history")]
LIMITS: dict[str, dict[str, dict[str, Any]]] = {
    # All that can forget, no sooner than their longest window; events come up to 3 days late.
    "all": {name: {"forget_after_days": 3.5 if name == "item_click" else 3} for name in REMEMBERING},
    # A few, beside others that answer together with them.
    "some": {name: {"forget_after_days": 4} for name in ("item_click", "n", "liked_items")},
}
DAYS, UNTIL = 60.0, 30.0  # few enough rows a day for pauses


class Learning:
    """A pipeline that knows a log until day `UNTIL`, and the rows of both logs that it then learns, some late."""

    def __init__(self, seed: int, limits: str, folder: Path) -> None:
        random = np.random.default_rng(seed)
        features = {name: {**each, **LIMITS[limits].get(name, {})} for name, each in FEATURES.items()}
        self.schema: Schema = schema_with_purchases(features, folder)
        self.table = random_log(seed, 300, days=DAYS)
        chosen = self.table.take(pa.array(np.sort(random.integers(0, len(self.table), 150))))
        self.bought = chosen.select(["user", "item", "brand"]).append_column("bought_at", chosen["time"])
        self.until = START + int(UNTIL * DAY)
        self.logs: dict[str | None, LogRows] = {
            None: log_rows(self.table, self.schema),
            "purchases": event_rows(self.bought, self.schema, "purchases"),
        }
        arrives = {
            source: rows.times() + random.choice([0, 0, DAY, 3 * DAY], len(rows)) for source, rows in self.logs.items()
        }
        before = {source: rows.filter(arrives[source] < self.until) for source, rows in self.logs.items()}
        self.pipeline = fit_in_memory(
            self.schema, [before[None]], (START, self.until), {"purchases": [before["purchases"]]}
        )
        self._compact(folder)
        self.batches: list[tuple[str | None, LogRows]] = []
        edges = self.until + (np.array([0, 0.3, 2, 9, 15, 99]) * DAY).astype(np.int64)
        for start, end in pairwise(edges.tolist()):
            for source, rows in self.logs.items():
                self.batches.append((source, rows.filter(in_window(arrives[source], (start, end)))))

    def _compact(self, folder: Path) -> None:
        """What a build writes, and a server reads."""
        for name, encoder in self.pipeline.memory_encoders.items():
            write_memory(encoder.compacted(encoder.memory, self.until), folder, name)
            encoder.memory = read_memory(encoder, folder)

    def asking(self, time: int, rows: int = 40) -> tuple[LogRows, RequestRows]:
        """Rows of a moment in both forms, that of logs and that of requests: a row for each of as many requests."""
        table = at_times(self.table.slice(0, rows), np.full(rows, time))
        asked = log_rows(table, self.schema)
        roles = self.schema.roles
        own = {"item", *roles.candidate, *roles.placement}
        columns = {
            name: asked.column(name) for name in column_uses(self.schema) if name not in ("click", "liked", "spent")
        }
        shared = FewRows({name: each for name, each in columns.items() if name not in own}, rows, self.schema)
        candidates = {name: each for name, each in columns.items() if name in own}
        return asked, RequestRows(shared, candidates, np.arange(rows))


def extended(pipeline: FeaturePipeline, source: str | None, rows: LogRows) -> FeaturePipeline:
    """The same pipeline whose memories were extended by rows."""
    other = copy.copy(pipeline)
    other.encoders = {name: copy.copy(encoder) for name, encoder in pipeline.encoders.items()}
    other.__dict__.pop("memory_encoders", None)
    other._together = None
    for name, events in other.live_events(source, rows).items():
        encoder = other.memory_encoders[name]
        encoder.memory = encoder.extended(encoder.memory, events)
    return other


def same(learning: Learning, pipeline: FeaturePipeline, expected: FeaturePipeline, time: int) -> None:
    """In all ways of asking."""
    rows, of_requests = learning.asking(time)
    assert_same(pipeline.encode(rows), expected.encode(rows))
    for one, two in zip(
        pipeline.request_inputs(learning.asking(time)[1]), expected.request_inputs(of_requests), strict=True
    ):
        assert_same_inputs(one, two)
    _, lists = pipeline.found(learning.asking(time)[1])
    assert set(lists) == {name for name, each in FEATURES.items() if each["kind"] == "history"}
    for found, other in zip(pipeline.found(learning.asking(time)[1]), expected.found(of_requests), strict=True):
        assert found.keys() == other.keys()
        for name, values in found.items():
            if values.dtype == object:
                assert values.tolist() == other[name].tolist(), name
            else:
                np.testing.assert_array_equal(values.view(np.uint64), other[name].view(np.uint64), err_msg=name)


@pytest.fixture(autouse=True)
def small_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SMALLEST": 8, "_GROWTH": 3, "_MANY": 24}.items():
        monkeypatch.setattr(levels, name, value)


@pytest.mark.parametrize("limits", sorted(LIMITS))
@pytest.mark.parametrize("seed", range(2))
def test_served_is_what_an_extension_of_the_same_memory_gives(seed, limits, tmp_path):
    learning = Learning(seed, limits, tmp_path)
    pipeline, expected, live = learning.pipeline, learning.pipeline, Live.none(learning.pipeline.memory_encoders)
    random = np.random.default_rng(seed)
    last = int(times_of(learning.table).max()) + 2 * DAY
    before = pipeline.encode(learning.asking(last)[0]).dense
    for source, rows in learning.batches:
        if len(rows):
            live = live.extended(pipeline.live_events(source, rows), len(rows))
            expected = extended(expected, source, rows)
        if source is not None:  # both logs have had their turn
            pipeline = pipeline.with_live(live)
            between = learning.until + int(random.integers(0, 40 * DAY))
            for time in (learning.until - 1, learning.until, between, last):
                same(learning, pipeline, expected, time)
    assert (pipeline.encode(learning.asking(last)[0]).dense != before).any()
    learnt = sum(len(rows) for _, rows in learning.batches)
    assert (live.rows, live.rows > 100) == (learnt, True)
