"""When learning rates rise and fall, and when validation rows are scored."""

from __future__ import annotations

import math

from mmoe_rec.settings import Training


def learning_rate_share(step: int, total: int, warmup_share: float) -> float:
    """Share of the peak learning rate at a step: linear rise, then a cosine down to 1% (Loshchilov & Hutter 2017)."""
    warmup = math.ceil(total * warmup_share)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def validation_steps(batches_per_epoch: int, settings: Training) -> set[int]:
    """Numbers of steps after which to validate, the last step of each epoch among them."""
    parts = min(settings.validations_per_epoch, batches_per_epoch)
    return {
        epoch * batches_per_epoch + round(batches_per_epoch * part / parts)
        for epoch in range(settings.epochs)
        for part in range(1, parts + 1)
    }
