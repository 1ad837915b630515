"""The served model: a script that MLflow runs to get it (models from code), so that no pickle is written.

A request is `{"inputs": [{"user": {...}, "context": {...}, "candidates": {...}}], "params": {...}}`; each element of
`inputs` gets one ranking. `task_weights` and `top_k` may stand in an element or, for all elements, in `params`; the
element's own win. MLflow drops unknown keys of `params` before the model sees them; in an element they are an error.
"""

from __future__ import annotations

import json
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from pydantic import BaseModel, ConfigDict, ValidationError

from mmoe_rec.serving.envelope import Envelope, explain_envelope
from mmoe_rec.serving.errors import RequestError

ARTIFACT = "model"


class BadRequest(MlflowException):
    """HTTP 400 with one sentence. MLflow would put the whole input, which may be megabytes, in front of it."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, error_code=INVALID_PARAMETER_VALUE)
        self.sentence = sentence

    def serialize_as_json(self) -> str:
        """The body of the reply."""
        return json.dumps({"error_code": self.error_code, "message": self.sentence})


class RankingRequest(BaseModel):
    """What MLflow documents and lets through; `Envelope` checks it, with errors that don't repeat the input."""

    model_config = ConfigDict(extra="allow")

    user: Any = None
    context: Any = None
    candidates: Any = None
    task_weights: Any = None
    top_k: Any = None


class RankingPythonModel(PythonModel):
    """Ranks the candidates of each request."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the artifact folder."""
        from mmoe_rec.serving.ranker import Ranker

        self.ranker = Ranker.load(context.artifacts[ARTIFACT])

    def predict(
        self, context: Any, model_input: list[RankingRequest], params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One ranking a request, see `Ranking`. Raises BadRequest with the sentence for the caller."""
        several = len(model_input) > 1
        replies = []
        for index, each in enumerate(model_input):
            try:
                replies.append(self._rank(each, params or {}))
            except RequestError as error:
                raise BadRequest(f"inputs[{index}]: {error}" if several else str(error)) from None
            except RuntimeError as error:
                raise MlflowException(str(error), error_code=INTERNAL_ERROR) from error
        return replies

    def _rank(self, request: RankingRequest, params: dict[str, Any]) -> dict[str, Any]:
        try:
            envelope = Envelope.model_validate(request.model_dump(exclude_unset=True))
        except ValidationError as error:
            raise RequestError(explain_envelope(error)) from None
        weights = params.get("task_weights") if envelope.task_weights is None else envelope.task_weights
        top_k = params.get("top_k") if envelope.top_k is None else envelope.top_k
        ranking = self.ranker.rank(envelope.user, envelope.context, envelope.candidates, weights, top_k)
        return ranking.to_dict()


mlflow.models.set_model(RankingPythonModel())
