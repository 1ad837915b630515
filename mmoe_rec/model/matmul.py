"""Linear layers and their stacks on the BLAS library or oneDNN, and layers that run experts on their own rows only.

On a CPU, torch uses its BLAS library for fp32 products, and oneDNN only for half precision. Torch's packages for x86
contain Intel's MKL as BLAS library. MKL takes twice as long as oneDNN on some processors of other vendors. This module
calls oneDNN with the operator that torch's compiler uses for linear layers. Results differ only by rounding.
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
"""blas: the library behind `torch.mm`; onednn: oneDNN for fp32 on a CPU, and torch's default elsewhere."""


class Linear(nn.Linear):
    """`nn.Linear` for inputs (B, inputs), computed with the library `matmul_backend`."""

    matmul_backend: MatmulBackend = "blas"

    def forward(self, input: Tensor, data: Tensor | None = None) -> Tensor:
        """Return the outputs (B, outputs).

        Args:
            input: (B, inputs), or (B, inputs - D) with `data`.
            data: (B, D), the last D inputs of the layer, which get no gradient.
        """
        return _linear(input, self.weight, self.bias, self.matmul_backend, data)


def set_matmul_backend(model: nn.Module, matmul_backend: MatmulBackend) -> None:
    """Set the library of all layers of a model.

    Args:
        model: Model to change.
        matmul_backend: Library.
    """
    for module in model.modules():
        if isinstance(module, Linear | StackedLinear):
            module.matmul_backend = matmul_backend


@lru_cache
def has_onednn() -> bool:
    """Return whether torch can multiply in fp32 with oneDNN here. With some settings, oneDNN rounds to bf16 or TF32."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 256, generator=generator), torch.randn(256, 64, generator=generator)
    try:
        product = onednn_linear(left, right).double()
    except (AttributeError, RuntimeError):  # The operator is missing or has another signature.
        return False
    # The outputs have a standard deviation of 16. The error is about 1e-5 in fp32 and 1e-2 in TF32.
    return bool((product - left.double() @ right.double()).abs().max() < 5e-4)


def choose_matmul_backend(choice: Literal["auto"] | MatmulBackend, device: str) -> MatmulBackend:
    """Return the library for a setting. `auto` takes oneDNN on a CPU if torch has it, because oneDNN is never slower.

    Args:
        choice: Setting `training.matmul_backend`.
        device: "cpu" or "cuda".

    Raises:
        UserError: This machine doesn't have the library.
    """
    if choice == "auto":
        return "onednn" if device == "cpu" and has_onednn() else "blas"
    if choice == "onednn" and device == "cuda":
        raise UserError("training.matmul_backend is onednn, which only supports CPUs. Set it to auto.")
    if choice == "onednn" and not has_onednn():
        raise UserError(
            "training.matmul_backend is onednn, which torch doesn't support in fp32 here. Set it to auto or blas."
        )
    return choice


def choose_serving_backend(choice: str) -> MatmulBackend:
    """Return oneDNN if this machine has it and `choice` (`serving.matmul_backend`) isn't `blas`, otherwise BLAS."""
    return "onednn" if choice != "blas" and has_onednn() else "blas"


def onednn_linear(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return left @ right + bias, (m, n).

    Args:
        left: (m, k) float32, contiguous or not.
        right: (k, n) float32, contiguous or not.
        bias: (n,).
    """
    # Copy matrices whose rows or columns have gaps in memory. For some, oneDNN would take a thousand times as long.
    left, right = (x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous() for x in (left, right))
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")


def cast_for_matmul(tensor: Tensor) -> Tensor:
    """Cast a tensor to autocast's precision if autocast is on. Several products can then share the result."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, matmul_backend: MatmulBackend, data: Tensor | None = None
) -> Tensor:
    """Apply a linear layer to the columns of `x` and then of `data`, which gets no gradient."""
    x, data = cast_for_matmul(x), None if data is None else cast_for_matmul(data)
    if data is None and (matmul_backend == "blas" or not _can_use_onednn(x)):
        return functional.linear(x, weight, bias)
    return _Linear.apply(x, data, weight, bias, matmul_backend)


def _can_use_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and len(x) > 0


class _Linear(torch.autograd.Function):
    """Linear layer on the columns of `x`, then `data`, which gets no gradient. Weights are cast to the type of `x`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, data: Tensor | None, weight: Tensor, bias: Tensor | None, matmul_backend: MatmulBackend
    ) -> Tensor:
        inputs, cast_weight = x if data is None else torch.cat([x, data], dim=1), weight.to(x.dtype)
        cast_bias = None if bias is None else bias.to(x.dtype)
        ctx.save_for_backward(inputs, cast_weight)
        ctx.x_width, ctx.dtype, ctx.onednn = x.shape[1], weight.dtype, matmul_backend == "onednn" and _can_use_onednn(x)
        if ctx.onednn:
            return onednn_linear(inputs, cast_weight.t(), cast_bias)
        return functional.linear(inputs, cast_weight, cast_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        multiply = onednn_linear if ctx.onednn else torch.mm
        weight_gradient = None
        if needs_weight and ctx.onednn and gradient.shape[1] > inputs.shape[1]:
            # Transpose the product. OneDNN takes up to twice as long if the result has more rows than columns.
            weight_gradient = onednn_linear(inputs.t(), gradient).t().contiguous()
        elif needs_weight:
            weight_gradient = multiply(gradient.t(), inputs).to(ctx.dtype)
        x_gradient = multiply(gradient, weight[:, : ctx.x_width]) if needs_x else None
        return x_gradient, None, weight_gradient, gradient.sum(0).to(ctx.dtype) if needs_bias else None, None


class StackedLinear(nn.Module):
    """G independent linear layers of equal shape, initialized like `nn.Linear`.

    Layers that read the same input are computed in one large product (`shared`). Otherwise each layer has its own
    product, which is faster on a CPU than `torch.bmm`.

    Attributes:
        weight: (G, outputs, inputs).
        bias: (G, outputs).
    """

    matmul_backend: MatmulBackend = "blas"

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        """Create the layers.

        Args:
            groups: Number of layers G.
            inputs: Number of inputs.
            outputs: Number of outputs.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(groups, outputs))
        bound = 1 / math.sqrt(inputs) if inputs else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply each layer to its own input, (B, G, inputs) -> (B, G, outputs)."""
        groups = zip(cast_for_matmul(x).unbind(1), self.weight.unbind(), self.bias.unbind(), strict=True)
        outputs = [_Linear.apply(rows, None, weight, bias, self.matmul_backend) for rows, weight, bias in groups]
        return torch.stack(outputs, dim=1)

    def shared(self, x: Tensor) -> Tensor:
        """Apply all layers to one input, (B, inputs) -> (B, G * outputs), with the outputs of layer 0 first."""
        return _linear(x, self.weight.flatten(0, 1), self.bias.flatten(), self.matmul_backend)


# Sparse compute runs each expert only on the rows sent to it, with all experts in one product. The rows are copied to
# slots: each slot holds one row for one expert.
#
# On a GPU, the host must not wait for the device to count the rows of an expert. A row uses at most K experts, so B
# rows need at most B x K slots, and the host reserves this number. Only the device knows where each expert's slots end.
# Slots that no row needs are computed on some row, and their results are never read.
#
# `functional.embedding` copies rows to slots. Its backward pass adds gradients in a fixed order without atomic
# additions, so a step is reproducible bit by bit.
#
# Shapes: B rows, E experts, K maximum number of experts per row, S slots, I and O input and output width of a layer.

# `grouped_mm` needs rows of whole 16-byte blocks, which are 8 numbers in half precision.
GROUPED_MM_ALIGNMENT = 8


def supports_grouped_mm(x: Tensor) -> bool:
    """Return whether the GPU of `x` multiplies the rows of all experts in one product, without making the host wait.

    The product needs bf16 and Nvidia's compute capability 9 or 10. On other GPUs, torch loops over experts.
    """
    return x.dtype == torch.bfloat16 and _capability(x.device)[0] in (9, 10)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class Dispatch:
    """Assignment of B rows to E experts, in S slots. The slots of an expert are adjacent.

    Attributes:
        sizes: (E,) int64, number of slots of each expert.
        rows: (S,) int64, the row of the batch in each slot.
        slots: (B, K) int64, for each row the slots with the results of its experts.
        experts: (B, K) int64, the experts that computed these results.
        filled: (B, K) bool, whether `slots` holds a result. A row with fewer than K experts has fewer results.
    """

    sizes: Tensor
    rows: Tensor
    slots: Tensor
    experts: Tensor
    filled: Tensor

    @staticmethod
    def of(used: Tensor, block: int = 1, max_per_row: int | None = None) -> "Dispatch":
        """Assign rows to the experts that they use.

        Args:
            used: (B, E) bool.
            block: Each expert's number of slots is rounded up to a multiple of this number.
            max_per_row: Maximum number of experts per row. None counts them, for which the host waits for a GPU.
        """
        rows, count = used.shape
        if max_per_row is None:
            max_per_row = int(used.sum(1).max()) if rows else 0
            sizes = (used.sum(0) + block - 1) // block * block
            starts, total = sizes.cumsum(0) - sizes, int(sizes.sum())
        else:
            # GPU kernels treat a product over no rows differently, so each expert gets at least one slot. The last
            # expert also gets the remaining slots, so that every slot has a result.
            max_per_row = min(max_per_row, count)
            sizes = (used.sum(0) // block + 1) * block
            starts, total = sizes.cumsum(0) - sizes, (-(-rows * max_per_row // block) + count) * block
            sizes = torch.cat([sizes[:-1], total - starts[-1:]])
        expert_indices = torch.arange(count, device=used.device).expand(rows, -1)
        columns = torch.where(used, used.cumsum(1) - 1, max_per_row)  # The last column is for unused experts.
        experts = columns.new_zeros(rows, max_per_row + 1).scatter_(1, columns, expert_indices)[:, :max_per_row]
        filled = torch.arange(max_per_row, device=used.device) < used.sum(1, keepdim=True)
        slots = torch.where(filled, (starts + used.cumsum(0) - 1).gather(1, experts), total)
        row_indices = torch.arange(rows, device=used.device)[:, None].expand(-1, max_per_row).flatten()
        rows_of_slots = slots.new_zeros(total + 1).scatter_(0, slots.flatten(), row_indices)[:total]
        # `combine` multiplies missing results by 0. This would give NaN if another row's result were NaN, so missing
        # results point to the row's own first result.
        slots = torch.where(filled, slots, torch.where(filled[:, :1], slots[:, :1], 0))
        return Dispatch(sizes, rows_of_slots, slots, experts, filled)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Apply each expert's linear layer to its slots, (S, O). The gradient of the result must be contiguous.

        Args:
            x: (S, I).
            weight: (E, O, I), which is cast to the type of `x`.
            bias: (E, O), which is cast too.
        """
        outputs, inputs = weight.shape[1:]
        # The bias becomes a column of the weights, which multiplies a column of ones. Columns of zeros follow up to a
        # multiple of the alignment.
        padding = functional.pad(x.new_ones(1), (0, -(inputs + 1) % GROUPED_MM_ALIGNMENT))
        rows = torch.cat([x, padding.expand(len(x), -1)], dim=1)
        zeros = (0, len(padding) - 1, 0, -outputs % GROUPED_MM_ALIGNMENT)
        columns = functional.pad(torch.cat([weight, bias.unsqueeze(2)], dim=2), zeros)
        ends = self.sizes.cumsum(0, dtype=torch.int32)
        return functional.grouped_mm(rows, columns.to(x.dtype).transpose(1, 2), offs=ends)[:, :outputs]

    def combine(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts' outputs, (B, G, U).

        Args:
            values: (S, U) outputs of the slots.
            weights: (B, G, E).
        """
        if not len(values):
            return values.new_zeros(*weights.shape[:2], values.shape[1])
        row_weights = weights.gather(2, self.experts.unsqueeze(1).expand(-1, weights.shape[1], -1))  # (B, G, K)
        row_values = functional.embedding(self.slots, values)  # (B, K, U)
        return torch.bmm((row_weights * self.filled.unsqueeze(1)).to(values.dtype), row_values)
