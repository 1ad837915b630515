"""Feature crosses: DCN-v2 with low-rank weights (Wang et al., WWW 2021, eq. 2)."""

from __future__ import annotations

from torch import Tensor, nn


class Crosses(nn.Module):
    """x_{l+1} = x_0 * (U_l V_l x_l + b_l) + x_l for `layers` layers of the given rank, (B, W) -> (B, W).

    A product of two embeddings, such as a user's and a candidate's, is what layers of weighted sums learn badly.
    """

    def __init__(self, inputs: int, layers: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(inputs, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, inputs) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, W) -> (B, W)."""
        crossed = x
        for down, up in zip(self.down, self.up, strict=True):
            crossed = x * up(down(crossed)) + crossed
        return crossed
