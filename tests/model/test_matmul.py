"""Products by oneDNN against float64, layer by layer."""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from mmoe_rec.errors import UserError
from mmoe_rec.model import matmul as products_module
from mmoe_rec.model.matmul import (
    Linear,
    MatmulBackend,
    StackedLinear,
    choose_matmul_backend,
    choose_serving_backend,
    has_onednn,
    onednn_linear,
    set_matmul_backend,
)

pytestmark = pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN")

ROWS = (0, 1, 7, 64)
WIDTHS = ((1, 1), (5, 3), (3, 17), (64, 8))


def rows(count: int, *widths: int, gaps: bool = False) -> Tensor:
    """Random rows, on request columns of a wider tensor."""
    drawn = torch.randn(count, *widths[:-1], 2 * widths[-1] if gaps else widths[-1])
    return (drawn[..., ::2] if gaps else drawn).requires_grad_()


def values(module: nn.Module, x: Tensor, method: str) -> list[Tensor]:
    """Outputs, and gradients of inputs and weights, where each output counts by a weight of its own."""
    out = getattr(module, method)(x)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what oneDNN multiplies from now on."""
    shapes: list[tuple[int, ...]] = []

    def noted(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append((*left.shape, right.shape[1]))
        return onednn_linear(left, right, bias)

    monkeypatch.setattr(products_module, "onednn_linear", noted)
    return shapes


# Of inputs and outputs a layer, the widths of a row besides the inputs, and what is called.
LAYERS: dict[str, tuple[Callable[[int, int], nn.Module], tuple[int, ...], str]] = {
    "linear": (Linear, (), "forward"),
    "no bias": (partial(Linear, bias=False), (), "forward"),
    "stacked": (partial(StackedLinear, 3), (3,), "forward"),
    "shared": (partial(StackedLinear, 3), (), "shared"),
}


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_against_float64(monkeypatch: pytest.MonkeyPatch, kind: str, gaps: bool) -> None:
    torch.manual_seed(0)
    shapes = calls(monkeypatch)
    make, widths, method = LAYERS[kind]
    for count, (inputs, outputs) in product(ROWS, WIDTHS):
        module, x = make(inputs, outputs), rows(count, *widths, inputs, gaps=gaps)
        set_matmul_backend(module, "onednn")
        shapes.clear()
        actual = values(module, x, method)
        assert bool(shapes) == (count > 0)
        # All that float64 computes is by torch's own BLAS.
        shapes.clear()
        expected = values(module.double(), x.detach().double().requires_grad_(), method)
        assert shapes == []
        for ours, exact in zip(actual, expected, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * max(1, count))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("matmul_backend", ["blas", "onednn"])
@pytest.mark.parametrize("count", [0, 1, 64])
def test_data_among_the_inputs_gets_no_gradient(matmul_backend: MatmulBackend, bf16: bool, count: int) -> None:
    """All else is as if inputs and data were one input of torch's own linear layer."""
    torch.manual_seed(0)
    ours, theirs = Linear(12, 5), nn.Linear(12, 5)
    theirs.load_state_dict(ours.state_dict())
    set_matmul_backend(ours, matmul_backend)
    x, data = rows(count, 4), rows(count, 8)
    weights = torch.linspace(-1, 2, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        actual, expected = ours(x, data), theirs(torch.cat([x, data], 1))
    assert actual.dtype == expected.dtype == (torch.bfloat16 if bf16 else torch.float32)
    got = torch.autograd.grad((actual * weights).sum(), [x, *ours.parameters()], retain_graph=True)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *theirs.parameters()])
    for first, second in zip([actual, *got], [expected, *wanted], strict=True):
        torch.testing.assert_close(first, second, rtol=2e-2 if bf16 else 1e-5, atol=2e-2 if bf16 else 1e-5)
    assert torch.autograd.grad(actual.sum(), [data], allow_unused=True) == (None,)


def test_bf16_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = calls(monkeypatch)
    layer, stacked, x = Linear(4, 3), StackedLinear(2, 4, 3), rows(5, 4)
    for item in (layer, stacked):
        set_matmul_backend(item, "onednn")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == stacked.shared(x).dtype == torch.bfloat16
        assert stacked(torch.stack([x, x], 1)).dtype == torch.bfloat16
    assert shapes == []


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose_matmul_backend(name, "cpu") for name in ("auto", "blas", "onednn")] == ["onednn", "blas", "onednn"]
    assert [choose_serving_backend(name) for name in ("auto", "blas", "onednn")] == ["onednn", "blas", "onednn"]
    assert choose_matmul_backend("auto", "cuda") == "blas"
    with pytest.raises(
        UserError, match=r"^training\.matmul_backend is onednn, which only supports CPUs\. Set it to auto\.$"
    ):
        choose_matmul_backend("onednn", "cuda")

    def missing(*_: object) -> Tensor:
        raise AttributeError

    monkeypatch.setattr(products_module, "onednn_linear", missing)
    has_onednn.cache_clear()
    try:
        with pytest.raises(UserError, match=r"^training\.matmul_backend is onednn, which torch doesn't support"):
            choose_matmul_backend("onednn", "cpu")
        assert (
            choose_matmul_backend("auto", "cpu")
            == choose_serving_backend("auto")
            == choose_serving_backend("onednn")
            == "blas"
        )
    finally:
        has_onednn.cache_clear()
