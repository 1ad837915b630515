"""Matrix products of layers: by which library they run, of many small layers at once, and on sent rows only.

Three chapters: linear layers whose fp32 products can go to oneDNN; G layers of one shape stored as one weight; and
products of each expert with the rows that were sent to it, on a CPU (`Dispatch`) and on a GPU (`Sent`).

torch gives products in fp32 on a CPU to its BLAS library, and only those in half precision to oneDNN. Its packages for
x86 bring Intel's MKL, which takes twice as long as oneDNN on some processors of others. The operator that reaches
oneDNN is the one that torch's compiler puts in the place of linear layers; results are equal but for rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
def has_onednn() -> bool:
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


def choose_products(choice: Literal["auto"] | Products, device: str) -> Products:
    """The library that a setting asks for, for `auto` the default. device: "cpu" or "cuda".

    Raises UserError where it is not on offer here.
    """
    if choice == "onednn" and device == "cuda":
        raise UserError("training.products is onednn, a library of CPUs: set it to auto")
    if choice == "onednn" and not has_onednn():
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
    if not typed or _within_functorch() or (data is None and pick_library(x, products) == "blas"):
        return functional.linear(_beside(x, data), weight, bias)
    out: Tensor = _Linear.apply(x, data, weight, bias, products)
    return out


def for_products(tensor: Tensor) -> Tensor:
    """The tensor in autocast's precision, if that is on: cast once for several products."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def pick_library(x: Tensor, products: Products) -> Products:
    """The library by which rows such as these are multiplied where `products` is asked for."""
    fits = x.dtype == torch.float32 and x.device.type == "cpu"
    return products if fits and not _within_functorch() else "blas"


def _within_functorch() -> bool:
    """Whether `torch.func` maps or differentiates what runs, which has backward passes of its own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _beside(x: Tensor, data: Tensor | None) -> Tensor:
    return x if data is None else torch.cat([x, data], dim=1)


def multiply_into(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, products: Products) -> None:
    """(m, k) and (k, n), with what `pick_library` gave, to (m, n) plus bias (n,)."""
    if products == "onednn" and left.numel():
        out.copy_(by_onednn(left, right, bias))
    elif bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)


def weights_gradient_into(out: Tensor, gradient: Tensor, x: Tensor, products: Products) -> None:
    """Gradients (B, O) of outputs and inputs (B, I), with what `pick_library` gave, to the (O, I) of weights."""
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
        ctx.products = pick_library(x, products) if inputs.numel() else "blas"
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


# Many small layers.
#
# G independent layers of one shape are stored as one weight. Measured on a CPU: inputs that all groups share go through
# one large product; groups with inputs of their own go through a loop of products over slices, which beats a strided
# batched product (but for oneDNN in fp32, nothing is copied). The slices of all groups lie in one tensor in either
# direction, so that activations and their gradients are one pass over memory without gaps.


# oneDNN, which multiplies in half precision on a CPU, prepares products anew for each new number of rows, which takes
# as long as the product of some hundred rows: whole blocks of rows keep these numbers few.
ONEDNN_BLOCK = 16


class StackedLinear(Multiplying):
    """G independent linear layers from `inputs` to `outputs`, each initialised as `nn.Linear` would be.

    State: weight (G, outputs, inputs), bias (G, outputs).
    """

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(groups, outputs))
        bound = 1 / math.sqrt(inputs) if inputs else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """An input for each group: (B, G, inputs) -> (B, G, outputs)."""
        if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func maps over backward passes of its own
            return torch.einsum("bgi,goi->bgo", x, self.weight) + self.bias
        out: Tensor = _Stacked.apply(for_products(x), self.weight, self.bias, self.products)
        return out

    def shared(self, x: Tensor) -> Tensor:
        """One input for all groups: (B, inputs) -> (B, G * outputs), group-major."""
        return linear(x, self.weight.flatten(0, 1), self.bias.flatten(), self.products)


class _Stacked(torch.autograd.Function):
    """Linear layers of G groups, each over its own slice of the rows, whose results lie in one tensor.

    Weights of higher precision than the rows are cast, and so are their gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, products: Products) -> Tensor:
        ctx.dtype, ctx.products = weight.dtype, pick_library(x, products)
        own, by_group = weight.to(x.dtype), _by_group(x, ctx.products)
        ctx.save_for_backward(by_group, own)
        out = x.new_empty(*x.shape[:2], weight.shape[1])
        for rows, result, each, each_bias in zip(by_group, out.unbind(1), own, bias.to(x.dtype), strict=True):
            multiply_into(result, rows, each.t(), each_bias, ctx.products)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        by_group, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        gradients = _by_group(gradient, ctx.products)
        to_weight, to_x = torch.empty_like(weight), None
        for part, rows, result in zip(gradients, by_group, to_weight, strict=True):
            weights_gradient_into(result, part, rows, ctx.products)
        if ctx.needs_input_grad[0]:
            to_x = gradient.new_empty(*gradient.shape[:2], weight.shape[2])
            for part, each, result in zip(gradients, weight, to_x.unbind(1), strict=True):
                multiply_into(result, part, each, None, ctx.products)
        return to_x, to_weight.to(ctx.dtype), gradient.sum(0).to(ctx.dtype), None


def _by_group(x: Tensor, products: Products) -> Tensor:
    """(B, G, I) to (G, B, I), as a view but for oneDNN, which takes no rows with gaps."""
    turned = x.transpose(0, 1)
    return turned.contiguous() if products == "onednn" else turned


# Sparse compute: rows are gathered by the expert they were sent to, and each expert multiplies its own rows only.


@dataclass(frozen=True)
class Dispatch:
    """Which of E experts run on which of B rows: S places, those of one expert next to each other.

    rows: (S,) int64, the row in each place; counts: places of each expert; places, experts: (B, K) int64, where the up
    to K results of a row are, and whose they are; filled: (B, K) bool, False where a row has fewer.
    """

    rows: Tensor
    counts: list[int]
    places: Tensor
    experts: Tensor
    filled: Tensor

    @staticmethod
    def of(used: Tensor, block: int = 1) -> Dispatch:
        """From (B, E) bool. Each expert gets a multiple of `block` places; row 0 fills those that nobody asks for."""
        experts, rows = used.t().nonzero(as_tuple=True)
        counts = used.sum(0)
        sizes = (counts + block - 1) // block * block
        place = torch.arange(len(rows), device=used.device) + (_starts(sizes) - _starts(counts))[experts]
        nth = used.cumsum(1)[rows, experts] - 1
        of_row = used.sum(1, keepdim=True)
        filled = torch.arange(int(of_row.max()), device=used.device) < of_row
        places, owners = torch.zeros_like(filled, dtype=torch.int64), torch.zeros_like(filled, dtype=torch.int64)
        places[rows, nth], owners[rows, nth] = place, experts
        # A result that is not a row's own would reach it times 0, which is NaN if the result is.
        places = torch.where(filled, places, places[:, :1])
        in_place = rows.new_zeros(int(sizes.sum())).index_copy(0, place, rows)
        return Dispatch(in_place, sizes.tolist(), places, owners, filled)


class _Grouped(torch.autograd.Function):
    """Linear layers of E experts over rows that are ordered by expert, whose results lie in one tensor.

    Weights of higher precision than the rows are cast one expert at a time, while they are in the cache anyway, and so
    are their gradients: with many experts, casting all of them takes longer than the products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, counts: list[int], products: Products) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.products = counts, pick_library(x, products)
        out = x.new_empty(len(x), weight.shape[1])
        parts = zip(x.split(counts), out.split(counts), weight, bias.to(x.dtype), strict=True)
        for rows, result, own_weight, own_bias in parts:
            multiply_into(result, rows, own_weight.to(x.dtype).t(), own_bias, ctx.products)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        to_weight, to_bias = torch.empty_like(weight), x.new_empty(weight.shape[:2])
        xs, gradients = x.split(ctx.counts), gradient.split(ctx.counts)
        if to_x is not None:
            for part, own_weight, result in zip(gradients, weight, to_x.split(ctx.counts), strict=True):
                multiply_into(result, part, own_weight.to(x.dtype), None, ctx.products)
        for part, inputs, own_weight, own_bias in zip(gradients, xs, to_weight, to_bias, strict=True):
            if weight.dtype == x.dtype:
                weights_gradient_into(own_weight, part, inputs, ctx.products)
            else:
                own_weight.copy_(torch.mm(part.t(), inputs))
            torch.sum(part, dim=0, out=own_bias)
        return to_x, to_weight, to_bias.to(weight.dtype), None, None


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, counts: list[int], products: Products = "blas") -> Tensor:
    """(S, I) rows ordered by expert, (E, O, I) weights, (E, O) biases, rows of each expert -> (S, O) like the rows."""
    out: Tensor = _Grouped.apply(x, weight, bias, counts, products)
    return out


def combine(values: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    """(S, U) outputs of a dispatch's places, (B, G, E) weights -> (B, G, U), summed over experts."""
    own = weights.gather(2, dispatch.experts.unsqueeze(1).expand(-1, weights.shape[1], -1))  # (B, G, K)
    of_row = values.index_select(0, dispatch.places.flatten()).unflatten(0, dispatch.places.shape)  # (B, K, U)
    return torch.bmm((own * dispatch.filled.unsqueeze(1)).to(values.dtype), of_row)


def _starts(counts: Tensor) -> Tensor:
    """Where each of successive groups begins (E,)."""
    return counts.cumsum(0) - counts


# Sparse compute on a GPU: one product for all experts, each on the rows sent to it.
#
# `Dispatch`, made for CPUs, gives the number of rows of each expert to the host, which has to wait for the GPU. Here
# the number of places follows from what the host knows: a router gives a row at most k experts, so B rows take at most
# B x K places. Where each expert's places end stays on the device, where `grouped_mm` of torch reads it. Places without
# a row are computed on some row, and nobody reads them. Where no K is known, as under expert choice, whose experts take
# rows rather than rows experts, all experts run on all rows.
#
# Sums are taken in one order, without atomic additions: a step gives the same bits each time.
#
# Shapes: B rows, E experts, K experts a row at most, S places, I and O widths of a layer.


# Numbers in half precision that take the 16 bytes which a row has to be a multiple of, and each expert's first place.
BLOCK = 8


def in_one_product(x: Tensor, widths: tuple[int, ...]) -> bool:
    """Whether the device multiplies rows such as these, through layers of these widths, by one product of all experts.

    It takes bf16, widths that are multiples of `BLOCK`, and a GPU of Nvidia's compute capability 9 or 10: on others
    torch itself reads the numbers of rows back to the host and loops over experts.
    """
    fits = x.is_cuda and x.dtype == torch.bfloat16 and all(width % BLOCK == 0 for width in widths)
    return fits and _capability(x.device)[0] in (9, 10)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class Sent:
    """Which of E experts run on which of B rows: S places, those of one expert next to each other.

    ends: (E,) int32, the place after each expert's last one; owners: (S,) int64, whose a place is; rows: (S,) int64,
    the row in it; slots: (S,) int64, whose result of which row it is, as row x K + number of the result; asked: (S,)
    bool, False where nobody reads it. places, experts: (B, K) int64, where the up to K results of a row are, and whose
    they are; filled: (B, K) bool, False where a row has fewer.
    """

    ends: Tensor
    owners: Tensor
    rows: Tensor
    slots: Tensor
    asked: Tensor
    places: Tensor
    experts: Tensor
    filled: Tensor

    @staticmethod
    def of(used: Tensor, most: int) -> Sent:
        """From (B, E) bool, with at most `most` experts a row, which the caller knows: others would be left out."""
        (rows, count), device = used.shape, used.device
        most = min(most, count)
        total = -(-rows * most // BLOCK) * BLOCK + count * BLOCK
        each = used.long()
        # A product over no rows is a case of its own in every kernel; so each expert has one place more than asked for.
        sizes = (each.sum(0) // BLOCK + 1) * BLOCK
        starts = sizes.cumsum(0) - sizes
        # The last expert takes the places left, so that none is undefined.
        ends = torch.cat([starts[1:], starts.new_full((1,), total)])
        numbers = torch.arange(count, device=device)
        experts = (each * count - numbers).topk(most, dim=1).indices  # those in use, in their order, then others
        filled = used.gather(1, experts)
        places = (starts + each.cumsum(0) - 1).gather(1, experts)
        everywhere = torch.where(filled, places, total).flatten()  # one place more, for what is not there
        slots = everywhere.new_zeros(total + 1)
        slots.scatter_(0, everywhere, torch.arange(rows * most, device=device))
        asked = torch.zeros(total + 1, dtype=torch.bool, device=device).scatter_(0, everywhere, True)[:total]
        place = torch.arange(total, device=device)
        slots = slots[:total]
        # A result that is not a row's own would reach it times 0, which is NaN if the result is.
        own = torch.where(filled, places, torch.where(filled[:, :1], places[:, :1], 0))
        return Sent(
            ends=ends.int(),
            owners=torch.bucketize(place, ends, right=True),
            rows=torch.where(asked, slots // most, place % max(rows, 1)),
            slots=slots,
            asked=asked,
            places=own,
            experts=experts,
            filled=filled,
        )

    def to_places(self, x: Tensor) -> Tensor:
        """(B, I) rows -> (S, I), the row in each place."""
        out: Tensor = _ToPlaces.apply(x, self)
        return out

    def combine(self, values: Tensor, weights: Tensor) -> Tensor:
        """(S, U) outputs of places, (B, G, E) weights -> (B, G, U), summed over experts."""
        own = weights.gather(2, self.experts.unsqueeze(1).expand(-1, weights.shape[1], -1))  # (B, G, K)
        of_rows: Tensor = _ToRows.apply(values, self)
        return torch.bmm((own * self.filled.unsqueeze(1)).to(values.dtype), of_rows)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(S, I) places through each expert's own layer, (E, O, I) and (E, O) -> (S, O) like the places."""
        out: Tensor = _Product.apply(x, weight, bias, self)
        return out


class _ToPlaces(torch.autograd.Function):
    """Rows to their places; the gradient of a row is the sum over its places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sent) -> Tensor:
        ctx.sent = sent
        return x.index_select(0, sent.rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (_of_rows(gradient, ctx.sent) * ctx.sent.filled.unsqueeze(2)).sum(1), None


class _ToRows(torch.autograd.Function):
    """Results to their rows, (S, U) -> (B, K, U); the gradient of a place is that of the one slot it was read for."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sent: Sent) -> Tensor:
        ctx.sent = sent
        return _of_rows(values, sent)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        sent: Sent = ctx.sent
        return gradient.flatten(0, 1).index_select(0, sent.slots) * sent.asked.unsqueeze(1), None


class _Product(torch.autograd.Function):
    """Layers of E experts over places that are ordered by expert; weights are cast to the precision of the places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, sent: Sent) -> Tensor:
        low = weight.to(x.dtype)
        ctx.save_for_backward(x, low)
        ctx.sent, ctx.dtype = sent, weight.dtype
        out = functional.grouped_mm(x, low.transpose(1, 2), offs=sent.ends)
        return out.add_(bias.to(x.dtype).index_select(0, sent.owners))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, low = ctx.saved_tensors
        to_x, to_weight, to_bias = gradients(gradient, x, low, ctx.sent.ends, ctx.needs_input_grad[0])
        return to_x, to_weight.to(ctx.dtype), to_bias.to(ctx.dtype), None


def gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, ends: Tensor, of_places: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of places (S, I), weights (E, O, I) and biases (E, O), from that of the product (S, O).

    of_places: whether theirs is asked for; None in its place where not.
    """
    gradient = gradient.contiguous()
    to_x = functional.grouped_mm(gradient, weight, offs=ends) if of_places else None
    to_weight = functional.grouped_mm(gradient.t(), x, offs=ends)
    # A sum over each expert's places is a product with ones, of which the narrowest has BLOCK columns.
    to_bias = functional.grouped_mm(gradient.t(), x.new_ones(len(x), BLOCK), offs=ends)[..., 0]
    return to_x, to_weight, to_bias


def _of_rows(values: Tensor, sent: Sent) -> Tensor:
    """(S, U) -> (B, K, U)."""
    return values.index_select(0, sent.places.flatten()).unflatten(0, sent.places.shape)
