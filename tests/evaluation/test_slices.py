"""Slices against the metrics of their own rows, and planted ones that are worse."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import ttest_1samp
from simulated_log import Log, simulate
from sklearn.metrics import roc_auc_score

from mmoe_rec.auc import MIN_RARER_ROWS
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.intervals import effective_sample_size
from mmoe_rec.evaluation.messages import describe_slices
from mmoe_rec.evaluation.slices import (
    ALL_ROWS,
    MISSING,
    SliceRecord,
    SliceSpec,
    _read_slices,
    compare_slices,
    sort_worst_first,
)
from mmoe_rec.evaluation.summary import MeasuredModel, summarize
from mmoe_rec.log.columns import combine_hashes, hash_column
from mmoe_rec.log.reader import Log as LogFiles
from mmoe_rec.settings.sections import Evaluation
from tests.log.small_logs import random_log, schema_of, with_column, write_log


def model(log: Log, of_rows: np.ndarray) -> MeasuredModel:
    sums = log.measure()
    grouped = sums.users > len(sums.tables["ranking"])
    slices = {
        ("kind", str(item)): log.take(np.flatnonzero(of_rows == item)).measure(grouped=grouped)
        for item in np.unique(of_rows)
    }
    return MeasuredModel(sums, summarize(sums, 1), slices=slices)


@pytest.fixture
def log() -> Log:
    return simulate(seed=7, users=400, requests=1500)


def test_slices_have_the_metrics_of_their_rows(log: Log) -> None:
    of_rows = log.users % 3
    records = compare_slices({"ours": model(log, of_rows)}, "ours", 100)
    whole = roc_auc_score(log.labels["bought"], log.predictions["bought"])
    for kind in range(3):
        (actual,) = (
            record for record in records if (record.slice, record.group, record.metric) == (str(kind), "bought", "auc")
        )
        mine = of_rows == kind
        expected = roc_auc_score(log.labels["bought"][mine], log.predictions["bought"][mine])
        assert actual.value == pytest.approx(expected)
        assert actual.difference == pytest.approx(expected - whole)
        assert actual.rows == mine.sum()
        assert actual.labels == min(log.labels["bought"][mine].sum(), (1 - log.labels["bought"][mine]).sum())
        assert actual.low < actual.difference < actual.high
        assert actual.compared_to == ALL_ROWS
        assert actual.p_value <= actual.corrected_p_value


def test_a_bucket_holds_its_largest_number() -> None:
    values = pa.array([1.0, 2.0, None, 3.0, 4.0])
    actual = SliceSpec("bucket(price, 2)", "price", 2).find_slices(values)
    rows = {name: numbers.tolist() for name, numbers in actual.items()}
    assert rows == {"[1, 2]": [0, 1], "(2, 4]": [3, 4], MISSING: [2]}


def test_a_slice_that_is_worse_comes_first_and_others_are_not_called_so(log: Log) -> None:
    of_rows = np.random.default_rng(1).integers(8, size=400)[log.users + 200]
    noise = np.random.default_rng(2).random(len(log.score))
    wrong = np.where(of_rows == 5, noise, log.predictions["bought"])
    records = compare_slices({"ours": model(log.with_predictions(bought=wrong), of_rows)}, "ours", 200)
    shown = [record for record in records if record.metric == "auc" and (record.corrected_p_value or 1) < 0.05]
    assert [(item.slice, item.group) for item in shown] == [("5", "bought")]
    assert sort_worst_first(records)[0] == shown[0]


def test_an_outcome_that_the_first_model_lacks_is_not_compared(log: Log) -> None:
    labels, predictions = (values | {"both": values["bought"]} for values in (log.labels, log.predictions))
    bought = next(task for task in log.tasks if task.name == "bought")
    tasks = (*log.tasks, replace(bought, name="both"))
    more = replace(log, tasks=tasks, labels=labels, predictions=predictions)
    of_rows = (log.users % 2).astype(str)
    records = compare_slices({"new": model(log, of_rows), "old": model(more, of_rows)}, "new", 50)
    assert records
    assert "both" not in {record.group for record in records}


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.4])
def test_a_loss_beyond_the_margin_is_tested_as_by_scipy(margin: float) -> None:
    """By both tails, so it is twice the p-value of a test against the margin."""
    values = np.random.default_rng(0).normal(-0.2, 0.3, size=7)
    error = float(values.std(ddof=1) / np.sqrt(7))
    record = SliceRecord("a", "b", "it", "auc", 9, 99, None, 0.5, "old", values.mean(), 0.0, 0.0, error, 6.0, 0.1)
    expected = 2 * ttest_1samp(values, -margin, alternative="less").pvalue
    assert record.loss_p_value(margin) == pytest.approx(expected, rel=1e-9)
    for unknown in ("difference", "standard_error", "degrees_of_freedom"):
        assert replace(record, **{unknown: None}).loss_p_value(margin) == 1
    assert replace(record, standard_error=0.0).loss_p_value(margin) == 1


@pytest.mark.parametrize(
    ("metric", "value", "separate", "p", "is_worse"),
    [
        ("auc", 0.7, -0.1, 0.049, True),
        ("auc", 0.7, -0.1, 0.05, False),
        ("auc", 0.7, 0.1, 0.01, False),
        ("calibration", 1.5, 0.2, 0.01, True),  # from 1.3
        ("calibration", 0.6, -0.2, 0.01, True),  # from 0.8
        ("calibration", 0.6, -1.0, 0.01, True),  # from 1.6, which is 1 / 0.625
        ("calibration", 0.65, -0.95, 0.01, False),
        ("calibration", 0.9, 0.2, 0.01, False),  # from 0.7
    ],
)
def test_what_is_worse_is_lower_or_further_off(
    metric: str, value: float, separate: float, p: float, is_worse: bool
) -> None:
    record = SliceRecord("a", "b", "it", metric, 9, 99, None, value, "old", separate, 0.0, 0.0, 0.1, 7.0, 0.001, p)
    assert record.is_worse == is_worse


def test_the_worst_come_first() -> None:
    """Beside other models before all rows, and probabilities by how far they are off."""
    lost = SliceRecord("a", "b", "it", "auc", 9, 99, None, 0.6, ALL_ROWS, -0.1, 0.0, 0.0, 0.1, 7.0, 0.001, 0.001)
    off = replace(lost, metric="calibration", value=1.5, difference=0.3)
    expected = [
        replace(lost, compared_to="old", difference=-0.02),
        replace(lost, compared_to="old", difference=-0.01),
        replace(lost, difference=-0.2),
        lost,
        replace(off, value=0.5, difference=-0.4),
        off,
        replace(lost, difference=0.1),
        replace(lost, difference=0.3),
    ]
    assert sort_worst_first([expected[number] for number in (5, 3, 6, 1, 4, 2, 7, 0)]) == expected


def test_slices_of_other_rows_and_of_one_user_are_not_compared(log: Log) -> None:
    """Beside a model whose slices hold other rows; and a user alone says nothing of others."""
    rows = np.repeat(np.arange(len(log.score)), np.where(log.users == log.users[0], 9, 1))
    log = log.with_labels(bought=np.arange(len(log.score)) % 2.0).take(rows)
    mine = np.where(log.users == log.users[0], "one", np.where(log.users % 2 == 0, "even", "odd"))
    theirs = np.where((mine == "odd") & (log.users == log.users[mine == "odd"][0]), "even", mine)
    records = compare_slices({"new": model(log, mine), "old": model(log, theirs)}, "new", 100)
    actual = {
        (record.slice, record.compared_to): record
        for record in records
        if (record.group, record.metric) == ("bought", "auc")
    }
    assert actual.keys() == {(name, ALL_ROWS) for name in ("one", "even", "odd")} | {("one", "old")}
    for compared_to in (ALL_ROWS, "old"):
        assert actual["one", compared_to].labels >= 50
        assert actual["one", compared_to].difference is not None
        assert actual["one", compared_to].standard_error is actual["one", compared_to].p_value is None
    assert actual["even", ALL_ROWS].standard_error > 0


def test_slices_redraw_the_same_users_as_all_rows(log: Log) -> None:
    """By the error of a plain bootstrap. A user with most rows, and the mean ratio, counts by Kish's number."""
    place = np.unique(log.users, return_inverse=True)[1]
    rows = np.repeat(np.arange(len(place)), np.where(place == place.max(), 90, 1))
    log, place = log.take(rows), place[rows]
    heavy, labels = place == place.max(), log.labels["bought"]
    others = log.predictions["bought"] * labels[~heavy].sum() / log.predictions["bought"][~heavy].sum()
    log = log.with_predictions(bought=np.where(heavy, labels[heavy].mean(), np.minimum(others, 1)))
    records = compare_slices({"ours": model(log, np.where(place < 100, "early", "late"))}, "ours", 200)
    record = next(item for item in records if (item.slice, item.metric) == ("late", "calibration"))
    sums = [np.bincount(place, item) for item in (log.predictions["bought"], labels)]
    random, redrawn, parts = np.random.default_rng(1), [], (slice(None), slice(100, None))
    for _ in range(400):
        counts = np.bincount(random.integers(len(sums[0]), size=len(sums[0])), minlength=len(sums[0]))
        of_all, of_late = ((counts[users] @ sums[0][users]) / (counts[users] @ sums[1][users]) for users in parts)
        redrawn.append(of_late - of_all)
    sizes = (labels, 1 - labels, np.ones(len(labels)))
    effective = min(effective_sample_size(np.bincount(place, size)[100:]) for size in sizes)
    assert record.degrees_of_freedom + 1 == pytest.approx(effective)
    expected = np.std(redrawn) * np.sqrt(effective / (effective - 1))
    assert record.standard_error == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("rarer", [MIN_RARER_ROWS - 1, MIN_RARER_ROWS])
def test_slices_with_fifty_rows_of_the_rarer_label_are_judged(log: Log, rarer: int) -> None:
    given = np.where(np.cumsum(log.users % 2 == 0) <= rarer, 1.0, 0.0) * (log.users % 2 == 0)
    records = compare_slices({"ours": model(log.with_labels(bought=given), log.users % 2)}, "ours", 20)
    (actual,) = (record for record in records if (record.slice, record.group, record.metric) == ("0", "bought", "auc"))
    assert actual.labels == rarer
    assert (
        (actual.value is None)
        == (actual.difference is None)
        == (actual.corrected_p_value is None)
        == (rarer < MIN_RARER_ROWS)
    )


def test_few_requests_are_counted_and_not_judged(log: Log) -> None:
    of_requests = np.where(np.isin(log.requests, np.unique(log.requests)[:40]), "few", "many")
    records = compare_slices({"ours": model(log, of_requests)}, "ours", 50)
    (actual,) = (record for record in records if (record.slice, record.group) == ("few", "score"))
    assert actual.requests <= 40
    assert actual.value is actual.difference is None


def test_groups_of_users_are_redrawn_alike(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [item.value for item in compare_slices({"ours": model(log, log.users % 3)}, "ours", 20)]
    monkeypatch.setattr("mmoe_rec.evaluation.sums.MAX_BOOTSTRAP_UNITS", 64)
    grouped = model(log, log.users % 3)
    assert len(grouped.sums.tables["ranking"]) <= 64
    actual = [item.value for item in compare_slices({"ours": grouped}, "ours", 100)]
    assert actual == pytest.approx(expected, nan_ok=True)


def test_lists_that_slices_cut_are_not_compared_with_whole_ones(log: Log) -> None:
    """A column of noise: parts of lists are ranked better by chance alone, as they are shorter."""
    noise = np.random.default_rng(5).integers(3, size=len(log.score))
    records = compare_slices({"ours": model(log, noise)}, "ours", 100)
    ranked = [record for record in records if record.metric == "ndcg_at_10"]
    assert len(ranked) >= 3
    for item in ranked:
        assert item.value > 0
        assert item.requests >= 50
        assert item.difference is item.corrected_p_value is None
    whole = compare_slices({"ours": model(log, log.users % 3)}, "ours", 100)
    assert all(item.difference is not None for item in whole if item.metric == "ndcg_at_10")
    two = compare_slices({"ours": model(log, noise), "old": model(log, noise)}, "ours", 100)
    compared_to = [item for item in two if item.metric == "ndcg_at_10"]
    assert {item.compared_to for item in compared_to} == {"old"}
    assert all(item.difference == 0 for item in compared_to)


def test_probabilities_that_are_off_in_a_slice_are_reported(log: Log) -> None:
    of_rows = (log.users % 4).astype(str)
    doubled = np.where(of_rows == "2", np.clip(2.5 * log.predictions["bought"], 0, 1), log.predictions["bought"])
    models = {"ours": model(log.with_predictions(bought=doubled), of_rows)}
    records = compare_slices(models, "ours", 200)
    shown = [item for item in sort_worst_first(records) if item.metric == "calibration"]
    assert ("2", "bought") in {(item.slice, item.group) for item in shown}
    message = list(describe_slices(records))
    assert any(item.startswith("slice kind: 2 (") and "calibration of bought is" in item for item in message)


@pytest.mark.parametrize(("guarded", "kind"), [(None, "blocked"), ((), "better"), (("kind",), "blocked")])
def test_a_model_that_fails_in_one_slice_is_not_called_better(log: Log, guarded, kind: str) -> None:
    """It is far better in the others, and for each task."""
    random, of_rows = np.random.default_rng(4), (log.users % 5).astype(str)
    noisy = 1 / (1 + np.exp(-np.log(log.predictions["spent"]) - 2.5 * random.normal(size=len(log.score))))
    spoilt = np.where(of_rows == "3", random.permutation(noisy), log.predictions["bought"])
    models = {
        name: model(log.with_predictions(bought=item), of_rows) for name, item in (("new", spoilt), ("old", noisy))
    }
    rules = Evaluation(resamples=200, max_calibration_ratio=9, slices=("kind",), guardrail_slices=guarded)
    results = Results(models, ("bought",), rules, "", {})
    assert results.comparison.verdicts["old"].kind == kind
    message = results.comparison.verdicts["old"].message
    assert ("slice kind: 3 (" in message) == (kind != "better")
    with pytest.raises(UserError, match=r"guardrail_slices names 'kin', and rows are sliced by: kind"):
        _ = replace(results, rules=Evaluation(slices=("kin",), guardrail_slices=("kin",))).comparison


@pytest.mark.parametrize("again", [False, True])
def test_candidates_that_a_request_holds_twice_keep_their_slices(tmp_path: Path, again: bool) -> None:
    """A file that is there a second time adds no row, and a candidate at two places is in the slices of both."""
    schema = schema_of({"price": {"kind": "numeric", "column": "price"}})
    table = random_log(0, rows=60)
    table = with_column(pa.concat_tables([table, table]), "slot", [1] * 60 + [2] * 60)
    first = table.slice(0, 60)
    folder = write_log(tmp_path / "log", *([first, first.take(list(range(59, -1, -1)))] if again else [table]))
    log = LogFiles(str(folder), schema, extra_columns={"slot": "any"})
    keys = [
        combine_hashes([hash_column(item.requests()), item.hashes(["item"])])
        for part in log.parts()
        for item in log.reader.read(part)
    ]
    wanted = np.sort(np.concatenate(keys)[: 60 if again else None])
    actual = _read_slices(log, [SliceSpec("slot", "slot", None)], wanted, False)["slot"]
    assert {name: len(numbers) for name, numbers in actual.items()} == ({"1": 60} if again else {"1": 60, "2": 60})
