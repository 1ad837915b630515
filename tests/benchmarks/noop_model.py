"""The no-op ranker as MLflow serves it: the same request and reply as `mmoe_rec/inference/mlflow_model.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from mmoe_rec.inference.reader import read_requests
from mmoe_rec.log.given import plain
from tests.benchmarks.noop_ranker import NoopRanker


class NoopPythonModel(PythonModel):
    """Gives back each request's candidates."""

    def load_context(self, context: PythonModelContext) -> None:
        """Reads what replies look like."""
        self.ranker = NoopRanker.like(Path(context.artifacts["model"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """One reply a request."""
        requests = read_requests(plain(model_input), params or {})
        return [each.to_dict() for each in self.ranker.rank_many(requests)]


mlflow.models.set_model(NoopPythonModel())
