"""Validation users of one half select a model, and the other half judges it: what depends on which labels."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from scipy.special import logit
from sklearn.metrics import log_loss, roc_auc_score

from mmoe_rec.atomic import checksum
from mmoe_rec.batches.encoded_dataset import EncodedDataset, ValidationPart
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.evaluate import evaluate_model, score_rows
from mmoe_rec.evaluation.promotion import _open_judging_rows
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.model.score import UNCALIBRATED
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings
from mmoe_rec.training.checkpoint import FinishedRun
from mmoe_rec.training.train import train_model
from tests.commands import read_metrics
from tests.pipelines.learnable_log import write_files

OPTIONS = ("--training.calibration", "temperature", "--model.trees.max_trees", "20", "--model.trees.leaves", "8")
SPLIT = {"train_end": "2024-03-06", "validation_end": "2024-03-10"}
NAMES = ("click", "liked")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with trees and calibration, beside a log whose features and model were made by them."""
    settings = load_settings(write_files(tmp_path_factory.mktemp("judging"), split=SPLIT), OPTIONS)
    train_model(settings, register=False)
    return settings


def parts_of(settings: Settings) -> dict[str, str]:
    """Checksums of what validation rows select: the network's state, the trees, the blends and the calibration."""
    artifact = Path(settings.data.work_dir) / "model"
    files = [artifact / "weights.safetensors", artifact / "calibration.json", *artifact.glob("trees/*")]
    return {file.name: checksum(file) for file in files if file.exists()}


def flip_labels(settings: Settings, part: ValidationPart) -> None:
    """Turn each label of one half of the validation users into its opposite."""
    (file,) = (Path(settings.data.work_dir) / "features" / "encoded" / "validation").glob("*.parquet")
    table = pq.read_table(file)
    theirs = pa.array(part.contains(table["user"].combine_chunks()))
    for name in (f"label.{task}" for task in NAMES):
        flipped = pc.if_else(theirs, pc.subtract(pa.scalar(1, table[name].type), table[name]), table[name])
        table = table.set_column(table.column_names.index(name), name, flipped)
    pq.write_table(table, file)


def test_the_reported_figures_are_of_the_served_model_on_the_judging_rows(settings: Settings) -> None:
    """By scikit-learn; the network alone, which has a row of its own, has others."""
    ended, artifact = FinishedRun.read(Path(settings.data.work_dir)), Path(settings.data.work_dir) / "model"
    ranker = Ranker.load(artifact)
    rows = EncodedDataset(
        Path(settings.data.work_dir) / "features/encoded/validation", ranker.layout, part=ValidationPart.EVALUATION
    )
    scored = score_rows(settings, ranker.model, ranker.layout, rows, ranker.calibration)
    assert ended is not None
    assert ended.network_validation is not None
    assert "click" in json.loads((artifact / "calibration.json").read_text())
    for name in NAMES:
        known = ~np.isnan(scored.labels[name])
        label, predicted = scored.labels[name][known], scored.predictions[name][known]
        assert ended.best.auc[name] == pytest.approx(roc_auc_score(label, predicted), abs=3e-4)
        assert ended.best.loss[name] == pytest.approx(log_loss(label, predicted), rel=1e-4)
        assert ended.best.calibration[name] == pytest.approx(predicted.sum() / label.sum(), rel=1e-4)
        assert ended.network_validation.loss[name] != pytest.approx(ended.best.loss[name], rel=1e-3)


def test_an_evaluation_measures_calibrated_predictions(settings: Settings, tmp_path: Path) -> None:
    work = Path(settings.data.work_dir)
    evaluate_model(settings, str(work / "model"), tmp_path)
    actual, ranker = read_metrics(tmp_path)["tasks"], Ranker.load(work / "model")
    rows = EncodedDataset(work / "features" / "encoded" / "test", ranker.layout)
    scored = score_rows(settings, ranker.model, ranker.layout, rows, ranker.calibration)
    plain = score_rows(settings, ranker.model, ranker.layout, rows, UNCALIBRATED)
    for name in NAMES:
        known = ~np.isnan(scored.labels[name])
        sides = (scored.predictions, plain.predictions, scored.labels)
        total, second, labels = (side[name][known].sum() for side in sides)
        assert actual[name]["calibration"]["value"] == pytest.approx(total / labels, rel=1e-5)
        assert total != pytest.approx(second, rel=1e-4)


def test_labels_of_judging_users_select_nothing(settings: Settings) -> None:
    before, figures = parts_of(settings), FinishedRun.read(Path(settings.data.work_dir))
    flip_labels(settings, ValidationPart.EVALUATION)
    train_model(settings, register=False)
    assert parts_of(settings) == before
    assert {"weights.safetensors", "calibration.json", "blends.json", "click.txt"} <= before.keys()
    judged = FinishedRun.read(Path(settings.data.work_dir))
    assert figures is not None
    assert judged is not None
    for name in NAMES:
        assert logit(judged.best.auc[name]) == pytest.approx(-logit(figures.best.auc[name]), abs=0.02)
    flip_labels(settings, ValidationPart.SELECTION)
    train_model(settings, register=False)
    assert parts_of(settings)["blends.json"] != before["blends.json"]


def test_a_user_of_one_half_alone_judges_nothing(settings: Settings, tmp_path: Path) -> None:
    """All rows select, and a comparison with the champion is refused."""
    (file,) = (Path(settings.data.work_dir) / "features" / "encoded" / "validation").glob("*.parquet")
    table = pq.read_table(file)
    pq.write_table(table.filter(pc.equal(table["user"], table["user"][0])), tmp_path / "part-00000.parquet")
    layout = Ranker.load(Path(settings.data.work_dir) / "model").layout
    selecting = EncodedDataset(tmp_path, layout, part=ValidationPart.SELECTION)
    assert not selecting.uses_part
    assert selecting.rows == pq.read_metadata(tmp_path / "part-00000.parquet").num_rows
    with pytest.raises(UserError, match="the validation rows have too few users"):
        _open_judging_rows(tmp_path, layout)
