"""Counters and histories over further logs of events: point in time as well, and as strict about bad files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.reader import EventRows, Log
from mmoe_rec.preprocessing.prepare import prepare
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import (
    ALL_KINDS,
    DAY,
    START,
    assert_same,
    fit_in_memory,
    log_rows,
    memory_table,
    random_log,
    raw_results,
    remember,
    times_of,
    write_log,
)
from tests.preprocessing.growing_log import OF_PURCHASES, schema_with_purchases

UNTIL = START + 6 * DAY
WINDOWS = {"train": (None, UNTIL), "validation": (UNTIL, UNTIL + 2 * DAY), "test": (UNTIL + 2 * DAY, None)}
LOG = random_log(0)


def _events(seed: int, rows: int = 200) -> pa.Table:
    """Purchases at some of the log's own times and between them."""
    table = random_log(0, 300).slice(0, 300).take(pa.array(np.random.default_rng(seed).integers(0, 300, rows)))
    shift = np.random.default_rng(seed).choice([0, 0, 1, -1, DAY // 3], rows)
    times = pa.array(times_of(table) + shift).cast(table["time"].type)
    return table.select(["user", "item", "brand"]).append_column("bought_at", times)


def _schema(path: Path) -> Schema:
    return schema_with_purchases({"item": ALL_KINDS["item"], **OF_PURCHASES}, path)


def _fitted(folder: Path, *events: pa.Table, statistics: pa.Table | None = None) -> FeaturePipeline:
    schema = _schema(write_log(folder / "purchases", *events))
    log = Log(str(write_log(folder / "log", LOG)), schema)
    rows = {"purchases": list(EventRows("purchases", log).stream())}
    if statistics is None:
        return fit_in_memory(schema, list(log.stream()), (None, UNTIL), rows)
    pipeline = _fitted(folder / "statistics", statistics)
    remember(pipeline, list(log.stream()), rows)
    return pipeline


def test_events_equal_a_naive_loop(tmp_path):
    events = _events(1)
    pipeline = _fitted(tmp_path, events)
    rows = log_rows(LOG, pipeline.schema)
    encoded, raw = pipeline.encode(rows), raw_results(pipeline.encoders["n"], rows)
    known = [(time + 1, event) for time, event in zip(_bought_at(events), events.to_pylist(), strict=True)]
    items = pipeline.encoders["item"].owner.encode(events["item"].combine_chunks())
    history = encoded.ids["bought"]
    for index, (row, now) in enumerate(zip(LOG.to_pylist(), times_of(LOG), strict=True)):
        mine = [(time, item) for (time, event), item in zip(known, items, strict=True) if event["user"] == row["user"]]
        expected = [item for _, item in sorted(each for each in mine if each[0] <= now)[-3:]]
        assert history.values[history.offsets[index] : history.offsets[index + 1]].tolist() == expected
        same = [
            time for time, event in known if time <= now and all(event[key] == row[key] for key in ("user", "brand"))
        ]
        assert raw["n_rows"][index] == raw["n_positives"][index] == np.log1p(len(same))
        assert raw["n_rows_1d"][index] == np.log1p(sum(time > now - DAY for time in same))
        recency = np.log1p((now - max(same)) / DAY) if same else np.nan
        np.testing.assert_allclose(raw["n_recency"][index], recency, rtol=1e-12)


def _bought_at(events: pa.Table) -> list[int]:
    return events["bought_at"].cast(pa.int64()).to_pylist()


def test_events_at_or_after_the_request_have_no_influence(tmp_path):
    events = _events(2)
    truth = _fitted(tmp_path / "truth", events)
    for index, moment in enumerate(np.random.default_rng(0).choice(times_of(LOG), 5)):
        past = events.filter(pa.array(np.array(_bought_at(events)) < moment))
        future = events.filter(pa.array(np.array(_bought_at(events)) >= moment))
        lies = future.set_column(
            0, "user", pa.array(np.random.default_rng(index).permutation(future["user"].to_numpy()))
        )
        other = _fitted(tmp_path / str(index), pa.concat_tables([lies, lies.slice(0, 3)]), past, statistics=events)
        now = log_rows(LOG.filter(pa.array(times_of(LOG) == moment)), truth.schema)
        assert_same(other.encode(now), truth.encode(now))


def test_no_order_of_events_changes_the_state(tmp_path):
    events = _events(3)
    shuffled = events.take(pa.array(np.random.default_rng(0).permutation(events.num_rows)))
    one, other = _fitted(tmp_path / "a", events), _fitted(tmp_path / "b", shuffled.slice(0, 70), shuffled.slice(70))
    for name in ("bought", "n"):
        mine, theirs = one.encoders[name], other.encoders[name]
        assert mine.state().values == theirs.state().values
        assert memory_table(mine).equals(memory_table(theirs))


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (None, r"does not exist; set `data.events.purchases.path`"),
        (_events(0).drop_columns(["brand"]), r"0.parquet' has no column 'brand'"),
        (
            _events(0).set_column(1, "item", _events(0)["item"].cast(pa.string())),
            r"column 'item' is string in events 'purchases' and int64",
        ),
        (
            _events(0).set_column(3, "bought_at", pa.nulls(200, pa.timestamp("us"))),
            r"0.parquet': column 'bought_at' is null in 200 rows; every event needs a time",
        ),
        (_events(0).set_column(3, "bought_at", pa.array(["x"] * 200)), r"column 'bought_at' must hold timestamps"),
    ],
)
def test_bad_events(tmp_path, events, message):
    path = tmp_path / "purchases" if events is None else write_log(tmp_path / "purchases", events)
    with pytest.raises(UserError, match=message):
        prepare(str(write_log(tmp_path / "log", LOG)), _schema(path), WINDOWS, tmp_path / "work")
    assert not list(tmp_path.glob("work/*"))


def test_changed_events_are_built_again(tmp_path):
    path = write_log(tmp_path / "purchases", _events(0))
    log = str(write_log(tmp_path / "log", LOG))
    first = prepare(log, _schema(path), WINDOWS, tmp_path / "work").manifest
    assert first["events"] == {"purchases": {"files": 1, "rows": 200}}
    write_log(path, _events(1, rows=150))
    assert prepare(log, _schema(path), WINDOWS, tmp_path / "work").manifest["events"]["purchases"]["rows"] == 150


def test_an_event_is_seen_by_requests_after_its_instant(tmp_path):
    """Not by those of the same microsecond."""
    moments = START + np.array([0, 1, 2, DAY])
    log = LOG.slice(0, 4).set_column(2, "time", pa.array(moments).cast(LOG["time"].type))
    log = log.set_column(0, "user", pa.array([5] * 4)).set_column(1, "item", pa.array([1] * 4))
    features = {
        "item": ALL_KINDS["item"],
        # Without outputs: those that events have.
        "n": {"kind": "counter", "events": "purchases", "by": ["user"], "window_days": [None, 0.5]},
        "bought": {"kind": "history", "events": "purchases", "of": "item"},
    }
    events = pa.table({"user": [5], "item": [1], "bought_at": pa.array(moments[1:2]).cast(LOG["time"].type)})
    schema = schema_with_purchases(features, write_log(tmp_path / "purchases", events))
    rows = list(EventRows("purchases", Log(str(write_log(tmp_path / "log", log)), schema)).stream())
    pipeline = fit_in_memory(schema, [log_rows(log, schema)], (None, UNTIL), {"purchases": rows})
    counter, history = (raw_results(pipeline.memory_encoders[name], log_rows(log, schema)) for name in ("n", "bought"))
    assert list(counter) == ["n_positives", "n_positives_0p5d", "n_recency"]
    np.testing.assert_allclose(np.expm1(counter["n_positives"]), [0, 0, 1, 1])
    np.testing.assert_allclose(np.expm1(counter["n_positives_0p5d"]), [0, 0, 1, 0])
    np.testing.assert_array_equal(history["bought"].lengths, [0, 0, 1, 1])
