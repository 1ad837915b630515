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
    random_log,
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
