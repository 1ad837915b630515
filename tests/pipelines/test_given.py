"""A satisfaction that is given an engagement, on a sampled log: trained, evaluated and served by the commands."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import log_loss, roc_auc_score

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.batches.encoded_dataset import EncodedDataset, ValidationPart
from mmoe_rec.evaluation.evaluate import score_rows
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.load import load_settings
from mmoe_rec.training.train import calibrate
from tests.commands import read_metrics, run
from tests.pipelines.learnable_log import learnable_log, settings_tree

pytestmark = pytest.mark.thorough

RATE = 0.5  # of rows without a click


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log, its settings and the trained model."""
    folder = tmp_path_factory.mktemp("given")
    log = learnable_log()
    clicked = log["click"].to_numpy() == 1
    kept = clicked | (np.random.default_rng(2).random(len(clicked)) < RATE)
    log = log.append_column("rate", pa.array(np.where(clicked, 1.0, RATE)))
    (folder / "log").mkdir()
    pq.write_table(log.filter(pa.array(kept)), folder / "log" / "0.parquet")
    tree = settings_tree(folder)
    tree["columns"]["sampling_rate"] = "rate"
    tree["tasks"]["liked"] |= {"conditional_on": "click", "score_weight": 0.5}
    tree["training"] |= {"sampling_correction": "weights", "task_weighting": "uncertainty"}
    (folder / "settings.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    run("train", "--config", str(folder / "settings.yaml"))
    return folder


def evaluated(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """metrics.json of the model."""
    words = ["--config", folder / "settings.yaml", "--model", folder / "work" / "model", "--out", folder / name]
    run("evaluate", *words, *options)
    return read_metrics(folder / name)


@pytest.fixture(scope="module")
def judged(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The metrics, and the model's predictions on the test rows with their labels and weights."""
    ranker = Ranker.load(folder / "work" / "model")
    rows = EncodedDataset(folder / "work" / "features" / "encoded" / "test", ranker.layout)
    part, table = next(rows.stream(rows.rows, ("sampling_rate", "label.click_and_liked")))
    logits = ranker.model(make_batch(part.encoded, ranker.layout, torchrec=False)).logits.detach().numpy()
    click, liked = (1 / (1 + np.exp(-logits[:, task].astype(np.float64))) for task in (0, 1))
    known = {"click": part.labels[:, 0], "liked": part.labels[:, 1], "p": click, "q": liked}
    both = table["label.click_and_liked"].to_numpy()
    return evaluated(folder, "weighted"), known | {"both": both, "weight": 1 / table["sampling_rate"].to_numpy()}


def test_metrics_are_over_engaged_and_over_all_rows(judged: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    metrics, rows = judged
    tasks = metrics["tasks"]
    clicked = rows["click"] == 1
    np.testing.assert_equal(np.where(clicked, rows["liked"], 0.0), rows["both"])
    assert list(tasks) == ["click", "liked", "click_and_liked"]
    assert tasks["liked"]["rows"] == clicked.sum()
    assert tasks["click_and_liked"]["rows"] == len(clicked)
    both, weight = rows["p"] * rows["q"], rows["weight"]
    for name, labels, predictions, inside in (
        ("liked", rows["liked"], rows["q"], clicked),
        ("click_and_liked", rows["both"], both, np.ones_like(clicked)),
        ("click", rows["click"], rows["p"], np.ones_like(clicked)),
    ):
        label, predicted, by = labels[inside], predictions[inside], weight[inside]
        assert tasks[name]["logloss"]["value"] == pytest.approx(log_loss(label, predicted, sample_weight=by), rel=1e-5)
        area = roc_auc_score(label, predicted, sample_weight=by)
        assert tasks[name]["auc"]["value"] == pytest.approx(area, abs=1e-5)
        calibration = (by * predicted).sum() / (by * label).sum()
        assert tasks[name]["calibration"]["value"] == pytest.approx(calibration, rel=1e-5)
        assert calibration == pytest.approx(1, abs=0.2)
        assert tasks[name]["auc"]["value"] > 0.6
    assert metrics["sampling_correction"] == "weights"


def test_the_settings_of_the_evaluation_decide_on_weights(
    folder: Path, judged: tuple[dict[str, Any], dict[str, np.ndarray]]
) -> None:
    metrics, rows = evaluated(folder, "plain", "--training.sampling_correction", "none"), judged[1]
    assert metrics["sampling_correction"] == "none"
    assert metrics["tasks"]["click"]["logloss"]["value"] == pytest.approx(log_loss(rows["click"], rows["p"]), rel=1e-5)
    for metric in ("ndcg_at_10", "mrr"):
        assert metrics["score"][metric] == judged[0]["score"][metric]


def test_replies_hold_what_both_are_and_the_score_multiplies_once(folder: Path) -> None:
    ranker = Ranker.load(folder / "work" / "model")
    ranking = ranker.rank({"user": 3}, {}, {"item": list(range(20))})
    actual = {name: np.array(values) for name, values in ranking.predictions.items()}
    assert list(actual) == ["click", "liked", "click_and_liked"]
    np.testing.assert_allclose(actual["click_and_liked"], actual["click"] * actual["liked"])
    np.testing.assert_allclose(ranking.scores, actual["click"] * actual["liked"] ** 0.5, rtol=1e-5)
    assert "log_variances" not in ranker.model.state_dict()


def test_calibration_is_that_of_the_log_before_it_was_sampled(folder: Path) -> None:
    """A satisfaction's is that of its own label, which engaged rows have."""
    ranker, prepared = Ranker.load(folder / "work" / "model"), FeatureFolder(folder / "work" / "features")
    rows = EncodedDataset(prepared.split("validation"), ranker.layout, part=ValidationPart.SELECTION)

    def predicted_by_observed(*options: str, weighted: bool) -> np.ndarray:
        settings = load_settings(folder / "settings.yaml", ["--training.calibration", "temperature", *options])
        calibration = calibrate(settings, prepared, ranker.model)
        weighing = load_settings(folder / "settings.yaml", ["--training.sampling_correction", "weights"])
        scored = score_rows(weighing, ranker.model, ranker.layout, rows, calibration)
        weight = scored.weight if weighted and scored.weight is not None else 1
        ratios = []
        for name in (task.name for task in ranker.layout.tasks):
            known, sides = ~np.isnan(scored.labels[name]), (scored.predictions[name], scored.labels[name])
            predicted, observed = ((np.where(known, side, 0) * weight).sum() for side in sides)
            ratios.append(predicted / observed)
        return np.array(ratios)

    np.testing.assert_allclose(predicted_by_observed(weighted=True), 1, rtol=1e-4)
    plain = ["--training.sampling_correction", "none"]
    np.testing.assert_allclose(predicted_by_observed(*plain, weighted=False), 1, rtol=1e-4)
    assert predicted_by_observed(*plain, weighted=True)[0] > 1.1
