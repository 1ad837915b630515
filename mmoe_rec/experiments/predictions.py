"""Predictions of the rows that judge variants: computed once for each run, kept in a file, measured from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmoe_rec.atomic import atomic_file
from mmoe_rec.batches.batch import make_batch
from mmoe_rec.batches.encoded_rows import EncodedRows, Part, Rows, weights_of
from mmoe_rec.devices import device_of
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.sums import EvaluationSums, MeasuredTask, measure
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.score import Calibration, fuse, predictions
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.sections import Settings

ROWS_AT_A_TIME = 65_536
_FACTS = b"mmoe_rec"  # The key of a file's metadata.


@dataclass(frozen=True)
class Predictions:
    """Predictions of N rows.

    Attributes:
        tasks: Names of the T predicted tasks.
        values: Probabilities, or values of a regression. Shape (N, T).
        score: Ranking scores. Shape (N,).
    """

    tasks: tuple[str, ...]
    values: np.ndarray
    score: np.ndarray

    def write(self, file: Path, facts: dict[str, Any]) -> None:
        """Write the predictions, and facts about the run as metadata."""
        table = pa.table({name: self.values[:, place] for place, name in enumerate(self.tasks)} | {"score": self.score})
        try:
            with atomic_file(file) as path:
                pq.write_table(table.replace_schema_metadata({_FACTS: json.dumps(facts)}), path, compression="zstd")
        except OSError as error:
            raise UserError(f"'{file}' can't be written: {error.strerror or error}") from None

    @staticmethod
    def read(file: Path) -> tuple[Predictions, dict[str, Any]]:
        """Read what `write` wrote. Raises UserError for a damaged file."""
        try:
            table = pq.read_table(file)
        except (OSError, pa.ArrowException):
            raise UserError(f"'{file}' is damaged. Remove it and repeat the command.") from None
        *values, score = (table.column(name).to_numpy() for name in table.column_names)
        facts = json.loads(table.schema.metadata[_FACTS])
        return Predictions(tuple(table.column_names[:-1]), np.column_stack(values), score), facts


@torch.inference_mode()
def predict(model: RankingModel, layout: ModelLayout, calibration: Calibration, parts: Iterable[Rows]) -> Predictions:
    """Predict rows as the model is served: without placement, in fp32.

    Raises:
        UserError: A prediction is not a finite number.
    """
    model.eval()
    names, kinds = [task.name for task in layout.tasks], [task.kind for task in layout.tasks]
    weights, found = [task.score_weight for task in layout.tasks], list[tuple[np.ndarray, np.ndarray]]()
    for rows in parts:
        inputs, _ = model.side_by_side(make_batch(rows.encoded, layout, torchrec=False).to(device_of(model)))
        logits = calibration.apply(model.of_inputs(inputs, None).logits.cpu(), names)
        if not logits.isfinite().all():
            raise UserError("the model gives predictions that are not finite numbers. Lower the learning rates.")
        found.append((predictions(logits, kinds).numpy(), fuse(logits, kinds, weights).numpy()))
    values, score = (np.concatenate(each) for each in zip(*found, strict=True))
    return Predictions(tuple(names), values, score)


@dataclass(frozen=True)
class JudgedRows:
    """N rows with their labels, by which predictions are measured.

    Attributes:
        tasks: The tasks, with what their labels are worth in a ranking.
        columns: Columns user and request, and candidate if the log has candidates.
        labels: Task -> labels, NaN where unobserved. Shape (N,).
        weights: Weights of the rows, None if all count alike. Shape (N,).
    """

    tasks: tuple[MeasuredTask, ...]
    columns: pa.Table
    labels: dict[str, np.ndarray]
    weights: np.ndarray | None

    @staticmethod
    def read(settings: Settings, prepared: FeatureFolder, split: str, part: Part | None = None) -> JudgedRows:
        """Read the rows of a split, or of one part of its users."""
        layout = ModelLayout.of(prepared.layout, settings)
        weighted = settings.training.sampling_correction == "weights"
        no_inputs = replace(layout, tables=(), ids=(), dense=(), attention=())
        rows = EncodedRows(prepared.split(split), no_inputs, part=part)
        columns = ["user", "request", "candidate", *rows.weighing(weighted)]
        return JudgedRows.join(settings, layout, list(rows.stream(ROWS_AT_A_TIME, columns)))

    @staticmethod
    def join(settings: Settings, layout: ModelLayout, parts: Sequence[tuple[Rows, pa.Table]]) -> JudgedRows:
        """Join parts of rows, as `EncodedRows.stream` yields them."""
        tasks = tuple(
            MeasuredTask(task.name, task.kind, settings.tasks[task.name].score_weight) for task in layout.tasks
        )
        labels = np.concatenate([rows.labels for rows, _ in parts])
        table = pa.concat_tables([table for _, table in parts])
        names = ["user", "request", *(["candidate"] if settings.columns.has_candidate else [])]
        by_task = {task.name: labels[:, place] for place, task in enumerate(tasks)}
        return JudgedRows(tasks, table.select(names).combine_chunks(), by_task, weights_of(table))

    def measure(self, predicted: Predictions) -> EvaluationSums:
        """Measure the tasks that the predictions have."""
        columns = {name: self.columns.column(name).combine_chunks() for name in self.columns.column_names}
        values = {name: predicted.values[:, place] for place, name in enumerate(predicted.tasks)}
        return measure(
            [task for task in self.tasks if task.name in values],
            columns["user"],
            columns["request"],
            values,
            {name: self.labels[name] for name in values},
            score=predicted.score,
            weight=self.weights,
            candidates=columns.get("candidate"),
        )
