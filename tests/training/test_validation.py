"""Validation sums against scikit-learn on all predictions at once, and what is said of a validation."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, mean_squared_error, roc_auc_score

from mmoe_rec.batches.batch import Batch
from mmoe_rec.model.mmoe import Outputs
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.routing import Routing
from mmoe_rec.model.utilization import ExpertUtilization
from mmoe_rec.training.distributed import process_group
from mmoe_rec.training.validation import (
    BINS_PER_UNIT,
    MIN_RARER_ROWS,
    Validation,
    explain_choice,
    find_warnings,
    validate,
)
from tests.model.examples import LAYOUT
from tests.training.learnable import CPU, GIVEN

TASKS = len(LAYOUT.tasks)
EXPERTS = 4


class Reported(torch.nn.Module):
    """A model that takes its logits and gates from the batch's dense inputs."""

    experts_in_use = torch.ones(TASKS, EXPERTS, dtype=torch.bool)

    def forward(self, batch: Batch) -> Outputs:
        assert not self.training
        logits, gates = batch.dense[:, :TASKS], batch.dense[:, TASKS:].reshape(-1, TASKS, EXPERTS)
        return Outputs(logits, (Routing(gates, gates, None, gates),))


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(CPU):
        yield


def validated(
    logits: np.ndarray,
    labels: np.ndarray,
    gates: np.ndarray,
    parts: int = 3,
    layout: ModelLayout = LAYOUT,
    weights: np.ndarray | None = None,
) -> Validation:
    """Validates (N, T) logits and labels (NaN is unobserved), (N, T, E) gates, (N,) weights, in batches."""
    model = Reported()
    dense = np.concatenate([logits, gates.reshape(len(logits), -1)], axis=1).astype(np.float32)
    batches = []
    for rows in np.array_split(np.arange(len(logits)), parts):
        known = ~np.isnan(labels[rows])
        label = torch.from_numpy(np.where(known, labels[rows], 0).astype(np.float32))
        weight = None if weights is None else torch.from_numpy(weights[rows])
        seen = torch.from_numpy(known)
        batches.append(Batch(None, torch.from_numpy(dense[rows]), label, seen, weights=weight))
    for batch in batches:
        batch.to = lambda device, non_blocking, batch=batch: batch  # type: ignore[method-assign, misc]
    actual = validate(model, batches, layout, CPU)  # type: ignore[arg-type]
    assert model.training
    return actual


def example(rows: int = 3_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random logits, labels that go along with them, and gates."""
    random = np.random.default_rng(4)
    logits = random.normal(0, 2, (rows, TASKS)).astype(np.float32)
    labels = (logits + random.logistic(size=logits.shape) > 0).astype(np.float32)
    labels[:, 2] = logits[:, 2] + random.normal(size=rows)
    labels[random.random(labels.shape) < 0.4] = np.nan
    return logits, labels, random.dirichlet(np.ones(EXPERTS), (rows, TASKS)).astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_and_areas_equal_scikit_learn(weighted: bool) -> None:
    logits, labels, gates = example()
    weights = np.random.default_rng(5).uniform(1, 9, len(logits)) if weighted else None
    actual = validated(logits, labels, gates, weights=weights)
    for index, task in enumerate(LAYOUT.tasks):
        known = ~np.isnan(labels[:, index])
        predicted, label = logits[known, index].astype(np.float64), labels[known, index]
        weight = None if weights is None else weights[known]
        if task.kind == "regression":
            expected = mean_squared_error(label, predicted, sample_weight=weight) / task.std**2
        else:
            expected = log_loss(label, 1 / (1 + np.exp(-predicted)), sample_weight=weight)
            # Exact up to ties within a bin of 1/256.
            area = roc_auc_score(label, np.floor(predicted * BINS_PER_UNIT), sample_weight=weight)
            assert actual.auc[task.name] == pytest.approx(area, abs=1e-12)
            assert area == pytest.approx(roc_auc_score(label, predicted, sample_weight=weight), abs=2e-4)
            probability = np.average(1 / (1 + np.exp(-predicted)), weights=weight)
            calibration = probability / np.average(label, weights=weight)
            assert actual.calibration[task.name] == pytest.approx(calibration, rel=1e-6)
            # Whether labels are enough is told by rows, whatever their weights.
            assert actual.rarer_label_rows[task.name] == min((label == 0).sum(), (label == 1).sum())
        assert actual.loss[task.name] == pytest.approx(expected, rel=1e-6)
    assert set(actual.auc) == set(actual.calibration) == set(actual.rarer_label_rows) == {"click", "like"}


def test_a_task_with_given_is_judged_by_both_labels() -> None:
    logits, labels, gates = example()
    labels[labels[:, 0] == 0, 1] = 0.0
    labels[np.isnan(labels[:, 0]), 1] = np.nan
    actual = validated(logits, labels, gates, layout=GIVEN)
    click, like = (1 / (1 + np.exp(-logits[:, task].astype(np.float64))) for task in (0, 1))
    known = ~np.isnan(labels[:, 1])
    assert set(actual.loss) == {"click", "click_and_like", "rating"}
    assert actual.loss["click_and_like"] == pytest.approx(log_loss(labels[known, 1], (click * like)[known]), rel=1e-6)
    clicked = known & (labels[:, 0] == 1)
    assert actual.auc["like"] == pytest.approx(roc_auc_score(labels[clicked, 1], like[clicked]), abs=5e-5)
    expected = actual.loss["click"] + 2 * actual.loss["click_and_like"] + 0.5 * actual.loss["rating"]
    assert actual.objective("loss", GIVEN) == pytest.approx(-expected)
    assert actual.objective("auc", GIVEN) == pytest.approx((actual.auc["click"] + actual.auc["like"]) / 2)


def test_rows_without_labels_change_nothing_and_neither_do_batches() -> None:
    logits, labels, gates = example(400)
    plain = validated(logits, labels, gates, parts=1)
    np.testing.assert_allclose(plain.experts.weights, gates[~np.isnan(labels).all(1)].mean(0), rtol=1e-6)
    more = [np.concatenate([item, item[:90]]) for item in (logits, labels, gates)]
    more[1][400:] = np.nan
    padded = validated(*more, parts=7)
    assert padded.loss == pytest.approx(plain.loss, rel=1e-12)
    assert padded.auc == plain.auc
    torch.testing.assert_close(padded.experts.weights, plain.experts.weights)


def test_one_class_gives_no_auc_but_a_loss() -> None:
    logits, labels, gates = example(300)
    labels[:, 0] = np.where(np.isnan(labels[:, 0]), np.nan, 0)
    actual = validated(logits, labels, gates)
    assert set(actual.auc) == {"like"}
    assert set(actual.loss) == {"click", "like", "rating"}
    assert actual.objective("auc", LAYOUT) == actual.auc["like"]


def test_huge_logits_count_at_the_ends() -> None:
    _, labels, gates = example(200)
    signs = np.where(np.isnan(labels), 0, 2 * (labels > 0) - 1)
    assert validated(signs * 1e6, labels, gates).auc == {"click": 1.0, "like": 1.0}
    assert validated(signs * -1e6, labels, gates).auc == {"click": 0.0, "like": 0.0}


def test_an_auc_of_few_rows_of_a_label_has_no_say() -> None:
    logits, labels, gates = example(2_000)
    rare = np.flatnonzero(labels[:, 0] == 1)[MIN_RARER_ROWS - 1 :]
    labels[rare, 0] = 0.0
    actual = validated(logits, labels, gates)
    assert actual.rarer_label_rows["click"] == MIN_RARER_ROWS - 1
    assert actual.tasks_monitored_by_auc("auc") == ["like"]
    assert actual.objective("auc", LAYOUT) == actual.auc["like"]
    labels[:, 1] = labels[:, 0]
    alone = validated(logits, labels, gates)
    assert alone.tasks_monitored_by_auc("auc") == []
    assert alone.objective("auc", LAYOUT) == alone.objective("loss", LAYOUT) < 0


EVEN_GATES = ExpertUtilization(torch.full((1, 2), 0.5), torch.full((1, 2), 0.5))


def build_validation(**changes: dict) -> Validation:
    """A validation of two tasks without anything to say, but for what is changed."""
    good = {"calibration": {"click": 1.1, "like": 0.9}, "rarer_label_rows": {"click": 900, "like": 500}}
    return Validation({"click": 0.4}, **{"auc": {"click": 0.7, "like": 0.8}, "experts": EVEN_GATES, **good, **changes})


def test_the_rule_that_chose_is_named() -> None:
    three = build_validation(auc={"click": 0.7, "like": 0.8, "stay": 0.6})
    start = "best validation, at step 7: "
    assert explain_choice(three, 7, "auc") == [f"{start}the mean AUC of click, like and stay is the highest"]
    assert explain_choice(build_validation(), 7, "loss") == [f"{start}the weighted loss is the lowest"]
    few = build_validation(rarer_label_rows={"click": 13, "like": 500})
    assert explain_choice(few, 7, "auc") == [
        f"{start}the AUC of like is the highest",
        f"the AUC of 'click' was ignored: 13 selection rows have its rarer label, at least {MIN_RARER_ROWS} are needed",
    ]


def test_an_auc_below_chance_is_reported() -> None:
    (good,) = find_warnings(
        build_validation(auc={"click": 0.998, "like": 0.8}, rarer_label_rows={"click": 500, "like": 500}), "none"
    )
    assert "the validation AUC of 'click' is 0.9980, too good to be true" in good
    assert find_warnings(build_validation(auc={"click": 0.998}, rarer_label_rows={"click": 13}), "none") == []
    (few,) = find_warnings(
        build_validation(auc={"click": 0.478, "like": 0.8}, rarer_label_rows={"click": 13, "like": 500}), "none"
    )
    assert few.startswith(
        "the validation AUC of 'click' is 0.478, below .5, which is no better than chance. Its rarer label may have "
        "too few rows (13)"
    )


@pytest.mark.parametrize(
    ("ratio", "rows", "message"),
    [(11.0, 130, True), (0.3, 130, True), (1.9, 10_000, False), (0.55, 10_000, False), (2.5, 3, False), (0.0, 9, True)],
)
def test_probabilities_far_from_what_was_observed_are_reported(ratio: float, rows: int, message: bool) -> None:
    """2.5 times 3 rows may be chance."""
    validation = build_validation(calibration={"click": ratio}, rarer_label_rows={"click": rows})
    for calibration, advice in (
        ("none", "set training.calibration to"),
        ("isotonic", "the isotonic calibration was"),
    ):
        warnings = find_warnings(validation, calibration)
        assert bool(warnings) == message
        assert all("probabilities of 'click'" in warning and f"{ratio:.2f} times" in warning for warning in warnings)
        assert all(advice in warning for warning in warnings)
