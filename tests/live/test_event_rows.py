"""Rows that callers send: taken as a log's files are, or refused with a sentence about a row and a column."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe_rec.errors import RequestError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.live.journal_rows import CLOCK_TOLERANCE_US, RowValidator
from mmoe_rec.log.columns import UTC_MICROSECONDS
from tests.log.small_logs import ALL_KINDS, DAY, START, log_rows, random_log, schema_of, with_requests
from tests.server.asking import as_json

COLUMNS = {"user": "user", "candidate": "item", "time": "time", "request": "request", "sampling_rate": "rate"}
FEATURES = {
    **ALL_KINDS,
    "viewed": {"kind": "counter", "events": "views", "by": ["user", "brand"], "outputs": ["log_sum"]},
    "taste": {"kind": "vector", "column": "taste", "size": 2},
}
ROLES = {"user": ["age"], "candidate": ["brand", "price", "tags", "taste"], "context": ["born"], "placement": ["slot"]}
SCHEMA = schema_of(FEATURES, columns=COLUMNS, roles=ROLES, events={"views": {"path": "views", "time": "at"}})
NOW = START + 400 * DAY


def _log() -> pa.Table:
    table = with_requests(random_log(3, 200))
    taste = pa.array([[1.0, 2.0]] * len(table))
    return table.append_column("rate", pa.array(np.ones(len(table)))).append_column("taste", taste)


def _pipeline() -> FeaturePipeline:
    pipeline = FeaturePipeline(SCHEMA)
    pipeline.partial_fit(log_rows(_log(), SCHEMA), NOW)
    pipeline.finish_fit()
    pipeline.booleans = {"liked", "slot"}
    return pipeline


CHECKS = RowValidator(_pipeline(), max_rows=500)
ROW = {
    "user": 5, "item": 3, "time": "2024-01-01T00:00:00Z", "request": 12, "click": 1, "liked": None, "spent": 2.5,
    "age": 1, "brand": "a", "price": 3, "tags": ["x", None], "born": "2000-01-01", "slot": 2, "rate": 0.5,
    "taste": [1, 2.5], "event_id": "e1",
}  # fmt: skip
NEEDED = ["user", "item", "time", "request", "click", "liked", "spent"]


def _reported(rows: object, source: str | None = None) -> str:
    with pytest.raises(RequestError) as error:
        CHECKS.read_json(source, rows, NOW)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_columns_in_canonical_types():
    table = CHECKS.read_json(None, [ROW], NOW)
    assert table.schema.field("price").type == table.schema.field("click").type == pa.float64()
    assert table.schema.field("time").type == table.schema.field("born").type == UTC_MICROSECONDS
    expected = {name: value for name, value in ROW.items() if name != "age"}
    assert table.to_pylist()[0] | {"time": 0, "born": 0} == expected | {"time": 0, "born": 0}, "no feature reads age"


def test_only_what_a_row_could_not_count_without_is_needed():
    row = {name: ROW[name] for name in NEEDED}
    table = CHECKS.read_json(None, [row], NOW)
    assert set(table.column_names) == {*NEEDED, "rate"}
    assert table["liked"].null_count == 1
    assert table["rate"].to_pylist() == [1.0], "a row that nobody has sampled was kept"
    table = CHECKS.read_json(None, [{**ROW, "rate": 0.5}, {**ROW, "rate": None, "click": None, "brand": None}], NOW)
    assert [table[name].to_pylist() for name in ("rate", "click", "brand")] == [[0.5, 1.0], [1.0, None], ["a", None]]
    for name in NEEDED:
        lacking = {key: value for key, value in row.items() if key != name}
        assert _reported([row, lacking]) == f"row 1: there is no column '{name}'"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"user": None}, "column 'user' is null, but every row needs one"),
        ({"item": None}, "column 'item' is null"),
        ({"request": None}, "column 'request' is null"),
        ({"time": None}, "column 'time' is null"),
        ({"user": "5"}, "column 'user' must hold integers, as in the log; found strings"),
        ({"click": True}, "column 'click' must hold numbers; found true/false"),
        ({"tags": [True]}, "column 'tags' must hold lists of strings, as in the log; found lists of true/false"),
        ({"taste": []}, "column 'taste' holds []. Feature 'taste' needs lists of 2 finite numbers"),
        ({"event_id": True}, "column 'event_id' must hold integers or strings; found true/false"),
        ({"event_id": ""}, "column 'event_id' is empty, "),
        ({"price": True}, "column 'price' must hold numbers; found true/false"),
        ({"price": math.nan}, "column 'price' holds NaN or infinity. Use null for a missing number"),
        ({"click": 2}, "column 'click' is the label of the binary task 'click' and holds 2"),
        ({"liked": 0.5}, "column 'liked' is the label of the binary task 'liked' and holds 0.5"),
        ({"spent": 1e300}, "column 'spent' is the label of task 'spent' and holds 1e+300, which"),
        ({"rate": 0}, "column 'rate' holds 0"),
        ({"rate": 1.5}, "column 'rate' holds 1.5"),
        ({"taste": [1.0]}, "column 'taste' holds [1.0]. Feature 'taste' needs lists of 2 finite numbers"),
        ({"taste": [1.0, None]}, "column 'taste' holds null inside a list. Use null in place of the whole list"),
        ({"time": "yesterday"}, "column 'time' holds 'yesterday', which is not an ISO 8601 time"),
        ({"time": "2199-01-01"}, "column 'time' holds a request in the future, 2199-01-01T00:00:00+00:00, later than"),
        ({"userr": 1}, "the model was trained without a column 'userr': leave it out; did you mean 'user'?"),
        ({"door": 1}, "the model was trained without a column 'door': leave it out; valid are user, item, request, ti"),
        ({"request": 13, "user": 5, "x" * 5000: 1}, "the model was trained without a column 'xxxx"),
        ({"user": 6}, "column 'user' holds another user than row 0, of the same request by column 'request'"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(changes, sentence):
    rows = [copy.deepcopy(ROW) for _ in range(7)]
    rows[4] |= changes
    message = _reported(rows)
    assert message.startswith(f"row 4: {sentence}"), message
    assert len(message) < 600
    assert CHECKS.read_json(None, [*rows[:4], *rows[5:]], NOW).num_rows == 6


def test_what_is_no_row_and_too_many():
    for rows in (None, [], {}, "rows", 5, {"user": [1]}):
        assert _reported(rows) == "the rows must be a list of at least one object of columns and values"
    assert _reported([ROW, None]) == "row 1 must be an object of columns and values, found NoneType"
    assert _reported([ROW] * 501) == "there are more than 500 rows; send them in several calls"


def test_times_up_to_a_little_later_than_now():
    row = {"user": 1, "brand": "a", "at": "2024-01-01T00:00:00Z"}
    at = 1_704_067_200_000_000
    assert CHECKS.read_json("views", [row], at - CLOCK_TOLERANCE_US).num_rows == 1
    with pytest.raises(RequestError, match="row 0: column 'at' holds an event in the future, 2024-01-01T00:00:00"):
        CHECKS.read_json("views", [row], at - CLOCK_TOLERANCE_US - 1)
    assert CHECKS.read_json("views", [row]).num_rows == 1, "by the clock"


def test_rows_of_a_log_of_events():
    row = {"user": 1, "brand": None, "at": "2024-01-01T00:00:00Z"}
    table = CHECKS.read_json("views", [{**row, "event_id": 3}, row], NOW)
    assert table.to_pylist()[0]["event_id"] == 3
    assert _reported([{**row, "item": 3}], "views").startswith("row 0: the model was trained without a column 'item': ")
    assert _reported([{**row, "at": None}], "views") == "row 0: column 'at' is null, but every event needs a time"
    assert _reported([{"user": 1, "at": row["at"]}], "views") == "row 0: there is no column 'brand'"
    assert _reported([{"user": 1, "at": row["at"], "bran": "a"}], "views").endswith("; and there is no column 'brand'")
    assert _reported([row], "purchases") == "there is no event log 'purchases'. Event logs: views"
    assert CHECKS.read_json("views", [{**row, "user": None}], NOW).num_rows == 1, "as a build takes it"


@pytest.mark.parametrize("seed", range(4))
def test_rows_become_those_of_the_log(seed):
    table = with_requests(random_log(seed, 120), seed)
    table = table.append_column("rate", pa.array(np.full(len(table), 0.25)))
    first = CHECKS.read_json(None, as_json(table), NOW)
    whole = table.append_column("taste", pa.nulls(len(table)))
    expected = log_rows(whole, SCHEMA).table
    for name in first.column_names:
        assert first[name].combine_chunks().equals(expected[name].combine_chunks()), name


def _outcome(check: Callable[[], pa.Table]) -> tuple[pa.Table | None, str]:
    """A table, or None and what was said instead."""
    try:
        return check(), ""
    except RequestError as error:
        return None, str(error)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
        st.sampled_from(["2024-01-01", 1e308, 2**70]), st.text(alphabet="\ud800a", max_size=2),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=2)),
    max_leaves=5,
)  # fmt: skip


PLAUSIBLE = [None, True, False, 0, 1, 1.0, 0.5, 2**53 + 1, 2**63, "", "a", "1", math.nan, {}]
PLAUSIBLE += [[], [None], [True], [1], [0.5, 2], [1.0, None], ["a"], ["a", None], [[]], "2023-01-01", 1_700_000_000]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_value_is_refused_for_itself_whatever_stands_beside_it(data):
    name = data.draw(st.sampled_from([item for item in ROW if item != "event_id"]))  # a caller's own, of any type
    values = data.draw(st.lists(st.one_of(st.sampled_from([*PLAUSIBLE, ROW[name]]), VALUES), min_size=1, max_size=4))
    rows = [{**ROW, "request": 20 + number, name: value} for number, value in enumerate(values)]
    alone = [_outcome(lambda row=row: CHECKS.read_json(None, [row], NOW)) for row in rows]
    table, message = _outcome(lambda: CHECKS.read_json(None, rows, NOW))
    if table is None:
        assert message in [item.replace("row 0: ", f"row {row}: ", 1) for row, (_, item) in enumerate(alone) if item]
    else:
        assert [item for _, item in alone] == [""] * len(rows)
        table.validate(full=True)
        one_by_one = pa.concat_tables([item for item, _ in alone], promote_options="permissive")
        assert table.to_pylist() == one_by_one.select(table.column_names).to_pylist()


def test_true_and_false_are_taken_where_the_log_holds_them():
    rows = [{**ROW, "liked": liked} for liked in (True, 0, None, False, 1.0)]
    assert CHECKS.read_json(None, rows, NOW)["liked"].to_pylist() == [1.0, 0.0, None, 0.0, 1.0]
