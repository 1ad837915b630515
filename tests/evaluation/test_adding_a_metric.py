"""A metric is one class and one line of registration; what it leaves out is told."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from simulated_log import Log
from sklearn.metrics import brier_score_loss

from mmoe_rec.evaluation import metrics as registered
from mmoe_rec.evaluation.metrics.metric import Metric, Ratio, TaskRows
from mmoe_rec.evaluation.results_report import metrics_table, summary_to_dict
from mmoe_rec.evaluation.summary import flatten, summarize
from mmoe_rec.report.parts import to_rich
from tests.evaluation.trees import compare


class Brier(Ratio[TaskRows]):
    """Mean squared deviation of the probability from the label (Brier, 1950)."""

    name, kinds, better, required_sums = "brier", ("binary",), "lower", ("squared_deviation", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        return {"squared_deviation": rows.weight * (rows.prediction - rows.label) ** 2}


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = 1 + [metric.name for metric in registered.METRICS].index("calibration")
    before, after = registered.METRICS[:behind], registered.METRICS[behind:]
    monkeypatch.setattr(registered, "METRICS", (*before, Brier(), *after))


@pytest.mark.usefixtures("toys")
def test_a_metric_is_in_summary_json_mlflow_and_table(log: Log) -> None:
    log = replace(log, weight=np.random.default_rng(5).uniform(0.5, 20, len(log.score)))
    whole = summarize(log.measure(), resamples=200)
    summary = json.loads(json.dumps(summary_to_dict(whole), allow_nan=False))
    stream = io.StringIO()
    Console(file=stream, width=200).print(to_rich(metrics_table({"model": whole})))
    lines = [line.strip("│ ") for line in stream.getvalue().splitlines()]
    for task in ("bought", "liked"):
        rows, label, prediction = log.observed(task)
        actual = summary["tasks"][task]["brier"]
        assert actual["value"] == pytest.approx(brier_score_loss(label, prediction, sample_weight=log.weight[rows]))
        assert actual["low"] < actual["value"] < actual["high"]
        assert flatten(whole)[f"{task}.brier"] == actual["value"]
        assert flatten(whole)[f"{task}.brier.high"] == actual["high"]
        (line,) = (line for line in lines if line.startswith("brier ↓") and f"{actual['value']:.4f} ±" in line)
        assert f"{(actual['high'] - actual['low']) / 2:.4f}" in line
    assert "brier" not in summary["tasks"]["spent"]
    shown = [line.split()[0] for line in lines if "±" in line]
    assert shown[shown.index("calibration") + 1] == "brier"


@pytest.mark.usefixtures("toys")
def test_a_metric_is_compared_and_the_better_model_is_marked(log: Log) -> None:
    right = log.with_predictions(bought=0.5 * log.predictions["bought"])
    sums = {"a": log.measure(), "b": right.measure()}
    summaries = {name: summarize(item, 20) for name, item in sums.items()}
    difference = compare(sums, "a")["against"]["b"]["groups"]["bought"]["brier"]["value"]
    first, second = (summary.tasks["bought"].get("brier").value for summary in summaries.values())
    assert difference == pytest.approx(first - second)
    row = next(row for row in metrics_table(summaries).rows if row[0] == "brier ↓")
    assert [cell.mark for cell in row[1:]] == (["best", ""] if first < second else ["", "best"])


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("has_interval", [True, False])
def test_an_undefined_metric_has_a_note(log: Log, has_interval: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Brier, "summarize", lambda self, resamples: np.full(resamples.counts.shape[1], np.nan))
    monkeypatch.setattr(Brier, "has_interval", has_interval)
    actual = summarize(log.measure(), 5)
    bought = summary_to_dict(actual)["tasks"]["bought"]
    assert (bought["brier"]["value"] if has_interval else bought["brier"]) is None
    assert "brier is undefined: " in bought["note"]
    assert "bought.brier" not in flatten(actual)


def test_sums_that_nobody_or_two_metrics_measure_are_named(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = type("Forgetful", (Brier,), {"measure": Metric.measure})
    monkeypatch.setattr(registered, "METRICS", (*registered.METRICS, forgetful()))
    with pytest.raises(ValueError, match="a metric reads 'squared_deviation', which no metric measures"):
        summarize(log.measure(), 5)
    for taken in ("logloss", "rows"):
        twice = type("Twice", (Brier,), {"measure": lambda self, rows, taken=taken: {taken: rows.weight}})
        monkeypatch.setattr(registered, "METRICS", (*registered.METRICS[:-1], twice()))
        with pytest.raises(ValueError, match=f"metric 'brier' measures .*{taken}"):
            log.measure()
