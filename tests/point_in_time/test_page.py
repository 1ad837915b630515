"""The numbers in the example of the counter page equal the results of the code, and the functions it names exist."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.features.kinds import parse_schema
from mmoe_rec.features.kinds.counter import LABEL_SCALE, CounterEncoder, LookupTotals
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.rows import LogRows
from tests.log.small_logs import DAY, log_rows

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "point-in-time.md").read_text(encoding="utf-8")
WEEK = 7 * DAY
CLICKS = {"kind": "counter", "task": "clicked", "by": ["user"], "outputs": ["log_sum"], "window_days": [7]}
CLICKED = {"label": "clicked", "objective": "engagement", "label_delay_days": 1}
COLUMNS = {"user": "user", "candidate": "item", "time": "time"}
SCHEMA = parse_schema({"columns": COLUMNS, "tasks": {"clicked": CLICKED}, "features": {"clicks": CLICKS}})


def tables() -> list[list[dict[str, str]]]:
    """The page's tables, each a list of rows."""
    parsed = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        names, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        parsed.append([dict(zip(names, row, strict=True)) for row in rows])
    return parsed


LOG, STORE, REQUESTS, STEPS, *_ = tables()


def moment(text: str) -> int:
    """`day 2, 10:00` as microseconds."""
    day, hour, minute = map(int, re.fullmatch(r"day (\d+), (\d\d):(\d\d)", text).groups())
    return day * DAY + (hour * 60 + minute) * 60_000_000


def rows_of(table: list[dict[str, str]]) -> LogRows:
    columns = {
        "user": pa.array([row["user"] for row in table]),
        "item": pa.array(range(len(table))),
        "time": pa.array([moment(row["time"]) for row in table]).cast(UTC_MICROSECONDS),
        "clicked": pa.array([int(row["clicked"]) if row.get("clicked") else None for row in table], pa.int8()),
    }
    return log_rows(pa.table(columns), SCHEMA)


@pytest.fixture
def encoder() -> CounterEncoder:
    (actual,) = FeaturePipeline(SCHEMA).point_in_time_encoders.values()
    assert isinstance(actual, CounterEncoder)
    return actual


def test_labels_become_available_when_the_page_says(encoder):
    events = encoder.events(rows_of(LOG))
    assert events["available_at"].to_pylist() == [moment(row["available"]) for row in LOG if row["available"]]


def test_the_store_equals_the_page(encoder):
    log = rows_of(LOG)
    names = dict(zip(log.hashes(["user"]).tolist(), log.column("user").to_pylist(), strict=True))
    store = encoder.extended(encoder.store, encoder.events(log))
    for left, when in (store, ""), (encoder.compacted(store, 11 * DAY), " on day 11"):
        columns = left.to_columns()
        users = [names[key] for key in columns["key"].tolist()]
        clicks = (columns["label_sum"] / LABEL_SCALE).tolist()
        actual = zip(users, columns["available_at"].tolist(), columns["rows"].tolist(), clicks, strict=True)
        rows, sums = "rows" + when, "clicks" + when
        expected = [
            (row["user"], moment(row["available"]), int(row[rows]), int(row[sums])) for row in STORE if row[rows]
        ]
        assert sorted(actual) == sorted(expected)


@pytest.mark.parametrize("cuts", [[], [4 * DAY], [3 * DAY, 8 * DAY]])
def test_requests_get_what_the_page_says(encoder, cuts):
    """Requests get the same results if the store is passed from one chunk of time to the next."""
    events, requests = encoder.events(rows_of(LOG)), rows_of(REQUESTS)
    store, edges = encoder.store, [-1, *cuts, 99 * DAY]
    for start, end in pairwise(edges):
        available_at = events["available_at"].to_numpy()
        store = encoder.extended(store, events.filter(pa.array((available_at > start) & (available_at <= end))))
        if end in cuts:
            store = encoder.compacted(store, min(end, 5 * DAY))
    lookups = requests.lookups(["user"])
    join = store.join(lookups)
    if not cuts:
        for index, name in ((join.last(), "total now"), (join.last(WEEK), "total 7 days earlier")):
            clicks = store.sums(index)[1][lookups.inverse] / LABEL_SCALE
            assert clicks.tolist() == [int(row[name]) for row in REQUESTS]
    clicks = LookupTotals(store, lookups).totals(WEEK)[1][lookups.inverse]
    assert clicks.tolist() == [int(row["clicks in 7 days"]) for row in REQUESTS]

    encoder.store = store
    encoder.partial_fit_results(encoder.look_up(requests))
    for number in encoder.numbers.values():
        number.finish_fit()
    results, inputs = encoder.look_up(requests), encoder.encode(requests).standardized().dense
    for actual, name in ((results, "log(1 + clicks)"), (inputs, "standardized")):
        np.testing.assert_allclose(actual["clicks_log_sum_7d"], [float(row[name]) for row in REQUESTS], atol=5e-5)


def test_what_each_step_names_is_there():
    for step in STEPS:
        paths = re.findall(r"`(mmoe_rec/[\w/.]+)`\]\([^)]*\): ((?:`\w+`(?:, )?)+)", step["where"])
        assert paths, step
        for path, names in paths:
            text = (ROOT / path).read_text(encoding="utf-8")
            for name in re.findall(r"\w+", names):
                assert re.search(rf"^\s*(?:def|class) {name}\b", text, re.MULTILINE), f"{path}: {name}"
