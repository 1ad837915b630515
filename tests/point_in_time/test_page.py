"""The page that follows a counter: its example's numbers are those of the code, and what it names is there."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.features.kinds import schema_of
from mmoe_rec.features.kinds.counter import UNITS, CounterEncoder, SeenTotals
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.rows import LogRows
from tests.log.small_logs import DAY, log_rows

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "mmoe_rec" / "point_in_time" / "README.md").read_text(encoding="utf-8")
WEEK = 7 * DAY
CLICKS = {"kind": "counter", "task": "clicked", "by": ["user"], "outputs": ["log_sum"], "window_days": [7]}
CLICKED = {"label": "clicked", "objective": "engagement", "label_delay_days": 1}
COLUMNS = {"user": "user", "candidate": "item", "time": "time"}
SCHEMA = schema_of({"columns": COLUMNS, "tasks": {"clicked": CLICKED}, "features": {"clicks": CLICKS}})


def tables() -> list[list[dict[str, str]]]:
    """The page's tables, each a list of rows."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        names, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        found.append([dict(zip(names, row, strict=True)) for row in rows])
    return found


LOG, MEMORY, REQUESTS, STEPS = tables()


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
    (found,) = FeaturePipeline(SCHEMA).memory_encoders.values()
    assert isinstance(found, CounterEncoder)
    return found


def test_labels_become_known_when_the_page_says(encoder):
    events = encoder.events(rows_of(LOG))
    assert events["known"].to_pylist() == [moment(row["known"]) for row in LOG if row["known"]]


def test_the_memory_is_that_of_the_page(encoder):
    log = rows_of(LOG)
    names = dict(zip(log.hashes(["user"]).tolist(), log.column("user").to_pylist(), strict=True))
    memory = encoder.extended(encoder.memory, encoder.events(log))
    for left, when in (memory, ""), (encoder.compacted(memory, 11 * DAY), " on day 11"):
        columns = left.to_columns()
        users = [names[key] for key in columns["key"].tolist()]
        clicks = (columns["label_sum"] / UNITS).tolist()
        found = zip(users, columns["known"].tolist(), columns["rows"].tolist(), clicks, strict=True)
        rows, sums = "rows" + when, "clicks" + when
        expected = [(row["user"], moment(row["known"]), int(row[rows]), int(row[sums])) for row in MEMORY if row[rows]]
        assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("cuts", [[], [4 * DAY], [3 * DAY, 8 * DAY]])
def test_requests_get_what_the_page_says(encoder, cuts):
    """Also where the memory is carried from one chunk of time to the next."""
    events, requests = encoder.events(rows_of(LOG)), rows_of(REQUESTS)
    memory, edges = encoder.memory, [-1, *cuts, 99 * DAY]
    for start, end in pairwise(edges):
        known = events["known"].to_numpy()
        memory = encoder.extended(memory, events.filter(pa.array((known > start) & (known <= end))))
        if end in cuts:
            memory = encoder.compacted(memory, min(end, 5 * DAY))
    asked = requests.look_ups(["user"])
    join = memory.join(asked)
    if not cuts:
        for index, name in ((join.last(), "total now"), (join.last(WEEK), "total 7 days earlier")):
            clicks = memory.sums(index)[1][asked.number] / UNITS
            assert clicks.tolist() == [int(row[name]) for row in REQUESTS]
    clicks = SeenTotals(memory, asked).totals(WEEK)[1][asked.number]
    assert clicks.tolist() == [int(row["clicks in 7 days"]) for row in REQUESTS]

    encoder.memory = memory
    encoder.learn_results(encoder.look_up(requests))
    for number in encoder.numbers.values():
        number.finish()
    results, inputs = encoder.look_up(requests), encoder.encode(requests).standardised().dense
    for found, name in ((results, "log(1 + clicks)"), (inputs, "standardised")):
        np.testing.assert_allclose(found["clicks_positives_7d"], [float(row[name]) for row in REQUESTS], atol=5e-5)


def test_what_each_step_names_is_there():
    for step in STEPS:
        places = re.findall(r"`(mmoe_rec/[\w/.]+)`: ((?:`\w+`(?:, )?)+)", step["where"])
        assert places, step
        for path, names in places:
            text = (ROOT / path).read_text(encoding="utf-8")
            for name in re.findall(r"\w+", names):
                assert re.search(rf"^\s*(?:def|class) {name}\b", text, re.MULTILINE), f"{path}: {name}"
