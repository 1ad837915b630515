"""Fits `mmoe_rec.model.score` on rows that the model was not trained on.

fit_temperature: slope x logit + offset by logistic regression of the label on the logit (Platt, 1999; temperature
scaling (Guo et al., ICML 2017) with an offset, as a model may also be too high everywhere). Two numbers: it needs few
rows.

fit_isotonic: the rising step function with the least squared error (Zadrozny and Elkan, KDD 2002), which can take any
rising form, and needs thousands of rows. Its steps are flat, so they would tie candidates that the model tells apart.
Hence the middles of the steps are joined by straight lines, which rise by at least FLATTEST; see `fit_isotonic`.
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
# Observed rows of the rarer label that a fit needs: their rate then has a standard error of about a tenth, or of 3%.
MIN_LABELS = {"temperature": 100, "isotonic": 1000}
# The least slope of an isotonic fit. Logits that differ by 1e-4 then still differ in float32.
MIN_SLOPE = 0.01
# Where a larger logit changes no probability, and the exponential of a far larger one has no float64.
_LARGEST_LOGIT = 100.0


def fit_calibration(
    method: CalibrationMethod,
    tasks: Sequence[TaskOutput],
    logits: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    times: np.ndarray | None = None,
) -> tuple[Calibration, list[str]]:
    """The calibration of all binary tasks, and a sentence for each that is left as it is.

    tasks: T tasks; regressions are passed over; logits: (N, T) of the model; labels: (N, T), 0 or 1, NaN where
    unobserved; weights: (N,) positive, how many rows each stands for; None is 1 each; times: (N,) of requests. Where
    the function fitted on the earlier half of a task's rows makes the later half worse, the task drifts, and is left as
    it is. None: no such trial. Raises UserError where a logit is not a finite number.
    """
    if not np.isfinite(logits).all():
        raise UserError("validation predictions hold NaN or infinity: training diverged; lower the learning rates")
    calibrated, left = {}, []
    for index, task in enumerate(tasks):
        if not task.kind.is_binary:
            continue
        observed = ~np.isnan(labels[:, index])
        x, y = logits[observed, index].astype(np.float64), labels[observed, index].astype(np.float64)
        w = np.ones(len(y)) if weights is None else weights[observed].astype(np.float64)
        rarer = task.kind.count_minority(y)
        if rarer < MIN_LABELS[method]:
            why = f"{rarer:,} observed selecting rows have its rarer label, {method} needs {MIN_LABELS[method]:,}"
        elif (fitted := _FITS[method](x, y, w)) is None:
            why = "its logits do not rise with the label on validation rows, or tell the labels apart without an error"
        elif times is not None and (drift := _find_drift(method, x, y, w, times[observed])):
            why = drift
        else:
            calibrated[task.name] = fitted
            continue
        left.append(f"task '{task.name}' is not calibrated: {why}")
    return Calibration(calibrated), left


def _find_drift(
    method: CalibrationMethod, x: np.ndarray, y: np.ndarray, w: np.ndarray, times: np.ndarray
) -> str | None:
    """What a fit on the earlier half of rows does to the later half, if it makes them worse by two standard errors."""
    early, late = np.array_split(np.argsort(times, kind="stable"), 2)
    if len(np.unique(y[early])) < 2 or (fitted := _FITS[method](x[early], y[early], w[early])) is None:
        return None
    share, before = w[late] / w[late].sum(), x[late]
    after = fitted.apply(torch.from_numpy(before)).numpy()
    # A kind's own loss, such as a focal one, need not be least for the true probabilities.
    losses = [DEFAULT_KIND.losses(logits, y[late]) for logits in (after, before)]
    apart = losses[0] - losses[1]
    if share @ apart <= 2 * math.sqrt(share**2 @ (apart - share @ apart) ** 2):
        return None
    return (
        "fitted on the earlier half of validation rows, it makes the later half worse (logloss "
        f"{share @ losses[0]:.4g} instead of {share @ losses[1]:.4g}): it drifts"
    )


def fit_temperature(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> TaskCalibration | None:
    """slope x logit + offset of the largest likelihood; None where there is none with a slope above 0.

    x, y, weights: (N,) float64, logits, labels of both classes (0 or 1) and positive weights.
    """
    negatives, positives = x[y == 0], x[y == 1]
    if positives.min() >= negatives.max() or negatives.min() >= positives.max():
        return None  # The steeper the likelier, without end.
    # C of infinity is no regularisation: a and b are those of the likelihood alone.
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-8).fit(x[:, None], y, weights)
    slope, offset = float(model.coef_[0, 0]), float(model.intercept_[0])
    return TaskCalibration.linear(slope, offset) if slope > 0 else None


def fit_isotonic(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> TaskCalibration:
    """Straight lines between the middles of the steps of isotonic regression, in logits.

    A step's middle is (mean probability before, rate of the label): where the model is right on average, it stays as
    it is. A lowest step without positives or a highest one without negatives is joined to its neighbour, as its rate is
    not known to be 0 or 1. Beyond the outer middles the slope is 1: a logit is shifted as the outermost one is. So the
    function rises everywhere and the order of rows stays, but for logits that rounding to float32 makes equal.

    x, y, weights: as for `fit_temperature`.
    """
    x = x.clip(-_LARGEST_LOGIT, _LARGEST_LOGIT)
    rates = IsotonicRegression().fit(x, y, weights).predict(x)
    step = np.unique(rates, return_inverse=True)[1]
    positives, rows = np.bincount(step, y), np.bincount(step)
    first, last = int(positives[0] == 0), len(rows) - 1 - int(positives[-1] == rows[-1])
    step = step.clip(min(first, last), last)  # the outer ones joined to their neighbours where they have one label
    step -= step.min()
    high, low, positive, negative = (np.bincount(step, weights * each) for each in (expit(x), expit(-x), y, 1 - y))
    before, after = np.log(high / low), np.log(positive / negative)
    after = np.maximum.accumulate(after - MIN_SLOPE * before) + MIN_SLOPE * before
    apart = np.diff(before, prepend=-np.inf) > 0  # steps a rounding error wide
    return TaskCalibration(tuple(before[apart].tolist()), tuple(after[apart].tolist()), 1.0)


_FITS: dict[CalibrationMethod, Callable[[np.ndarray, np.ndarray, np.ndarray], TaskCalibration | None]] = {
    "temperature": fit_temperature,
    "isotonic": fit_isotonic,
}


@torch.inference_mode()
def predict_for_calibration(
    model: RankingModel, layout: ModelLayout, rows: EncodedDataset, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Logits (N, T) without placement, labels (N, T), NaN where unobserved, weights (N,), if rows have them, and times
    of requests (N,) int64."""
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
    known = np.concatenate(weights) if weights else None
    return np.concatenate(logits), np.concatenate(labels), known, np.concatenate(times)
