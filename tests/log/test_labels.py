"""Labels of all tasks, and of what two tasks are together, against a loop over rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmoe_rec.features.layout import Layout
from mmoe_rec.log.rows import LogRows, labels_of
from mmoe_rec.preprocessing.prepare import prepare
from tests.log.small_logs import (
    BASE,
    DAY,
    LATE_DAYS,
    START,
    log_rows,
    random_log,
    schema_of,
    times_of,
    write_log,
)

FEATURES = {"item": {"kind": "id", "column": "item"}}


def tasks(**liked: Any) -> dict[str, Any]:
    """Those of the small logs, where liked is given click; its label matures late."""
    return BASE["tasks"] | {"liked": BASE["tasks"]["liked"] | {"given": "click"} | liked}


def expected_rows(rows: LogRows, known_by: int) -> tuple[list[float | None], list[float | None]]:
    """The own labels of liked, and those of click and liked together."""
    own: list[float | None] = []
    both: list[float | None] = []
    for row, time in zip(rows.table.to_pylist(), rows.times().tolist(), strict=True):
        matured = time + LATE_DAYS * DAY <= known_by
        clicked = None if time > known_by else row["click"]
        own.append(row["liked"] if clicked == 1 and matured else None)
        both.append(0 if clicked == 0 and matured else own[-1])
    return own, both


@pytest.mark.parametrize("liked", [{}, {"observed_when": None}])
def test_equals_a_loop(liked: dict[str, Any]) -> None:
    rows = log_rows(random_log(3), schema_of(FEATURES, tasks=tasks(**liked)))
    known_by = START + 6 * DAY
    found = labels_of(rows, known_by)
    assert list(found) == ["click", "liked", "spent", "click_and_liked"]
    own, both = expected_rows(rows, known_by)
    np.testing.assert_equal(found["liked"], np.array(own, np.float64))
    np.testing.assert_equal(found["click_and_liked"], np.array(both, np.float64))
    assert {0.0, 1.0} == set(found["click_and_liked"][~np.isnan(found["click_and_liked"])])


def test_encoded_rows_and_their_counts_have_both(tmp_path: Path) -> None:
    schema = schema_of(FEATURES, tasks=tasks())
    write_log(tmp_path / "log", random_log(3, rows=600))
    edges = [START + days * DAY for days in (6, 8)]
    windows = {"train": (None, edges[0]), "validation": (edges[0], edges[1]), "test": (edges[1], None)}
    prepared = prepare(str(tmp_path / "log"), schema, windows, tmp_path / "work")
    assert prepared.layout.outcomes == {"click_and_liked": (0, 1)}
    assert [task.learnt_from for task in prepared.layout.tasks] == ["click", "click_and_liked", "spent"]
    assert Layout.from_json(prepared.layout.to_json()) == prepared.layout
    table = pq.read_table(prepared.split("train"))
    observed = prepared.manifest["splits"]["train"]["observed"]
    for name in ("liked", "click_and_liked"):
        column = table[f"label.{name}"]
        assert observed[name] == len(column) - column.null_count > 0
    assert observed["liked"] < observed["click_and_liked"] < observed["click"]


COUNTED = {
    "item": {"kind": "id", "column": "item", "min_count": 1},
    "rate": {"kind": "counter", "task": "liked", "by": ["brand"], "outputs": ["rows", "rate"], "smoothing": 2.0},
    "last": {"kind": "history", "task": "liked", "of": "item", "length": 1000},
}


def test_labels_that_had_not_matured_are_counted(tmp_path: Path) -> None:
    """Of each split's rows, those whose label the log holds already."""
    table = random_log(3, rows=600)
    schema = schema_of(FEATURES, tasks=tasks())
    edges = [START + days * DAY for days in (6, 8)]
    windows = {"train": (None, edges[0]), "validation": (edges[0], edges[1]), "test": (edges[1], None)}
    prepared = prepare(str(write_log(tmp_path / "log", table)), schema, windows, tmp_path / "work")
    last = int(times_of(table).max())
    for split, (start, end) in windows.items():
        told = prepared.manifest["splits"][split]
        assert told["known_by"] == (edges[0] if split == "train" else last)
        late = [
            row["click"] == 1 and row["liked"] is not None and time + LATE_DAYS * DAY > told["known_by"]
            for row, time in zip(table.to_pylist(), times_of(table).tolist(), strict=True)
            if (start or 0) <= time < (end or last + 1)
        ]
        assert told["unmatured"] == {"click": 0, "liked": sum(late), "spent": 0}
        assert sum(late) > 0
