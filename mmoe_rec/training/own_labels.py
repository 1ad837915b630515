"""What validation says of binary tasks besides loss and AUC: calibration and GAUC, over the rows of a task's own label.

Sums are kept by every rank. GAUC needs the rows of a user side by side, wherever they were scored: all ranks exchange
them. Where there are more than ROWS_KEPT, GAUC is that of a share of the users, drawn by a hash of their ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmoe_rec.auc import grouped_auc
from mmoe_rec.batches.batch import Batch
from mmoe_rec.features.layout import Layout

ROWS_KEPT = 1_000_000
# Of a batch: users (B,), and logits and labels (B, T) of the binary tasks, NaN where unobserved.
Kept = tuple[np.ndarray, np.ndarray, np.ndarray]


class OwnLabels:
    """Adds up batches of this rank; `exchange` makes them those of all ranks."""

    def __init__(self, layout: Layout) -> None:
        self._binary = [index for index, task in enumerate(layout.tasks) if task.kind == "binary"]
        self._names = [layout.tasks[index].name for index in self._binary]
        self._one_in = 1  # one of this many users is kept: a power of 2, so that fewer are part of more
        self._sums = torch.zeros(len(self._binary), 2, dtype=torch.float64)  # of predictions and labels
        self._kept: list[Kept] = []

    def add(self, logits: Tensor, batch: Batch, own: Tensor) -> None:
        """logits (B, T) and own (B, T) bool, the rows of each task's own label; all in main memory."""
        logits, labels, known = (each[:, self._binary].double() for each in (logits, batch.labels, own))
        weights = known if batch.weights is None else known * batch.weights.double()[:, None]
        self._sums += torch.stack([(weights * logits.sigmoid()).sum(0), (weights * labels).sum(0)], dim=1)
        if batch.users is not None:
            seen = torch.where(known > 0, labels, torch.nan)
            kept = batch.users.numpy(), logits.numpy().astype(np.float32), seen.numpy()
            self._kept.append(_of_users(kept, self._one_in))
            while sum(len(users) for users, _, _ in self._kept) > ROWS_KEPT // dist.get_world_size():
                self._keep(2 * self._one_in)

    def exchange(self, device: torch.device) -> None:
        """A collective call."""
        if dist.get_world_size() > 1:
            sums = self._sums.to(device)
            dist.all_reduce(sums)
            self._sums = sums.cpu()
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (self._one_in, self._kept))
            self._kept = [each for _, part in parts for each in part]
            self._keep(max(one_in for one_in, _ in parts))

    def _keep(self, one_in: int) -> None:
        self._one_in, self._kept = one_in, [_of_users(each, one_in) for each in self._kept]

    def calibration(self) -> dict[str, float]:
        """Task -> sum of predictions / sum of labels, both weighted as the loss; not where no label is 1."""
        pairs = zip(self._names, self._sums.tolist(), strict=True)
        return {name: predicted / labels for name, (predicted, labels) in pairs if labels > 0}

    def gauc(self) -> dict[str, float]:
        """Task -> mean AUC of users weighted by their rows; not where no user has both labels."""
        if not self._kept:
            return {}
        users, logits, labels = (np.concatenate(each) for each in zip(*self._kept, strict=True))
        found = {name: _gauc(users, logits[:, t], labels[:, t]) for t, name in enumerate(self._names)}
        return {name: value for name, value in found.items() if value is not None}


def _of_users(kept: Kept, one_in: int) -> Kept:
    """The rows of one user in `one_in`, by the upper half of the hash: the lower one may be in use elsewhere."""
    users, logits, labels = kept
    chosen = (users.view(np.uint64) >> np.uint64(32)) % np.uint64(one_in) == 0
    return users[chosen], logits[chosen], labels[chosen]


def _gauc(users: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Of (N,) rows, NaN labels are unobserved."""
    seen = ~np.isnan(labels)
    distinct, user = np.unique(users[seen], return_inverse=True)
    areas = grouped_auc(user, logits[seen], labels[seen], 1 - labels[seen], len(distinct))
    both = ~np.isnan(areas)
    if not both.any():
        return None
    rows = np.bincount(user)[both]
    return float((areas[both] * rows).sum() / rows.sum())
