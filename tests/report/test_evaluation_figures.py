"""The numbers in figures and tables of an evaluation are those of the summary."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from mmoe_rec.evaluation.results_report import calibration_figure, gate_weights_figure, metrics_of_models
from mmoe_rec.evaluation.summary import summarise
from mmoe_rec.report.parts import to_rich
from tests.evaluation.simulated_log import Log, simulate


@pytest.fixture
def log() -> Log:
    return simulate(seed=0)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_calibration_figure_draws_the_bins(log: Log, scale: float) -> None:
    log = log.with_predictions(bought=scale * log.predictions["bought"])
    summary = summarise(log.measure(), 50)
    figure = calibration_figure(summary, "bought")
    figure.canvas.draw()
    points = figure.axes[0].containers[0].lines[0].get_xydata()
    bins = summary.tasks["bought"].details["calibration_bins"]
    np.testing.assert_allclose(points, [[row["mean_predicted"], row["observed_rate"]] for row in bins])
    ratio = figure.axes[1].containers[0].lines[0].get_ydata()
    np.testing.assert_allclose(ratio, [row["observed_rate"] / row["mean_predicted"] for row in bins])


def test_a_prediction_of_0_has_no_ratio(log: Log) -> None:
    log = log.with_predictions(bought=np.where(log.predictions["bought"] < 0.5, 0.0, 0.7))
    ratio = calibration_figure(summarise(log.measure(), 20), "bought").axes[1].containers[0].lines[0].get_ydata()
    assert np.isnan(ratio).tolist() == [True, False]


def test_gate_weights_figure_writes_every_weight() -> None:
    figure = gate_weights_figure({"bought": np.array([0.25, 0.75, np.nan]), "liked": np.array([0.1, np.nan, 0.9])})
    figure.canvas.draw()
    axes = figure.axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "0.25", (1, 0): "0.75", (0, 1): "0.10", (2, 1): "0.90"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["bought", "liked"]


def test_three_models_fit_a_narrow_terminal_and_what_one_lacks_is_a_dash(log: Log) -> None:
    summary, one = (summarise(replace(log, tasks=log.tasks[:tasks]).measure(), 50) for tasks in (2, 1))
    table = metrics_of_models({"MMoE": summary, "gradient boosting": summary, "popularity": one})
    stream = io.StringIO()
    Console(file=stream, width=80).print(to_rich(table))
    assert stream.getvalue().count(f"{summary.tasks['bought'].get('auc').value:.4f} ±") == 3
    assert "…" not in stream.getvalue()
    assert [row[3].text for row in table.rows if row[0] == "auc ↑"][1] == "-"
