"""Tasks and features as a settings file gives them: what they mean, and what a model makes of them.

The latter are widths of embeddings, objectives, and weights of losses and of the score. They stand beside the meaning
in the file, but no encoded row depends on them: another choice takes another training, not other features.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmoe_rec.schema.features import (
    CounterFeature,
    CrossFeature,
    HistoryFeature,
    IdFeature,
    IdsFeature,
    NumericFeature,
    TimeFeature,
    VectorFeature,
)
from mmoe_rec.schema.log import Task
from mmoe_rec.schema.section import Section


class _Embedded(Section):
    dim: int = Field(16, ge=1, le=1024, description="width of the embedding")


class EmbeddedId(IdFeature, _Embedded):
    """One id a row, embedded."""


class EmbeddedIds(IdsFeature, _Embedded):
    """A list of ids a row, embedded and averaged."""


class EmbeddedNumeric(NumericFeature, _Embedded):
    """A number, as a standardised input or as an embedded quantile bucket; missing values get an indicator."""


class EmbeddedTime(TimeFeature):
    """Hour and weekday as embeddings, age in days as a number."""

    dim: int = Field(4, ge=1, le=1024, description="width of the embeddings of hour and weekday")


class EmbeddedCross(CrossFeature, _Embedded):
    """The hashed combination of two or more columns, embedded."""


FeatureSettings = Annotated[
    EmbeddedId
    | EmbeddedIds
    | EmbeddedNumeric
    | VectorFeature
    | EmbeddedTime
    | EmbeddedCross
    | HistoryFeature
    | CounterFeature,
    Field(discriminator="kind"),
]


class TaskSettings(Task):
    """One predicted behaviour. A null label is always unobserved."""

    objective: Literal["engagement", "satisfaction"] = Field(description="the objective that the task serves")
    loss_weight: float = Field(1.0, ge=0, description="weight of the task's loss in training")
    score_weight: float = Field(
        1.0, ge=0, description="weight in the score exp(sum of weight x log probability); 0 leaves the task out"
    )
