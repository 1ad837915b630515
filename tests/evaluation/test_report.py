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


def test_three_models_fit_a_narrow_terminal(log: Log) -> None:
    summary = summarise(replace(log, tasks=log.tasks[:2]).measure(), 50)
    stream = io.StringIO()
    Console(file=stream, width=80).print(
        results_table(dict.fromkeys(["MMoE", "gradient boosting", "popularity"], summary))
    )
    assert stream.getvalue().count(f"{summary.score.get('mrr').value:.4f} ±") == 3
    assert "…" not in stream.getvalue()


def test_table_shows_a_dash_for_what_a_model_lacks(log: Log) -> None:
    only_bought = replace(log, tasks=log.tasks[:1])
    table = results_table({"both": summarise(log.measure(), 5), "one": summarise(only_bought.measure(), 5)})
    cells = {
        metric: cell.plain for metric, cell in zip(table.columns[0].cells, table.columns[2].cells, strict=True) if cell
    }
    assert cells["  rmse ↓"] == "-"
