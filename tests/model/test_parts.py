"""Experts, towers, the score, calibration, the use of gates and weights in int8, each on its own."""

import itertools
import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.model.levels import Experts
from mmoe_rec.model.mmoe import Outputs, PiecewiseLinear, PlacementTower
from mmoe_rec.model.routing import Routing
from mmoe_rec.model.score import (
    UNCALIBRATED,
    Calibration,
    TaskCalibration,
    compute_log_scores,
    joint_logit,
    predictions,
)
from mmoe_rec.model.tables import (
    SCALES_SUFFIX,
    Int8EmbeddingBag,
    dequantize,
    pop_table,
    quantize,
    rows_per_scale,
    to_float32,
)
from mmoe_rec.model.utilization import ExpertUtilization, UtilizationAccumulator
from mmoe_rec.settings import model as section
from mmoe_rec.task_kinds import KINDS
from mmoe_rec.task_kinds.task_kind import MIN_LINEAR_PREDICTION


def test_each_expert_starts_on_its_own_like_a_linear_layer() -> None:
    torch.manual_seed(0)
    experts = Experts(4, 200, section.Experts(units=(150, 100)))
    for layer, inputs in zip(experts.layers, (200, 150), strict=True):
        weight = layer.weight.detach().flatten(1).numpy()  # type: ignore[operator]
        assert np.abs(np.corrcoef(weight) - np.eye(4)).max() < 0.05
        # nn.Linear draws from U(-1 / sqrt(inputs), 1 / sqrt(inputs)); a stacked fan-in would be smaller.
        assert np.abs(weight).max() == pytest.approx(1 / math.sqrt(inputs), rel=0.01)
        np.testing.assert_allclose(weight.std(1), 1 / math.sqrt(3 * inputs), rtol=0.05)


def test_placement_dropout_hides_whole_rows() -> None:
    torch.manual_seed(0)
    tower = PlacementTower(3, 2, section.Placement(units=(4,), dropout=0.25))
    placement = torch.randn(4000, 3)
    logits = tower(placement)
    hidden = logits == 0
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert hidden[:, 0].float().mean().item() == pytest.approx(0.25, abs=0.03)
    full = tower.eval()(placement)
    torch.testing.assert_close(logits, torch.where(hidden, 0.0, full))


def test_log_score_is_finite_for_extreme_logits() -> None:
    logits = torch.tensor([[-500.0, -3.0], [500.0, 0.0]])
    log_score = compute_log_scores(logits, [*KINDS.values()], [1.0, 1.0])
    tiny = math.log(MIN_LINEAR_PREDICTION)
    np.testing.assert_allclose(log_score.numpy(), [-500.0 + tiny, tiny], rtol=1e-6)


def test_the_logit_of_both_is_exact_for_any_logits() -> None:
    """Against 400 digits, where p q, 1 - p q and their logarithms can be written as they are.

    A logit of 300 itself is held to 2e-5, which is what the logarithm of 1 - e^-300 can be held to, relatively.
    """
    ends = [-300.0, -90.0, -20.0, -3.0, 0.0, 0.5, 8.0, 40.0, 90.0, 300.0]
    getcontext().prec = 400

    def probability(logit: float) -> Decimal:
        return 1 / (1 + (-Decimal(logit)).exp())

    for left, second in itertools.product(ends, ends):
        actual = joint_logit(torch.tensor(left), torch.tensor(second))
        both = probability(left) * probability(second)
        assert actual.item() == pytest.approx(float((both / (1 - both)).ln()), rel=1e-6, abs=2e-6)
        assert functional.logsigmoid(actual).item() == pytest.approx(float(both.ln()), rel=2e-5, abs=1e-37)
        if abs(actual) < 80:
            assert functional.logsigmoid(-actual).item() == pytest.approx(float((1 - both).ln()), rel=2e-5, abs=1e-37)


def test_the_gradient_of_the_logit_of_both_is_finite_and_right() -> None:
    ends = torch.tensor([-300.0, -20.0, 0.0, 8.0, 300.0], dtype=torch.float64)
    left, second = (item.flatten().requires_grad_() for item in torch.meshgrid(ends, ends, indexing="ij"))
    assert torch.autograd.gradcheck(joint_logit, (left, second))


def test_a_wrong_number_of_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="each of 2 tasks, not 3"):
        predictions(torch.zeros(4, 3), [KINDS["binary"]] * 2)


def test_edges_may_lie_near_to_each_other_far_from_zero() -> None:
    edges = np.float32([3.0, 3.000002, 3.000006, 9.9999, 10.0])
    x = np.float32([[2.9], [3.000001], [3.000004], [3.000006], [9.99995], [10.0]])
    parts = PiecewiseLinear([edges.tolist()])(torch.from_numpy(x)).numpy()
    low, high, exact = edges[:-1].astype(float), edges[1:].astype(float), x.astype(float)
    np.testing.assert_allclose(parts, np.clip((exact - low) / (high - low), 0, 1), atol=1e-6)


CURVE = TaskCalibration((-2.0, 0.5, 3.0), (-1.0, -0.5, 4.0), 0.25)


@pytest.mark.parametrize("knots", [1, 2, 3, 40])
def test_equals_interpolation_and_lines_beyond(knots: int) -> None:
    random = np.random.default_rng(knots)
    x, y = (np.sort(random.normal(size=knots)) for _ in range(2))
    logits = np.concatenate([random.normal(scale=3.0, size=500), x])
    expected = np.interp(logits, x, y) + 0.5 * (np.minimum(logits - x[0], 0) + np.maximum(logits - x[-1], 0))
    actual = TaskCalibration(tuple(x), tuple(y), 0.5).apply(torch.from_numpy(logits))
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-12)


def test_tasks_are_found_by_name_and_others_stay() -> None:
    logits = torch.randn(7, 3)
    calibrated = Calibration({"c": CURVE, "a": TaskCalibration.linear(2.0, 1.0)}).apply(logits, ["a", "b", "c"])
    assert calibrated.dtype == torch.float32
    torch.testing.assert_close(calibrated[:, 0], 2 * logits[:, 0] + 1)
    assert torch.equal(calibrated[:, 1], logits[:, 1])
    torch.testing.assert_close(calibrated[:, 2], CURVE.apply(logits[:, 2]))
    assert UNCALIBRATED.apply(logits, ["a", "b", "c"]) is logits
    assert Calibration({"a": CURVE}).apply(logits[:0], ["a", "b", "c"]).shape == (0, 3)


@pytest.mark.parametrize(
    ("logits", "calibrated", "slope", "message"),
    [
        ((0.0, 0.0), (0.0, 1.0), 1.0, "must increase"),
        ((0.0, 1.0), (0.0, 1.0), 0.0, "must increase"),
        ((0.0,), (0.0,), float("nan"), "is not finite"),
        ((0.0,), (0.0, 1.0), 1.0, "1 logits don't match 2 calibrated"),
    ],
)
def test_what_would_change_the_order_is_refused(
    logits: tuple[float, ...], calibrated: tuple[float, ...], slope: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TaskCalibration(logits, calibrated, slope)


def outputs(weights: Tensor, selected: Tensor | None = None) -> Outputs:
    return Outputs(torch.zeros(weights.shape[:2]), (Routing(weights, weights, selected, torch.zeros(())),))


def used(*weights: list[float]) -> ExpertUtilization:
    return ExpertUtilization(torch.tensor(weights, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64))


def test_means_are_over_the_counted_rows_of_all_batches() -> None:
    torch.manual_seed(0)
    weights = torch.rand(10, 2, 3).softmax(-1)
    sums = UtilizationAccumulator(torch.ones(2, 3, dtype=torch.bool))
    counted = torch.arange(10) % 3 > 0
    sums.add(outputs(weights[:4]), counted[:4])
    sums.add(outputs(weights[4:]), counted[4:])
    actual = sums.result()
    torch.testing.assert_close(actual.weights, weights[counted].double().mean(0))
    torch.testing.assert_close(actual.loads, actual.weights)


def test_loads_of_chosen_experts_are_shares_of_choices() -> None:
    """Two of three experts a row, one router for both tasks, of which the first row has only one."""
    selected = torch.tensor([[[True, False, False]], [[True, True, False]]])
    sums = UtilizationAccumulator(torch.ones(2, 3, dtype=torch.bool))
    sums.add(outputs(torch.full((2, 2, 3), 1 / 3), selected))
    assert sums.result().loads.tolist() == [[0.75, 0.25, 0.0]] * 2


def test_experts_that_a_task_does_not_see_are_left_out() -> None:
    visible = torch.tensor([[True, True, False], [True, False, True]])
    sums = UtilizationAccumulator(visible)
    sums.add(outputs(torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]])))
    actual = sums.result()
    assert torch.equal(actual.weights.isnan(), ~visible)
    entropies = [actual.to_metrics(["a", "b"])[f"gates/{task}.entropy"] for task in ("a", "b")]
    assert entropies == pytest.approx([1.0, 1.0])
    assert actual.total_loads.tolist() == [0.5, 0.25, 0.25]
    assert actual.max_over_mean == pytest.approx(1.5)
    assert actual.entropy == pytest.approx(1.5 * math.log(2) / math.log(3))
    assert "gates/b/expert_1.weight" not in actual.to_metrics(["a", "b"])


def test_what_gates_do_is_reported_in_words() -> None:
    actual = used([0.9, 0.1, 0.0, 0.0], [0.3, 0.3, 0.4, 0.0])
    assert actual.polarized == [True, False]
    assert actual.underused == [3]
    dead, settled = actual.findings(["bought", "liked"])
    assert dead.startswith("expert 3 is underused: it gets 0.00% of the load, compared with 25.0% on average")
    assert settled.startswith("the gate of 'bought' is polarized: expert 0 gets 90% of its weight")
    assert actual.to_metrics(["bought", "liked"])["gates/polarized_fraction"] == 0.5


def test_nothing_is_said_of_experts_that_are_out_of_use() -> None:
    sums = UtilizationAccumulator(torch.tensor([[True, False], [True, False]]))
    sums.add(outputs(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])))
    actual = sums.result()
    assert actual.findings(["a", "b"]) == []
    assert (actual.max_over_mean, actual.entropy) == (1.0, 1.0)
    nothing = UtilizationAccumulator(torch.zeros(2, 2, dtype=torch.bool))
    nothing.add(outputs(torch.zeros(1, 2, 2)))
    assert nothing.result().max_over_mean == 1.0
    assert nothing.result().findings(["a", "b"]) == []
    assert used([0.25] * 4, [0.25] * 4).findings(["a", "b"]) == []


# Weights in int8 against a loop over rows in numpy, which rounds to bfloat16 by itself.


def bfloat16(value: np.float32) -> np.float32:
    """The nearest number of 8 bits, the even one of two."""
    bits = int(np.float32(value).view(np.uint32))
    bits += 0x7FFF + ((bits >> 16) & 1)
    return np.uint32(bits & 0xFFFF0000).view(np.float32)


def naive(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, the scale of each row, and the weights that they stand for."""
    rows, width = weights.shape
    together = next(count for count in range(1, 17) if count * width >= 16)
    codes, scales = np.zeros(weights.shape, np.int8), np.zeros(rows, np.float32)
    for first in range(0, rows, together):
        block = weights[first : first + together]
        scale = bfloat16(np.abs(block).max() / np.float32(127))
        scales[first : first + together] = scale
        if scale > 0:
            codes[first : first + together] = np.clip(np.rint(block / scale), -127, 127)
    return codes, scales, codes.astype(np.float32) * scales[:, None]


def drawn_rows(seed: int, rows: int, width: int) -> np.ndarray:
    """Rows of many sizes, from 1e-36 to 1e36, some of them constant or zero."""
    random = np.random.default_rng(seed)
    weights = random.normal(size=(rows, width)) * 10.0 ** random.integers(-36, 37, (rows, 1))
    weights[random.random(rows) < 0.2] = 0.0
    constant = random.random(rows) < 0.2
    weights[constant] = weights[constant, :1]
    return weights.astype(np.float32)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 15, 16, 17, 64])
def test_equals_a_loop_over_rows(width: int) -> None:
    for rows in (1, 2, 3, 50):
        weights = drawn_rows(width, rows, width)
        codes, scales = quantize(torch.from_numpy(weights))
        expected_codes, expected_scales, expected = naive(weights)
        assert (codes.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
        np.testing.assert_array_equal(codes.numpy(), expected_codes)
        np.testing.assert_array_equal(
            scales.float().repeat_interleave(rows_per_scale(width))[:rows].numpy(), expected_scales
        )
        np.testing.assert_array_equal(dequantize(codes, scales).numpy(), expected)


def test_numbers_too_small_for_a_scale_become_zeros() -> None:
    weights = torch.full((3, 16), 1e-40)
    weights[1] = torch.linspace(-1, 1, 16)
    actual = dequantize(*quantize(weights))
    assert actual.isfinite().all()
    assert (actual[[0, 2]] == 0).all()
    assert torch.equal(actual[1] == 0, torch.zeros(16, dtype=torch.bool))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weights = torch.zeros(40, 4)
    weights[33, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(weights)


@pytest.mark.parametrize("width", [3, 4, 16, 24])
def test_look_ups_are_those_of_a_table_of_floats(width: int) -> None:
    random = np.random.default_rng(width)
    codes, scales = quantize(torch.from_numpy(random.normal(size=(37, width))))
    bag = Int8EmbeddingBag(codes, scales)
    plain = nn.EmbeddingBag.from_pretrained(dequantize(codes, scales), mode="mean", include_last_offset=True)
    lengths = random.integers(0, 5, 60)
    ids, offsets = torch.from_numpy(random.integers(0, 37, lengths.sum())), np.concatenate([[0], np.cumsum(lengths)])
    assert torch.equal(bag(ids, torch.from_numpy(offsets)), plain(ids, torch.from_numpy(offsets)))
    assert torch.equal(bag.rows(ids), plain.weight[ids])
    assert torch.equal(bag.weight, plain.weight)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert bag.rows(nothing).shape == (0, width)
    assert torch.equal(bag(nothing, torch.zeros(3, dtype=torch.int64)), torch.zeros(2, width))


def test_scales_that_do_not_fit_are_refused() -> None:
    codes, scales = quantize(torch.randn(9, 4))
    with pytest.raises(ValueError, match="9 rows of 4 numbers"):
        Int8EmbeddingBag(codes, scales[:-1])
    with pytest.raises(KeyError):
        pop_table({"t": codes}, "t")


def test_a_file_is_read_as_floats() -> None:
    codes, scales = quantize(torch.randn(9, 4))
    half, full = torch.randn(3, 4).bfloat16(), torch.randn(5)
    stored = {"table": codes, "table" + SCALES_SUFFIX: scales, "half": half, "full": full}
    actual = to_float32(stored)
    assert {name: item.dtype for name, item in actual.items()} == dict.fromkeys(
        ("table", "half", "full"), torch.float32
    )
    assert torch.equal(actual["table"], dequantize(codes, scales))
    assert torch.equal(actual["half"].bfloat16(), half)
    assert torch.equal(actual["full"], full)
