"""Fits of calibration against closed forms, the equations of the likelihood and a naive isotonic regression."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from sklearn.metrics import log_loss, roc_auc_score

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation import calibration as module
from mmoe_rec.evaluation.calibration import MIN_SLOPE, fit_calibration, fit_isotonic, fit_temperature
from mmoe_rec.features.layout import TaskOutput
from mmoe_rec.model.score import TaskCalibration

TASK = TaskOutput("click", "binary")


def drawn(true_logit: np.ndarray, seed: int = 0) -> np.ndarray:
    """Labels (0.0 or 1.0) of these logits."""
    return (np.random.default_rng(seed).random(len(true_logit)) < expit(true_logit)).astype(float)


def calibrated(fit: TaskCalibration | None, x: np.ndarray) -> np.ndarray:
    return fit.apply(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("seed", range(3))
def test_temperature_solves_the_equations_of_the_likelihood(seed: int) -> None:
    random = np.random.default_rng(seed)
    x, w = random.normal(-2, 2, 3000), random.exponential(size=3000) + 0.1
    y = drawn(0.6 * x - 0.4, seed)
    error = w * (expit(calibrated(fit_temperature(x, y, w), x)) - y)
    assert abs(error.sum()) < 1e-5 * w.sum()
    assert abs(error @ x) < 1e-5 * w.sum()


def naive_steps(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> list[list[int]]:
    """Pool adjacent violators, one pair at a time: rows of each step."""
    steps = [[row] for row in np.argsort(x, kind="stable").tolist()]

    def rate(step: list[int]) -> float:
        return float(w[step] @ y[step] / w[step].sum())

    while bad := [i for i in range(len(steps) - 1) if rate(steps[i]) >= rate(steps[i + 1])]:
        steps[bad[0] : bad[0] + 2] = [steps[bad[0]] + steps[bad[0] + 1]]
    if len(steps) > 1 and rate(steps[0]) == 0:
        steps[:2] = [steps[0] + steps[1]]
    if len(steps) > 1 and not (1 - y[steps[-1]]).any():
        steps[-2:] = [steps[-2] + steps[-1]]
    return steps


@pytest.mark.parametrize("seed", range(4))
def test_isotonic_knots_are_the_middles_of_naive_steps(seed: int) -> None:
    random = np.random.default_rng(seed)
    x, w = random.normal(-1, 2, 250), random.integers(1, 5, 250).astype(float)
    y = drawn(0.5 * x + np.sin(2 * x), seed)
    steps = naive_steps(x, y, w)
    assert len(steps) > 4
    before = [logit(np.average(expit(x[step]), weights=w[step])) for step in steps]
    after = [logit(np.average(y[step], weights=w[step])) for step in steps]
    assert min((b - a) / (d - c) for (a, b), (c, d) in zip(pairwise(after), pairwise(before), strict=True)) > MIN_SLOPE
    fit = fit_isotonic(x, y, w)
    np.testing.assert_allclose(fit.logits, before, atol=1e-9)
    np.testing.assert_allclose(fit.calibrated, after, atol=1e-9)
    assert fit.slope == 1


@pytest.mark.parametrize("form", ["rising", "flat", "falling", "steps"])
def test_the_order_stays_in_float32_whatever_the_labels(form: str) -> None:
    x = np.random.default_rng(6).normal(0, 3, 40_000)
    truth = {"rising": x, "flat": 0 * x, "falling": -x, "steps": np.sign(x)}[form]
    fit = fit_isotonic(x, drawn(truth), np.ones(len(x)))
    later = np.random.default_rng(7).normal(0, 3, 40_000).astype(np.float32)
    after = calibrated(fit, later)
    assert after.dtype == np.float32
    assert (np.diff(after[np.argsort(later)]) >= 0).all()
    assert len(np.unique(after)) > 0.95 * len(np.unique(later))
    second = drawn(later, 8)
    assert roc_auc_score(second, after) == pytest.approx(roc_auc_score(second, later), abs=1e-6)


def test_a_flat_stretch_keeps_a_slope() -> None:
    """Rates of 0.3, 0.3001 and 0.8 at three logits: isotonic regression's second step is next to level."""
    rows, positives = 10_000, (3000, 3001, 8000)
    x = np.repeat([-3.0, 2.0, 4.0], rows)
    y = np.concatenate([np.repeat([1.0, 0.0], [positive, rows - positive]) for positive in positives])
    fit = fit_isotonic(x, y, np.ones(len(y)))
    slopes = np.diff(fit.calibrated) / np.diff(fit.logits)
    assert slopes[0] == pytest.approx(MIN_SLOPE)
    assert fit.calibrated[::2] == (pytest.approx(logit(0.3)), pytest.approx(logit(0.8)))


def test_labels_distinguished_without_an_error_stay_between_0_and_1() -> None:
    x = np.linspace(-3, 3, 5000)
    fit = fit_isotonic(x, (x > 1).astype(float), np.ones(len(x)))
    assert fit.logits == (pytest.approx(logit(expit(x).mean())),)
    assert fit.calibrated == (pytest.approx(logit((x > 1).mean())),)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_each_binary_task_is_fitted_on_its_observed_rows(method: module.CalibrationMethod) -> None:
    tasks = [TASK, TaskOutput("spent", "regression"), TaskOutput("liked", "binary")]
    random = np.random.default_rng(10)
    logits = random.normal(size=(20_000, 3)).astype(np.float32)
    labels = np.stack([drawn(logits[:, i] - 1, seed=i) for i in range(3)], axis=1).astype(np.float32)
    labels[random.random(labels.shape) < 0.3] = np.nan
    weights = random.exponential(size=len(labels)) + 0.5
    actual, left = fit_calibration(method, tasks, logits, labels, weights)
    assert list(actual.tasks) == ["click", "liked"]
    assert left == []
    for index in (0, 2):
        known = ~np.isnan(labels[:, index])
        x, y = (item[known, index].astype(float) for item in (logits, labels))
        alone = getattr(module, f"fit_{method}")(x, y, weights[known])
        assert actual.tasks[tasks[index].name] == alone
    plain, _ = fit_calibration(method, tasks, logits, labels)
    assert plain.tasks.keys() == actual.tasks.keys()
    assert plain != actual


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        (np.linspace(-1, 1, 5000), np.arange(5000) < 99, "99 observed selection rows have its rarer label"),
        (np.linspace(-1, 1, 5000), np.ones(5000), "0 observed selection rows have its rarer label"),
        (np.linspace(-1, 1, 5000), np.full(5000, np.nan), "0 observed selection rows have its rarer label"),
        (np.linspace(-1, 1, 5000), drawn(-np.linspace(-1, 1, 5000)), "do not rise with the label"),
        (np.linspace(-1, 1, 5000), np.linspace(-1, 1, 5000) > 0, "tell the labels apart without an error"),
        (np.linspace(-1, 1, 5000), np.linspace(-1, 1, 5000) < 0, "do not rise with the label"),
        (np.zeros(5000), np.arange(5000) % 2, "do not rise with the label"),
    ],
)
def test_a_task_that_cannot_be_fitted_is_named(x: np.ndarray, y: np.ndarray, sentence: str) -> None:
    actual, (message,) = fit_calibration("temperature", [TASK], x[:, None], y[:, None].astype(float))
    assert not actual.tasks
    assert message.startswith("task 'click' is not calibrated: ")
    assert sentence in message


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_what_drifts_is_not_calibrated_by_the_past(method: module.CalibrationMethod) -> None:
    """Logits that are too high by as much as they become too low later, in rows of any order."""
    random = np.random.default_rng(4)
    x, times = random.normal(size=40_000), random.permutation(40_000)
    for later, drifts in ((-0.8, True), (0.8, False), (0.0, True)):
        y = drawn(x - np.where(times < 20_000, 0.8, later), seed=1).astype(float)
        actual, left = fit_calibration(method, [TASK], x[:, None], y[:, None], None, times)
        assert bool(actual.tasks) != drifts
        assert len(left) == drifts
        late = times >= 20_000
        fitted = fit_calibration(method, [TASK], x[~late][:, None], y[~late][:, None])[0].tasks["click"]
        losses = [log_loss(y[late], expit(item[late])) for item in (calibrated(fitted, x), x)]
        assert (losses[0] > losses[1]) == drifts
        if drifts:
            assert f"(logloss {losses[0]:.4g} instead of {losses[1]:.4g}): it drifts" in left[0]


def test_diverged_logits_are_refused() -> None:
    with pytest.raises(UserError, match="training diverged"):
        fit_calibration("temperature", [TASK], np.array([[np.nan], [0.0]]), np.array([[1.0], [0.0]]))
