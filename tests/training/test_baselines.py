"""Baselines for any data set: smoothed rates by hand, trees that learn what they should, and both beside a model."""

import json
from dataclasses import replace
from pathlib import Path

import lightgbm
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from mmoe_rec.batches.encoded_dataset import EncodedDataset, ValidationPart
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation import evaluate
from mmoe_rec.task_kinds import KINDS
from mmoe_rec.training import baselines
from mmoe_rec.training import boosting as trees
from mmoe_rec.training.baselines import measure_baselines
from mmoe_rec.training.boosting import Predictor, TreeInputs, fit_boosted_trees, fit_target_encoding
from tests import commands
from tests.inference.small_model import SmallModel
from tests.log.small_logs import BASE, DAY, START, random_log, times_of


@pytest.mark.parametrize("unit", [None, 1.0, 1e-6, 1e6])
def test_popularity_is_the_smoothed_rate_of_rows_by_their_weights(unit: float | None) -> None:
    """A row of weight 3 counts as if it came three times, and smoothing is by rows of the mean weight."""
    random = np.random.default_rng(2)
    items, labels = random.integers(0, 5, 200), (random.random(200) < 0.3).astype(float)
    labels[random.random(200) < 0.1] = np.nan
    weights = random.integers(1, 4, 200) if unit else np.ones(200, int)
    actual = fit_target_encoding(
        pa.array([f"item {entry}" for entry in items]),
        labels,
        None if unit is None else weights * unit,
    )(pa.array([f"item {index}" for index in range(6)]))
    often, item, smoothing = labels.repeat(weights), items.repeat(weights), 20 * weights[~np.isnan(labels)].mean()
    for own, rate in enumerate(actual):
        seen = often[(item == own) & ~np.isnan(often)]
        expected = (seen.sum() + smoothing * np.nanmean(often)) / (len(seen) + smoothing)
        assert rate == pytest.approx(expected, rel=1e-9)


def tree_rows(seed: int, by: float = 1.5, rows: int = 4000) -> TreeInputs:
    """A number with gaps, an id of 120 values, of which some matter `by` so much, and one that says nothing."""
    generator = np.random.default_rng(seed)
    number = np.where(generator.random(rows) < 0.1, np.nan, generator.normal(size=rows))
    ids = np.column_stack([generator.geometric(0.02, rows) % 120, generator.integers(0, 200, rows)])
    logit = np.nan_to_num(number) + np.where(ids[:, 0] // 15 % 2 == 0, by, -by)
    label = (generator.random(rows) < 1 / (1 + np.exp(-logit))).astype(float)
    label[generator.random(rows) < 0.1] = np.nan
    return TreeInputs(np.column_stack([number, ids]).astype(np.float32), 1, label[:, None])


def boosted(train: TreeInputs, validation: TreeInputs, kind: str = "binary") -> tuple[Predictor, str]:
    return fit_boosted_trees(KINDS[kind], train.select_task(0), validation.select_task(0))


@pytest.mark.parametrize(("by", "later", "stands"), [(3, 3, "with"), (1, -1, "without"), (0.2, 0.2, "both")])
def test_validation_rows_choose_how_many_trees_and_whether_ids_help(
    by: float, later: float, stands: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the losses of all numbers of trees that LightGBM grows when nothing stops it."""
    monkeypatch.setattr(trees, "MAX_TREES", 60)
    monkeypatch.setattr(trees, "LEAF_COUNTS", trees.LEAF_COUNTS[:1])
    train, validation, test = tree_rows(0, by), tree_rows(1, later), tree_rows(2, later)
    known, observed = (~np.isnan(item.labels[:, 0]) for item in (train, validation))
    predicted, counts = {}, {}
    parameters = {"objective": "binary", "learning_rate": 0.05, "num_leaves": 31, "min_data_in_leaf": 50, "seed": 0}
    parameters |= {"deterministic": True, "force_col_wise": True, "verbosity": -1}
    for name, columns in (("without", 1), ("with", 3)):
        x = [item.x[:, :columns] for item in (train, validation, test)]
        model = lightgbm.train(parameters, lightgbm.Dataset(x[0][known], train.labels[known, 0]), 60)
        own, second = ([model.predict(item, num_iteration=count) for count in range(1, 61)] for item in x[1:])
        best = int(np.argmin([log_loss(validation.labels[observed, 0], item[observed]) for item in own]))
        predicted[name], counts[name] = np.stack([own[best], second[best]]), f"{best + 1} trees of 31 leaves {name} ids"
    predicted["both"] = (predicted["without"] + predicted["with"]) / 2
    losses = {name: log_loss(validation.labels[observed, 0], item[0][observed]) for name, item in predicted.items()}
    assert min(losses, key=losses.__getitem__) == stands, "of the data"
    better, worse = sorted(counts, key=losses.__getitem__)
    counts["both"] = f"the mean of {counts[better]} and {counts[worse]}"
    (predict, message), (again, _) = (boosted(train, validation) for _ in range(2))
    assert message.startswith(f"{counts[stands]}, logloss of validation rows {losses[stands]:.4g}; ")
    np.testing.assert_allclose(predict(test), predicted[stands][1], rtol=1e-6)
    np.testing.assert_array_equal(predict(test), again(test))


def id_rows(seed: int, rows: int = 6000) -> TreeInputs:
    """A user and an item, and nothing else; lists of five, of which one is clicked."""
    effects, generator = np.random.default_rng(9).normal(0, 1.5, (2, 300)), np.random.default_rng(seed)
    ids = np.stack([generator.integers(0, 300, rows // 5).repeat(5), generator.integers(0, 300, rows)])
    liking = (effects[0, ids[0]] + effects[1, ids[1]] + generator.gumbel(size=rows)).reshape(-1, 5)
    clicked = (liking == liking.max(axis=1, keepdims=True)).astype(float).reshape(-1, 1)
    folds = generator.integers(0, 5, rows // 5).repeat(5)
    return TreeInputs(ids.T.astype(np.float32), 0, clicked, folds=folds)


def test_where_there_are_ids_alone_their_mean_labels_tell_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a row come from other requests: its list would tell that one of five is clicked."""
    monkeypatch.setattr(trees, "MAX_TREES", 100)
    (predict, message), (again, _) = (boosted(id_rows(0), id_rows(1)) for _ in range(2))
    assert "with mean labels of ids" in message.partition(";")[0]
    test = id_rows(2)
    assert roc_auc_score(test.labels[:, 0], predict(test)) > 0.75
    np.testing.assert_array_equal(predict(test), again(test))


@pytest.mark.parametrize("weighted", [False, True])
def test_mean_labels_of_ids_come_from_other_folds(weighted: bool) -> None:
    """By a loop over rows; of other rows than those of training, from all."""
    rows = id_rows(0, 500).select_task(0)
    rows = replace(rows, x=np.column_stack([np.arange(500), rows.x]).astype(np.float32), num_numeric=1)
    if weighted:
        rows = replace(rows, weights=np.random.default_rng(0).choice([0.5, 1, 4], 500))
    name, x, view = list(trees._views(rows))[-1]
    assert name == "with mean labels of ids"
    others = replace(rows, x=rows.x + 1)
    weights = np.ones(500) if rows.weights is None else rows.weights

    def expect(each: np.ndarray, taken: np.ndarray) -> list[float]:
        means = [each[0]]
        overall = np.average(rows.labels[taken], weights=weights[taken])
        for column in (1, 2):
            same = taken & (rows.x[:, column] == each[column])
            count = weights[same] / weights[taken].mean()
            means.append((rows.labels[same] @ count + 20 * overall) / (count.sum() + 20))
        return means

    np.testing.assert_allclose(
        x, [expect(*item) for item in zip(rows.x, rows.folds != rows.folds[:, None], strict=True)], rtol=1e-5
    )
    np.testing.assert_allclose(view(others), [expect(item, np.ones(500, bool)) for item in others.x], rtol=1e-5)


def test_where_validation_rows_say_nothing_there_are_trees_all_the_same() -> None:
    train = tree_rows(5)
    nothing = replace(train, labels=np.full_like(train.labels, np.nan))
    for rows, stands in ((train, "without ids"), (replace(train, x=train.x[:, 1:], num_numeric=0), "with ids")):
        predict, message = boosted(rows, nothing)
        assert message == f"100 trees of 31 leaves {stands}"
        assert roc_auc_score(train.select_task(0).labels, predict(rows.select_task(0))) > 0.6


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_units_of_weights_and_labels_do_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Least sums of weights, and least gains of a loss, are constants of LightGBM, which holds labels in float32."""
    monkeypatch.setattr(trees, "MAX_TREES", 100)
    rows, predicted = [tree_rows(3), tree_rows(4)], []
    if kind == "regression":
        rows = [replace(row, labels=3 + 2 * np.nan_to_num(row.x[:, :1]) + 0 * row.labels) for row in rows]
    weights = np.random.default_rng(0).choice([0.5, 1.0, 4.0], len(rows[0].labels))
    second = {"binary": (1.0, 0.0), "regression": (2.0**-20, 2.0**10)}[kind]
    for scale, unit, least in ((1.0, 1.0, 0.0), (2.0**-30, *second)):
        own = [replace(row, labels=row.labels * unit + least, weights=weights * scale) for row in rows]
        predicted.append((boosted(*own, kind=kind)[0](rows[1]) - least) / unit)
    np.testing.assert_allclose(*predicted, rtol=1e-5, atol=1e-5)
    assert np.nanmean(np.abs(predicted[0] - rows[1].labels[:, 0])) < (0.2 if kind == "regression" else 0.4)


def test_odd_inputs_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that varies, numbers that only later rows lack, one that is missing everywhere, very many ids, two rows,
    and weights that make others of rows."""
    monkeypatch.setattr(trees, "MAX_TREES", 40)
    rows = tree_rows(6, 3.0, 1000).select_task(0)
    whole = replace(rows, x=np.nan_to_num(rows.x))
    lacking = replace(rows, x=np.column_stack([np.full(len(rows.x), np.nan), rows.x]), num_numeric=2)
    many = replace(rows, x=np.column_stack([rows.x[:, 0], np.arange(len(rows.x)) * 100]).astype(np.float32))
    two = replace(rows, x=rows.x[:2], labels=np.array([0.0, 1.0]))
    for train, validation in ((whole, rows), (lacking, lacking), (many, many), (two, rows)):
        predicted = fit_boosted_trees(KINDS["binary"], train, validation)[0](validation)
        assert ((predicted > 0) & (predicted < 1)).all()
        assert roc_auc_score(validation.labels, predicted) > 0.55 or train is two
    alike = replace(rows, x=np.ones_like(rows.x))
    for weights in (np.ones(len(rows.x)), np.where(rows.labels > 0, 1.5, 0.5)):
        weighted = replace(alike, weights=weights / weights.mean())
        predicted = fit_boosted_trees(KINDS["binary"], weighted, weighted)[0](weighted)
        np.testing.assert_allclose(predicted, np.average(rows.labels, weights=weights), atol=1e-6)
    constant = replace(rows, labels=np.full(len(rows.x), 7.0))
    np.testing.assert_allclose(fit_boosted_trees(KINDS["regression"], constant, constant)[0](rows), 7.0)


def test_what_can_not_be_learnt_is_reported() -> None:
    def rows(labels: object, numbers: int = 1) -> TreeInputs:
        return TreeInputs(np.zeros((3, numbers), np.float32), numbers, np.array(labels)[:, None])

    unobserved = np.full(3, np.nan)
    for item, sentence in (
        (rows(unobserved), "no training row"),
        (rows([1, 1, np.nan]), "but trees need both 0 and 1"),
        (rows([1.0, 1, 0], 0), "have the role placement or are lists of IDs"),
    ):
        with pytest.raises(UserError, match=sentence):
            boosted(item, item)
    with pytest.raises(UserError, match="no training row has an observed label"):
        fit_target_encoding(pa.array([1, 2, 3]), unobserved, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(tmp_path_factory.mktemp("model"))


def run(model: SmallModel, *words: str) -> Path:
    commands.run("baselines", "--config", str(model.config()), *words)
    return Path(model.settings.data.work_dir) / "baselines"


def test_a_model_stands_beside_what_it_has_to_beat(
    model: SmallModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(evaluate, "log_evaluation", lambda *_: None)
    monkeypatch.setattr(trees, "MAX_TREES", 20)
    capsys.readouterr()
    out = run(model, "--model", str(model.folder))
    comparison = json.loads((out / "metrics.json").read_text())["comparison"]
    assert comparison["model"] == "model"
    assert list(comparison["against"]) == ["gradient boosting", "popularity"]
    evaluation = Path(model.settings.data.work_dir) / "evaluation"
    mine = json.loads((evaluation / "metrics.json").read_text())
    assert json.loads((out / "metrics.json").read_text())["tasks"]["click"]["auc"] == mine["tasks"]["click"]["auc"]
    printed, said = capsys.readouterr()
    said = " ".join(said.split())
    assert "gradient boosting of click: " in said
    assert "gradient boosting of click" in (out / "report.html").read_text()
    assert "report: " in printed


def test_popularity_is_the_rate_of_each_candidate(model: SmallModel) -> None:
    """By a loop over training rows; alone, without a model."""
    out = run(model, "--evaluation.guardrail_slices", '["user"]')  # baselines are not sliced
    assert json.loads((out / "metrics.json").read_text())["comparison"]["model"] == baselines.TREES_BASELINE
    train, test = (pq.read_table(model.prepared.split(name)).to_pandas() for name in ("train", "test"))
    overall = train["label.click"].mean()
    sums = train.groupby("candidate")["label.click"].agg(["sum", "count"])
    rates = ((sums["sum"] + 20 * overall) / (sums["count"] + 20)).to_dict()
    test = test[test["label.click"].notna()]
    predicted = [rates.get(item, overall) for item in test["candidate"]]
    actual = json.loads((out / "metrics.json").read_text())["against"]["popularity"]
    expected = roc_auc_score(test["label.click"], predicted)
    assert actual["tasks"]["click"]["auc"]["value"] == pytest.approx(expected, abs=1e-9)


def test_probabilities_are_calibrated_as_those_of_the_model_are(tmp_path: Path) -> None:
    """Clicks of later days are rarer, on validation and test rows alike, and some items always have more; a regression
    stays as it is."""
    log = random_log(0, rows=16_000)
    rarer = (times_of(log) > START + 6 * DAY) & (np.arange(len(log)) % 3 > 0)
    click = np.where(rarer, 0.0, np.where(log["item"].to_numpy() > 0, log["click"].to_numpy(), 1.0))
    log = log.set_column(log.column_names.index("click"), "click", pa.array(click, from_pandas=True))
    tasks: dict[str, list[dict]] = {}
    for method in ("none", "temperature"):
        out = run(SmallModel(tmp_path / method, log=[log], training={"calibration": method}))
        actual = json.loads((out / "metrics.json").read_text())
        tasks[method] = [item["tasks"] for item in (actual, actual["against"]["popularity"])]
    for before, after in zip(*tasks.values(), strict=True):
        assert before["click"]["calibration"]["value"] > 1.5
        assert after["click"]["calibration"]["value"] == pytest.approx(1, abs=0.2)
        assert before["spent"]["rmse"] == after["spent"]["rmse"]


def test_rows_that_were_sampled_count_by_their_rate(tmp_path: Path) -> None:
    """As they do in the metrics: popularity is right in sum where candidates have many rows."""
    random, log = np.random.default_rng(0), random_log(0, rows=3000)
    rate = np.where(log["click"].to_numpy() == 1, 1.0, 0.2)
    kept = log.append_column("rate", pa.array(rate)).filter(pa.array(random.random(len(log)) < rate))
    model = SmallModel(
        tmp_path,
        log=[kept],
        columns={**BASE["columns"], "sampling_rate": "rate"},
        training={"sampling_correction": "weights"},
    )
    out = run(model)
    actual = json.loads((out / "metrics.json").read_text())["against"]["popularity"]["tasks"]["click"]["calibration"]
    assert actual["low"] <= 1.05
    assert 0.8 < actual["value"] < 1.25


def test_selecting_rows_choose_the_trees(model: SmallModel) -> None:
    """The judging users have no say in how many trees there are, nor in the calibration."""
    layout = model.prepared.layout
    _, held_out = baselines.read_tree_inputs(model.settings, model.prepared, layout)
    rows = pq.read_table(model.prepared.split("validation"))
    users, labels = rows.column("user").combine_chunks(), rows.column("label.click").to_numpy()
    expected = labels[ValidationPart.SELECTION.contains(users)]
    assert 0 < len(expected) < len(labels)
    np.testing.assert_array_equal(held_out.labels[:, [task.name for task in layout.tasks].index("click")], expected)


def test_of_many_rows_the_last_ones_are_taken(model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are read at a time; fewer of those with many inputs."""
    layout = model.prepared.layout
    rows = EncodedDataset(model.prepared.split("train"), layout)
    whole = TreeInputs.read(rows, layout, ("candidate",))
    assert len(whole.x) == rows.rows
    requests = pq.read_table(model.prepared.split("train"), columns=["request"]).to_pandas()["request"]
    folds = pd.Series(whole.folds).groupby(requests)
    assert (folds.nunique() == 1).all()
    assert set(whole.folds) == set(range(5))
    monkeypatch.setattr(trees, "CHUNK_ROWS", 13)
    inputs = len(layout.dense) + len(layout.ids)
    for most, values in ((1, 10**9), (7, 10**9), (10**9, inputs * rows.rows - 1), (rows.rows, 10**9), (10**9, 10**9)):
        monkeypatch.setattr(trees, "MAX_ROWS", most)
        monkeypatch.setattr(trees, "MAX_VALUES", values)
        last = TreeInputs.read(rows, layout, ("candidate",))
        taken = min(most, rows.rows, values // inputs)
        for name in ("x", "labels", "folds"):
            np.testing.assert_array_equal(getattr(last, name), getattr(whole, name)[-taken:])
        assert last.column("candidate").equals(whole.column("candidate")[-taken:])


def test_a_task_whose_last_rows_say_nothing_is_reported_with_their_number(
    model: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that are known late may all lie before them."""
    monkeypatch.setattr(trees, "MAX_ROWS", 1)
    with pytest.raises(UserError, match="no baseline can be trained for task 'click': "):
        measure_baselines(model.settings, Path(model.settings.data.work_dir) / "last")
