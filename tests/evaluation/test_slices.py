"""Slices against the metrics of their own rows, and planted ones that are worse."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from simulated_log import Log, simulate
from sklearn.metrics import roc_auc_score

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.slices import ALL, MISSING, SliceBy, compare_slices, sort_worst_first
from mmoe_rec.evaluation.summary import MeasuredModel, summarise
from mmoe_rec.report.sentences import describe_slices, describe_verdict
from mmoe_rec.settings.sections import Evaluation


def model(log: Log, of_rows: np.ndarray) -> MeasuredModel:
    sums = log.measure()
    grouped = sums.users > len(sums.tables["ranking"])
    slices = {
        ("kind", str(each)): log.take(np.flatnonzero(of_rows == each)).measure(grouped=grouped)
        for each in np.unique(of_rows)
    }
    return MeasuredModel(sums, summarise(sums, 1), slices=slices)


@pytest.fixture
def log() -> Log:
    return simulate(seed=7, users=400, requests=1500)


def test_slices_have_the_metrics_of_their_rows(log: Log) -> None:
    of_rows = log.users % 3
    records = compare_slices({"ours": model(log, of_rows)}, "ours", 100)
    whole = roc_auc_score(log.labels["bought"], log.predictions["bought"])
    for kind in range(3):
        (found,) = (each for each in records if (each.slice, each.group, each.metric) == (str(kind), "bought", "auc"))
        mine = of_rows == kind
        expected = roc_auc_score(log.labels["bought"][mine], log.predictions["bought"][mine])
        assert found.value == pytest.approx(expected)
        assert found.apart == pytest.approx(expected - whole)
        assert found.rows == mine.sum()
        assert found.labels == min(log.labels["bought"][mine].sum(), (1 - log.labels["bought"][mine]).sum())
        assert found.low < found.apart < found.high
        assert found.beside == ALL
        assert found.p <= found.p_corrected


def test_a_bucket_holds_its_largest_number() -> None:
    values = pa.array([1.0, 2.0, None, 3.0, 4.0])
    found = SliceBy("bucket(price, 2)", "price", 2).find_slices(values)
    rows = {name: numbers.tolist() for name, numbers in found.rows(values).items()}
    assert rows == {"[1, 2]": [0, 1], "(2, 4]": [3, 4], MISSING: [2]}


def test_a_slice_that_is_worse_comes_first_and_others_are_not_called_so(log: Log) -> None:
    of_rows = np.random.default_rng(1).integers(8, size=400)[log.users + 200]
    noise = np.random.default_rng(2).random(len(log.score))
    wrong = np.where(of_rows == 5, noise, log.predictions["bought"])
    records = compare_slices({"ours": model(log.with_predictions(bought=wrong), of_rows)}, "ours", 200)
    shown = [each for each in records if each.metric == "auc" and (each.p_corrected or 1) < 0.05]
    assert [(each.slice, each.group) for each in shown] == [("5", "bought")]
    assert sort_worst_first(records)[0] == shown[0]


def test_models_are_compared_within_slices(log: Log) -> None:
    of_rows = (log.users % 2).astype(str)
    noise = np.random.default_rng(3).random(len(log.score))
    worse = log.with_predictions(bought=np.where(of_rows == "1", noise, log.predictions["bought"]))
    models = {"new": model(worse, of_rows), "old": model(log, of_rows)}
    records = compare_slices(models, "new", 200)
    apart = {each.slice: each for each in records if (each.group, each.metric, each.beside) == ("bought", "auc", "old")}
    assert apart["0"].apart == 0
    assert apart["0"].p_corrected == 1
    assert apart["1"].apart < -0.1
    assert apart["1"].p_corrected < 0.01


def test_few_labels_or_requests_are_counted_and_not_judged(log: Log) -> None:
    of_rows = np.where(np.arange(len(log.score)) < 40, "few", "many")
    records = compare_slices({"ours": model(log, of_rows)}, "ours", 50)
    few = [each for each in records if each.slice == "few" and each.group == "bought"]
    assert few
    for each in few:
        assert each.labels < 50
        assert each.rows == 40
        assert each.value is each.apart is each.p is each.p_corrected is None
    of_requests = np.where(np.isin(log.requests, np.unique(log.requests)[:40]), "few", "many")
    records = compare_slices({"ours": model(log, of_requests)}, "ours", 50)
    (found,) = (each for each in records if (each.slice, each.group) == ("few", "score"))
    assert found.requests <= 40
    assert found.value is found.apart is None


def test_groups_of_users_are_redrawn_alike(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [each.value for each in compare_slices({"ours": model(log, log.users % 3)}, "ours", 20)]
    monkeypatch.setattr("mmoe_rec.evaluation.sums.MOST_UNITS", 64)
    grouped = model(log, log.users % 3)
    assert len(grouped.sums.tables["ranking"]) <= 64
    found = [each.value for each in compare_slices({"ours": grouped}, "ours", 100)]
    assert found == pytest.approx(expected, nan_ok=True)


def test_lists_that_slices_cut_are_not_compared_with_whole_ones(log: Log) -> None:
    """A column of noise: parts of lists are ranked better by chance alone, as they are shorter."""
    noise = np.random.default_rng(5).integers(3, size=len(log.score))
    records = compare_slices({"ours": model(log, noise)}, "ours", 100)
    ranked = [each for each in records if each.metric == "ndcg_at_10"]
    assert len(ranked) >= 3
    for each in ranked:
        assert each.value > 0
        assert each.requests >= 50
        assert each.apart is each.p_corrected is None
    whole = compare_slices({"ours": model(log, log.users % 3)}, "ours", 100)
    assert all(each.apart is not None for each in whole if each.metric == "ndcg_at_10")
    two = compare_slices({"ours": model(log, noise), "old": model(log, noise)}, "ours", 100)
    beside = [each for each in two if each.metric == "ndcg_at_10"]
    assert {each.beside for each in beside} == {"old"}
    assert all(each.apart == 0 for each in beside)


def test_probabilities_that_are_off_in_a_slice_are_told(log: Log) -> None:
    of_rows = (log.users % 4).astype(str)
    doubled = np.where(of_rows == "2", np.clip(2.5 * log.predictions["bought"], 0, 1), log.predictions["bought"])
    models = {"ours": model(log.with_predictions(bought=doubled), of_rows)}
    records = compare_slices(models, "ours", 200)
    shown = [each for each in sort_worst_first(records) if each.metric == "calibration"]
    assert ("2", "bought") in {(each.slice, each.group) for each in shown}
    told = list(describe_slices(records))
    assert any(each.startswith("slice kind: 2 (") and "calibration of bought is" in each for each in told)
    of_placement = compare_slices(models, "ours", 200, placement=("kind",))
    # Models leave placement out, so there it is off by design.
    assert {each.metric for each in of_placement} == {each.metric for each in records} - {"calibration"}


@pytest.mark.parametrize(
    ("guarded", "placement", "kind"),
    [(None, (), "held back"), (None, ("kind",), "better"), ((), (), "better"), (("kind",), ("kind",), "held back")],
)
def test_a_model_that_fails_in_one_slice_is_not_called_better(log: Log, guarded, placement, kind: str) -> None:
    """It is far better in the others, and for each task."""
    random, of_rows = np.random.default_rng(4), (log.users % 5).astype(str)
    noisy = 1 / (1 + np.exp(-np.log(log.predictions["spent"]) - 2.5 * random.normal(size=len(log.score))))
    spoilt = np.where(of_rows == "3", random.permutation(noisy), log.predictions["bought"])
    models = {
        name: model(log.with_predictions(bought=each), of_rows) for name, each in (("new", spoilt), ("old", noisy))
    }
    rules = Evaluation(resamples=200, calibration=9, slices=("kind",), guarded_slices=guarded)
    results = Results(models, ("bought",), rules, "", {}, placement)
    assert results.comparison.verdicts["old"].kind == kind
    told = describe_verdict(results.comparison, "old", results.first.summary)
    assert ("slice kind: 3 (" in told) == (kind != "better")
    with pytest.raises(UserError, match=r"guarded_slices names 'kin', and rows are sliced by: kind"):
        _ = replace(results, rules=Evaluation(slices=("kin",), guarded_slices=("kin",))).comparison
