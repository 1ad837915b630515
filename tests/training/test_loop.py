"""The training loop on rows that can be learnt from, judged by scikit-learn on the plain model that it leaves."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, mean_squared_error, roc_auc_score

from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.errors import UserError
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.utilization import ExpertUtilization
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.model import Gates, Model
from mmoe_rec.training import loop
from mmoe_rec.training.distributed import process_group
from mmoe_rec.training.loop import Meter, Trainer, TrainingResult
from mmoe_rec.training.losses import masked_loss
from mmoe_rec.training.steps import has_improved, learning_rate_fraction
from mmoe_rec.training.validation import Validation
from tests.model.examples import LAYOUT, is_weight
from tests.training.learnable import (
    CPU,
    LAYOUTS,
    MODEL,
    ROWS,
    TRAINING,
    SmallTraining,
    layout_of,
    learnable_rows,
    plain_model,
    scores,
    trained,
    write_prepared,
)
from tests.training.ranks import save_weights

STEPS = ROWS["train"] // TRAINING.batch_size
DROPS = Model.model_validate(
    MODEL.model_dump() | {"gates": {"dropout": 0.2}, "placement": {"units": [4], "dropout": 0.3}}
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> FeatureFolder:
    return write_prepared(tmp_path_factory.mktemp("prepared"), LAYOUT)


@contextmanager
def trainer(prepared: FeatureFolder, folder: Path, **changes: object) -> Iterator[Trainer]:
    """A trainer whose steps a test takes itself."""
    with process_group(CPU):
        yield Trainer(
            prepared, layout_of(prepared), MODEL, TRAINING.model_copy(update=changes), CPU, folder, lambda *_: None
        )


def meter(left: Trainer) -> Meter:
    """One that nobody reads."""
    return Meter(left.layout, left.world_size)


def weights(left: Trainer, folder: Path) -> dict[str, torch.Tensor]:
    """Name -> copy of every weight, tables included."""
    save_weights(left.sharded.model, folder)
    return {name: item.clone() for name, item in plain_model(left.layout, folder).state_dict().items()}


# Batches


def test_an_automatic_batch_follows_from_the_training_rows(
    prepared: FeatureFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with trainer(prepared, tmp_path / "auto", batch_size="auto") as left:
        left.announce()
        assert (left.batch_size, left.reader.batch_size, left.total_steps) == (64, 64, math.ceil(ROWS["train"] / 64))
    assert "188 steps of 64 rows\n" in capsys.readouterr().err


# Learning rates


def test_learning_rates_rise_in_a_line_and_fall_in_a_cosine() -> None:
    shares = [learning_rate_fraction(step, 110, 10 / 110) for step in range(110)]
    np.testing.assert_allclose(shares[:10], np.arange(1, 11) / 11)
    assert shares[10] == 1.0
    expected = [0.01 + 0.99 * (1 + math.cos(math.pi * done / 100)) / 2 for done in range(100)]
    np.testing.assert_allclose(shares[10:], expected)
    assert learning_rate_fraction(60, 110, 10 / 110) == pytest.approx(0.01 + 0.99 / 2)
    assert 0.01 <= shares[-1] < 0.012
    assert learning_rate_fraction(110, 110, 10 / 110) == pytest.approx(0.01)


def test_tables_take_the_schedules_rate_in_the_same_step(prepared: FeatureFolder, tmp_path: Path) -> None:
    """The first update of a row by row-wise Adagrad has a root mean square of exactly the learning rate."""
    looked_at = tuple(f"{item.table}.weight" for item in LAYOUT.ids if item.feature == "history")
    with trainer(prepared, tmp_path / "best", warmup_fraction=0.5) as left:
        before = first = weights(left, tmp_path / "now")
        for step, batch in enumerate(left._batches(left.reader, left.position, 1)):
            left._step(iter([batch]), meter(left))
            after = weights(left, tmp_path / "now")
            updates = []
            # What attention alone looks at has hardly a gradient at first, beside which the epsilon counts.
            for name in (name for name in after if name.startswith("tables.") and not name.endswith(looked_at)):
                fresh = (before[name] == first[name]).all(1) & (after[name] != before[name]).any(1)
                updates.append((after[name] - before[name])[fresh].square().mean(1).sqrt())
            rate = TRAINING.table_learning_rate * learning_rate_fraction(step, STEPS, 0.5)
            update = torch.cat(updates)
            assert len(update) > 0
            assert float(update.median()) == pytest.approx(rate, rel=1e-3)
            before = after
            if step == 2:
                break
        assert rate > 2 * TRAINING.table_learning_rate * learning_rate_fraction(0, STEPS, 0.5)


# A step is one of the plain gradient, and a bad one ends the training.


def batch_of(left: Trainer, seed: int, torchrec: bool = True) -> Batch:
    encoded, labels = learnable_rows(LAYOUT, 60, seed)
    return replace(make_batch(encoded, LAYOUT, labels, torchrec=torchrec), position=left.position)


def test_a_step_is_that_of_the_plain_gradient(prepared: FeatureFolder, tmp_path: Path) -> None:
    """The first step of row-wise Adagrad is the rate times each row's gradient over its root mean square."""
    with trainer(prepared, tmp_path / "best", max_grad_norm=1e9, warmup_fraction=0.0) as left:
        save_weights(left.sharded.model, tmp_path / "before")
        batch = batch_of(left, 7)
        left._step(iter([batch]), meter(left))
        after = weights(left, tmp_path / "after")
        model = plain_model(LAYOUT, tmp_path / "before").train()
        plain = batch_of(left, 7, torchrec=False)
    counts = plain.observed.sum(0)
    logits = model(plain).logits
    masked_loss(logits, plain.labels, plain.observed, tasks=LAYOUT.tasks, global_counts=counts)[0].backward()
    compared = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient, before = parameter.grad, parameter.detach()
        if name.startswith("tables."):
            size = gradient.square().mean(1, keepdim=True).sqrt()
            moved = (size > 1e-5).flatten()  # below, the optimizer's epsilon counts
            expected = before - TRAINING.table_learning_rate * gradient / size.clamp(min=1e-30)
        else:
            moved = gradient.abs() > 1e-5
            rate, decay = TRAINING.learning_rate, TRAINING.weight_decay
            expected = before * (1 - rate * decay) - rate * gradient.sign()
        compared += int(moved.sum())
        torch.testing.assert_close(after[name][moved], expected[moved], atol=2e-4, rtol=1e-3, msg=name)
    assert compared > 300


def test_a_gradient_that_is_not_finite_ends_the_training(prepared: FeatureFolder, tmp_path: Path) -> None:
    with trainer(prepared, tmp_path / "best") as left:
        left._step(iter([batch_of(left, 1)]), meter(left))
        before = {name: item.detach().clone() for name, item in left.sharded.dense_parameters().items()}
        # Only a dense weight's own gradient is bad; what goes on to the tables is finite.
        parameter = next(item for name, item in left.sharded.dense_parameters().items() if "towers" in name)
        parameter.register_hook(lambda gradient: gradient * float("nan"))
        with pytest.raises(UserError, match="the gradient of step 2 is not finite"):
            left._step(iter([batch_of(left, 2)]), meter(left))
        assert all(torch.equal(before[name], item) for name, item in left.sharded.dense_parameters().items())


def test_rows_without_labels_do_not_count_in_balance(prepared: FeatureFolder, tmp_path: Path) -> None:
    """The reader fills the last batch of an epoch with such copies."""
    encoded, labels = learnable_rows(LAYOUT, 80, seed=7)
    labels[50:] = np.nan
    encoded.dense[50:] = 3.0
    whole = make_batch(encoded, LAYOUT, labels, torchrec=True)
    alone = make_batch(encoded.take(np.arange(50)), LAYOUT, labels[:50], torchrec=True)
    actual = {}
    for name, batch, gates_settings in (
        ("whole", whole, Gates(balance="loss", balance_weight=20.0, z_loss=5.0)),
        ("alone", alone, Gates(balance="loss", balance_weight=20.0, z_loss=5.0)),
        ("unbalanced", alone, Gates()),
    ):
        with trainer(prepared, tmp_path / "best", warmup_fraction=0.0) as left:
            left.steps._gates = gates_settings
            left._step(iter([replace(batch, position=left.position)]), meter(left))
            actual[name] = weights(left, tmp_path / name)
    for key, weight in actual["whole"].items():
        torch.testing.assert_close(weight, actual["alone"][key], atol=1e-5, rtol=0, msg=key)
    gates = "mixture.levels.0.gates.linear.weight"
    assert (actual["alone"][gates] - actual["unbalanced"][gates]).abs().max() > 1e-3


# What is left at the end


def judge(actual: SmallTraining) -> dict[str, float]:
    """Compares the validation's numbers with scikit-learn's on the plain model; task -> AUC, or R2 of a regression."""
    logits, labels = scores(actual.model(), actual.prepared)
    best = actual.result.best
    assert best is not None
    quality = {}
    for index, task in enumerate(actual.prepared.layout.tasks):
        known = ~np.isnan(labels[:, index])
        predicted, label = logits[known, index].astype(np.float64), labels[known, index]
        if task.kind == "regression":
            error = mean_squared_error(label, predicted)
            assert best.loss[task.name] == pytest.approx(error / task.std**2, rel=1e-4)
            quality[task.name] = 1 - error / float(label.var())
        else:
            assert best.loss[task.name] == pytest.approx(log_loss(label, 1 / (1 + np.exp(-predicted))), rel=1e-4)
            assert best.auc[task.name] == pytest.approx(roc_auc_score(label, predicted), abs=3e-4)
            quality[task.name] = best.auc[task.name]
    assert set(best.auc) == {task.name for task in actual.prepared.layout.tasks if task.kind == "binary"}
    return quality


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "everything" else pytest.mark.thorough) for name in LAYOUTS]
)
def test_every_layout_learns_and_validates_as_scikit_learn(name: str, tmp_path: Path) -> None:
    layout: ModelLayout = LAYOUTS[name]
    prepared = write_prepared(tmp_path / "data", layout)
    least = {task.name: 0.05 if task.kind == "regression" else 0.75 for task in layout.tasks}
    # Of tasks that have nothing in common, one may wait long until a small model has room for it: the least rounding,
    # and so the processor, decides when.
    for epochs in (8, 24) if name == "no dense" else (4, 8, 24):
        actual = trained(prepared, tmp_path / f"best{epochs}", epochs=epochs)
        quality = judge(actual)
        if all(quality[task] > least[task] for task in least):
            break
    else:
        raise AssertionError(quality)
    assert [step for step, _ in actual.result.history] == [STEPS * epoch for epoch in range(1, epochs + 1)]
    assert actual.result.steps == epochs * STEPS
    assert 0 <= actual.result.data_wait_fraction <= 1
    assert actual.result.rows_per_s > 0
    assert len(actual.result.plan.splitlines()) == len({item.table for item in layout.ids})


@pytest.mark.thorough
def test_bf16_trains_as_well_as_fp32(prepared: FeatureFolder, tmp_path: Path) -> None:
    precise = judge(trained(prepared, tmp_path / "fp32", DROPS, epochs=4))
    coarse = judge(trained(prepared, tmp_path / "bf16", DROPS, precision="bf16", epochs=4))
    assert precise["click"] > 0.75
    assert coarse != precise
    assert coarse == pytest.approx(precise, abs=0.02)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(prepared: FeatureFolder, tmp_path: Path) -> None:
    models = [trained(prepared, tmp_path / f"{i}", DROPS, seed=seed).model() for i, seed in enumerate((3, 3, 4))]
    once, again, second = (model.state_dict() for model in models)
    assert all(torch.equal(weight, again[name]) for name, weight in once.items())
    assert all(torch.equal(weight, second[name]) != is_weight(name) for name, weight in once.items())


def test_metrics_are_logged_on_the_way(prepared: FeatureFolder, tmp_path: Path) -> None:
    actual = trained(prepared, tmp_path / "best", epochs=2, validations_per_epoch=3)
    train = [(step, metrics) for step, metrics in actual.logged if "train/learning_rate" in metrics]
    assert [step for step, _ in train] == list(range(25, 401, 25))
    for step, metrics in train:
        share = learning_rate_fraction(step - 1, 2 * STEPS, TRAINING.warmup_fraction)
        assert metrics["train/learning_rate"] == pytest.approx(TRAINING.learning_rate * share)
        assert 0 <= metrics["train/data_wait_fraction"] <= 1
        assert {f"train/{task.name}.loss" for task in LAYOUT.tasks} <= set(metrics)
    assert train[-1][1]["train/click.loss"] < train[0][1]["train/click.loss"]
    validations = [(step, metrics) for step, metrics in actual.logged if "train/learning_rate" not in metrics]
    assert [step for step, _ in validations] == [67, 133, 200, 267, 333, 400]
    assert all({"validation/click.auc", "validation/rating.loss"} <= set(metrics) for _, metrics in validations)


# The best model


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[float, float]]:
    """(AUC, loss) that the validations find, one after the other; each also saves the weights of its moment."""
    actual: list[tuple[float, float]] = []
    message = iter(range(100))

    def validate(model: torch.nn.Module, *_: object) -> Validation:
        number = next(message)
        area, loss = actual[number]
        save_weights(model, tmp_path / f"moment{number}")
        losses = {task.name: loss for task in LAYOUT.tasks}
        return Validation(
            losses, {"click": area, "like": area}, ExpertUtilization(*torch.zeros(2, len(LAYOUT.tasks), 2))
        )

    monkeypatch.setattr(loop, "validate", validate)
    return actual


@pytest.mark.parametrize(("monitor", "best"), [("auc", 1), ("loss", 2)])
def test_the_best_model_is_kept(
    prepared: FeatureFolder, tmp_path: Path, scripted: list[tuple[float, float]], monitor: str, best: int
) -> None:
    scripted += [(0.6, 0.9), (0.8, 0.8), (0.7, 0.3), (0.8, 0.7), (0.5, 0.9)]
    actual = trained(prepared, tmp_path / "best", validations_per_epoch=5, monitor=monitor)
    assert actual.result.best_step == (best + 1) * STEPS // 5
    assert actual.result.best is actual.result.history[best][1]
    assert not actual.result.stopped_early
    kept = actual.model().state_dict()
    for number in range(5):
        moment = plain_model(LAYOUT, tmp_path / f"moment{number}").state_dict()
        same = all(torch.equal(weight, moment[name]) for name, weight in kept.items())
        assert same == (number == best)


def test_a_number_of_epochs_is_trained_to_its_end(
    prepared: FeatureFolder, tmp_path: Path, scripted: list[tuple[float, float]]
) -> None:
    scripted += [(0.6, 0), (0.7, 0), (0.65, 0), (0.69, 0), (0.6, 0), (0.6, 0)]
    actual = trained(prepared, tmp_path / "best", epochs=3, validations_per_epoch=2)
    assert not actual.result.stopped_early
    assert actual.result.steps == 3 * STEPS
    assert actual.result.best_step == STEPS


def last_epoch(curve: list[list[float]]) -> int:
    """The epoch after which `epochs: auto` stops, from the values of each epoch's validations."""
    best = None
    for epoch, values in enumerate(curve, 1):
        if best is not None and max(values) < best + 0.0005 * abs(best):
            return epoch
        best = max([*values] if best is None else [*values, best])
    return len(curve)


@pytest.mark.parametrize("monitor", ["auc", "loss"])
def test_training_stops_after_an_epoch_without_gain(monitor: str) -> None:
    """Only validations decide: the loop takes no step here."""
    random, epochs, left = np.random.default_rng(3), set(), Trainer.__new__(Trainer)
    left.settings = TRAINING.model_copy(update={"epochs": "auto", "monitor": monitor})
    left.layout, left.cycle_steps, left.total_steps = replace(LAYOUT, tasks=LAYOUT.tasks[:1]), 30, 600
    for halving in np.linspace(0, 0.97, 50):
        curve = 0.7 + 0.2 * (1 - halving ** np.arange(20)[:, None]) + random.normal(0, 0.001, (20, 3))
        left.result, stops = TrainingResult(""), []
        for number, value in enumerate(curve.ravel().tolist(), 1):
            validation = Validation({"click": -value}, {"click": value}, ExpertUtilization(*torch.zeros(2, 1, 2)))
            left.result.history.append((10 * number, validation))
            left.result.steps = 10 * number
            stops += [left.result.steps] * left._stops_early()
        epochs.add(last_epoch(curve.tolist()))
        assert min([*stops, 600]) == 30 * last_epoch(curve.tolist())
    assert {3, 20} < epochs


def test_learning_rates_rise_and_fall_in_each_epoch(
    prepared: FeatureFolder, tmp_path: Path, scripted: list[tuple[float, float]], capsys: pytest.CaptureFixture
) -> None:
    scripted += [(0.6, 0), (0.7, 0), (0.69, 0), (0.72, 0), (0.7202, 0), (0.7, 0), (0.99, 0)]
    actual = trained(prepared, tmp_path / "best", epochs="auto", validations_per_epoch=2)
    assert f"{STEPS} steps of 60 rows per epoch, until" in capsys.readouterr().err
    assert actual.result.stopped_early
    assert actual.result.steps == 3 * STEPS
    assert actual.result.best_step == 5 * STEPS // 2, "the best state is kept, though its gain was too small to go on"
    rates = {
        step: metrics["train/learning_rate"] for step, metrics in actual.logged if "train/learning_rate" in metrics
    }
    expected = [
        TRAINING.learning_rate * learning_rate_fraction(step - 1, STEPS, TRAINING.warmup_fraction)
        for step in range(25, STEPS + 1, 25)
    ]
    assert list(rates.values()) == pytest.approx(3 * expected)


def test_a_warm_start_is_the_first_to_compare_with() -> None:
    assert has_improved({0: 0.7}, -30)
    assert not has_improved({0: 0.7, 30: 0.7003}, 0)
    assert has_improved({0: 0.7, 30: 0.7004}, 0)
