"""Scores encoded rows with a model, to be measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.batches.encoded_rows import EncodedRows, Part, Rows, weights_of
from mmoe_rec.devices import device_of, freed_memory_kept
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.summary import PredictedRows
from mmoe_rec.evaluation.sums import EvaluationSums, MeasuredTask
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import UNCALIBRATED, Calibration, add_outcomes, fuse, predictions
from mmoe_rec.model.utilisation import Utilisation, UtilisationSums
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.progress import bar
from mmoe_rec.settings.sections import Settings

COLUMNS = ("user", "request", "candidate")
ROWS_AT_A_TIME = 65_536


class NotFiniteError(UserError):
    """A model gives predictions that are not finite numbers. name: of the model."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class ScoredRows:
    """N scored rows in any order, because the rows of a request may lie anywhere in a log.

    Attributes:
        layout: Layout of the model.
        users: IDs, int64 or string. Shape (N,).
        requests: IDs, int64 or string. Shape (N,).
        candidates: IDs, int64 or string, None if the log has no candidates. Shape (N,).
        predictions: Predictions of the tasks. Shape (N, T).
        labels: Labels of the tasks, NaN where unobserved. Shape (N, T).
        score: Log scores. Shape (N,).
        experts: How the tasks used the experts, None if there are none.
        outcomes: Outcome of `layout.outcomes` -> labels, NaN where unobserved. Shape (N,).
        relevance: Task -> weight of its label in the relevance of a row.
        weights: Weights of the rows, None if all rows count alike. Shape (N,).
        row: Numbers of the rows in their log, if the log has no candidates. Shape (N,).
    """

    layout: ModelLayout
    users: pa.Array
    requests: pa.Array
    candidates: pa.Array | None
    predictions: np.ndarray
    labels: np.ndarray
    score: np.ndarray
    experts: Utilisation | None
    outcomes: dict[str, np.ndarray]
    relevance: Mapping[str, float]
    weights: np.ndarray | None = None
    row: pa.Array | None = None

    @property
    def predicted(self) -> PredictedRows:
        """The rows as they are measured: each task over the rows of its own label, each outcome over all rows.

        An outcome's prediction is the product of both tasks'. It has no weight in the score, which multiplies already.
        """
        names = [*(task.name for task in self.layout.tasks), *self.layout.outcomes]
        specs = [MeasuredTask(task.name, task.kind, self.relevance[task.name]) for task in self.layout.tasks]
        specs += [MeasuredTask(name, weight=0.0) for name in self.layout.outcomes]
        return PredictedRows(
            tuple(specs),
            self.users,
            self.requests,
            self.candidates,
            add_outcomes(self.predictions, self.layout),
            dict(zip(names, [*self.labels.T, *self.outcomes.values()], strict=True)),
            self.score,
            self.weights,
        )

    def measure(self) -> EvaluationSums:
        """Sum what all metrics need, by user or group of users."""
        return self.predicted.sum()

    def with_predictions(self, values: np.ndarray) -> "ScoredRows":
        """The same rows with another model's predictions (N, T), fused by the relevance weights."""
        weights = np.array([self.relevance[task.name] for task in self.layout.tasks])
        score = np.log(np.clip(values, 1e-12, None)) @ weights
        return replace(self, predictions=values, score=score)


def read_labels(settings: Settings, prepared: FeatureFolder, split: str, part: Part | None = None) -> ScoredRows:
    """Read the rows of a split, or of one part of its users, without inputs. Predictions and scores are zeros."""
    weighted, layout = settings.training.sampling_correction == "weights", ModelLayout.of(prepared.layout, settings)
    rows = EncodedRows(prepared.split(split), replace(layout, tables=(), ids=(), dense=(), attention=()), part=part)
    columns = (*COLUMNS, *(f"label.{name}" for name in layout.outcomes), *rows.weighing(weighted))
    return join_labels(settings, layout, list(rows.stream(ROWS_AT_A_TIME, columns)))


def join_labels(settings: Settings, layout: ModelLayout, parts: Sequence[tuple[Rows, pa.Table]]) -> ScoredRows:
    """Join parts of rows, with the columns beside them. Predictions and scores are zeros."""
    labels = np.concatenate([rows.labels for rows, _ in parts])
    unknown = {"predictions": np.zeros(labels.shape), "score": np.zeros(len(labels)), "experts": None}
    relevance = {name: task.score_weight for name, task in settings.tasks.items()}
    scored = _put_together(layout, [table for _, table in parts], labels=labels, relevance=relevance, **unknown)
    return scored if settings.columns.has_candidate else replace(scored, candidates=None)


def _put_together(layout: ModelLayout, tables: Sequence[pa.Table], **of_rows: Any) -> ScoredRows:
    """Rows with the columns that were read beside them; of_rows: what else they have."""
    beside = pa.concat_tables(tables)
    users, requests, candidates = (beside.column(name).combine_chunks() for name in COLUMNS)
    outcomes = {name: beside.column(f"label.{name}").to_numpy() for name in layout.outcomes}
    weights = weights_of(beside)
    return ScoredRows(layout, users, requests, candidates, outcomes=outcomes, weights=weights, **of_rows)


@torch.inference_mode()
def score_rows(
    model: RankingModel,
    layout: ModelLayout,
    rows: EncodedRows,
    batch_size: int,
    *,
    calibration: Calibration = UNCALIBRATED,
    relevance: Mapping[str, float] | None = None,
    weighted: bool = False,
    name: str = "the model",
) -> ScoredRows:
    """Scores all rows without placement, in fp32, on the model's device.

    The score is the one that the model serves, by its own weights. relevance: weight of each task's label in what a row
    is worth, against which rankings are measured, so that models with other weights are measured alike; None takes the
    model's. weighted: metrics are those of the log before it was sampled, each row weighing 1 / its sampling rate.
    Raises NotFiniteError, which calls the model by its name.
    """
    model.eval()
    kinds, names = [task.kind for task in layout.tasks], [task.name for task in layout.tasks]
    weights = [task.score_weight for task in layout.tasks]
    if relevance is None:
        relevance = dict(zip(names, weights, strict=True))
    more = [*(f"label.{name}" for name in layout.outcomes), *rows.weighing(weighted)]
    parts: list[tuple[np.ndarray, ...]] = []
    tables: list[pa.Table] = []
    experts = UtilisationSums(model.experts_in_use)
    with bar() as progress, freed_memory_kept():
        task = progress.add_task("scoring", total=rows.rows)
        for part, table in rows.stream(batch_size, (*COLUMNS, *more)):
            batch = make_batch(part.encoded, layout, torchrec=False).to(device_of(model))
            outputs = model(batch)
            if not outputs.logits.isfinite().all():
                raise NotFiniteError(f"'{name}' gives predictions that are not finite numbers", name)
            logits = calibration.apply(outputs.logits.cpu(), names)
            parts.append((predictions(logits, kinds).numpy(), part.labels, fuse(logits, kinds, weights).numpy()))
            experts.add(outputs)
            tables.append(table)
            progress.advance(task, len(part))
    predicted, labels, score = (np.concatenate(each) for each in zip(*parts, strict=True))
    return _put_together(
        layout,
        tables,
        predictions=predicted,
        labels=labels,
        score=score,
        experts=experts.result(),
        relevance=relevance,
    )
