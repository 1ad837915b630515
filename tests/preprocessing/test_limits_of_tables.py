"""`max_keys` in the tables of models: those that go on, those that are made anew, and those that learn live."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.requests.request import Request, RequestReader
from mmoe_rec.log.reader import event_rows
from mmoe_rec.preprocessing.logs import BuildOptions
from tests.log.small_logs import DAY, START, log_rows, times_of
from tests.preprocessing.growing_log import Growing
from tests.preprocessing.test_limits_of_memory import REMEMBERING, capped, growing
from tests.preprocessing.test_tables_of_models import Served

STEPS = [(0, 8), (8, 9), (9, 10.5), (10.5, 99)]
CAPS = {
    "clicked": 4,
    "liked_items": 4,
    "item_click": 16,
    "user_brand_liked": 15,
    "brand_spent": 3,
    "bought": 4,
    "n": 15,
}
CAPPED = {name: {"max_keys": most} for name, most in CAPS.items()}
Tables = dict[str, pa.Table]


def memories(features: Path) -> Tables:
    return {name: pq.read_table(features / f"{name}.memory") for name in REMEMBERING}


def keys_in(table: pa.Table) -> set[int]:
    return set(table["key"].to_pylist())


def of_keys(table: pa.Table, keys: set[int]) -> pa.Table:
    return table.filter(pa.array([key in keys for key in table["key"].to_pylist()]))


def stepped(folder: Path, caps: dict[str, dict[str, int]]) -> tuple[Growing, list[Path], Served]:
    """The log, and the features of a model whose tables went on, after each step."""
    log = growing(folder, caps)
    log.written = log.events["bought_at"].cast(pa.int64()).to_numpy()  # none comes late
    log.add(*STEPS[0])
    served = Served(log.prepare(), folder / "model", log.source, BuildOptions())
    found = [served.features]
    for step in STEPS[1:]:
        log.add(*step)
        assert served.go_on() is not None
        found.append(served.features)
    return log, found, served


def test_the_same_keys_stay_and_those_that_never_went_remember_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    everything = [memories(each) for each in stepped(tmp_path / "all", {})[1]]
    capsys.readouterr()
    _, folders, served = stepped(tmp_path / "capped", CAPPED)
    said = capsys.readouterr().err
    found, anew = [memories(each) for each in folders], memories(served.anew()[0])
    knew_more = 0
    for name, most in CAPS.items():
        went = {
            key
            for all_, some in zip(everything, found, strict=True)
            for key in keys_in(all_[name]) - keys_in(some[name])
        }
        last = found[-1][name]
        assert anew[name].equals(capped(everything[-1][name], most)), name
        assert keys_in(last) == keys_in(anew[name]), name
        stayed, back = keys_in(last) - went, keys_in(last) & went
        assert stayed, name
        assert of_keys(last, stayed).equals(of_keys(anew[name], stayed)), name
        knew_more += sum(not of_keys(last, {key}).equals(of_keys(anew[name], {key})) for key in back)
    assert knew_more > 3
    assert said.count("feature 'n' has more than 15 keys: the ") == len(STEPS)  # by the build, and by each refresh


def test_keys_that_come_back_begin_anew_in_a_refresh_as_in_a_server(tmp_path: Path) -> None:
    """What a server learnt live is what its next tables hold, of the keys that stay."""
    log, folders, served = stepped(tmp_path, CAPPED)
    live, after = (FeaturePipeline.load(each) for each in folders[-2:])
    start, schema = START + int(STEPS[-1][0] * DAY), live.schema
    rows = log_rows(log.table.filter(pa.array(times_of(log.table) >= start)), schema)
    learnt = live.live.extended(live.live_events(None, rows), len(rows))
    events = event_rows(log.events.filter(pa.array(log.written >= start)), schema, "purchases")
    live = live.with_live(learnt.extended(live.live_events("purchases", events), len(events)))
    anew = FeaturePipeline.load(served.anew()[0])

    users = sorted(set(log.table["user"].to_pylist()))
    pairs = log.table.select(["item", "brand"]).group_by(["item", "brand"]).aggregate([])

    def found(pipeline: FeaturePipeline) -> dict[str, list[str]]:
        reader = RequestReader(pipeline, folders[-1], 1_000)
        context = {"time": np.datetime64(int(times_of(log.table).max()) + 3 * DAY, "us").item()}
        candidates = {"item": [*pairs["item"].to_pylist(), -9], "brand": [*pairs["brand"].to_pylist(), "unknown"]}
        requests = [Request({"user": user}, context, candidates) for user in [*users, 10**9]]
        numbers, lists = pipeline.found(reader.rows(requests))
        return {name: [repr(each) for each in values.tolist()] for name, values in (numbers | lists).items()}

    of_live, of_after, of_anew = found(live), found(after), found(anew)
    known = knew_more = 0
    for name, values in of_after.items():
        unknown = values[-1]  # of a user and an item that nobody has met
        for served_live, now, all_of_it in zip(of_live[name], values, of_anew[name], strict=True):
            assert now in (served_live, unknown), name
            known += now != unknown
            knew_more += all_of_it not in (served_live, unknown)
    assert known > 500
    assert knew_more > 20
