"""The masked loss and learnt task weights against the reference, a label at a time; predictions begin at base rates."""

import math
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from scipy.special import logit

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.features.layout import TaskOutput
from mmoe_rec.model.model_layout import ModelLayout, ModelTask
from mmoe_rec.model.warm_start import base_rates
from mmoe_rec.preprocessing.count_and_encode import SplitCounts
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.training.distributed import process_group
from mmoe_rec.training.loop import Trainer
from mmoe_rec.training.losses import masked_loss
from tests.reference.model import loss as reference_loss
from tests.training.learnable import (
    CPU,
    LAYOUT,
    LAYOUTS,
    MODEL,
    ROWS,
    TRAINING,
    SmallTraining,
    learnable_rows,
    trained,
    write_prepared,
)

TASKS = (
    ModelTask("clicked", "binary", "engagement"),
    ModelTask("watched", "regression", "engagement", loss_weight=0.5, mean=2.0, std=1.5),
    ModelTask("liked", "binary", "satisfaction", loss_weight=2.0),
)


# Liked is only what was clicked.
BOTH = (TASKS[0], TASKS[1], replace(TASKS[2], conditional_on="clicked"))


def random_labels(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (rows, 3), generator=generator).double()
    labels[:, 1] *= 4.5
    observed = torch.rand(rows, 3, generator=generator) < 0.6
    return logits, labels * observed, observed


WEIGHTS = 1 + 9 * torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["rows count alike", "weighted"])
@pytest.mark.parametrize("tasks", [TASKS, BOTH], ids=["apart", "given"])
def test_loss_and_gradients_are_the_references(tasks: tuple[ModelTask, ...], weights: torch.Tensor | None) -> None:
    logits, labels, observed = random_labels(40)
    counts = observed.sum(0) if weights is None else (observed * weights[:, None]).sum(0)
    logits.requires_grad_()
    total, sums = masked_loss(logits, labels, observed, tasks=tasks, global_counts=counts, weights=weights)
    expected, expected_sums = reference_loss(logits, labels, observed, tasks, weights)
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert sums.tolist() == pytest.approx([expected_sum.item() for expected_sum in expected_sums], rel=1e-12)
    left, right = (torch.autograd.grad(item, logits)[0] for item in (total, expected))
    torch.testing.assert_close(left, right, atol=1e-12, rtol=1e-9)
    assert not left[:, 1][~observed[:, 1]].any()


LEARNT = {"task_weighting": "uncertainty"}


LOG_VARIANCES = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> FeatureFolder:
    return write_prepared(tmp_path_factory.mktemp("prepared"), LAYOUT)


def saved_log_variances(folder: Path) -> torch.Tensor:
    """Those of a checkpoint."""
    state = {"model": {"log_variances": torch.zeros(len(LAYOUT.tasks))}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state["model"]["log_variances"]


def test_equals_a_loop_over_tasks() -> None:
    logits, labels, observed = random_labels(40)
    counts = observed.sum(0)
    total, sums = masked_loss(logits, labels, observed, tasks=TASKS, global_counts=counts, log_variances=LOG_VARIANCES)
    expected, naive = 0.0, [item.item() for item in reference_loss(logits, labels, observed, TASKS)[1]]
    for task, s, value, count in zip(TASKS, LOG_VARIANCES.tolist(), naive, counts.tolist(), strict=True):
        likelihood = math.exp(-s) * value / count
        if task.kind == "regression":
            likelihood /= 2
        expected += task.loss_weight * (likelihood + s / 2)
    assert total.item() == pytest.approx(expected)
    assert sums.tolist() == pytest.approx(naive)


def test_an_unobserved_task_adds_exactly_zero() -> None:
    logits, labels, observed = random_labels(10)
    observed[:, 1] = False
    logs = torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64, requires_grad=True)
    total, _ = masked_loss(logits, labels, observed, tasks=TASKS, global_counts=observed.sum(0), log_variances=logs)
    fixed, sums = masked_loss(logits.requires_grad_(), labels, observed, tasks=TASKS, global_counts=observed.sum(0))
    assert total.item() == pytest.approx(fixed.item(), rel=1e-14)
    assert sums[1] == 0
    for loss, values in ((total, logs), (fixed, logits)):
        (gradient,) = torch.autograd.grad(loss, values)
        assert not gradient[..., 1].any()
        assert gradient[..., [0, 2]].any()
    nothing, _ = masked_loss(logits, labels, observed & False, tasks=TASKS, global_counts=torch.zeros(3))
    assert nothing == 0


def test_the_weights_are_learnt_logged_and_left_out_of_the_model(prepared: FeatureFolder, tmp_path: Path) -> None:
    actual = trained(prepared, tmp_path, epochs=2, weight_decay=0.5, **LEARNT)
    logs = saved_log_variances(actual.checkpoint)
    assert logs.all()  # each has moved from 0, if not far: the loss of one may rest near it
    assert logs.abs().max() > 0.1
    assert "log_variances" not in actual.model().state_dict()
    steps = [metrics for _, metrics in actual.logged if "train/learning_rate" in metrics]
    for index, task in enumerate(LAYOUT.tasks):
        half = 0.5 if task.kind == "regression" else 1.0
        last = task.loss_weight * half * math.exp(-logs[index].item())
        assert steps[-1][f"train/{task.name}.weight"] == pytest.approx(last, rel=1e-5)
    # The smaller its loss, the more a task counts.
    losses = actual.result.history[-1][1].loss
    shares = {"click": steps[-1]["train/click.weight"], "rating": steps[-1]["train/rating.weight"] / 0.5}
    smaller, larger = sorted(shares, key=lambda name: losses[name])
    assert losses[smaller] < 0.95 * losses[larger]
    assert shares[smaller] > shares[larger]


def test_weight_decay_leaves_them_alone(prepared: FeatureFolder, tmp_path: Path) -> None:
    with process_group(CPU):
        settings = TRAINING.model_copy(update=LEARNT | {"weight_decay": 0.25})
        trainer = Trainer(prepared, LAYOUT, MODEL, settings, CPU, tmp_path, lambda *_: None)
        decays = {}
        for group in trainer.optimizer.dense.param_groups:
            decays |= dict.fromkeys(map(id, group["params"]), group["weight_decay"])
        for name, parameter in trainer.sharded.dense_parameters().items():
            assert decays.pop(id(parameter)) == (0.0 if name == "log_variances" else 0.25)
        assert not decays


# Predictions begin at the rates of the labels, and are those of the whole log where rows were sampled.

RATED = (
    TaskOutput("click", "binary"),
    TaskOutput("kept", "binary", conditional_on="click"),
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
    actual = base_rates(manifest(labels, rates), RATED, weighted)
    weights = 1 / rates if weighted else np.ones(3_000)
    expected = [((weights * click).sum() + 0.5 * weights.mean()) / (weights.sum() + weights.mean())]
    engaged = click == 1
    expected.append((kept[engaged].sum() + 0.5) / (engaged.sum() + 1))  # clicks weigh 1
    assert actual[:2] == pytest.approx(expected, rel=1e-12)
    assert actual[2:] == [None, None]


def test_a_training_begins_at_the_rates_and_a_regression_at_its_mean(prepared: FeatureFolder, tmp_path: Path) -> None:
    with process_group(CPU):
        trainer = Trainer(prepared, LAYOUT, MODEL, TRAINING, CPU, tmp_path / "checkpoints", lambda *_: None)
        bias = trainer.sharded.model.module.mixture.towers.output_bias.detach()
        rates = base_rates(prepared.manifest, LAYOUT.tasks, weighted=False)
        assert bias[:, 0].tolist() == pytest.approx([logit(rates[0]), logit(rates[1]), 0.0], rel=1e-6)


def train_with_unit(folder: Path, unit: float) -> SmallTraining:
    """By weights that are multiples of a unit."""
    return trained(write_prepared(folder / "data", LAYOUT, unit=unit), folder / "best", epochs=2, **LEARNT)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> SmallTraining:
    return train_with_unit(tmp_path_factory.mktemp("weighted"), 1.0)


@pytest.mark.parametrize("unit", [2.0**20, 1e-20, 7e18])
def test_weights_times_any_constant_train_the_same(weighted: SmallTraining, tmp_path: Path, unit: float) -> None:
    """To the last bit where the constant is a power of two, which rounds nothing."""
    actual = (weighted, train_with_unit(tmp_path, unit))
    left, right = (item.model().state_dict() for item in actual)
    near = 0.0 if math.frexp(unit)[0] == 0.5 else 1e-3
    for key, weight in left.items():
        torch.testing.assert_close(right[key], weight, rtol=near, atol=near, msg=lambda text, key=key: f"{key}: {text}")
    for (_, first), (_, second) in zip(*(item.result.history for item in actual), strict=True):
        assert second.to_metrics() == pytest.approx(first.to_metrics(), rel=near, abs=near)


# Without placement, which would hold a part of the mean.
ONE_TASK = replace(LAYOUTS["no placement"], tasks=LAYOUTS["no placement"].tasks[:1])
KEPT_SHARE = 0.2  # of rows without a click


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> FeatureFolder:
    """Rows with a click, and one in five of the others."""
    prepared = write_prepared(tmp_path_factory.mktemp("sampled"), ONE_TASK)
    for split in ROWS:
        (file,) = prepared.split(split).iterdir()
        table = pq.read_table(file)
        clicked = table["label.click"].to_numpy() == 1
        kept = clicked | (np.random.default_rng(0).random(len(clicked)) < KEPT_SHARE)
        rate = pa.array(np.where(clicked, 1.0, KEPT_SHARE), pa.float32())
        table = table.set_column(table.column_names.index("sampling_rate"), "sampling_rate", rate)
        pq.write_table(table.filter(pa.array(kept)), file, row_group_size=1_000)
    return prepared


def mean_prediction(actual: SmallTraining, whole: ModelLayout) -> tuple[float, float]:
    """Of all validation rows, sampled or not, and their rate of clicks."""
    encoded, labels = learnable_rows(whole, ROWS["validation"], 1)
    logits = actual.model()(make_batch(encoded, whole, torchrec=False)).logits.detach().numpy()[:, 0]
    known = ~np.isnan(labels[:, 0])
    return float((1 / (1 + np.exp(-logits[known]))).mean()), float(labels[known, 0].mean())


def test_predictions_are_those_of_the_whole_log(sampled: FeatureFolder, tmp_path: Path) -> None:
    changes = {"epochs": 4, "monitor": "loss"}
    plain = trained(sampled, tmp_path / "plain", **changes)
    weighted = trained(sampled, tmp_path / "weighted", sampling_correction="weights", **changes)
    predicted, rate = mean_prediction(weighted, ONE_TASK)
    assert predicted == pytest.approx(rate, abs=0.04)
    too_high, _ = mean_prediction(plain, ONE_TASK)
    assert too_high > rate + 0.15
