"""Towers begin at the base rates: a new model says of every row what the training rows say on average.

From a bias of 0 it says .5, and the first steps, in which learning rates rise, go into the way down: of a label that
one row in 200 has, a short training never arrives, and all its probabilities are too high.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmoe_rec.features.layout import TaskOutput
from mmoe_rec.model.towers import Towers


def base_rates(manifest: Mapping[str, Any], tasks: Sequence[TaskOutput], weighted: bool) -> list[float | None]:
    """Of each task, how often its label is 1 among the training rows in which it is observed, as encoding counted them.

    manifest: that of the features; weighted: rows count 1 / the rate at which they were sampled, as in the loss. None
    for a regression, and where no label was observed. Half a row of each class is added, so that no rate is 0 or 1.
    A task with `given` predicts what holds given that one, and its own label is observed only there.
    """
    counts = manifest["splits"]["train"]
    rows, positives = ("weight", "weighted_sum") if weighted else ("observed", "label_sum")
    rates = []
    for task in tasks:
        observed, positive = counts[rows].get(task.name, 0), counts[positives].get(task.name, 0)
        known = task.kind == "binary" and observed > 0
        rates.append((positive + 0.5) / (observed + 1) if known else None)
    return rates


@torch.no_grad()
def start_at(towers: Towers, rates: Sequence[float | None]) -> None:
    """Sets the towers' last biases to the logits of the rates; 0 where there is none, a regression's mean label."""
    logits = [0.0 if rate is None else math.log(rate) - math.log1p(-rate) for rate in rates]
    towers.output_bias.copy_(torch.tensor(logits)[:, None])
