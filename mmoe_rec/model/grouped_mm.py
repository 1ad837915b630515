"""Sparse compute on a GPU: one product for all experts, each on the rows sent to it, and no word of it to the host.

`Dispatch`, made for CPUs, counts each expert's rows and gives these numbers to the host, which then has to wait for the
GPU. Here the number of places follows from what the host knows: a router gives a row at most k experts, so B rows take
at most B x K places, and where each expert's places end stays on the device, where `grouped_mm` of torch reads it.
Places that nobody asks for are computed on some row and read by none. Where no K is known, as under expert choice,
whose experts take rows rather than rows experts, all experts run on all rows.

Sums are taken in one order, without atomic additions: a step gives the same bits each time.

Shapes: B rows, E experts, K experts a row at most, S places, I and O widths of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
