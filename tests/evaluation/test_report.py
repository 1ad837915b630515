"""What people see: the numbers in tables are those of the summary."""

import io
from dataclasses import replace

from rich.console import Console
from simulated_log import Log

from mmoe_rec.evaluation.summary import summarise
from mmoe_rec.report.tables import results_table


def test_three_models_fit_a_narrow_terminal_and_what_one_lacks_is_a_dash(log: Log) -> None:
    summary, one = (summarise(replace(log, tasks=log.tasks[:tasks]).measure(), 50) for tasks in (2, 1))
    table = results_table({"MMoE": summary, "gradient boosting": summary, "popularity": one})
    stream = io.StringIO()
    Console(file=stream, width=80).print(table)
    assert stream.getvalue().count(f"{summary.tasks['bought'].get('auc').value:.4f} ±") == 3
    assert "…" not in stream.getvalue()
    rows = zip(*(column.cells for column in table.columns), strict=True)
    assert [str(cells[3]) for cells in rows if str(cells[0]) == "  auc ↑"][1] == "-"
