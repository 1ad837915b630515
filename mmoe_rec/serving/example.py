"""A realistic request made from what a model knows: to try the server with, and to document it."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mmoe_rec.features.latest import LatestValues
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.features.vocabulary import VocabularyFeature
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
    for name, feature in pipeline.schema.features.items():
        if isinstance(feature, VocabularyFeature) and feature.column == column:
            return list(pipeline.owners[feature.shares or name].vocabulary.ids[:CANDIDATES].to_pylist())
    return []


def _usual_context(pipeline: FeaturePipeline) -> dict[str, Any]:
    """Most frequent ids and mean numbers of the context columns; those that no such feature reads are left out."""
    usual: dict[str, Any] = {}
    uses = column_uses(pipeline.schema)
    for column, role in pipeline.schema.input_columns().items():
        if role != "context" or column == pipeline.schema.columns.time:
            continue
        readers = [name for name, feature in pipeline.schema.features.items() if [*feature.reads()] == [column]]
        values = (pipeline.encoders[name].usual(uses[column]) for name in readers)
        usual[column] = next((value for value in values if value is not None), None)
    return {column: value for column, value in usual.items() if value is not None}
