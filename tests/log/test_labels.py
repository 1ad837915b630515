"""Labels of rows against a loop; rules compare a column of any type with a value as exactly as Python does."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.log.rows import LogRows, compute_labels
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.prepare import prepare
from tests.log.small_logs import BASE, DAY, LATE_DAYS, START, log_rows, random_log, schema_of, times_of, write_log

FEATURES = {"item": {"kind": "id", "column": "item"}}


def tasks(**liked: Any) -> dict[str, Any]:
    """Those of the small logs, where liked is given click; its label matures late."""
    return BASE["tasks"] | {"liked": BASE["tasks"]["liked"] | {"conditional_on": "click"} | liked}


def expected_rows(rows: LogRows, label_cutoff: int) -> tuple[list[float | None], list[float | None]]:
    """The own labels of liked, and those of click and liked together."""
    own: list[float | None] = []
    both: list[float | None] = []
    for row, time in zip(rows.table.to_pylist(), rows.times().tolist(), strict=True):
        matured = time + LATE_DAYS * DAY <= label_cutoff
        clicked = None if time > label_cutoff else row["click"]
        own.append(row["liked"] if clicked == 1 and matured else None)
        both.append(0 if clicked == 0 and matured else own[-1])
    return own, both


@pytest.mark.parametrize("liked", [{}, {"observed_when": None}])
def test_equals_a_loop(liked: dict[str, Any]) -> None:
    rows = log_rows(random_log(3), schema_of(FEATURES, tasks=tasks(**liked)))
    label_cutoff = START + 6 * DAY
    actual = compute_labels(rows, label_cutoff)
    assert list(actual) == ["click", "liked", "spent", "click_and_liked"]
    own, both = expected_rows(rows, label_cutoff)
    np.testing.assert_equal(actual["liked"], np.array(own, np.float64))
    np.testing.assert_equal(actual["click_and_liked"], np.array(both, np.float64))
    assert {0.0, 1.0} == set(actual["click_and_liked"][~np.isnan(actual["click_and_liked"])])


def test_encoded_rows_and_their_counts_have_both(tmp_path: Path) -> None:
    """And of each split's rows, those are counted whose label the log holds although it has not matured."""
    table, schema = random_log(3, rows=600), schema_of(FEATURES, tasks=tasks())
    edges = [START + days * DAY for days in (6, 8)]
    windows = {"train": (None, edges[0]), "validation": (edges[0], edges[1]), "test": (edges[1], None)}
    prepared = prepare(BuildInputs(str(write_log(tmp_path / "log", table)), schema, windows, tmp_path / "work"))
    assert prepared.layout.joint_outcomes == {"click_and_liked": (0, 1)}
    assert [task.loss_label for task in prepared.layout.tasks] == ["click", "click_and_liked", "spent"]
    train, last = pq.read_table(prepared.split("train")), int(times_of(table).max())
    observed = prepared.manifest["splits"]["train"]["observed"]
    for name in ("liked", "click_and_liked"):
        assert observed[name] == len(train) - train[f"label.{name}"].null_count > 0
    assert observed["liked"] < observed["click_and_liked"] < observed["click"]
    for split, (start, end) in windows.items():
        sentence = prepared.manifest["splits"][split]
        assert sentence["label_cutoff"] == (edges[0] if split == "train" else last)
        late = [
            row["click"] == 1 and row["liked"] is not None and time + LATE_DAYS * DAY > sentence["label_cutoff"]
            for row, time in zip(table.to_pylist(), times_of(table).tolist(), strict=True)
            if (start or 0) <= time < (end or last + 1)
        ]
        assert sentence["pending_labels"] == {"click": 0, "liked": sum(late), "spent": 0}
        assert sum(late) > 0
        rows = pq.read_table(prepared.split(split))
        assert sentence["rows"] == len(rows)
        assert sentence["label_sum"]["click"] == pa.compute.sum(rows["label.click"]).as_py()
        # Without a request column, a user's rows of one instant form a request.
        keys = set(zip(*(rows[name].to_pylist() for name in ("request", "user", "time")), strict=True))
        assert len({request for request, *_ in keys}) == len(keys) == len({key[1:] for key in keys})


def _observed(values: pa.Array, equals: Any) -> list[bool]:
    task = {"label": "click", "objective": "engagement", "observed_when": {"column": "seen", "equals": equals}}
    schema = schema_of({"item": {"kind": "id", "column": "item"}}, tasks={"click": task})
    log = random_log(0, len(values)).drop_columns(["click"])
    rows = log_rows(log.append_column("click", pa.array(np.ones(len(values)))).append_column("seen", values), schema)
    return (~np.isnan(rows.labels(schema.tasks["click"], START + 1000 * DAY))).tolist()


_INTEGERS = [4, None, 5, 2**53, -(2**63), 0, 1]
_NUMBERS = [4.5, None, 4.0, 2.0**70, -0.0, 1.0, 1e300]


@pytest.mark.parametrize(
    ("kind", "values", "wanted"),
    [
        (pa.int64(), _INTEGERS, [4, 4.0, 4.5, 5, True, False, 2**53, float(2**53), -(2**63), 2**70]),
        (pa.float64(), _NUMBERS, [4.5, 4, 4.0, 2**70, 2.0**70, 0, True, 1e300]),
        (pa.float32(), [4.5, None, 1.0], [4.5, 1, True]),
        (pa.bool_(), [True, None, False], [True, False, 1, 0, 1.0]),
        (pa.decimal128(10, 2), [Decimal("4.50"), None, Decimal("0.10"), Decimal(4)], [4.5, 0.1, 4, 4.0]),
        (pa.decimal256(50, 1), [Decimal("4.5"), None], [4.5]),
        (pa.string(), ["4", None, "true", "é\n"], ["4", "true", "é\n"]),
        (pa.dictionary(pa.int32(), pa.string()), ["a", None, "b"], ["a", "c"]),
        (pa.null(), [None, None], [1, "a", 4.5]),
    ],
)
def test_rules_compare_values_as_python_does(kind, values, wanted):
    for equals in wanted:
        rule = _observed(pa.array(values, kind), equals)
        assert rule == [value is not None and float(value) == equals if isinstance(value, Decimal) else value == equals
                        for value in values], equals  # fmt: skip


@pytest.mark.parametrize(
    ("values", "equals", "message"),
    [
        (["true", None], True, "text, but an `observed_when` compares it with True. Write the value in quotes."),
        (["4", None], 4, "text, but an `observed_when` compares it with 4. Write the value in quotes."),
        (
            [True, None],
            "true",
            "numbers, but an `observed_when` compares it with 'true'. Write the value without quotes.",
        ),
    ],
)
def test_a_value_that_a_column_cannot_hold_is_reported(values, equals, message):
    with pytest.raises(UserError, match=f"column 'seen' holds {message}"):
        _observed(pa.array(values), equals)
