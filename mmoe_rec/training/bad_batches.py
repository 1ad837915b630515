"""Steps whose loss is not finite: training stops with the batch at hand for inspection, or goes on without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mmoe_rec.atomic import atomic_file
from mmoe_rec.batches.batch import Batch
from mmoe_rec.errors import UserError

# So many in a row come of broken weights rather than of single batches.
IN_A_ROW_AT_MOST = 20


class BadBatches:
    """Counts them, all ranks alike. folder: where a batch is saved; policy: what to do; skipped: steps so far."""

    def __init__(self, folder: Path, policy: Literal["stop", "skip"]) -> None:
        self.folder, self.policy = folder, policy
        self.skipped = 0
        self._in_a_row = 0

    def none(self) -> None:
        """The step was a good one."""
        self._in_a_row = 0

    def leave_out(self, batch: Batch, logits: Tensor, step: int, what: str) -> None:
        """Skips a step, or raises UserError, as every rank does at the same step.

        what: is not finite: "loss" or "gradient".
        """
        self.skipped += 1
        self._in_a_row += 1
        if self.policy == "skip" and self._in_a_row <= IN_A_ROW_AT_MOST:
            return
        file = self.folder / f"bad_batch.step{step}.rank{dist.get_rank()}.pt"
        with atomic_file(file) as path:
            torch.save(_content(batch, logits), path)
        tried = f" in {self._in_a_row} steps, one after the other," if self.policy == "skip" else ""
        raise UserError(
            f"the {what} of step {step}{tried} is not finite; the batch is saved as '{file}' (torch.load): look there "
            "for extreme inputs, lower training.learning_rate or training.table_learning_rate, or set "
            "training.on_bad_loss to skip"
        )


def _content(batch: Batch, logits: Tensor) -> dict[str, Any]:
    ids = batch.ids
    keys = ids.keys() if callable(ids.keys) else ids.keys
    values, lengths = (each() if callable(each) else each for each in (ids.values, ids.lengths))
    content = {
        "id_names": list(keys),
        "id_values": values,
        "id_lengths": lengths,
        "dense": batch.dense,
        "labels": batch.labels,
        "observed": batch.observed,
        "weights": batch.weights,
        "logits": logits.detach(),
    }
    on_cpu = {name: each.cpu() if isinstance(each, Tensor) else each for name, each in content.items()}
    return on_cpu | {"position": None if batch.position is None else batch.position.to_dict()}
