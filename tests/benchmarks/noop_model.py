"""The no-op ranker as MLflow serves it: the same request and reply as `mmoe_rec/inference/mlflow_model.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

from mmoe_rec.inference.mlflow_model import RankingRequest, Reply
from mmoe_rec.inference.reader import read_requests
from tests.benchmarks.noop_ranker import NoopRanker


class NoopPythonModel(PythonModel):
    """Gives back each request's candidates."""

    def load_context(self, context: PythonModelContext) -> None:
        """Reads what replies look like."""
        self.ranker = NoopRanker.like(Path(context.artifacts["model"]))

    def predict(
        self, context: Any, model_input: list[RankingRequest], params: dict[str, Any] | None = None
    ) -> list[Reply]:
        """One reply a request."""
        return [
            each.to_dict()
            for each in self.ranker.rank_many(read_requests([each.given() for each in model_input], params or {}))
        ]


mlflow.models.set_model(NoopPythonModel())
