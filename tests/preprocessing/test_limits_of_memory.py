"""`forget_after_days` in builds and extensions: what stays is what the rule says, however built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe_rec.preprocessing.prepare import Prepared
from tests.log.small_logs import DAY, START, times_of
from tests.preprocessing.growing_log import FEATURES, LATER_DAYS, Growing, schema_with_purchases


def growing(folder: Path, changes: dict[str, dict[str, Any]], **options: Any) -> Growing:
    """A log whose features have further settings."""
    log = Growing(folder, **options)
    features = {name: {**each, **changes.get(name, {})} for name, each in FEATURES.items()}
    log.schema = schema_with_purchases(features, folder / "events")
    return log


REMEMBERING = [name for name, each in FEATURES.items() if each["kind"] in ("counter", "history")]
# No shorter than the longest window, nor than events come late: three days.
FORGETFUL = {name: {"forget_after_days": 3.5 if name == "item_click" else 3} for name in REMEMBERING}


def memories(prepared: Prepared) -> dict[str, pa.Table]:
    return {name: pq.read_table(prepared.serving / f"{name}.memory") for name in REMEMBERING}


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
