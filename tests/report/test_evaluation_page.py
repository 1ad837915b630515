"""The page of an evaluation: what it says first, what it draws, and what files hold it."""

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.results_report import (
    calibration_figure,
    gate_weights_figure,
    make_report,
    metrics_table,
    write_results,
)
from mmoe_rec.evaluation.summary import summarize
from mmoe_rec.report.parts import to_rich
from mmoe_rec.report.report_files import to_html
from tests.evaluation.simulated_log import simulate
from tests.report.evaluations import evaluation
from tests.report.parsed import Page


@pytest.fixture(scope="module")
def results() -> Results:
    return evaluation()


def said(results: Results) -> str:
    return " ".join(Page(to_html(make_report(results))).words.split())


def test_the_verdict_comes_first_and_values_stand_with_intervals(results: Results) -> None:
    words, compared = said(results), results.comparison
    assert compared is not None
    verdict = compared.verdicts["old"].message
    assert words.index(verdict[0].upper() + verdict[1:]) < words.index("auc ↑")
    assert words.index("'old': the model was trained on rows of 'old'.") < words.index("auc ↑")
    for summary in results.summaries.values():
        auc = summary.tasks["bought"].get("auc")
        assert f"{auc.value:.4f}±{(auc.high - auc.low) / 2:.4f}" in words
    assert f"{compared.differences['old'].groups['bought']['auc'].value:+.4f}" in words
    for name in ("bought: 3,600 rows", "mrr ↑", "catalog"):
        assert name in words
    assert words.index("kind: few & far") < words.index("kind: many"), "a slice that is worse stands first"


def test_guardrails_and_marks(results: Results) -> None:
    report = make_report(results)
    assert report.mark == "problem"
    assert {sentence.label for sentence in report.sentences if sentence.page_only} == {"pass", "fail"}
    slices = next(table for table in report.tables if table.title == "Slices")
    marks = {row[0]: row[-1].mark for row in slices.rows if row[2] == "auc"}
    assert marks["kind: few & far"] == "problem"
    for name, figure in zip(("new", "old"), report.figures, strict=True):
        assert f'aria-label="predicted against observed probabilities of bought by {name}"' in figure.svg


def test_one_model_alone_has_no_verdict(results: Results) -> None:
    report = make_report(replace(results, models={"new": replace(results.first, slices={})}))
    auc = results.first.summary.tasks["bought"].get("auc")
    assert report.headline.startswith(f"bought: auc {auc.value:.4f} (")
    assert [table.title for table in report.tables] == ["Metrics"]
    assert report.mark == "good"


def test_its_figures_are_in_files_too(results: Results, tmp_path: Path) -> None:
    write_results(results, tmp_path)
    assert pq.read_table(tmp_path / "slices.parquet").num_rows == len(results.slices)
    auc = asdict(results.summaries["old"].tasks["bought"].get("auc"))
    tree = json.loads((tmp_path / "metrics.json").read_text())
    assert tree["against"]["old"]["tasks"]["bought"]["auc"] == auc
    compared = results.comparison
    assert compared is not None
    separate = tree["comparison"]["against"]["old"]
    assert separate["groups"]["score"]["mrr"]["p_value"] == compared.differences["old"].groups["score"]["mrr"].p_value
    assert separate["objective"] == asdict(compared.differences["old"].objective)
    verdict = compared.verdicts["old"]
    assert separate["verdict"]["kind"] == verdict.kind
    assert [guardrail["passed"] for guardrail in separate["verdict"]["guardrails"]] == [
        guardrail.passed for guardrail in verdict.guardrails
    ]
    write_results(replace(results, models={"new": replace(results.first, slices={})}), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "report.json", "report.html"}


# Numbers in figures and tables are those of the summary.


LOG = simulate(seed=0)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_calibration_figure_draws_the_bins(scale: float) -> None:
    log = LOG.with_predictions(bought=scale * LOG.predictions["bought"])
    summary = summarize(log.measure(), 50)
    figure = calibration_figure(summary, "bought")
    figure.canvas.draw()
    points = figure.axes[0].containers[0].lines[0].get_xydata()
    bins = summary.tasks["bought"].details["calibration_bins"]
    np.testing.assert_allclose(points, [[row["mean_predicted"], row["observed_rate"]] for row in bins])
    ratio = figure.axes[1].containers[0].lines[0].get_ydata()
    np.testing.assert_allclose(ratio, [row["observed_rate"] / row["mean_predicted"] for row in bins])


def test_a_prediction_of_0_has_no_ratio() -> None:
    log = LOG.with_predictions(bought=np.where(LOG.predictions["bought"] < 0.5, 0.0, 0.7))
    ratio = calibration_figure(summarize(log.measure(), 20), "bought").axes[1].containers[0].lines[0].get_ydata()
    assert np.isnan(ratio).tolist() == [True, False]


def test_gate_weights_figure_writes_every_weight() -> None:
    figure = gate_weights_figure({"bought": np.array([0.25, 0.75, np.nan]), "liked": np.array([0.1, np.nan, 0.9])})
    figure.canvas.draw()
    axes = figure.axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "0.25", (1, 0): "0.75", (0, 1): "0.10", (2, 1): "0.90"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["bought", "liked"]


def test_three_models_fit_a_narrow_terminal_and_what_one_lacks_is_a_dash() -> None:
    summary, first = (summarize(replace(LOG, tasks=LOG.tasks[:tasks]).measure(), 50) for tasks in (2, 1))
    table = metrics_table({"MMoE": summary, "gradient boosting": summary, "popularity": first})
    stream = io.StringIO()
    Console(file=stream, width=80).print(to_rich(table))
    assert stream.getvalue().count(f"{summary.tasks['bought'].get('auc').value:.4f} ±") == 3
    assert "…" not in stream.getvalue()
    assert [row[3].text for row in table.rows if row[0] == "auc ↑"][1] == "-"
