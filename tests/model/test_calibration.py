"""Calibrated logits against NumPy's interpolation and by hand, and as JSON."""

import json

import numpy as np
import pytest
import torch

from mmoe_rec.model.score import UNCALIBRATED, Calibration, TaskCalibration

CURVE = TaskCalibration((-2.0, 0.5, 3.0), (-1.0, -0.5, 4.0), 0.25)


@pytest.mark.parametrize("knots", [1, 2, 3, 40])
def test_equals_interpolation_and_lines_beyond(knots: int) -> None:
    random = np.random.default_rng(knots)
    x, y = (np.sort(random.normal(size=knots)) for _ in range(2))
    logits = np.concatenate([random.normal(scale=3.0, size=500), x])
    expected = np.interp(logits, x, y) + 0.5 * (np.minimum(logits - x[0], 0) + np.maximum(logits - x[-1], 0))
    found = TaskCalibration(tuple(x), tuple(y), 0.5).apply(torch.from_numpy(logits))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_tasks_are_found_by_name_and_others_stay() -> None:
    logits = torch.randn(7, 3)
    calibrated = Calibration({"c": CURVE, "a": TaskCalibration.line(2.0, 1.0)}).apply(logits, ["a", "b", "c"])
    assert calibrated.dtype == torch.float32
    torch.testing.assert_close(calibrated[:, 0], 2 * logits[:, 0] + 1)
    assert torch.equal(calibrated[:, 1], logits[:, 1])
    torch.testing.assert_close(calibrated[:, 2], CURVE.apply(logits[:, 2]))
    assert UNCALIBRATED.apply(logits, ["a", "b", "c"]) is logits
    assert Calibration({"a": CURVE}).apply(logits[:0], ["a", "b", "c"]).shape == (0, 3)


def test_json_loses_nothing() -> None:
    knots = np.sort(np.random.default_rng(0).normal(size=(2, 30)))
    curve = TaskCalibration(tuple(knots[0].tolist()), tuple(knots[1].tolist()), 1 / 3)
    calibration = Calibration({"bought": curve, "rebought": TaskCalibration.line(0.1, -1e-17)})
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


@pytest.mark.parametrize(
    ("logits", "calibrated", "slope", "message"),
    [
        ((0.0, 0.0), (0.0, 1.0), 1.0, "must rise"),
        ((0.0, 1.0), (1.0, 1.0), 1.0, "must rise"),
        ((0.0, 1.0), (0.0, 1.0), 0.0, "must rise"),
        ((0.0,), (float("inf"),), 1.0, "not a finite number"),
        ((0.0,), (0.0,), float("nan"), "not a finite number"),
        ((0.0,), (0.0, 1.0), 1.0, "1 logits and 2 calibrated"),
        ((), (), 1.0, "0 logits"),
    ],
)
def test_what_would_change_the_order_is_refused(
    logits: tuple[float, ...], calibrated: tuple[float, ...], slope: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TaskCalibration(logits, calibrated, slope)
