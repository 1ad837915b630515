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

    def forward(self, input: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs)."""
        return linear(input, self.weight, self.bias, self.products)


def set_products(model: nn.Module, products: Products) -> None:
    """From now on all layers multiply by this library."""
    for each in model.modules():
        if isinstance(each, Multiplying):
            each.products = products


@lru_cache
def onednn_offered() -> bool:
    """Whether this build of torch multiplies by oneDNN, and does it right."""
    try:
        left, right = torch.arange(12.0).view(3, 4), torch.arange(20.0).view(4, 5)
        return torch.allclose(by_onednn(left, right, torch.ones(5)), left @ right + 1)
    except (AttributeError, RuntimeError, NotImplementedError):  # there is none, or it is another one
        return False


def products_of(choice: Literal["auto"] | Products, device: str) -> Products:
    """The library that a setting asks for, for `auto` the default. device: "cpu" or "cuda".

    Raises UserError where it is not on offer here.
    """
    if choice == "onednn" and device == "cuda":
        raise UserError("training.products is onednn, a library of CPUs: set it to auto")
    if choice == "onednn" and not onednn_offered():
        raise UserError("training.products is onednn, but torch is built without it here: set it to auto or blas")
    return "blas" if choice == "auto" else choice


def by_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """(m, k) and (k, n) float32, with or without gaps but not empty, to (m, n) plus bias (n,)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, products: Products) -> Tensor:
    """`functional.linear`: (B, I), (O, I), (O,) -> (B, O)."""
    if taken(x, products) == "blas" or not x.numel() or torch.is_autocast_enabled(x.device.type):
        return functional.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


def taken(x: Tensor, products: Products) -> Products:
    """The library by which rows such as these are multiplied where `products` is asked for."""
    fits = x.dtype == torch.float32 and x.device.type == "cpu"
    return products if fits and torch._C._functorch.peek_interpreter_stack() is None else "blas"


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
        out.copy_(_weights_gradient(gradient, x))
    else:
        torch.mm(gradient.t(), x, out=out)


def _weights_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """By oneDNN. It takes up to twice as long where the result has more rows than columns, and for rows with gaps."""
    gradient, x = gradient.contiguous(), x.contiguous()
    if gradient.shape[1] > x.shape[1]:
        return by_onednn(x.t(), gradient).t()
    return by_onednn(gradient.t(), x)


class _Linear(torch.autograd.Function):
    """A linear layer by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return by_onednn(x, weight.t(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        return (
            by_onednn(gradient, weight) if to_x else None,
            _weights_gradient(gradient, x) if to_weight else None,
            gradient.sum(0) if to_bias else None,
        )
