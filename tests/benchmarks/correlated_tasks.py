"""Two regression tasks of chosen correlation: the synthetic data of the MMoE paper (Ma et al., KDD 2018, section 3.2).

With u1 and u2 orthonormal, w1 = c u1 and w2 = c (p u1 + sqrt(1 - p^2) u2), so that p is the cosine of the angle between
the tasks' weights; inputs x ~ N(0, I) and labels y_k = w_k.x + sum over i of sin(a_i w_k.x + b_i) + N(0, 0.01). Shapes:
S seeds, N rows, D inputs, M sines, and always 2 tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NOISE_VARIANCE = 0.01


class Rows(NamedTuple):
    """What rows are made of, whatever the correlation of their tasks.

    inputs (S, N, D), projections (S, N, 2) of the inputs on u1 and u2, noise (S, N, 2), all float32.
    """

    inputs: Tensor
    projections: Tensor
    noise: Tensor


class CorrelatedTasks:
    """An endless stream of rows for each of S seeds, which draws its tasks too; the same seed gives the same stream.

    Rows do not depend on the correlation: the labels at p = 0 and p = 1 are those of the same inputs, directions, sines
    and noise. State: directions (S, D, 2), amplitudes and phases of the sines (S, 1, 1, M).
    """

    def __init__(self, seeds: Sequence[int], inputs: int, scale: float, sines: int) -> None:
        self.inputs = inputs
        self.scale = scale
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        # The directions of a random plane: Gaussian columns made orthonormal.
        self.directions = torch.linalg.qr(self._normal(inputs, 2)).Q
        self.amplitudes = self._normal(1, 1, sines)
        self.phases = self._normal(1, 1, sines)

    def draw(self, rows: int) -> Rows:
        """The next N rows of each seed."""
        inputs = self._normal(rows, self.inputs)
        return Rows(inputs, inputs @ self.directions, self._normal(rows, 2) * NOISE_VARIANCE**0.5)

    def labels(self, rows: Rows, correlation: float) -> Tensor:
        """Labels (S, N, 2) float32 of the rows' two tasks at correlation p in [-1, 1]."""
        first, second = rows.projections.unbind(-1)
        both = torch.stack([first, correlation * first + (1 - correlation**2) ** 0.5 * second], dim=-1)
        linear = self.scale * both
        waves = torch.sin(self.amplitudes * linear.unsqueeze(-1) + self.phases).sum(-1)
        return linear + waves + rows.noise

    def _normal(self, *shape: int) -> Tensor:
        """(S, *shape) from N(0, 1), each seed's part from its own generator."""
        return torch.stack([torch.randn(shape, generator=each) for each in self.generators])
