"""torch-rechub's MMOE in the smallest pyfunc that ranks honestly: raw ids in, candidates with predictions out.

Ids are looked up in dictionaries, a missing column counts as an unknown id, and the model has random weights. There are
no counters, histories or stored attributes, and nothing is checked.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext


class RechubModel(PythonModel):
    """Ranks by the sum of the tasks' log predictions, as ours does without weights."""

    def load_context(self, context: PythonModelContext) -> None:
        """Builds the model as `tests.benchmarks.serving_models.save_rechub` says."""
        about = json.loads(Path(context.artifacts["about"]).read_text(encoding="utf-8"))
        sys.path.append(about["packages"])  # what this environment lacks, which is torch-rechub
        from torch_rechub.basic.features import SparseFeature
        from torch_rechub.models.multi_task import MMOE

        torch.set_num_threads(1)  # as ours
        self.tasks = about["tasks"]
        self.rows = {column: {value: row for row, value in enumerate(ids, 1)} for column, ids in about["ids"].items()}
        self.model = MMOE(
            [SparseFeature(name, vocab_size=len(rows) + 1, embed_dim=about["dim"]) for name, rows in self.rows.items()],
            ["classification"] * len(self.tasks),
            about["experts"],
            expert_params={"dims": about["units"]},
            tower_params_list=[{"dims": about["towers"]} for _ in self.tasks],
        ).eval()

    def predict(
        self, context: Any, model_input: list[dict[str, dict[str, Any]]], params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One ranking a request: user and context (column -> value), candidates (column -> list, ids first)."""
        return [self._ranked(each) for each in model_input]

    def _ranked(self, request: dict[str, dict[str, Any]]) -> dict[str, Any]:
        candidates, shared = request["candidates"], {**request["user"], **request["context"]}
        ids = next(iter(candidates.values()))
        columns = {}
        for name, rows in self.rows.items():
            if name in candidates:
                columns[name] = torch.tensor([rows.get(each, 0) for each in candidates[name]])
            else:
                columns[name] = torch.full((len(ids),), rows.get(shared.get(name), 0))
        with torch.inference_mode():
            predictions = self.model(columns).numpy()
        scores = np.exp(np.log(predictions).sum(1))
        order = np.argsort(-scores, kind="stable")
        return {
            "candidates": [ids[each] for each in order],
            "scores": scores[order].tolist(),
            "predictions": {name: predictions[order, task].tolist() for task, name in enumerate(self.tasks)},
            "order": order.tolist(),
        }


mlflow.models.set_model(RechubModel())
