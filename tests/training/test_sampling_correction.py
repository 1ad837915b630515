"""A training on a sampled log whose rows weigh by their rate predicts the whole log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.preprocessing.prepare import Prepared
from tests.training.learnable import LAYOUTS, ROWS, Trained, learnable_rows, scores, trained, write_prepared

# Without placement, which would hold a part of the mean.
ONE_TASK = replace(LAYOUTS["no placement"], tasks=LAYOUTS["no placement"].tasks[:1])
RATE = 0.2  # of rows without a click


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Rows with a click, and one in five of the others."""
    prepared = write_prepared(tmp_path_factory.mktemp("sampled"), ONE_TASK)
    for split in ROWS:
        (file,) = prepared.split(split).iterdir()
        table = pq.read_table(file)
        clicked = table["label.click"].to_numpy() == 1
        kept = clicked | (np.random.default_rng(0).random(len(clicked)) < RATE)
        rate = pa.array(np.where(clicked, 1.0, RATE), pa.float32())
        table = table.set_column(table.column_names.index("sampling_rate"), "sampling_rate", rate)
        pq.write_table(table.filter(pa.array(kept)), file, row_group_size=1_000)
    return prepared


def mean_prediction(found: Trained, whole: ModelLayout) -> tuple[float, float]:
    """Of all validation rows, sampled or not, and their rate of clicks."""
    from mmoe_rec.batches.batch import make_batch

    encoded, labels = learnable_rows(whole, ROWS["validation"], 1)
    logits = found.model()(make_batch(encoded, whole, torchrec=False)).logits.detach().numpy()[:, 0]
    known = ~np.isnan(labels[:, 0])
    return float((1 / (1 + np.exp(-logits[known]))).mean()), float(labels[known, 0].mean())


def test_predictions_are_those_of_the_whole_log(sampled: Prepared, tmp_path: Path) -> None:
    changes = {"epochs": 4, "select_by": "loss"}
    plain = trained(sampled, tmp_path / "plain", **changes)
    weighted = trained(sampled, tmp_path / "weighted", sampling_correction="weights", **changes)
    predicted, rate = mean_prediction(weighted, ONE_TASK)
    assert predicted == pytest.approx(rate, abs=0.04)
    too_high, _ = mean_prediction(plain, ONE_TASK)
    assert too_high > rate + 0.15


def test_validation_has_the_weighted_loss(sampled: Prepared, tmp_path: Path) -> None:
    found = trained(sampled, tmp_path, sampling_correction="weights")
    logits, labels = scores(found.model(), sampled)
    known = ~np.isnan(labels[:, 0])
    logit, label = logits[known, 0].astype(np.float64), labels[known, 0]
    weight = np.where(label == 1, 1.0, 1 / RATE)
    losses = np.logaddexp(0, logit) - label * logit
    assert found.result.best is not None
    assert found.result.best.loss["click"] == pytest.approx(np.average(losses, weights=weight), rel=1e-4)
