"""Crosses and piecewise-linear numbers against the papers' formulas written as loops."""

from itertools import pairwise

import numpy as np
import torch

from mmoe_rec.model.bottom import Bottom, Crosses, PiecewiseLinear
from mmoe_rec.settings import model as section


def naive_cross(module: Crosses, row: torch.Tensor) -> torch.Tensor:
    current = row
    for down, up in zip(module.down, module.up, strict=True):
        weight = up.weight @ down.weight
        product = torch.stack([(weight[i] * current).sum() + up.bias[i] for i in range(len(row))])
        current = row * product + current
    return current


def naive_parts(edges: list[tuple[float, ...]], row: torch.Tensor) -> list[float]:
    parts = []
    for value, each in zip(row.tolist(), edges, strict=True):
        for low, high in pairwise(each):
            parts.append(min(1.0, max(0.0, (value - low) / (high - low))))
    return parts


def test_crosses_follow_the_formula():
    torch.manual_seed(0)
    crosses = Crosses(6, layers=2, rank=3)
    x = torch.randn(5, 6)
    torch.testing.assert_close(crosses(x), torch.stack([naive_cross(crosses, row) for row in x]))


def test_numbers_become_their_reach_into_each_interval():
    edges = [(-1.0, 0.0, 2.0), (), (0.5,), (-3.0, 3.0)]
    numbers = torch.tensor([[-2.0, 9.0, 9.0, 0.0], [1.0, 9.0, 9.0, 4.0], [-0.25, 9.0, 9.0, -1.5]])
    bends = PiecewiseLinear(edges)
    assert bends.outputs == 3
    expected = torch.tensor([naive_parts(edges, row) for row in numbers])
    torch.testing.assert_close(bends(numbers), expected)
    assert expected.tolist()[1] == [1.0, 0.5, 1.0]


def test_bottom_bends_the_last_inputs_and_keeps_the_rest():
    torch.manual_seed(1)
    edges = [(-1.0, 0.0, 1.0), ()]
    bottom = Bottom(4, edges, section.Bottom(units=(), cross_layers=1, cross_rank=2))
    x = torch.randn(3, 4)
    out = bottom(x)
    assert bottom.outputs == out.shape[1] == 6
    assert bottom.crosses is not None
    torch.testing.assert_close(out[:, :4], torch.stack([naive_cross(bottom.crosses, row) for row in x]))
    torch.testing.assert_close(out[:, 4:], torch.tensor([naive_parts(edges, row[-2:]) for row in x]))


def test_bottom_without_bends_and_crosses_is_its_layers():
    bottom = Bottom(4, [(), ()], section.Bottom(units=(8, 5), cross_layers=0))
    x = torch.randn(3, 4)
    torch.testing.assert_close(bottom(x), bottom.layers(x))


def test_gradient_reaches_embeddings_through_crosses_but_not_numbers_through_bends():
    torch.manual_seed(2)
    bottom = Bottom(3, [(-1.0, 1.0)], section.Bottom(units=(), cross_layers=1, cross_rank=2))
    x = torch.randn(2, 3, requires_grad=True)
    bottom(x)[:, 3:].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() == 0
    bottom(x)[:, :3].sum().backward()
    assert (x.grad.abs() > 0).all()


def test_edges_may_lie_near_to_each_other_far_from_zero():
    edges = np.float32([3.0, 3.000002, 3.000006, 9.9999, 10.0])
    x = np.float32([[2.9], [3.000001], [3.000004], [3.000006], [9.99995], [10.0]])
    parts = PiecewiseLinear([edges.tolist()])(torch.from_numpy(x)).numpy()
    low, high, exact = edges[:-1].astype(float), edges[1:].astype(float), x.astype(float)
    np.testing.assert_allclose(parts, np.clip((exact - low) / (high - low), 0, 1), atol=1e-6)
