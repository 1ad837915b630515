"""A plain table with weights: trained, evaluated, scored and ranked by the commands, beside independent references."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from mmoe_rec.batches.encoded_dataset import ValidationPart
from mmoe_rec.errors import RequestError, UserError
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.live.label_join import join_labels
from mmoe_rec.live.skew import check_skew
from mmoe_rec.model.warm_start import base_rates
from mmoe_rec.preprocessing.prepare import build_features
from mmoe_rec.training.checkpoint import FinishedRun
from mmoe_rec.training.validation import BINS_PER_UNIT
from tests.commands import read_metrics, refuse, run
from tests.log.plain_tables import plain_settings, plain_table
from tests.report.parsed import Page

pytestmark = pytest.mark.thorough

ROWS = 4_000  # of two files
FEATURES = ["x", "word", "code"]


class World:
    """A trained model of a plain table, and the table in the order of its rows."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        self.folder = folder
        whole = plain_table(1, ROWS)
        tables = [whole.slice(0, ROWS // 4), whole.slice(ROWS // 4)]
        tracking = {"uri": f"sqlite:///{folder / 'mlflow.db'}"}
        self.settings = plain_settings(folder / "work", *tables, tracking=tracking, **sections)
        self.config = folder / "settings.yaml"
        self.config.write_text(self.settings.to_yaml(), encoding="utf-8")
        self.table: pd.DataFrame = pa.concat_tables(tables).to_pandas()
        run("train", "--config", str(self.config))
        self.model = folder / "work" / "model"

    def evaluate(self, name: str, *options: object) -> dict[str, Any]:
        """metrics.json of the model."""
        run("evaluate", "--config", self.config, "--model", self.model, "--out", self.folder / name, *options)
        return read_metrics(self.folder / name)

    def page(self, name: str) -> str:
        """The words of the page of an evaluation."""
        page = Page((self.folder / name / "report.html").read_text(encoding="utf-8"))
        return " ".join(page.words.split())


def measure(config: Path, predictions: Path, out: Path) -> dict[str, Any]:
    """What `evaluate` finds in predictions."""
    run("evaluate", "--config", config, "--predictions", predictions, "--out", out)
    return read_metrics(out)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("plain"), columns={"weight": "weight"})


@pytest.fixture(scope="module")
def scored(world: World) -> pd.DataFrame:
    """What `score` writes, in the order of the table."""
    out = world.folder / "scores"
    run("score", "--model", str(world.model), "--input", world.settings.data.log, "--output", str(out), "--labels")
    return pq.read_table(out).to_pandas().sort_values("row", ignore_index=True)


def by_the_table(
    world: World, scored: pd.DataFrame, folds: list[int], task: str, part: ValidationPart | None = None
) -> tuple[np.ndarray, ...]:
    """Labels, predictions and weights of rows that are observed, joined by their number alone, which is the user's."""
    inside = world.table["fold"].isin(folds) & world.table[task].notna()
    if part is not None:
        inside &= part.contains(pa.array(world.table.index))
    actual = world.table[inside], scored[inside.to_numpy()]
    return actual[0][task].to_numpy(), actual[1][f"predicted_{task}"].to_numpy(float), actual[0]["weight"].to_numpy()


def test_rows_are_named_by_their_number(world: World, scored: pd.DataFrame) -> None:
    assert scored["row"].tolist() == list(range(ROWS))
    assert not any("\0" in name for name in scored.columns)
    for task in ("label", "other"):
        np.testing.assert_array_equal(scored[f"label_{task}"], world.table[task].to_numpy(float))
    np.testing.assert_array_equal(scored["weight"], world.table["weight"])
    assert (scored["rank"] == 1).all()


def test_metrics_are_weighted_and_of_the_test_rows(
    world: World, scored: pd.DataFrame, capsys: pytest.CaptureFixture
) -> None:
    actual = world.evaluate("weighted")
    printed = capsys.readouterr().out
    test = world.table["fold"] == 4
    assert actual["rows"] == actual["users"] == int(test.sum())
    for task in ("label", "other"):
        labels, predicted, weights = by_the_table(world, scored, [4], task)
        mine = actual["tasks"][task]
        assert mine["rows"] == len(labels)
        assert mine["auc"]["value"] == pytest.approx(roc_auc_score(labels, predicted, sample_weight=weights), abs=1e-6)
        assert mine["logloss"]["value"] == pytest.approx(log_loss(labels, predicted, sample_weight=weights), rel=1e-5)
        plain = roc_auc_score(labels, predicted)
        assert abs(plain - roc_auc_score(labels, predicted, sample_weight=weights)) > 1e-4, "weights say nothing"
    assert "gauc" not in printed
    assert "ndcg" not in printed
    assert "bootstrap over rows" in " ".join(printed.split())
    assert "Each user has one row" in printed
    words = world.page("weighted")
    assert "those with 4 in column 'fold'" in words
    assert "catalog" not in words.lower()


def test_a_model_is_judged_by_weighted_losses_and_areas(world: World, scored: pd.DataFrame) -> None:
    best = FinishedRun.read(world.folder / "work").best  # type: ignore[union-attr]
    for task in ("label", "other"):
        labels, predicted, weights = by_the_table(world, scored, [3], task, ValidationPart.EVALUATION)
        expected = log_loss(labels, predicted, sample_weight=weights)
        assert best.loss[task] == pytest.approx(expected, rel=1e-4)
        assert abs(expected - log_loss(labels, predicted)) > 1e-3 * expected, "weights say nothing"
        binned = np.floor(np.log(predicted / (1 - predicted)) * BINS_PER_UNIT)
        area = roc_auc_score(labels, binned, sample_weight=weights)
        assert best.auc[task] == pytest.approx(area, abs=1e-3)
        assert abs(area - roc_auc_score(labels, binned)) > 2e-3, "weights say nothing"


def test_rows_that_the_model_has_learnt_from_are_reported(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By the column of the split, whatever its type; also where their metrics are measured."""
    folds = world.table["fold"].to_numpy()
    new = np.where(folds == 4, 5, folds)  # a value that the settings do not list
    text = pa.array([str(fold) for fold in new])
    for name, column in {"short": pa.array(new, pa.int8()), "coded": text.dictionary_encode()}.items():
        table = pa.Table.from_pandas(world.table)
        _write(tmp_path / name, table.set_column(table.column_names.index("fold"), "fold", column))
    _write(tmp_path / "test", pa.Table.from_pandas(world.table[folds == 4]))
    _write(tmp_path / "without", pa.Table.from_pandas(world.table.drop(columns="fold")))
    learnt = f"on {int((folds < 4).sum()):,} of the {ROWS:,} rows, so their metrics are too optimistic"
    lacking = "the input lacks the split column 'fold'. Metrics are too optimistic if"
    said = dict.fromkeys(("short", "coded"), learnt) | {"test": None, "without": lacking}
    for name, sentence in said.items():
        out = tmp_path / f"scored_{name}"
        run("score", "--model", world.model, "--input", tmp_path / name, "--output", out, "--labels")
        for_score = capsys.readouterr().out
        measure(world.config, out, tmp_path / f"of_{name}")
        for item, severity in ((for_score, "warning"), (capsys.readouterr().out, "problem")):
            printed = " ".join(item.split())
            if sentence is None:
                assert "optimistic" not in printed
            else:
                assert printed.count(f"{severity}: the model was trained") == printed.count(sentence) == 1


def _write(folder: Path, table: pa.Table) -> None:
    folder.mkdir()
    pq.write_table(table, folder / "0.parquet")


def test_requests_give_what_scoring_gives(world: World, scored: pd.DataFrame) -> None:
    ranker = Ranker.load(world.model)
    rows = np.flatnonzero(world.table["fold"] == 4)[:50]
    shown = world.table.iloc[rows]
    candidates = {
        "x": [None if np.isnan(item) else item for item in shown["x"]],
        "word": shown["word"].tolist(),
        "code": shown["code"].tolist(),
    }
    ranking = ranker.rank({}, {}, candidates)
    assert ranking.candidates == ranking.order
    assert sorted(ranking.order) == list(range(50))
    expected = scored.iloc[rows]
    order = np.array(ranking.order)
    for task in ("label", "other"):
        given = expected[f"predicted_{task}"].to_numpy()[order]
        np.testing.assert_allclose(ranking.predictions[task], given, rtol=1e-5)
    np.testing.assert_allclose(ranking.scores, np.sort(expected["score"].to_numpy())[::-1], rtol=1e-4)
    assert ranking.warnings == []
    assert ranking.unknown_ids == {"user": 0, "candidate": 0}
    assert ranking.tables_as_of is None
    assert "1970" not in (world.model / "model.json").read_text()
    assert json.dumps(ranking.to_dict())
    assert ranker.rank({}, {}, candidates, top_k=3).order == ranking.order[:3]


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({}, "'candidates' is empty: it needs the columns that describe the rows to score"),
        ({"x": [1.0], "word": ["a"]}, "'candidates' lacks column 'code', which the model reads; give null if it is"),
    ],
)
def test_requests_that_say_too_little(world: World, candidates: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        Ranker.load(world.model).rank({}, {}, candidates)
    assert message in str(error.value)


def test_scoring_by_tables_is_the_same(world: World, scored: pd.DataFrame, tmp_path: Path) -> None:
    """And new rows need neither labels nor splits nor weights."""
    pq.write_table(pa.Table.from_pandas(world.table[FEATURES]), tmp_path / "rows.parquet")
    for as_of in ("log", "tables"):
        out = tmp_path / as_of
        words = ["--model", str(world.model), "--input", str(tmp_path / "rows.parquet"), "--as-of", as_of]
        run("score", *words, "--output", str(out))
        actual = pq.read_table(out).to_pandas().sort_values("row", ignore_index=True)
        np.testing.assert_allclose(actual["score"], scored["score"], rtol=1e-5)
        assert "1970-" not in (out / "_manifest.json").read_text()


def test_baselines_learn_by_weights(world: World, capsys: pytest.CaptureFixture) -> None:
    out = world.folder / "baselines"
    run("baselines", "--config", world.config, "--out", out)
    printed = capsys.readouterr().out
    assert "gradient boosting" in printed
    assert "popularity ┃" not in printed
    assert "'popularity'" not in printed
    assert read_metrics(out)["tasks"]["label"]["auc"]["value"] > 0.6


def test_what_scoring_and_measuring_refuse(
    world: World, scored: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Nothing is known of rows, so nothing completes them, as of users and candidates."""
    for name, table in (("unweighted", scored.drop(columns="weight")), ("lacking", world.table[["x", "code"]])):
        _write(tmp_path / name, pa.Table.from_pandas(table))
    score = ("score", "--model", world.model, "--output", tmp_path / "out", "--input")
    lacks = "0.parquet' has no column 'word'"
    for words, sentence in (
        ((*score, tmp_path / "lacking", "--as-of", "log"), lacks),
        ((*score, tmp_path / "lacking", "--as-of", "tables"), lacks),
        ((*score, world.settings.data.log, "--start", "2024-01-01"), "--start and --end need request times"),
        (
            ("evaluate", "--config", world.config, "--predictions", tmp_path / "unweighted", "--out", tmp_path / "out"),
            "weight",
        ),
    ):
        assert sentence in refuse(capsys, *words)
        assert not (tmp_path / "out").exists()


def test_what_needs_users_and_times_says_so(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    needs = "needs columns.user and columns.candidate and columns.time, but the settings lack them"
    with pytest.raises(UserError, match=f"a skew check {needs}"):
        check_skew(world.settings, 0, 1, str(world.model), tmp_path)
    with pytest.raises(UserError, match=f"join-labels {needs}"):
        join_labels(world.settings, str(tmp_path), None, tmp_path / "out")
    error_text = refuse(capsys, "refresh", "--config", world.config, "--model", "models:/plain@champion")
    assert f"a refresh of a model's tables {needs}" in error_text


def test_a_training_is_recognised(world: World, capsys: pytest.CaptureFixture) -> None:
    """By its split and weights too."""
    run("train", "--config", str(world.config), "--resume")
    assert "The run has already finished" in capsys.readouterr().out
    for words, error_text in (
        (["--split.test", "[3]", "--split.validation", "[4]"], "it was started with split.validation"),
        (["--columns.weight", "null"], "it was started with columns.weight"),
    ):
        assert error_text in refuse(capsys, "train", "--config", world.config, "--resume", *words)


def test_users_in_training_and_test_rows_are_seen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A planted bug: a column that splits rows of the same users. Rows of a user in one split are fine."""
    error_text = "100.0% of the users of test rows also have training rows, as split by column 'fold'"
    for user, is_reported in (("person", True), ("group", False)):
        settings = plain_settings(tmp_path / user, columns={"user": user})
        (tmp_path / f"{user}.yaml").write_text(settings.to_yaml(), encoding="utf-8")
        run("inspect", "--config", tmp_path / f"{user}.yaml")
        assert (error_text in " ".join(capsys.readouterr().out.split())) == is_reported


def test_weights_of_tasks_rank_nothing_here(world: World, capsys: pytest.CaptureFixture) -> None:
    world.evaluate("weighed")
    predictions = world.folder / "weighed" / "predictions.parquet"
    error_text = refuse(capsys, "tune-weights", "--config", world.config, "--predictions", predictions, predictions)
    assert "has only one row, so there is no ranking to improve" in error_text


def test_predictions_hold_no_invented_columns(world: World, tmp_path: Path) -> None:
    world.evaluate("predicted")
    predictions = world.folder / "predicted" / "predictions.parquet"
    rows = pd.read_parquet(predictions)
    assert rows.columns[0] == "row"
    assert not {"user", "request", "candidate"} & set(rows)
    test = world.table[world.table["fold"] == 4]
    np.testing.assert_array_equal(rows["row"].sort_values(), test.index)
    mine = test.loc[rows["row"]]
    np.testing.assert_array_equal(rows["label_label"], mine["label"])
    np.testing.assert_array_equal(rows["weight"], mine["weight"])
    theirs = measure(world.config, predictions, tmp_path / "measured")["tasks"]["label"]["auc"]
    assert theirs == pytest.approx(world.evaluate("again")["tasks"]["label"]["auc"], abs=1e-6)


def test_towers_start_at_the_rates_of_the_loss(tmp_path: Path) -> None:
    """With weights alone, with rates alone and with both, whether these are corrected or not."""
    table = plain_table(5, 2_000)
    rates = np.where(table["label"].to_numpy() == 1, 1.0, 0.01)
    table = table.append_column("rate", pa.array(rates))
    inside = table["fold"].to_numpy() <= 2
    label, weight, rate = table["label"].to_numpy()[inside], table["weight"].to_numpy()[inside], rates[inside]
    for columns, weighted, expected in (
        ({"weight": "weight"}, False, weight),
        ({"weight": "weight", "sampling_rate": "rate"}, False, weight),
        ({"weight": "weight", "sampling_rate": "rate"}, True, weight / rate),
        ({"sampling_rate": "rate"}, True, 1 / rate),
        ({"sampling_rate": "rate"}, False, np.ones(len(rate))),
    ):
        settings = plain_settings(tmp_path / f"{len(list(tmp_path.iterdir()))}", table, columns=columns)
        prepared = build_features(settings)
        actual = base_rates(prepared.manifest, prepared.layout.tasks, weighted)
        assert actual[0] == pytest.approx(np.average(label, weights=expected), abs=2e-3)


def test_repeated_rows_are_named_by_columns_that_there_are(tmp_path: Path) -> None:
    table = pa.concat_tables([plain_table(0), plain_table(0).slice(3, 1)])
    columns = {"user": "person", "candidate": "code"}
    settings = plain_settings(tmp_path, table, columns=columns, roles={"candidate": ["x", "word"]})
    with pytest.raises(UserError) as error:
        build_features(settings)
    assert "(columns 'person', within a split, and 'code')" in str(error.value)
    assert "\0" not in str(error.value)


def test_a_model_of_a_log_with_times_is_reported(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = world.table.assign(at=pd.date_range("2024-01-01", periods=len(world.table), freq="min"))
    settings = plain_settings(
        tmp_path / "work",
        pa.Table.from_pandas(table),
        columns={"time": "at"},
        split={"train_end": "2024-01-02", "validation_end": "2024-01-03"},
        tracking={"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"},
    )
    (tmp_path / "timed.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    said = refuse(capsys, "evaluate", "--config", tmp_path / "timed.yaml", "--model", world.model)
    error_text = (
        "trained on a log that has no times (a plain table), but the log of the settings has times (columns.time)"
    )
    assert error_text in said
