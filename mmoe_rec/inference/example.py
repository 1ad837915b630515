"""A realistic request made from what a model knows: to try the server with, to document it, and to tell at every load
whether the model still computes what it did when it was written."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.features.vocabulary import VocabularyFeature
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.log.columns import column_uses
from mmoe_rec.model.layout import ModelTask
from mmoe_rec.model.score import SMALLEST_VALUE, Calibration
from mmoe_rec.settings.columns import Role

EXAMPLE = "example_request.json"
SCORES = "example_scores.json"
CANDIDATES = 8
# Libraries and processors round otherwise: fp32 logits then differ by some 1e-6, half precision by 1e-2.
TOLERANCE = 1e-4
_NOTHING, _LARGEST = 1e-30, 1e300  # probabilities and scores beyond are 0 or all there is, as rounding has it


def example_request(features: Path, tables_as_of: str | None) -> dict[str, Any]:
    """Arguments of `Ranker.rank`: a frequent user, frequent candidates, a usual context, a minute after the log's end;
    of a plain table, what is frequent in its columns.

    Args:
        features: serving state, `<work>/features/serving` or an artifact's `features`.
        tables_as_of: ISO time of the log's last request, None where it has no times.
    """
    pipeline = FeaturePipeline.load(features, memories=False)
    names = pipeline.schema.columns
    user = {column: values[0] for column, values in _usual(pipeline, "user").items()}
    if names.has_user:
        user = {names.user: _frequent(pipeline, features, "user", names.user)[0]}
    candidates = _usual(pipeline, "candidate")
    if names.has_candidate:
        candidates = {names.candidate: _frequent(pipeline, features, "candidate", names.candidate)}
    context = {column: values[0] for column, values in _usual(pipeline, "context").items() if values[0] is not None}
    if tables_as_of is not None:
        moment = datetime.fromisoformat(tables_as_of).replace(microsecond=0) + timedelta(minutes=1)
        context[names.time] = moment.isoformat()
    return {"user": user, "context": context, "candidates": candidates}


def _frequent(pipeline: FeaturePipeline, features: Path, role: Role, key: str) -> list[Any]:
    """The most frequent ids, or any known ones where no feature has counted them."""
    known = pq.read_table(features / f"latest.{role}.parquet", columns=[key]).column(key)
    return _vocabulary(pipeline, key) or known[:CANDIDATES].to_pylist()


def _vocabulary(pipeline: FeaturePipeline, column: str) -> list[Any]:
    for name, feature in pipeline.schema.features.items():
        if isinstance(feature, VocabularyFeature) and feature.column == column:
            return list(pipeline.vocabularies[feature.shares or name].ids[:CANDIDATES].to_pylist())
    return []


def _usual(pipeline: FeaturePipeline, role: Role) -> dict[str, list[Any]]:
    """Some values of each column of a role: the most frequent ids, or a mean number; null where no feature of a kind
    that knows one reads it."""
    usual: dict[str, list[Any]] = {}
    uses, own = column_uses(pipeline.schema), pipeline.schema.columns.names
    for column, its in pipeline.schema.input_columns().items():
        if its != role or column in own:
            continue
        readers = [name for name, feature in pipeline.schema.features.items() if [*feature.reads()] == [column]]
        values = (pipeline.encoders[name].typical(uses[column]) for name in readers)
        usual[column] = [next((value for value in values if value is not None), None)] * CANDIDATES
        if uses[column] == "key" and (known := _vocabulary(pipeline, column)):
            usual[column] = [known[place % len(known)] for place in range(CANDIDATES)]
    return usual


@dataclass(frozen=True)
class ExampleScores:
    """What a model gives for its example, in the request's order.

    scores: (N,); predictions: task -> (N,); computed_with: package, or "processor" -> version of it.
    """

    scores: tuple[float, ...]
    predictions: Mapping[str, tuple[float, ...]]
    computed_with: Mapping[str, str]

    @staticmethod
    def of(ranking: Ranking, tasks: Sequence[ModelTask]) -> ExampleScores:
        """The scores of a ranking of all candidates, computed in this process."""
        back = np.argsort(ranking.order)
        return ExampleScores(
            tuple(np.array(ranking.scores)[back].tolist()),
            {task.name: tuple(np.array(ranking.predictions[task.name])[back].tolist()) for task in tasks},
            {name: version(name) for name in ("torch", "numpy", "pyarrow")} | {"processor": platform.machine()},
        )

    @staticmethod
    def read(folder: Path) -> ExampleScores:
        """The scores in an artifact folder.

        Raises what json does, KeyError, TypeError or AttributeError for a damaged file.
        """
        tree = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        predictions = {name: tuple(values) for name, values in tree["predictions"].items()}
        return ExampleScores(tuple(tree["scores"]), predictions, dict(tree["computed_with"]))

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them without loss."""
        return asdict(self)

    def difference(self, now: ExampleScores, tasks: Sequence[ModelTask], calibration: Calibration) -> str | None:
        """What `now`, computed elsewhere or later, has that rounding does not explain, as a part of a sentence.

        A prediction may be off by TOLERANCE of its task's scale: the largest one in the example, or a regression's
        deviation where that is larger. A calibration may be steep, which multiplies what rounding does to logits. A
        score may be whatever such predictions make of it.
        """
        checks = []
        least_score, most_score = np.full((2, len(self.scores)), [[1 - TOLERANCE], [1 + TOLERANCE]])
        for task in tasks:
            values, regression = np.array(self.predictions[task.name]), task.kind == "regression"
            scale = max(np.abs(values).max(), task.deviation if regression else 0.0)
            steepest = calibration.tasks[task.name].steepest if task.name in calibration.tasks else 1.0
            off = TOLERANCE * scale * max(1.0, steepest) + _NOTHING
            checks.append((f"'{task.name}'", values, now.predictions[task.name], values - off, values + off))
            floor = SMALLEST_VALUE if regression else 0.0
            with np.errstate(over="ignore"):
                least_score *= np.maximum(values - off, floor) ** task.score_weight
                most_score *= np.maximum(values + off, floor) ** task.score_weight
        scores = np.array(self.scores)
        checks.append(("the score", scores, now.scores, np.minimum(least_score, _LARGEST), most_score))
        for what, before, after, low, high in checks:
            fits = [(low <= each) & (each <= high) for each in (before, np.array(after))]
            if not np.all(fits):
                place = int(np.argmin(fits[0] & fits[1]))
                return f"{what} of candidate {place + 1} is {after[place]:.6g} instead of {before[place]:.6g}"
        return None

    def other_versions(self, now: ExampleScores) -> list[str]:
        """What has another version in `now`, such as "torch 2.13.0 instead of 2.14.1"."""
        versions = now.computed_with
        return [
            f"{name} {versions.get(name)} instead of {each}"
            for name, each in self.computed_with.items()
            if versions.get(name) != each
        ]
