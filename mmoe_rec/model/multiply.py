"""By what library fp32 matrices are multiplied on a CPU, and the linear layers that can change it.

torch gives products in fp32 to its BLAS library, and only those in half precision to oneDNN. Its packages for x86
bring Intel's MKL, which takes twice as long as oneDNN on some processors of others. The operator that reaches oneDNN is
the one that torch's compiler puts in the place of linear layers; results are equal but for rounding.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.errors import UserError

Products = Literal["blas", "onednn"]
"""blas: the library behind `torch.mm`; onednn: oneDNN, for fp32 on a CPU; the rest stays where torch has it."""


class Multiplying(nn.Module):
    """A layer that multiplies by the library that `products` names."""

    products: Products = "blas"


class Linear(nn.Linear, Multiplying):
    """`nn.Linear`, with its weights and its state, of (B, inputs) alone."""

    def forward(self, input: Tensor, data: Tensor | None = None) -> Tensor:
        """(B, inputs) -> (B, outputs). data: (B, D) the last D of the inputs, which get no gradient."""
        return linear(input, self.weight, self.bias, self.products, data)


def set_products(model: nn.Module, products: Products) -> None:
    """From now on all layers multiply by this library."""
    for each in model.modules():
        if isinstance(each, Multiplying):
            each.products = products


@lru_cache
def onednn_offered() -> bool:
    """Whether this build of torch multiplies by oneDNN, and in fp32: some settings of torch's and of oneDNN's have it
    round to bf16 or TF32, where the processor can.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 256, generator=generator), torch.randn(256, 64, generator=generator)
    try:
        found = by_onednn(left, right).double()
    except (AttributeError, RuntimeError):  # there is none, or it is another one
        return False
    # The outputs are about 16: fp32 is off by a hundred-thousandth, TF32 by a hundredth.
    return bool((found - left.double() @ right.double()).abs().max() < 5e-4)


def products_of(choice: Literal["auto"] | Products, device: str) -> Products:
    """The library that a setting asks for, for `auto` the default. device: "cpu" or "cuda".

    Raises UserError where it is not on offer here.
    """
    if choice == "onednn" and device == "cuda":
        raise UserError("training.products is onednn, a library of CPUs: set it to auto")
    if choice == "onednn" and not onednn_offered():
        raise UserError(
            "training.products is onednn, but torch does not multiply by it in fp32 here: set it to auto or blas"
        )
    return "blas" if choice == "auto" else choice


def by_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """(m, k) and (k, n) float32, with or without gaps but not empty, to (m, n) plus bias (n,)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(
        _without_gaps(left), _without_gaps(right).t(), bias, "none", [], ""
    )
    return out


def _without_gaps(matrix: Tensor) -> Tensor:
    """Some matrices with gaps go through a loop of oneDNN's that takes a thousand times as long."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, products: Products, data: Tensor | None = None) -> Tensor:
    """`functional.linear`: (B, I), (O, I), (O,) -> (B, O). data: (B, D) the last D of I, which get no gradient."""
    x, data = for_products(x), None if data is None else for_products(data)
    typed = weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    if not typed or _within_functorch() or (data is None and taken(x, products) == "blas"):
        return functional.linear(_beside(x, data), weight, bias)
    out: Tensor = _Linear.apply(x, data, weight, bias, products)
    return out


def for_products(tensor: Tensor) -> Tensor:
    """The tensor in autocast's precision, if that is on: cast once for several products."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def taken(x: Tensor, products: Products) -> Products:
    """The library by which rows such as these are multiplied where `products` is asked for."""
    fits = x.dtype == torch.float32 and x.device.type == "cpu"
    return products if fits and not _within_functorch() else "blas"


def _within_functorch() -> bool:
    """Whether `torch.func` maps or differentiates what runs, which has backward passes of its own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _beside(x: Tensor, data: Tensor | None) -> Tensor:
    return x if data is None else torch.cat([x, data], dim=1)


def multiply_into(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, products: Products) -> None:
    """(m, k) and (k, n), with what `taken` gave, to (m, n) plus bias (n,)."""
    if products == "onednn" and left.numel():
        out.copy_(by_onednn(left, right, bias))
    elif bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)


def weights_gradient_into(out: Tensor, gradient: Tensor, x: Tensor, products: Products) -> None:
    """Gradients (B, O) of outputs and inputs (B, I), with what `taken` gave, to the (O, I) of weights."""
    if products == "onednn" and x.numel():
        out.copy_(_weights_gradient_by_onednn(gradient, x))
    else:
        torch.mm(gradient.t(), x, out=out)


def _weights_gradient_by_onednn(gradient: Tensor, x: Tensor) -> Tensor:
    """(O, I), perhaps with gaps: oneDNN takes up to twice as long where its result has more rows than columns."""
    if gradient.shape[1] > x.shape[1]:
        return by_onednn(x.t(), gradient).t()
    return by_onednn(gradient.t(), x)


class _Linear(torch.autograd.Function):
    """A linear layer, without a gradient of data among its inputs.

    Weights of higher precision than the rows are cast, and so are their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, data: Tensor | None, weight: Tensor, bias: Tensor | None, products: Products
    ) -> Tensor:
        inputs, own = _beside(x, data), weight.to(x.dtype)
        own_bias = None if bias is None else bias.to(x.dtype)
        ctx.save_for_backward(inputs, own)
        ctx.own, ctx.dtype = x.shape[1], weight.dtype
        ctx.products = taken(x, products) if inputs.numel() else "blas"
        if ctx.products == "onednn":
            return by_onednn(inputs, own.t(), own_bias)
        return functional.linear(inputs, own, own_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        to_x, _, to_weight, to_bias, _ = ctx.needs_input_grad
        gradient, own = gradient.contiguous(), weight[:, : ctx.own]
        onednn = ctx.products == "onednn"
        weights = None
        if to_weight and onednn:  # sums of gradients take longer with gaps
            weights = _weights_gradient_by_onednn(gradient, inputs).contiguous()
        elif to_weight:
            weights = torch.mm(gradient.t(), inputs).to(ctx.dtype)
        return (
            (by_onednn if onednn else torch.mm)(gradient, own) if to_x else None,
            None,
            weights,
            gradient.sum(0).to(ctx.dtype) if to_bias else None,
            None,
        )
