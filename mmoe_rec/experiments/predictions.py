"""Predictions of the rows that judge variants: computed once for each run, kept in a file, measured from it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmoe_rec.atomic import atomic_file
from mmoe_rec.batches.batch import make_batch
from mmoe_rec.batches.encoded_rows import Rows
from mmoe_rec.devices import device_of
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.summary import PredictedRows
from mmoe_rec.evaluation.sums import EvaluationSums
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import Calibration, fuse, predictions

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

    def measure(self, rows: PredictedRows) -> EvaluationSums:
        """Measure the predicted tasks by the labels of rows."""
        values = {name: self.values[:, place] for place, name in enumerate(self.tasks)}
        tasks = tuple(task for task in rows.tasks if task.name in values)
        labels = {name: rows.labels[name] for name in values}
        return replace(rows, tasks=tasks, predictions=values, labels=labels, score=self.score).sum()


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
