"""A realistic request made from what a model knows: to try the server with, and to document it."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mmoe_rec.features.ids import IdEncoder, IdsEncoder
from mmoe_rec.features.latest import LatestValues
from mmoe_rec.features.numeric import NumericEncoder
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.columns import column_uses

CANDIDATES = 8


def example_request(features: Path, tables_as_of: str) -> dict[str, Any]:
    """Arguments of `Ranker.rank`: a frequent user, frequent candidates, a usual context, a minute after the log's end.

    Args:
        features: serving state, `<work>/features/serving` or an artifact's `features`.
        tables_as_of: ISO time of the log's last request.
    """
    pipeline = FeaturePipeline.load(features, memories=False)
    names = pipeline.schema.columns
    users = LatestValues(names.user, pq.read_table(features / "latest.user.parquet"))
    candidates = LatestValues(names.candidate, pq.read_table(features / "latest.candidate.parquet"))
    moment = datetime.fromisoformat(tables_as_of).replace(microsecond=0) + timedelta(minutes=1)
    return {
        "user": {names.user: _frequent(pipeline, users, 1)[0]},
        "context": _usual_context(pipeline) | {names.time: moment.isoformat()},
        "candidates": {names.candidate: _frequent(pipeline, candidates, CANDIDATES)},
    }


def _frequent(pipeline: FeaturePipeline, latest: LatestValues, count: int) -> list[Any]:
    """The most frequent ids, or any known ones where no feature has counted them."""
    known = _vocabulary(pipeline, latest.key)
    return (known or latest.table.column(latest.key)[:count].to_pylist())[:count]


def _vocabulary(pipeline: FeaturePipeline, column: str) -> list[Any]:
    for encoder in pipeline.encoders.values():
        if isinstance(encoder, IdEncoder) and encoder.feature.column == column:
            return list(encoder.owner.vocabulary.known[:CANDIDATES].to_pylist())
    return []


def _usual_context(pipeline: FeaturePipeline) -> dict[str, Any]:
    """Most frequent ids and mean numbers of the context columns; those that no such feature reads are left out."""
    usual: dict[str, Any] = {}
    uses = column_uses(pipeline.schema)
    for column, role in pipeline.schema.input_columns().items():
        if role != "context" or column == pipeline.schema.columns.time:
            continue
        for encoder in pipeline.encoders.values():
            if isinstance(encoder, IdEncoder) and encoder.feature.column == column:
                known = _vocabulary(pipeline, column)[:1]
                usual.update({column: known if isinstance(encoder, IdsEncoder) else known[0]} if known else {})
            elif isinstance(encoder, NumericEncoder) and encoder.feature.column == column and uses[column] == "number":
                usual.setdefault(column, _usual_number(encoder))
    return usual


def _usual_number(encoder: NumericEncoder) -> float:
    if encoder.feature.transform == "buckets":
        return float(encoder.edges[len(encoder.edges) // 2]) if len(encoder.edges) else 0.0
    mean = encoder.number.standardiser.mean
    return round(float(np.sign(mean) * np.expm1(abs(mean))) if encoder.feature.transform == "log" else mean, 6)
