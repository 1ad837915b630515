"""Tasks as a settings file gives them: what they mean, and what a model makes of them.

The latter are objectives and the weights of losses and of the score; for features, the width of embeddings. They stand
beside the meaning in the file, but no encoded row depends on them: to change one takes a new training, not new
features.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmoe_rec.schema.log import Task


class TaskSettings(Task):
    """One predicted behaviour. A null label is always unobserved."""

    objective: Literal["engagement", "satisfaction"] = Field(description="the objective that the task serves")
    loss_weight: float = Field(1.0, ge=0, description="weight of the task's loss in training")
    score_weight: float = Field(
        1.0, ge=0, description="weight in the score exp(sum of weight x log probability); 0 leaves the task out"
    )
