"""`forget_after_days` and `max_keys` in builds and extensions: what stays is what the rule says, however built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe_rec.features import memory_limits
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.preprocessing import steps
from mmoe_rec.preprocessing.logs import BuildOptions, Logs
from mmoe_rec.preprocessing.prepare import Prepared, encode_with
from tests.log.small_logs import DAY, START, files_of, log_rows, times_of
from tests.preprocessing.growing_log import FEATURES, LATER_DAYS, WINDOWS, Growing, schema_with_purchases


def growing(folder: Path, changes: dict[str, dict[str, Any]], **options: Any) -> Growing:
    """A log whose features have further settings."""
    log = Growing(folder, **options)
    features = {name: {**each, **changes.get(name, {})} for name, each in FEATURES.items()}
    log.schema = schema_with_purchases(features, folder / "events")
    return log


REMEMBERING = [name for name, each in FEATURES.items() if each["kind"] in ("counter", "history")]
# No shorter than the longest window, nor than events come late: three days.
FORGETFUL = {name: {"forget_after_days": 3.5 if name == "item_click" else 3} for name in REMEMBERING}
CAPS = {"clicked": 2, "liked_items": 1, "item_click": 4, "user_brand_liked": 7, "brand_spent": 3, "bought": 3, "n": 6}
CAPPED = {name: {"max_keys": most} for name, most in CAPS.items()}


def memories(prepared: Prepared) -> dict[str, pa.Table]:
    return {name: pq.read_table(prepared.serving / f"{name}.memory") for name in REMEMBERING}


def capped(table: pa.Table, most: int) -> pa.Table:
    """The events of the keys with the latest ones."""
    last: dict[int, int] = {}
    for key, known in zip(table["key"].to_pylist(), table["known"].to_pylist(), strict=True):
        last[key] = max(known, last.get(key, known))
    stay = sorted(last, key=lambda key: (-last[key], key))[:most]
    return table.filter(pa.array([key in stay for key in table["key"].to_pylist()]))


@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    days=LATER_DAYS,
    rows_in_memory=st.sampled_from([40, 10**6]),
)
def test_day_by_day_forgets_what_a_build_of_all_days_does(tmp_path_factory, seed, days, rows_in_memory):
    log = growing(tmp_path_factory.mktemp("log"), FORGETFUL, seed=seed, rows=250)
    options = {"rows_in_memory": rows_in_memory, "duplicates": "keep"}
    log.prepare_first_days(**options)
    for start, end in days:
        if ((times_of(log.table) >= START + int(start * DAY)) & (times_of(log.table) < START + int(end * DAY))).any():
            log.add(start, end)
            assert log.extend(**options) is not None
        else:
            log.written[log.written >= START + int(start * DAY)] += 99 * DAY
    assert memories(Prepared(log.work / "features")) == memories(log.prepare("whole", **options))


def test_forgetting_takes_other_results_and_less_memory(tmp_path):
    found = []
    for name, changes in (("all", {}), ("forgetful", {name: {"forget_after_days": 3.5} for name in REMEMBERING})):
        log = growing(tmp_path / name, changes, days=60.0)
        log.add(0, 60)
        found.append(log.prepare())
    everything, some = map(memories, found)
    smaller = [name for name in REMEMBERING if len(some[name]) < len(everything[name])]
    assert {"clicked", "user_brand_liked", "item_click", "n"} <= set(smaller)
    encoded = [pq.read_table(each.split("test")) for each in found]
    assert any(not encoded[0][name].equals(encoded[1][name]) for name in encoded[0].column_names)


@pytest.fixture(scope="module")
def uncapped(tmp_path_factory: pytest.TempPathFactory) -> Growing:
    log = growing(tmp_path_factory.mktemp("uncapped"), {})
    log.add(0, 8)
    log.prepare()
    return log


@pytest.mark.parametrize(("rows_in_memory", "workers"), [(10**6, 1), (500, 2), (120, 2), (40, 4)])
@pytest.mark.parametrize("gathered", [0, 10**6])
def test_the_keys_with_the_latest_events_stay_however_many_partitions_there_are(
    tmp_path, uncapped, monkeypatch, capsys, rows_in_memory, workers, gathered
):
    monkeypatch.setattr(memory_limits, "_KEYS_AT_LEAST", gathered)
    log = growing(tmp_path, CAPPED)
    log.add(0, 8)
    prepared = log.prepare(rows_in_memory=rows_in_memory, workers=workers)
    everything = memories(Prepared(uncapped.work / "features"))
    dropped = {}
    for name, table in memories(prepared).items():
        assert table.equals(capped(everything[name], CAPS[name])), name
        assert table.schema.equals(everything[name].schema, check_metadata=True), name
        dropped[name] = len(set(everything[name]["key"].to_pylist())) - CAPS[name]
        assert dropped[name] > 0, name
    assert prepared.manifest["dropped_keys"] == dropped
    said = capsys.readouterr().err
    for name, number in dropped.items():
        assert f"feature '{name}' has more than {CAPS[name]:,} keys: the {number:,} with the oldest events go" in said
    # Rows see all.
    assert files_of(prepared.folder / "encoded") == files_of(uncapped.work / "features" / "encoded")


def test_ties_between_keys_go_by_the_key(tmp_path):
    known = pa.array(np.array([5, 7, 7, 3, 7], np.int64))
    key = pa.array(np.array([1, 4, 6, 7, 2**64 - 1], np.uint64))
    parts = [slice(0, 2), slice(2, 4), slice(4, 5)]
    expected = [[4], [4, 6], [4, 6, 2**64 - 1], [1, 4, 6, 2**64 - 1], [1, 4, 6, 7, 2**64 - 1]]
    for most, stay in enumerate(expected, 1):
        folder = tmp_path / str(most) / "n.memory"
        folder.mkdir(parents=True)
        for number, part in enumerate(parts):
            table = pa.table({"key": key[part], "known": known[part]})
            pq.write_table(table, folder / f"part-{number:05d}.parquet")
        assert memory_limits.drop_keys(folder.parent, "n", most) == 5 - most
        assert pq.read_table(folder)["key"].to_pylist() == stay


@pytest.mark.parametrize("rows_in_memory", [60, 10**6])
def test_an_extension_goes_on_from_the_keys_that_stayed(tmp_path, rows_in_memory):
    """And bounds its own: a key that was dropped begins anew."""
    log = growing(tmp_path, CAPPED)
    log.add(0, 8)
    log.prepare()
    before = FeaturePipeline.load(log.work / "features" / "serving")
    log.add(8, 99)
    extended = log.extend(rows_in_memory=rows_in_memory)
    assert extended is not None
    after = memories(extended.prepared)
    name, most = "user_brand_liked", CAPS["user_brand_liked"]
    # By hand: what was kept, with the new rows' events.
    encoder = before.memory_encoders[name]
    new = log_rows(log.table.filter(pa.array(times_of(log.table) >= START + 8 * DAY)), log.schema)
    memory = encoder.extended(encoder.memory, encoder.events(new))
    end = int(times_of(log.table).max()) + 1
    expected = capped(pa.table(encoder.compacted(memory, end).to_columns()), most)
    assert after[name].to_pydict() == expected.to_pydict()
    assert extended.prepared.manifest["dropped_keys"][name] > 0
    assert len(set(after[name]["key"].to_pylist())) == most


def test_another_log_that_is_encoded_keeps_nothing(tmp_path, monkeypatch):
    """So nothing is dropped, and nothing said."""
    log = growing(tmp_path, CAPPED)
    log.add(0, 8)
    prepared = log.prepare()
    monkeypatch.setattr(steps, "drop_keys", lambda *_: pytest.fail("the memories are not asked again"))
    windows = {"test": WINDOWS["test"]}
    encode_with(prepared.serving, Logs(log.source, log.schema, BuildOptions()), windows, tmp_path / "encoded")
