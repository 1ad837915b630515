"""What people see: the numbers in tables are those of the summary."""

import io
from dataclasses import replace

from rich.console import Console
from simulated_log import Log

from mmoe_rec.evaluation.summary import summarise
from mmoe_rec.report.tables import results_table


def test_table_shows_values_with_intervals_and_marks_the_best(log: Log) -> None:
    worse = replace(log, predictions=log.predictions | {"bought": 0.2 + 0.5 * log.predictions["liked"]})
    columns = {"mmoe": summarise(log.measure(), 50), "popularity": summarise(worse.measure(), 50)}
    table = results_table(columns)
    stream = io.StringIO()
    Console(file=stream, width=200).print(table)
    auc = columns["mmoe"].tasks["bought"].get("auc")
    assert f"{auc.value:.4f} ±{(auc.high - auc.low) / 2:.4f}" in stream.getvalue()
    rows = list(zip(*(list(column.cells) for column in table.columns), strict=True))
    metric, best, other = rows[1]
    assert metric == "  auc ↑"
    assert best.style == "bold"
    assert other.style == ""
    assert [str(row[0]) for row in rows if not row[1]] == ["bought", "liked", "spent", "score"]


def test_three_models_fit_a_narrow_terminal_and_what_one_lacks_is_a_dash(log: Log) -> None:
    summary, one = (summarise(replace(log, tasks=log.tasks[:tasks]).measure(), 50) for tasks in (2, 1))
    table = results_table({"MMoE": summary, "gradient boosting": summary, "popularity": one})
    stream = io.StringIO()
    Console(file=stream, width=80).print(table)
    assert stream.getvalue().count(f"{summary.tasks['bought'].get('auc').value:.4f} ±") == 3
    assert "…" not in stream.getvalue()
    rows = zip(*(column.cells for column in table.columns), strict=True)
    assert [str(cells[3]) for cells in rows if str(cells[0]) == "  auc ↑"][1] == "-"
