"""What a model has learnt of placement, for people: by the values of the columns that describe it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmoe_rec.evaluation.results import PlacementRecord
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inspection.health import row_names

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows

MOST_VALUES = 50
"""Values of a feature that are told: those that most rows have."""


def describe_placement(scored: ScoredRows, features: Path) -> list[PlacementRecord]:
    """What a model has learnt of each value of placement; none of a model that knows no placement.

    features: folder of the model's features, which say what values are called.
    """
    return [] if scored.placement is None else list(_records(scored, features))


def _records(scored: ScoredRows, features: Path) -> Iterator[PlacementRecord]:
    assert scored.placement is not None
    schema = FeaturePipeline.load(features, memories=False).schema
    inputs = {each.name: each for each in scored.layout.ids}
    for name, (numbers, rows, effects) in scored.placement.inputs.items():
        most = np.sort(np.argsort(-rows, kind="stable")[:MOST_VALUES])
        feature, table = inputs[name].feature, inputs[name].table
        meaning = schema.features[feature].meaning(schema)
        for value, count, effect in zip(
            _values(numbers[most].tolist(), meaning, table, features), rows[most], effects[most], strict=True
        ):
            told = {
                task.name: float(np.exp(each) if task.kind == "binary" else each)
                for task, each in zip(scored.layout.tasks, effect, strict=True)
            }
            yield PlacementRecord(name, value, int(count), told)


def _values(numbers: list[int], meaning: Any, table: str, features: Path) -> list[str]:
    known = [number for number in numbers if number >= meaning.first_known or meaning.row_name is not None]
    names = dict(zip(known, row_names(meaning, table, list(known), features), strict=True))
    return [names.get(number, "missing" if meaning.missing and number == 0 else "unknown") for number in numbers]
