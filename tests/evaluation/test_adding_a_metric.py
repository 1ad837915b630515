"""A metric is one class and one line of registration; what it leaves out is told."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from simulated_log import Log, simulate
from sklearn.metrics import brier_score_loss

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation import metrics as registered
from mmoe_rec.evaluation import summary as typed
from mmoe_rec.evaluation.metrics.metric import Metric, Ratio, TaskRows, UserSums
from mmoe_rec.evaluation.metrics.ranking import RankedLists
from mmoe_rec.evaluation.summary import flatten
from mmoe_rec.evaluation.sums import EvaluationSums, close_sums, merge_all
from mmoe_rec.report.documents import summary_tree
from mmoe_rec.report.tables import results_table
from tests.added_package import AddedPackage
from tests.evaluation.trees import find_differences, summarise


class Brier(Ratio[TaskRows]):
    """Mean squared deviation of the probability from the label (Brier, 1950)."""

    name, kinds, better, totals = "brier", ("binary",), "lower", ("squared_deviation", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        return {"squared_deviation": rows.weight * (rows.prediction - rows.label) ** 2}


class LargestError(Metric[TaskRows]):
    """The largest error of any row of the users drawn: a sum that is not added up, a metric of both kinds of task."""

    name, kinds, better, totals = "largest_error", ("binary", "regression"), "lower", ()
    merged = {"largest_deviation": "max"}  # noqa: RUF012

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        return {"largest_deviation": np.abs(rows.prediction - rows.label)}

    def summarise(self, drawn: Any) -> np.ndarray:
        of_user = drawn.sums.column("largest_deviation", absent=0.0)
        return np.where(drawn.counts > 0, of_user[:, None], 0.0).max(axis=0)

    def details(self, sums: UserSums, resamples: int, seed: int) -> dict[str, Any]:
        return {"users_with_errors": int((sums.column("largest_deviation") > 0).sum())}


class FirstIsRelevant(Ratio[RankedLists]):
    """Share of requests whose first row is relevant; undefined where none is."""

    name, kinds, better, totals = "hit", ("score",), "higher", ("hit", "ranked_requests")

    def measure(self, lists: RankedLists) -> dict[str, np.ndarray]:
        first = (lists.position == 0) & (lists.gain > 0)
        return {"hit": np.bincount(lists.request, first, lists.requests)}


BRIER = '''

class Brier(Ratio[TaskRows]):
    """Mean squared deviation of the probability from the label (Brier, 1950)."""

    name, kinds, better, totals = "brier", ("binary",), "lower", ("squared_deviation", "weight")

    def measure(self, rows: TaskRows) -> dict[str, np.ndarray]:
        """`squared_deviation`."""
        return {"squared_deviation": rows.weight * (rows.prediction - rows.label) ** 2}
'''


def test_a_class_and_a_line_are_all_that_is_added(log: Log, tmp_path: Path) -> None:
    """To the package itself, a copy of which measures the log in a process of its own."""
    package = AddedPackage(tmp_path)
    package.add(
        "evaluation/metrics/probability.py",
        BRIER,
        listed_in="evaluation/metrics/__init__.py",
        after="    probability.Logloss(),",
        line="    probability.Brier(),",
    )
    _, label, prediction = log.observed("bought")
    np.savez(tmp_path / "rows.npz", label=label, prediction=prediction)
    printed = package.run("""
import json, numpy as np
from mmoe_rec.evaluation.summary import flatten, summarise
from mmoe_rec.evaluation.sums import MeasuredTask, measure
rows = np.load("rows.npz")
number = np.arange(len(rows["label"]))
sums = measure(
    [MeasuredTask("bought", "binary")],
    users=number // 8, requests=number // 4, score=rows["prediction"],
    predictions={"bought": rows["prediction"]}, labels={"bought": rows["label"]},
)
print(json.dumps(flatten(summarise(sums, 20))))
""")
    found = json.loads(printed)
    assert found["bought.brier"] == pytest.approx(brier_score_loss(label, prediction))
    assert found["bought.brier.low"] < found["bought.brier"] < found["bought.brier.high"]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each."""
    behind = 1 + [metric.name for metric in registered.METRICS].index("calibration")
    before, after = registered.METRICS[:behind], registered.METRICS[behind:]
    monkeypatch.setattr(registered, "METRICS", (*before, Brier(), LargestError(), *after, FirstIsRelevant()))


def weighted(log: Log) -> Log:
    return replace(log, weight=np.random.default_rng(5).uniform(0.5, 20, len(log.score)))


def in_parts(log: Log) -> EvaluationSums:
    """Merged of parts that share users."""
    return merge_all(log.take(np.flatnonzero(log.requests // 1_000_003 % 5 == part)).measure() for part in range(5))


def hit_rate(log: Log) -> float:
    """By a loop over requests."""
    gain = sum(task.weight * np.maximum(np.nan_to_num(log.labels[task.name]), 0) for task in log.tasks)
    hits = []
    for request in np.unique(log.requests):
        mine = log.requests == request
        if len(set(gain[mine])) > 1:
            hits.append(gain[mine][np.argmax(log.score[mine])] > 0)
    return float(np.mean(hits))


@pytest.mark.usefixtures("toys")
def test_a_metric_is_in_summary_json_mlflow_and_table(log: Log, tmp_path: Path) -> None:
    log = weighted(log)
    in_parts(log).save(tmp_path / "sums")
    whole = typed.summarise(EvaluationSums.load(tmp_path / "sums"), resamples=200)
    summary = json.loads(json.dumps(summary_tree(whole), allow_nan=False))
    stream = io.StringIO()
    Console(file=stream, width=200).print(results_table({"model": whole}))
    lines = [line.strip("│ ") for line in stream.getvalue().splitlines()]
    for task in ("bought", "liked"):
        rows, label, prediction = log.observed(task)
        found = summary["tasks"][task]["brier"]
        assert found["value"] == pytest.approx(brier_score_loss(label, prediction, sample_weight=log.weight[rows]))
        assert found["low"] < found["value"] < found["high"]
        assert flatten(whole)[f"{task}.brier"] == found["value"]
        assert flatten(whole)[f"{task}.brier.high"] == found["high"]
        (line,) = (line for line in lines if line.startswith("brier ↓") and f"{found['value']:.4f} ±" in line)
        assert f"{(found['high'] - found['low']) / 2:.4f}" in line
    for task in ("bought", "spent"):
        _, label, prediction = log.observed(task)
        assert summary["tasks"][task]["largest_error"]["value"] == pytest.approx(np.abs(prediction - label).max())
        assert summary["tasks"][task]["users_with_errors"] == len(np.unique(log.users[log.observed(task)[0]]))
    assert summary["score"]["hit"]["value"] == pytest.approx(hit_rate(log))
    assert "brier" not in summary["tasks"]["spent"]
    shown = [line.split()[0] for line in lines if "±" in line]
    assert shown[shown.index("calibration") + 1 : shown.index("calibration") + 3] == ["brier", "largest_error"]
    assert [line for line in lines if line.startswith("hit ↑")]


@pytest.mark.usefixtures("toys")
def test_a_metric_is_compared_and_the_better_model_is_marked(log: Log) -> None:
    other = replace(log, predictions=log.predictions | {"bought": 0.5 * log.predictions["bought"]})
    a, b = log.measure(), other.measure()
    summaries = {"a": typed.summarise(a, 20), "b": typed.summarise(b, 20)}
    found = find_differences({"a": close_sums(a), "b": close_sums(b)}, "a", resamples=20)["against"]["b"]["groups"]
    difference = found["bought"]["brier"]["value"]
    first, second = (each.tasks["bought"].get("brier").value for each in summaries.values())
    assert difference == pytest.approx(first - second)
    table = results_table(summaries)
    row = [str(cell) for cell in table.columns[0].cells].index("  brier ↓")
    styles = [list(column.cells)[row].style for column in table.columns[1:]]
    assert styles == (["bold", ""] if first < second else ["", "bold"])


@pytest.mark.usefixtures("toys")
def test_an_undefined_metric_has_a_note(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Brier, "summarise", lambda self, drawn: np.full(drawn.counts.shape[1], np.nan))
    summary = summarise(log.measure(), 5)
    assert summary["tasks"]["bought"]["brier"]["value"] is None
    assert "brier is undefined." in summary["tasks"]["bought"]["note"]
    monkeypatch.setattr(Brier, "has_interval", False)
    summary = summarise(log.measure(), 5)
    assert summary["tasks"]["bought"]["brier"] is None
    assert "brier is undefined." in summary["tasks"]["bought"]["note"]
    assert "bought.brier" not in flatten(typed.summarise(log.measure(), 5))


def test_sums_of_a_version_without_the_metric_are_told_of(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    before = log.measure()
    monkeypatch.setattr(registered, "METRICS", (*registered.METRICS, LargestError(), Brier()))
    before = before.merge(before)
    with pytest.raises(UserError, match=r"hold no 'squared_deviation'.*evaluate again"):
        summarise(before, 5)
    with pytest.raises(
        UserError, match=r"different metrics: only one side has \['largest_deviation', 'squared_deviation'\]"
    ):
        before.merge(log.measure())


def test_sums_with_their_columns_in_another_order_merge(log: Log) -> None:
    sums = log.measure()
    turned = replace(
        sums, tables={name: table.select(sorted(table.column_names)) for name, table in sums.tables.items()}
    )
    rest = simulate(seed=8).measure()
    assert rest.merge(turned) == rest.merge(sums)
    assert flatten(typed.summarise(turned, 5)) == pytest.approx(flatten(typed.summarise(sums, 5)))


@pytest.mark.parametrize("left_out", ["name", "kinds", "better", "totals"])
def test_a_metric_that_does_not_say_all_cannot_be_registered(left_out: str) -> None:
    said = {"name": "toy", "kinds": ("binary",), "better": "lower", "totals": ("weight",)}
    del said[left_out]
    toy = type("Toy", (Metric,), {**said, "summarise": lambda self, drawn: drawn["weight"]})
    with pytest.raises(TypeError, match=f"metric Toy does not say: {left_out}"):
        toy()


def test_sums_that_nobody_or_two_metrics_measure_are_named(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = type("Forgetful", (Ratio,), {**vars(Brier), "measure": Metric.measure})
    monkeypatch.setattr(registered, "METRICS", (*registered.METRICS, forgetful()))
    with pytest.raises(ValueError, match=r"metric 'brier' reads \['squared_deviation'\], which no metric measures"):
        log.measure()
    for taken in ("logloss", "rows"):
        twice = type("Twice", (Brier,), {"measure": lambda self, rows, taken=taken: {taken: rows.weight}})
        monkeypatch.setattr(registered, "METRICS", (*registered.METRICS[:-1], twice()))
        with pytest.raises(ValueError, match=f"metric 'brier' measures .*{taken}"):
            log.measure()


def test_registered_metrics_have_names_of_their_own_and_say_which_way_is_better() -> None:
    for kind in ("binary", "regression", "score"):
        names = [metric.name for metric in registered.metrics_of(kind)]
        assert len(names) == len(set(names)) > 0
    for metric in registered.METRICS:
        assert set(metric.kinds) <= {"binary", "regression", "score"}
        assert metric.better in ("higher", "lower", "one")
