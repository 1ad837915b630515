"""How a table of any width is trained by kernels that take multiples of four columns only.

fbgemm stores rows of D' columns, the next such multiple of the table's width D; columns from D on are zeros, get no
gradient and stay zeros. Row-wise Adagrad divides a row's step by the root of the mean square of its gradients, a mean
that then is over D' columns and so too small by D / D'. Hence what is stored is the weights times sqrt(D' / D): steps
do not depend on a gradient's scale, so a stored row moves by as much as any other, and the weights by sqrt(D / D')
of that, which is what a table of D columns would do (but for Adagrad's epsilon of 1e-8).

Only training stores tables so; a trained model, as it is served, started from or evaluated, has D columns.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

COLUMNS = 4


def stored_width(dim: int) -> int:
    """Columns in which a table of that width is stored."""
    return -(-dim // COLUMNS) * COLUMNS


def to_stored(weights: Tensor) -> Tensor:
    """Rows (N, D) as they are stored: (N, D')."""
    dim = weights.shape[1]
    width = stored_width(dim)
    return weights if width == dim else functional.pad(weights * math.sqrt(width / dim), (0, width - dim))


def from_stored(weights: Tensor, dim: int) -> Tensor:
    """Stored rows, or means of such rows, (N, D') as they are meant: (N, D)."""
    width = weights.shape[1]
    return weights if width == dim else weights[:, :dim] * math.sqrt(dim / width)
