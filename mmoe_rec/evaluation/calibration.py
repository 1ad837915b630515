"""Fit calibrations (`mmoe_rec.model.score`) on rows that the model was not trained on.

`fit_temperature` fits slope x logit + offset by logistic regression of the label on the logit (Platt, 1999). It is
temperature scaling (Guo et al., ICML 2017) with an offset, because all predictions may also be too high or too low. It
has only two parameters, so few rows are enough.

`fit_isotonic` starts from isotonic regression, the rising step function with the least squared error (Zadrozny and
Elkan, KDD 2002). It can fit any rising relation, and needs thousands of rows. Rows on one step would get equal
predictions, although the model distinguishes them. Each step is therefore replaced by one point, and lines with a slope
of at least `MIN_SLOPE` connect the points.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.batches.encoded_dataset import EncodedDataset
from mmoe_rec.devices import device_of, keeping_freed_memory
from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import TaskOutput
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import Calibration, TaskCalibration
from mmoe_rec.progress import bar
from mmoe_rec.task_kinds import DEFAULT_KIND

CalibrationMethod = Literal["temperature", "isotonic"]
# Minimum number of rows with the rarer label. The relative standard error of the label's rate is then 10% or 3%.
MIN_LABELS = {"temperature": 100, "isotonic": 1000}
# Minimum slope of an isotonic fit. Logits that differ by 1e-4 then still differ in float32.
MIN_SLOPE = 0.01
# Larger logits don't change a probability, and the exponential of far larger logits overflows float64.
_LARGEST_LOGIT = 100.0


def fit_calibration(
    method: CalibrationMethod,
    tasks: Sequence[TaskOutput],
    logits: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    times: np.ndarray | None = None,
) -> tuple[Calibration, list[str]]:
    """Fit the calibration of all binary tasks, each on its observed rows.

    Args:
        method: `temperature` or `isotonic`.
        tasks: T tasks. Regressions are skipped.
        logits: Logits of the model, shape (N, T).
        labels: Labels 0 or 1 of binary tasks, NaN if unobserved, shape (N, T).
        weights: Positive weights of the rows, shape (N,), None for equal weights.
        times: Times of the requests, shape (N,). A task drifts if a fit on the earlier half of its rows makes the later
            half worse, and is then not calibrated. None skips this test.

    Returns:
        The calibration, and a sentence with the reason for each binary task that is not calibrated.

    Raises:
        UserError: A logit is not a finite number.
    """
    if not np.isfinite(logits).all():
        raise UserError("validation predictions hold NaN or infinity: training diverged; lower the learning rates")
    calibrated, left = {}, []
    for index, task in enumerate(tasks):
        if not task.kind.is_binary:
            continue
        observed = ~np.isnan(labels[:, index])
        x, y = logits[observed, index].astype(np.float64), labels[observed, index].astype(np.float64)
        observed_weights = np.ones(len(y)) if weights is None else weights[observed].astype(np.float64)
        rarer = task.kind.count_minority(y)
        if rarer < MIN_LABELS[method]:
            reason = f"{rarer:,} observed selection rows have its rarer label, {method} needs {MIN_LABELS[method]:,}"
        elif (fitted := _FITS[method](x, y, observed_weights)) is None:
            reason = (
                "its logits do not rise with the label on validation rows, or tell the labels apart without an error"
            )
        elif times is not None and (drift := _find_drift(method, x, y, observed_weights, times[observed])):
            reason = drift
        else:
            calibrated[task.name] = fitted
            continue
        left.append(f"task '{task.name}' is not calibrated: {reason}")
    return Calibration(calibrated), left


def _find_drift(
    method: CalibrationMethod, x: np.ndarray, y: np.ndarray, w: np.ndarray, times: np.ndarray
) -> str | None:
    """Return a sentence that describes the drift of a task, None if the task doesn't drift.

    A task drifts if a calibration that is fitted on the earlier half of the rows increases the mean log loss of the
    later half by more than two standard errors.
    """
    early, late = np.array_split(np.argsort(times, kind="stable"), 2)
    if len(np.unique(y[early])) < 2 or (fitted := _FITS[method](x[early], y[early], w[early])) is None:
        return None
    fractions, before = w[late] / w[late].sum(), x[late]
    after = fitted.apply(torch.from_numpy(before)).numpy()
    # Use log loss, because the task's own loss, such as focal loss, may not be lowest for true probabilities.
    losses = [DEFAULT_KIND.losses(logits, y[late]) for logits in (after, before)]
    loss_changes = losses[0] - losses[1]
    if fractions @ loss_changes <= 2 * math.sqrt(fractions**2 @ (loss_changes - fractions @ loss_changes) ** 2):
        return None
    return (
        "fitted on the earlier half of validation rows, it makes the later half worse (logloss "
        f"{fractions @ losses[0]:.4g} instead of {fractions @ losses[1]:.4g}): it drifts"
    )


def fit_temperature(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> TaskCalibration | None:
    """Fit slope x logit + offset by maximum likelihood.

    Args:
        x: Logits, shape (N,) float64.
        y: Labels 0 or 1, at least one of each, shape (N,) float64.
        weights: Positive weights, shape (N,) float64.

    Returns:
        The calibration. None if the logits don't rise with the label, or separate the labels without an error.
    """
    negatives, positives = x[y == 0], x[y == 1]
    if positives.min() >= negatives.max() or negatives.min() >= positives.max():
        return None  # The likelihood rises with the slope without bound.
    # An infinite C turns regularization off.
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-8).fit(x[:, None], y, weights)
    slope, offset = float(model.coef_[0, 0]), float(model.intercept_[0])
    return TaskCalibration.linear(slope, offset) if slope > 0 else None


def fit_isotonic(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> TaskCalibration:
    """Fit an increasing, piecewise linear function from logits to calibrated logits.

    Isotonic regression divides the rows into steps. Each step becomes one point: x is the logit of the mean prediction
    of its rows, y is the logit of their observed rate. Lines connect the points. If predictions are right on average in
    each step, the function changes nothing.

    A lowest step without positives or a highest step without negatives has no finite logit, so it is merged with its
    neighbor. Beyond the outer points, the slope is 1. The function increases everywhere, so rows keep their order,
    except for logits that become equal in float32.

    Args:
        x: As in `fit_temperature`.
        y: As in `fit_temperature`.
        weights: As in `fit_temperature`.
    """
    x = x.clip(-_LARGEST_LOGIT, _LARGEST_LOGIT)
    rates = IsotonicRegression().fit(x, y, weights).predict(x)
    step = np.unique(rates, return_inverse=True)[1]
    positives, rows = np.bincount(step, y), np.bincount(step)
    first, last = int(positives[0] == 0), len(rows) - 1 - int(positives[-1] == rows[-1])
    step = step.clip(min(first, last), last)  # merge outer steps that have a single label
    step -= step.min()
    high, low, positive, negative = (np.bincount(step, weights * values) for values in (expit(x), expit(-x), y, 1 - y))
    before, after = np.log(high / low), np.log(positive / negative)
    after = np.maximum.accumulate(after - MIN_SLOPE * before) + MIN_SLOPE * before
    is_distinct = np.diff(before, prepend=-np.inf) > 0  # drop steps that are only a rounding error wide
    return TaskCalibration(tuple(before[is_distinct].tolist()), tuple(after[is_distinct].tolist()), 1.0)


_FITS: dict[CalibrationMethod, Callable[[np.ndarray, np.ndarray, np.ndarray], TaskCalibration | None]] = {
    "temperature": fit_temperature,
    "isotonic": fit_isotonic,
}


@torch.inference_mode()
def predict_for_calibration(
    model: RankingModel, layout: ModelLayout, rows: EncodedDataset, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Predict the logits of rows as in serving, without placement features.

    Args:
        model: Model that predicts T tasks.
        layout: Layout of the model.
        rows: N encoded rows.
        batch_size: Rows per batch.

    Returns:
        Logits (N, T), labels (N, T) with NaN if unobserved, weights (N,) or None if rows have no weights, and request
            times (N,) int64 in microseconds.
    """
    model.eval()
    logits, labels, weights, times = [], [], [], []
    with bar() as progress, keeping_freed_memory():
        task = progress.add_task("calibrating", total=rows.rows)
        for part, table in rows.stream(batch_size, ("time",)):
            batch = make_batch(part.encoded, layout, torchrec=False).to(device_of(model))
            logits.append(model(batch).logits.cpu().numpy())
            labels.append(part.labels)
            if part.weights is not None:
                weights.append(part.weights)
            times.append(table.column("time").cast(pa.int64()).to_numpy())
            progress.advance(task, len(part))
    row_weights = np.concatenate(weights) if weights else None
    return np.concatenate(logits), np.concatenate(labels), row_weights, np.concatenate(times)
