"""Matrix products of layers: by which library they run, of many small layers at once, and on sent rows only.

Three chapters: linear layers whose fp32 products can go to oneDNN; G layers of one shape stored as one weight; and
products of each expert with the rows that were sent to it (`Dispatch`).

torch gives products in fp32 on a CPU to its BLAS library, and only those in half precision to oneDNN. Its packages for
x86 bring Intel's MKL, which takes twice as long as oneDNN on some processors of others. The operator that reaches
oneDNN is the one that torch's compiler puts in the place of linear layers; results are equal but for rounding.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.errors import UserError

MatmulBackend = Literal["blas", "onednn"]
"""blas: the library behind `torch.mm`; onednn: oneDNN, for fp32 on a CPU; the rest stays where torch has it."""


class Linear(nn.Linear):
    """`nn.Linear`, with its weights and its state, of (B, inputs) alone, by the library that `matmul_backend` names."""

    matmul_backend: MatmulBackend = "blas"

    def forward(self, input: Tensor, data: Tensor | None = None) -> Tensor:
        """(B, inputs) -> (B, outputs). data: (B, D) the last D of the inputs, which get no gradient."""
        return linear(input, self.weight, self.bias, self.matmul_backend, data)


def set_matmul_backend(model: nn.Module, matmul_backend: MatmulBackend) -> None:
    """Makes all layers multiply by this library."""
    for each in model.modules():
        if isinstance(each, Linear | StackedLinear):
            each.matmul_backend = matmul_backend


@lru_cache
def has_onednn() -> bool:
    """Whether this build of torch multiplies by oneDNN, and in fp32: some settings of torch's and of oneDNN's have it
    round to bf16 or TF32, where the processor can.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 256, generator=generator), torch.randn(256, 64, generator=generator)
    try:
        found = onednn_linear(left, right).double()
    except (AttributeError, RuntimeError):  # there is none, or it is another one
        return False
    # The outputs are about 16: fp32 is off by a hundred-thousandth, TF32 by a hundredth.
    return bool((found - left.double() @ right.double()).abs().max() < 5e-4)


def choose_matmul_backend(choice: Literal["auto"] | MatmulBackend, device: str) -> MatmulBackend:
    """Return the library that a setting asks for.

    `auto` takes oneDNN on a CPU where torch has it. Its matmuls in fp32 take half the time of BLAS on some processors,
    and as long on others (`tests/benchmarks/LOG.md`).

    Args:
        choice: The setting `training.matmul_backend`.
        device: "cpu" or "cuda".

    Raises:
        UserError: This machine does not have the library.
    """
    if choice == "auto":
        return "onednn" if device == "cpu" and has_onednn() else "blas"
    if choice == "onednn" and device == "cuda":
        raise UserError("training.matmul_backend is onednn, a library of CPUs: set it to auto")
    if choice == "onednn" and not has_onednn():
        raise UserError(
            "training.matmul_backend is onednn, but torch does not multiply by it in fp32 here: set it to auto or blas"
        )
    return choice


def choose_serving_backend(choice: str) -> MatmulBackend:
    """Return the library to serve by. oneDNN, also of a model from another machine, gives way to BLAS without it.

    Args:
        choice: The setting `serving.matmul_backend`.
    """
    return "onednn" if choice != "blas" and has_onednn() else "blas"


def onednn_linear(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """(m, k) and (k, n) float32, with or without gaps, to (m, n) plus bias (n,)."""
    # Some matrices with gaps go through a loop of oneDNN's that takes a thousand times as long.
    left, right = (
        each if each.is_contiguous() or each.t().is_contiguous() else each.contiguous() for each in (left, right)
    )
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")


def cast_for_matmul(tensor: Tensor) -> Tensor:
    """The tensor in autocast's precision, if that is on: cast once for several products."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, matmul_backend: MatmulBackend, data: Tensor | None = None
) -> Tensor:
    """`functional.linear`: (B, I), (O, I), (O,) -> (B, O). data: (B, D) the last D of I, which get no gradient."""
    if data is None and (matmul_backend == "blas" or not _takes_onednn(cast_for_matmul(x))):
        return functional.linear(cast_for_matmul(x), weight, bias)
    return _Linear.apply(
        cast_for_matmul(x), None if data is None else cast_for_matmul(data), weight, bias, matmul_backend
    )


def _takes_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and len(x) > 0


class _Linear(torch.autograd.Function):
    """A linear layer, without a gradient of data among its inputs.

    Weights of higher precision than the rows are cast, and so are their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, data: Tensor | None, weight: Tensor, bias: Tensor | None, matmul_backend: MatmulBackend
    ) -> Tensor:
        inputs, own = x if data is None else torch.cat([x, data], dim=1), weight.to(x.dtype)
        own_bias = None if bias is None else bias.to(x.dtype)
        ctx.save_for_backward(inputs, own)
        ctx.own, ctx.dtype, ctx.onednn = x.shape[1], weight.dtype, matmul_backend == "onednn" and _takes_onednn(x)
        return onednn_linear(inputs, own.t(), own_bias) if ctx.onednn else functional.linear(inputs, own, own_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        to_x, _, to_weight, to_bias, _ = ctx.needs_input_grad
        multiply = onednn_linear if ctx.onednn else torch.mm
        weights = None
        if to_weight and ctx.onednn and gradient.shape[1] > inputs.shape[1]:
            # oneDNN takes up to twice as long where its result has more rows than columns.
            weights = onednn_linear(inputs.t(), gradient).t().contiguous()
        elif to_weight:
            weights = multiply(gradient.t(), inputs).to(ctx.dtype)
        of_x = multiply(gradient, weight[:, : ctx.own]) if to_x else None
        return of_x, None, weights, gradient.sum(0).to(ctx.dtype) if to_bias else None, None


class StackedLinear(nn.Module):
    """G independent linear layers from `inputs` to `outputs`, each initialised as `nn.Linear` would be.

    Inputs that all groups share go through one large product; groups with inputs of their own through one each, which
    beats a strided batched product on a CPU. State: weight (G, outputs, inputs), bias (G, outputs).
    """

    matmul_backend: MatmulBackend = "blas"

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(groups, outputs))
        bound = 1 / math.sqrt(inputs) if inputs else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """An input for each group: (B, G, inputs) -> (B, G, outputs)."""
        groups = zip(cast_for_matmul(x).unbind(1), self.weight.unbind(), self.bias.unbind(), strict=True)
        outputs = [_Linear.apply(rows, None, weight, bias, self.matmul_backend) for rows, weight, bias in groups]
        return torch.stack(outputs, dim=1)

    def shared(self, x: Tensor) -> Tensor:
        """One input for all groups: (B, inputs) -> (B, G * outputs), group-major."""
        return linear(x, self.weight.flatten(0, 1), self.bias.flatten(), self.matmul_backend)


# Sparse compute: each expert on the rows that were sent to it, all experts in one product.
#
# On a GPU the host must not wait to learn how many rows an expert has. There the number of places follows from what it
# knows: a router gives a row at most k experts, so B rows take at most B x K places; where each expert's places end
# stays on the device. Places without a row are computed on some row, and nobody reads them. `functional.embedding`
# gathers rows, as its backward pass adds in one order, without atomic additions: a step gives the same bits each time.
#
# Shapes: B rows, E experts, K experts a row at most, S places, I and O widths of a layer.


# Rows whose numbers in half precision take 16 bytes, which `grouped_mm` asks for.
GROUPED_MM_ALIGNMENT = 8


def supports_grouped_mm(x: Tensor) -> bool:
    """Whether a GPU multiplies such rows by their experts' weights in one product: in bf16, from Nvidia's compute
    capability 9 to 10. On others torch itself reads the numbers of rows back to the host and loops over experts.
    """
    return x.dtype == torch.bfloat16 and _capability(x.device)[0] in (9, 10)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class Dispatch:
    """Which of E experts run on which of B rows: S places, those of one expert next to each other.

    sizes: (E,) int64, places of each expert; rows: (S,) int64, the row in each place; places, experts: (B, K) int64,
    where the up to K results of a row are, and whose they are; filled: (B, K) bool, False where a row has fewer.
    """

    sizes: Tensor
    rows: Tensor
    slots: Tensor
    experts: Tensor
    filled: Tensor

    @staticmethod
    def of(used: Tensor, block: int = 1, max_per_row: int | None = None) -> "Dispatch":
        """The dispatch of rows to the experts that they use, (B, E) bool.

        block: each expert gets a multiple of so many places; most: experts of a row, at most, with which no number is
        read from the device.
        """
        rows, count = used.shape
        if max_per_row is None:
            max_per_row = int(used.sum(1).max()) if rows else 0
            sizes = (used.sum(0) + block - 1) // block * block
            starts, total = sizes.cumsum(0) - sizes, int(sizes.sum())
        else:
            # Kernels of GPUs treat a product over no rows apart, so each expert has a place too many; and the last one
            # takes all that are left, so that none is undefined.
            max_per_row = min(max_per_row, count)
            sizes = (used.sum(0) // block + 1) * block
            starts, total = sizes.cumsum(0) - sizes, (-(-rows * max_per_row // block) + count) * block
            sizes = torch.cat([sizes[:-1], total - starts[-1:]])
        numbers = torch.arange(count, device=used.device).expand(rows, -1)
        nth = torch.where(used, used.cumsum(1) - 1, max_per_row)  # column `max_per_row` is for what is not there
        experts = nth.new_zeros(rows, max_per_row + 1).scatter_(1, nth, numbers)[:, :max_per_row]
        filled = torch.arange(max_per_row, device=used.device) < used.sum(1, keepdim=True)
        slots = torch.where(filled, (starts + used.cumsum(0) - 1).gather(1, experts), total)
        each_row = torch.arange(rows, device=used.device).repeat_interleave(max_per_row, output_size=rows * max_per_row)
        in_place = slots.new_zeros(total + 1).scatter_(0, slots.flatten(), each_row)[:total]
        # A result that is not a row's own would reach it times 0, which is NaN if the result is.
        slots = torch.where(filled, slots, torch.where(filled[:, :1], slots[:, :1], 0))
        return Dispatch(sizes, in_place, slots, experts, filled)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Places through each expert's own linear layer: (S, I), (E, O, I), (E, O) -> (S, O); weights are cast.

        The gradient that arrives has to be contiguous, as that of an activation is.
        """
        outputs, inputs = weight.shape[1:]
        # The bias multiplies a column of ones; further columns of zeros make up whole blocks.
        more = functional.pad(x.new_ones(1), (0, -(inputs + 1) % GROUPED_MM_ALIGNMENT))
        rows = torch.cat([x, more.expand(len(x), -1)], dim=1)
        columns = functional.pad(
            torch.cat([weight, bias.unsqueeze(2)], dim=2), (0, len(more) - 1, 0, -outputs % GROUPED_MM_ALIGNMENT)
        )
        ends = self.sizes.cumsum(0, dtype=torch.int32)
        return functional.grouped_mm(rows, columns.to(x.dtype).transpose(1, 2), offs=ends)[:, :outputs]

    def combine(self, values: Tensor, weights: Tensor) -> Tensor:
        """(S, U) outputs of places, (B, G, E) weights -> (B, G, U), summed over experts."""
        if not len(values):
            return values.new_zeros(*weights.shape[:2], values.shape[1])
        own = weights.gather(2, self.experts.unsqueeze(1).expand(-1, weights.shape[1], -1))  # (B, G, K)
        of_rows = functional.embedding(self.slots, values)  # (B, K, U)
        return torch.bmm((own * self.filled.unsqueeze(1)).to(values.dtype), of_rows)
