"""Labels of all tasks, and of what two tasks are together, against a loop over rows."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmoe_rec.features.build import prepare
from mmoe_rec.features.labels import labels_of
from mmoe_rec.features.layout import Layout, TaskOutput
from mmoe_rec.features.rows import LogRows
from tests.features.small_logs import BASE, DAY, LATE_DAYS, START, log_rows, random_log, schema_of, write_log

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


def test_zeros_do_not_come_before_ones() -> None:
    """Else the last days of training would have engagement without any satisfaction."""
    rows = log_rows(random_log(3), schema_of(FEATURES, tasks=tasks()))
    known_by = START + 6 * DAY
    late = rows.times() + LATE_DAYS * DAY > known_by
    assert late.any()
    assert np.isnan(labels_of(rows, known_by)["click_and_liked"][late]).all()


def test_tasks_without_given_have_their_labels_alone() -> None:
    rows = log_rows(random_log(3), schema_of(FEATURES))
    known_by = START + 6 * DAY
    found = labels_of(rows, known_by)
    assert list(found) == ["click", "liked", "spent"]
    for name, task in rows.schema.tasks.items():
        np.testing.assert_equal(found[name], rows.labels(task, known_by))


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


def test_a_layout_written_before_given_was_known_is_read() -> None:
    layout = Layout((), (), (), (TaskOutput("click", "binary"), TaskOutput("liked", "binary")))
    tree = asdict(layout)
    for task in tree["tasks"]:
        del task["given"]
    assert Layout.from_json(json.dumps(tree)) == layout
    assert layout.outcomes == {}
