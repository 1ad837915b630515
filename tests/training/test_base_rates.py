"""Predictions begin at the rates of the labels, and are those of the whole log where rows were sampled."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.special import logit

from mmoe_rec.features.layout import TaskOutput
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.mmoe import Towers
from mmoe_rec.preprocessing.prepare import Prepared
from mmoe_rec.preprocessing.splits import SplitCounts
from mmoe_rec.training.loop import Trainer
from mmoe_rec.training.ranks import process_group
from mmoe_rec.training.warm_start import base_rates, set_base_rates
from tests.training.learnable import (
    CPU,
    LAYOUT,
    LAYOUTS,
    MODEL,
    ROWS,
    TRAINING,
    Trained,
    learnable_rows,
    trained,
    write_prepared,
)

TASKS = (
    TaskOutput("click", "binary"),
    TaskOutput("kept", "binary", given="click"),
    TaskOutput("stars", "regression", mean=3.0),
    TaskOutput("survey", "binary"),
)


def manifest(labels: dict[str, np.ndarray], rates: np.ndarray) -> dict:
    """A manifest of training rows that were counted in two parts."""
    counts = SplitCounts()
    for part in (slice(0, 100), slice(100, None)):
        own = np.ones(len(rates))[part]
        counts.add({name: values[part] for name, values in labels.items()}, own, rates[part], {})
    return {"splits": {"train": asdict(counts)}}


@pytest.mark.parametrize("weighted", [False, True])
def test_rates_are_the_means_of_observed_labels(weighted: bool) -> None:
    random = np.random.default_rng(0)
    click = (random.random(3_000) < 0.01).astype(float)
    kept = np.where(click == 1, random.random(3_000) < 0.7, np.nan)
    rates = np.where(click == 1, 1.0, 0.2)
    labels = {"click": click, "kept": kept, "stars": random.normal(3, 1, 3_000), "survey": np.full(3_000, np.nan)}
    found = base_rates(manifest(labels, rates), TASKS, weighted)
    weights = 1 / rates if weighted else np.ones(3_000)
    expected = [((weights * click).sum() + 0.5) / (weights.sum() + 1)]
    engaged = click == 1
    expected.append((kept[engaged].sum() + 0.5) / (engaged.sum() + 1))  # clicks weigh 1
    assert found[:2] == pytest.approx(expected, rel=1e-12)
    assert found[2:] == [None, None]


def test_towers_say_the_rates_of_no_input() -> None:
    towers = Towers(4, 3, (2,))
    set_base_rates(towers, [0.005, 0.7, None, None])
    with torch.no_grad():
        towers.layers[-1].weight.zero_()
        said = towers(torch.randn(5, 4, 3)).numpy()
    np.testing.assert_allclose(said, np.tile([logit(0.005), logit(0.7), 0, 0], (5, 1)), rtol=1e-6)


def test_a_training_begins_at_the_rates_and_a_regression_at_its_mean(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "data", LAYOUT)
    with process_group(CPU):
        trainer = Trainer(prepared, LAYOUT, MODEL, TRAINING, CPU, tmp_path / "checkpoints", lambda *_: None)
        bias = trainer.sharded.model.module.mixture.towers.output_bias.detach()
        rates = base_rates(prepared.manifest, LAYOUT.tasks, weighted=False)
        assert bias[:, 0].tolist() == pytest.approx([logit(rates[0]), logit(rates[1]), 0.0], rel=1e-6)
        trainer.checkpoints.close()


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
